"""Equal formulas that export better: used while a graph is traced, never while a policy runs.

lerobot writes rotary embeddings into slices of an empty tensor (one ScatterND each, slow and
unfused), takes inverse square roots where runtimes look for the quotient of the root-mean-square
norm, builds time embeddings in float64, which TensorRT does not have, and copies keys and values to
every query head that shares them. A small policy's graph costs by the node, so fewer are better.
The parity gate holds the rewritten graph against the policy as lerobot runs it.
"""

import math
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def rewritten() -> Generator[None]:
    """Replaces the formulas in those policy modules that are loaded."""
    with ExitStack() as stack:
        for module, attribute, formula in _FORMULAS:
            owner: Any = sys.modules.get(module)
            for name in attribute.split(".")[:-1]:
                owner = getattr(owner, name, None)
            name = attribute.split(".")[-1]
            if hasattr(owner, name):
                stack.enter_context(patch.object(owner, name, formula))
        yield


def _rope(x: Tensor, positions: Tensor, max_wavelength: float = 10_000) -> Tensor:
    """Rotary embedding of x (B, L, heads, D) at positions (B, L): whole heads times tables."""
    half = x.shape[-1] // 2
    exponents = (2.0 / x.shape[-1]) * torch.arange(half, dtype=torch.float32, device=x.device)
    radians = (positions[..., None].to(torch.float32) / max_wavelength**exponents)[..., None, :]
    sin, cos = radians.sin(), radians.cos()
    a, b = x.to(torch.float32).split(half, dim=-1)
    turned = torch.cat([b, a], dim=-1) * torch.cat([-sin, sin], dim=-1)
    return (x.to(torch.float32) * torch.cat([cos, cos], dim=-1) + turned).to(x.dtype)


def _attention(
    self: Any,
    attention_mask: Tensor,
    batch_size: int,
    head_dim: int,
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
) -> Tensor:
    """Query heads that share keys are rows of one product, instead of copies of the keys.

    Queries (B, L, heads, D), keys and values (B, T, kv, D), mask (B, L, T) -> (B, L, heads * D).
    """
    length, shared = query_states.shape[1], key_states.shape[2]
    groups = query_states.shape[2] // shared
    query = query_states.to(torch.float32).unflatten(2, (shared, groups))
    query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, kv, groups * L, D)
    scores = query @ key_states.to(torch.float32).permute(0, 2, 3, 1) * head_dim**-0.5
    mask = attention_mask[:, None].repeat(1, 1, groups, 1)
    scores = torch.where(mask, scores, torch.finfo(torch.float32).min)
    out = scores.softmax(dim=-1).to(value_states.dtype) @ value_states.transpose(1, 2)
    return out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4).flatten(2)


def _self_attention(
    self: Any,
    model_layers: Any,
    inputs_embeds: Any,
    layer_idx: int,
    position_ids: Tensor,
    attention_mask: Tensor,
    batch_size: int,
    head_dim: int,
    use_cache: bool = True,
    past_key_values: Any = None,
) -> tuple[list[Tensor], Any]:
    """One layer over the prefix or over the chunk, which leaves the prefix's keys as they are.

    Joined products and one rotation for queries and keys (`passes.join_products`). lerobot appends
    the chunk's keys to the cache and cuts them off again, after which no two steps look alike.
    """
    ((layers, hidden),) = (
        (layers, hidden)
        for layers, hidden in zip(model_layers, inputs_embeds, strict=True)
        if hidden is not None
    )
    layer = layers[layer_idx]
    own, hidden = layer.self_attn, layer.input_layernorm(hidden)
    parts = [own.q_proj(hidden), own.k_proj(hidden), own.v_proj(hidden)]
    heads = torch.cat(parts, dim=-1).unflatten(-1, (-1, head_dim))
    queries, shared = self.num_attention_heads, self.num_key_value_heads
    turning, value = heads.split([queries + shared, shared], dim=2)
    query, key = _rope(turning, position_ids).split([queries, shared], dim=2)
    if layer_idx >= len(past_key_values.layers):
        past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), layer_idx)
    else:
        prefix = past_key_values.layers[layer_idx]
        key = torch.cat([prefix.keys.transpose(1, 2), key], dim=1)
        value = torch.cat([prefix.values.transpose(1, 2), value], dim=1)
    out = _attention(self, attention_mask, batch_size, head_dim, query, key, value)
    return [out], past_key_values


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Root-mean-square norm in the form that ONNX Runtime and TensorRT fuse into one operator."""
    x = hidden_states.to(torch.float32)
    scale = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (x / scale).to(hidden_states.dtype)


def _time_embedding(
    time: Tensor, dimension: int, min_period: float, max_period: float, device: Any = "cpu"
) -> Tensor:
    """Sine and cosine of flow time: frequencies in float64 as a constant, the rest in float32."""
    fraction = torch.linspace(0.0, 1.0, dimension // 2, dtype=torch.float64, device=device)
    frequency = (2 * math.pi / (min_period * (max_period / min_period) ** fraction)).float()
    angle = frequency[None, :] * time[:, None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


_SMOLVLA = "lerobot.policies.smolvla"
_FORMULAS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (f"{_SMOLVLA}.smolvlm_with_expert", "apply_rope", _rope),
    (
        f"{_SMOLVLA}.smolvlm_with_expert",
        "SmolVLMWithExpertModel.eager_attention_forward",
        _attention,
    ),
    (
        f"{_SMOLVLA}.smolvlm_with_expert",
        "SmolVLMWithExpertModel.forward_attn_layer",
        _self_attention,
    ),
    (f"{_SMOLVLA}.modeling_smolvla", "create_sinusoidal_pos_embedding", _time_embedding),
    ("lerobot.policies.pi0.modeling_pi0", "create_sinusoidal_pos_embedding", _time_embedding),
    ("transformers.models.llama.modeling_llama", "LlamaRMSNorm.forward", _rms_norm),
)
