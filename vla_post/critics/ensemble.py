"""What an ensemble says as one number, and the slow copy that targets are made from.

K critics, S sampled chunks, B batch. Heads of one network share its trunk, so their disagreement
understates what is unknown; the minimum is a habit that works, not a confidence bound.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Aggregation = Literal["minimum", "mean", "subset", "lower_bound"]
"""`subset`: minimum over `subset` heads drawn anew for each call, as in RLPD (arXiv:2302.02948).
`lower_bound`: mean minus one standard deviation."""


def aggregate(
    q: Float[Tensor, "*batch K"],
    how: Aggregation,
    *,
    subset: int = 2,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    """One value per item from K heads (Eq. A4 with `minimum`)."""
    heads = q.shape[-1]
    if how == "mean":
        return q.mean(dim=-1)
    if how == "lower_bound":
        return q.mean(dim=-1) - q.std(dim=-1, correction=0)
    if how == "subset":
        chosen = torch.randperm(heads, generator=generator)[:subset]
        q = q[..., chosen.to(q.device)]
    return q.amin(dim=-1)


@torch.no_grad()
def polyak_(target: nn.Module, online: nn.Module, rate: float) -> None:
    """target <- rate * online + (1 - rate) * target, in place (Eq. A3)."""
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.lerp_(new, rate)
