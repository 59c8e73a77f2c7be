"""Weights of steps by who drove: IWR and Sirius, Eq. H5-H7 of our specification.

IWR is arXiv:2012.06733, Sirius arXiv:2211.08416. C classes, B batch, H chunk length. A weight is
P*(c) / P(c), the desired share of a class over its share of what is drawn, so that the classes have
the desired shares of the loss whatever the mixture is. Differs from the papers: P is measured on
the batches, as a moving average, because here a mixture with a floor for demonstrations decides
what is drawn.
"""

from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from trajectory_store import Source
from vla_post import parallel


class Segment(IntEnum):
    """What a step says about the policy."""

    DEMONSTRATION = 0
    ROBOT = 1
    INTERVENTION = 2
    PRE_INTERVENTION = 3
    """The robot drove, and a person took over a moment later."""


def segments(
    source: Integer[Tensor, "B H"],
    demonstration: Bool[Tensor, " B"],
    to_takeover: Integer[Tensor, "B H"],
    *,
    window: int,
) -> Integer[Tensor, "B H"]:
    """`Segment` of each step.

    Args:
        demonstration: items of the demonstrations' stores; a person may have driven there too.
        to_takeover: steps until a person takes over, huge where nobody does or a person drives.
        window: steps before a takeover that count as pre-intervention.
    """
    segment = torch.full_like(source, Segment.ROBOT, dtype=torch.int64)
    segment[to_takeover <= window] = Segment.PRE_INTERVENTION
    segment[source == int(Source.HUMAN)] = Segment.INTERVENTION
    segment[source == int(Source.SCRIPTED)] = Segment.DEMONSTRATION
    segment[demonstration] = Segment.DEMONSTRATION
    return segment


def iwr_target(share: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """Half interventions; the rest shares the other half as it occurs (H5)."""
    target = share * (0.5 / (1.0 - share[Segment.INTERVENTION]).clamp(min=1e-6))
    target[Segment.INTERVENTION] = 0.5
    return target


def sirius_target(share: Float[Tensor, " C"], pre: float = 0.002) -> Float[Tensor, " C"]:
    """Interventions 0.5, the moments before them `pre`, demonstrations as they occur, the robot's
    own steps what is left (H7).

    The paper needs fewer than 0.498 demonstrations; beyond, they keep that much here and the
    robot's own steps carry nothing.
    """
    target = torch.zeros_like(share)
    target[Segment.INTERVENTION], target[Segment.PRE_INTERVENTION] = 0.5, pre
    target[Segment.DEMONSTRATION] = share[Segment.DEMONSTRATION].clamp(max=0.5 - pre)
    target[Segment.ROBOT] = 0.5 - pre - target[Segment.DEMONSTRATION]
    return target


def class_weights(share: Float[Tensor, " C"], target: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """P*(c) / P(c) (H6). An absent class has weight 0, and what it should have had goes to the
    others in proportion, so that the shares times the weights always sum to 1."""
    present = share > 0
    wanted = torch.where(present, target, 0.0)
    wanted = wanted / wanted.sum().clamp(min=1e-12)
    return torch.where(present, wanted / share.clamp(min=1e-12), 0.0)


class RunningShares:
    """Share of each class in what is drawn: a moving average of counts, right from the first."""

    def __init__(self, classes: int = len(Segment), keep: float = 0.99) -> None:
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.keep = keep

    def update(self, classes: Integer[Tensor, " N"]) -> Float[Tensor, " C"]:
        """Counts the classes of a batch, and returns the shares."""
        new = torch.bincount(classes.cpu(), minlength=len(self.counts)).double()
        new = parallel.total(new)
        self.counts = self.keep * self.counts + new
        return (self.counts / self.counts.sum().clamp(min=1e-12)).float()

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]
