"""Real-time chunking (RTC), arXiv 2506.07339: a new chunk continues the one that still runs.

While a policy computes, the robot executes the old chunk; the new one is painted around what is
already decided. Project convention (noise at t = 0, data at t = 1), k rows of overlap, d delay:

    x1 = x + (1 - t) v                    where the flow is heading
    v' = v + min(beta, g) J^T [W (Y - x1)],    g = (t^2 + (1 - t)^2) / (t (1 - t))

Y is the old chunk, zero-padded; W is 1 for the d rows that will have run when the new chunk
arrives, falls over the rest of the overlap and is 0 after it. J = d x1 / d x. The paper (and
Physical Intelligence's code) multiplies with it, at the price of one backward pass a step; lerobot
0.6 detaches the network there, which is J = 1. Both are here, as `form`.

N items, H chunk length, W model's action width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vla_post.policies import prefix

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class RtcConfig:
    form: Literal["identity", "jacobian"] = "identity"
    """J = 1 as in lerobot, or the network's own Jacobian as in the paper."""
    schedule: Literal["exp", "linear"] = "exp"
    """How W falls over the overlap that is not decided yet."""
    max_weight: float = 5.0
    """beta: cap on the guidance, which would be infinite at t = 0."""

    def __post_init__(self) -> None:
        if not self.max_weight > 0:
            raise ValueError(f"max_weight is {self.max_weight}; it must be > 0")


def prefix_weights(
    delay: int, overlap: int, horizon: int, schedule: str = "exp"
) -> Float[Tensor, " H"]:
    """W by row, see `vla_post.policies.prefix`."""
    return torch.from_numpy(prefix.prefix_weights(delay, overlap, horizon, schedule))


def guided(
    velocity: Velocity,
    previous: Float[Tensor, "N H W"],
    weights: Float[Tensor, "H W"],
    config: RtcConfig,
) -> Velocity:
    """The velocity field that leads to chunks that continue `previous`.

    Args:
        velocity: of N items, in the project's convention.
        previous: in network units; what it holds where `weights` is 0 does not matter.
        weights: 0 also in columns that only pad the action.
    """

    def pulled(x: Tensor, time: Tensor) -> Tensor:
        t = time[:, None, None]
        if config.form == "identity":
            v = velocity(x, time)
            pull = weights * (previous - (x + (1.0 - t) * v))
        else:
            with torch.enable_grad():
                free = x.detach().requires_grad_(True)
                v = velocity(free, time)
                x1 = free + (1.0 - t) * v
                error = (weights * (previous - x1)).detach()
                (pull,) = torch.autograd.grad(x1, free, error)
            v = v.detach()
        gain = (t.square() + (1.0 - t).square()) / (t * (1.0 - t))
        return v + gain.clamp(max=config.max_weight) * pull

    return pulled
