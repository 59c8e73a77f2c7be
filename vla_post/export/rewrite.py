"""Equal formulas that export better: used while a graph is traced, never while a policy runs.

lerobot writes rotary embeddings into slices of an empty tensor (one ScatterND each, slow and
unfused), takes inverse square roots where runtimes look for the quotient of the root-mean-square
norm, and builds time embeddings in float64, which TensorRT does not have. The parity gate holds the
rewritten graph against the policy as lerobot runs it.
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
    """Rotary embedding of x (B, L, heads, D) at positions (B, L), joined instead of written."""
    half = x.shape[-1] // 2
    exponents = (2.0 / x.shape[-1]) * torch.arange(half, dtype=torch.float32, device=x.device)
    radians = positions[..., None].to(torch.float32) / max_wavelength**exponents
    sin, cos = radians.sin()[..., None, :], radians.cos()[..., None, :]
    a, b = x.to(torch.float32).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


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
_FORMULAS: tuple[tuple[str, str, Callable[..., Tensor]], ...] = (
    (f"{_SMOLVLA}.smolvlm_with_expert", "apply_rope", _rope),
    (f"{_SMOLVLA}.modeling_smolvla", "create_sinusoidal_pos_embedding", _time_embedding),
    ("lerobot.policies.pi0.modeling_pi0", "create_sinusoidal_pos_embedding", _time_embedding),
    ("transformers.models.llama.modeling_llama", "LlamaRMSNorm.forward", _rms_norm),
)
