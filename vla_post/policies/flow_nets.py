"""Networks of `chunk_flow`: eyes, and two heads that predict the velocity of a chunk.

N items, H chunk length, A action size, C context size, T context tokens, D width.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Encoded(NamedTuple):
    """An observation, encoded once for all samples, times and steps."""

    summary: Float[Tensor, "B F"]
    """What critics and scorers see."""
    memory: Tensor
    """What the head reads: (B, C), or the keys and values of each layer (B, layers, T, 2 D)."""


class Eye(nn.Module):
    """One camera: three strided convolutions, a grid of D features an eighth of the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (3, 32, 64, width)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(8, after),
                nn.GELU(),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D s s"]:
        return self.layers(2.0 * image - 1.0)


def keypoints(grid: Float[Tensor, "B D s s"]) -> Float[Tensor, "B K"]:
    """Where each feature is brightest, in [-1, 1] (spatial softmax, arXiv:1509.06113); K = 2 D."""
    size = grid.shape[-1]
    place = torch.linspace(-1.0, 1.0, size, device=grid.device, dtype=grid.dtype)
    bright = grid.flatten(2).softmax(dim=-1).unflatten(2, (size, size))
    rows = (bright.sum(dim=3) * place).sum(dim=2)
    columns = (bright.sum(dim=2) * place).sum(dim=2)
    return torch.cat([rows, columns], dim=1)


class Waves(nn.Module):
    """Flow time as sines and cosines."""

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(frequencies // 2) / 2.0)
        self.size = 2 * (frequencies // 2)

    def forward(self, time: Float[Tensor, " N"]) -> Float[Tensor, "N W"]:
        angle = time[:, None] * self.get_buffer("frequencies")
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class MlpHead(nn.Module):
    """A residual MLP over context, flattened chunk and time."""

    def __init__(self, context: int, chunk: int, width: int, layers: int, frequencies: int) -> None:
        super().__init__()
        # A buffer of this class and not of `Waves`: older checkpoints name it so.
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(frequencies // 2) / 2.0)
        inputs = context + chunk + 2 * len(self.get_buffer("frequencies"))
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(layers)
        )
        self.out = nn.Linear(width, chunk)

    def forward(
        self,
        memory: Float[Tensor, "N C"],
        x: Float[Tensor, "N H A"],
        time: Float[Tensor, " N"],
    ) -> Float[Tensor, "N H A"]:
        angle = time[:, None] * self.get_buffer("frequencies")
        joined = torch.cat([memory, x.flatten(1), angle.sin(), angle.cos()], dim=1)
        hidden = nn.functional.gelu(self.embed(joined))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.out(hidden).view_as(x)


class TransformerHead(nn.Module):
    """Action tokens attend to each other and to the context tokens, both ways, in each layer."""

    def __init__(
        self, horizon: int, action: int, width: int, layers: int, heads: int, frequencies: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(action, width)
        self.position = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.waves = Waves(frequencies)
        self.time = nn.Sequential(
            nn.Linear(self.waves.size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, action)

    def remember(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B layers T DD"]:
        """Keys and values of the context for every layer, which no noise and no time changes."""
        layers: Any = self.layers
        return torch.stack([layer.memory(tokens) for layer in layers], dim=1)

    def forward(
        self,
        memory: Float[Tensor, "N layers T DD"],
        x: Float[Tensor, "N H A"],
        time: Float[Tensor, " N"],
    ) -> Float[Tensor, "N H A"]:
        hidden = self.embed(x) + self.position + self.time(self.waves(time))[:, None]
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, memory[:, number])
        return self.out(self.norm(hidden))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_self, self.norm_memory = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_cross, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_self, self.out_cross = nn.Linear(width, width), nn.Linear(width, width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def memory(self, tokens: Tensor) -> Tensor:
        return self.key_value(self.norm_memory(tokens))

    def forward(self, hidden: Tensor, memory: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm_self(hidden)).chunk(3, dim=-1)
        hidden = hidden + self.out_self(self._attend(query, key, value))
        query = self.query(self.norm_cross(hidden))
        hidden = hidden + self.out_cross(self._attend(query, *memory.chunk(2, dim=-1)))
        return hidden + self.mlp(self.norm_mlp(hidden))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)
