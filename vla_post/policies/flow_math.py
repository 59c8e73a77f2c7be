"""Flow matching in the project's convention: noise at t = 0, data at t = 1.

N items, H chunk length, W action width. x = (1 - t) * noise + t * data, velocity = data - noise.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def interpolate(
    noise: Float[Tensor, "N H W"], data: Float[Tensor, "N H W"], time: Float[Tensor, " N"]
) -> Float[Tensor, "N H W"]:
    """The point at `time` on the straight line from noise to data."""
    t = time[:, None, None]
    return (1.0 - t) * noise + t * data


def target_velocity(
    noise: Float[Tensor, "N H W"], data: Float[Tensor, "N H W"]
) -> Float[Tensor, "N H W"]:
    """What the network learns to predict."""
    return data - noise


def flow_loss(
    velocity: Float[Tensor, "N H W"],
    target: Float[Tensor, "N H W"],
    valid: Bool[Tensor, "N H"],
) -> Float[Tensor, " N"]:
    """Mean squared error of each item over its valid steps; 0 for an item without any."""
    # `where` and not a product: a padded step may hold anything, and NaN times 0 is NaN.
    error = torch.where(valid[..., None], velocity - target, 0.0).square()
    steps = valid.sum(dim=1).clamp(min=1)
    return error.sum(dim=(1, 2)) / (steps * target.shape[-1])


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Float[Tensor, "N H W"], steps: int
) -> Float[Tensor, "N H W"]:
    """Integrates dx/dt = velocity(x, t) from t = 0 to 1 in equal steps."""
    x = noise
    for step in range(steps):
        # `len(x)` would make the batch size a constant of an exported graph.
        time = torch.full_like(x[:, 0, 0], step / steps)
        x = x + velocity(x, time) / steps
    return x


def to_lerobot(
    time: Float[Tensor, " N"], velocity: Float[Tensor, "N H W"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N H W"]]:
    """Time and velocity in lerobot's convention (noise at 1, noise - data); its own inverse."""
    return 1.0 - time, -velocity
