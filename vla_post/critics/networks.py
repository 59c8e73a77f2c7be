"""Networks that value chunks and observations; every ensemble is one batched matrix product.

B batch, n chunks per observation, h chunk length of the critic, A action size, M feature tokens of
size F, P proprioception, K heads, W width. Two trunks:

- `transformer`: feature tokens, a proprioception token, h action tokens and learned read-out tokens
  through one encoder that all heads share; for images and language.
- `mlp`: K networks of their own over everything joined; for states, where it learns faster and its
  disagreement means more.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_post.critics.bins import Bins


@dataclass(frozen=True, kw_only=True)
class CriticInput:
    """What a critic knows of an observation; made by an `Encoder`."""

    features: Float[Tensor, "B M F"]
    proprioception: Float[Tensor, "B P"]

    @property
    def flat(self) -> Float[Tensor, "B MF_P"]:
        return torch.cat([self.features.flatten(1), self.proprioception], dim=1)


@dataclass(frozen=True, kw_only=True)
class InputSize:
    """Sizes of a `CriticInput`."""

    tokens: int
    features: int
    proprioception: int

    @property
    def flat(self) -> int:
        return self.tokens * self.features + self.proprioception


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    trunk: Literal["mlp", "transformer"] = "mlp"
    heads: int = 4
    """K."""
    width: int = 128
    layers: int = 2
    """Hidden layers of each MLP, or blocks of the transformer."""
    attention_heads: int = 4
    readouts: int = 4
    """Learned tokens of the transformer, which the heads read."""
    layer_norm: bool = True
    """After each linear layer of an MLP; keeps values bounded where there is no data
    (arXiv:2302.02948). A transformer always has it."""
    output: Literal["scalar", "two_hot", "hl_gauss"] = "scalar"
    """Squared error on one number, or cross-entropy on `bins` of them."""
    bins: int = 101

    def __post_init__(self) -> None:
        for name in ("heads", "width", "layers", "attention_heads", "readouts"):
            if getattr(self, name) < 1:
                raise ValueError(f"critic: {name} is {getattr(self, name)}; it must be at least 1")
        if self.trunk == "transformer" and self.width % self.attention_heads:
            raise ValueError(
                f"critic: width {self.width} does not divide into {self.attention_heads} heads"
            )


class EnsembleLinear(nn.Module):
    """K linear layers as one batched product: (K, N, in) -> (K, N, out)."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "K N I"]) -> Float[Tensor, "K N O"]:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleNorm(nn.Module):
    """Layer normalisation whose scale and shift each member learns for itself."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(members, 1, width))
        self.shift = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Float[Tensor, "K N W"]) -> Float[Tensor, "K N W"]:
        return nn.functional.layer_norm(x, x.shape[-1:]) * self.scale + self.shift


class EnsembleMlp(nn.Module):
    """K separate MLPs over the same inputs: (N, in) -> (N, K, out)."""

    def __init__(
        self,
        members: int,
        inputs: int,
        outputs: int,
        width: int,
        layers: int,
        layer_norm: bool,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.members = members
        blocks: list[nn.Module] = []
        for layer in range(layers):
            blocks.append(EnsembleLinear(members, inputs if layer == 0 else width, width))
            if layer_norm:
                blocks.append(EnsembleNorm(members, width))
            blocks.append(activation())
        blocks.append(EnsembleLinear(members, width if layers else inputs, outputs))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N K O"]:
        return self.blocks(x.expand(self.members, *x.shape)).transpose(0, 1)


class ReadoutTransformer(nn.Module):
    """Tokens in, the read-out tokens' final states out: (N, R * W)."""

    def __init__(self, config: CriticConfig) -> None:
        super().__init__()
        self.readouts = nn.Parameter(torch.randn(config.readouts, config.width) * 0.02)
        block = nn.TransformerEncoderLayer(
            config.width,
            config.attention_heads,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(block, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Float[Tensor, "N T W"]) -> Float[Tensor, "N RW"]:
        count = len(self.readouts)
        readouts = self.readouts.expand(len(tokens), -1, -1)
        hidden = self.encoder(torch.cat([readouts, tokens], dim=1))
        return self.norm(hidden[:, :count]).flatten(1)


class ChunkCritic(nn.Module):
    """Q_j(s, a_{t:t+h}) of K heads, in the unit of the return.

    Args:
        chunk: h; longer chunks are cut to it.
        action_mean, action_std: (A,), of the training data; the network sees normalised commands.
        bins: range of the returns for a categorical `output`.
    """

    def __init__(
        self,
        config: CriticConfig,
        inputs: InputSize,
        *,
        chunk: int,
        action_mean: Float[Tensor, " A"],
        action_std: Float[Tensor, " A"],
        bins: Bins | None = None,
    ) -> None:
        super().__init__()
        if (config.output == "scalar") != (bins is None):
            raise ValueError(f"output {config.output!r} and bins {bins}: give bins to that alone")
        self.config, self.chunk, self.bins = config, chunk, bins
        self.card: dict[str, str] = {}
        """Metadata for the file of its weights; see `saved`."""
        self.register_buffer("action_mean", action_mean.float())
        self.register_buffer("action_std", action_std.float())
        size, outputs = len(action_mean), 1 if bins is None else bins.count
        if config.trunk == "mlp":
            self.members = EnsembleMlp(
                config.heads,
                inputs.flat + chunk * size,
                outputs,
                config.width,
                config.layers,
                config.layer_norm,
            )
        else:
            self.feature_token = nn.Linear(inputs.features, config.width)
            self.state_token = nn.Linear(inputs.proprioception, config.width)
            self.action_token = nn.Linear(size, config.width)
            places = inputs.tokens + 1 + chunk
            self.place = nn.Parameter(torch.randn(places, config.width) * 0.02)
            self.trunk = ReadoutTransformer(config)
            self.members = EnsembleMlp(
                config.heads, config.readouts * config.width, outputs, config.width, 1, True
            )

    def forward(self, seen: CriticInput, chunk: Float[Tensor, "B n H A"]) -> Float[Tensor, "B n K"]:
        """Value of n chunks at each observation."""
        out = self.outputs(seen, chunk)
        return out.squeeze(-1) if self.bins is None else self.bins.mean(out)

    def outputs(
        self, seen: CriticInput, chunk: Float[Tensor, "B n H A"]
    ) -> Float[Tensor, "B n K O"]:
        """What the heads say: one number, or logits over bins."""
        size, n = chunk.shape[:2]
        mean, std = self.get_buffer("action_mean"), self.get_buffer("action_std")
        action = (chunk[:, :, : self.chunk] - mean) / std
        if self.config.trunk == "mlp":
            state = seen.flat[:, None].expand(-1, n, -1)
            out = self.members(torch.cat([state, action.flatten(2)], dim=2).flatten(0, 1))
        else:
            state = [
                self.feature_token(seen.features),
                self.state_token(seen.proprioception)[:, None],
            ]
            tokens = torch.cat(state, dim=1)[:, None].expand(-1, n, -1, -1)
            tokens = torch.cat([tokens, self.action_token(action)], dim=2) + self.place
            out = self.members(self.trunk(tokens.flatten(0, 1)))
        return out.unflatten(0, (size, n))

    def loss(
        self,
        seen: CriticInput,
        chunk: Float[Tensor, "B H A"],
        target: Float[Tensor, " B"],
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B K"]]:
        """Loss of each item, summed over the heads (Eq. A2), and the values; one target for all."""
        out = self.outputs(seen, chunk[:, None])[:, 0]
        aim = target[:, None].expand(-1, out.shape[1])
        if self.bins is None:
            q = out.squeeze(-1)
            return (q - aim).square().sum(dim=1), q.detach()
        return self.bins.loss(out, aim).sum(dim=1), self.bins.mean(out).detach()


class ValueNet(nn.Module):
    """V(s), as one number or as a distribution over returns.

    One class for the distributional value of AWR (256 bins), that of RECAP (201 bins over [-1, 0])
    and the expectile value of IQL (`bins` None).
    """

    def __init__(
        self, inputs: InputSize, bins: Bins | None, *, width: int = 128, layers: int = 2
    ) -> None:
        super().__init__()
        self.bins = bins
        self.card: dict[str, str] = {}
        """What its learner wants to be stored with the weights."""
        outputs = 1 if bins is None else bins.count
        self.net = EnsembleMlp(1, inputs.flat, outputs, width, layers, True)

    def forward(self, seen: CriticInput) -> Float[Tensor, " B"]:
        out = self.net(seen.flat)[:, 0]
        return out.squeeze(-1) if self.bins is None else self.bins.mean(out)

    def loss(self, seen: CriticInput, target: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Cross-entropy to the target's bin, or the squared error."""
        out = self.net(seen.flat)[:, 0]
        if self.bins is None:
            return (out.squeeze(-1) - target).square()
        return self.bins.loss(out, target)


def expectile_loss(difference: Float[Tensor, " B"], tau: float) -> Float[Tensor, " B"]:
    """|tau - 1(u < 0)| u**2 with u = target - value: the value loss of IQL (arXiv:2110.06169)."""
    weight = torch.where(difference < 0, 1.0 - tau, tau)
    return weight * difference.square()
