"""May this version move a robot? What a candidate must show before a runner adopts it.

The registry checks files; this checks behaviour on observations that the cell really made.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float

from trajectory_store.contract import ActionFeature


class AdoptionRefused(ValueError):
    """The candidate's actions are unfit to be sent to the robot; the message says why."""


class Acts(Protocol):
    """The part of a policy that the check needs (see `vla_post.export.runtime.ChunkPolicy`)."""

    def act(
        self, observation: Mapping[str, np.ndarray], instruction: str, seed: int = 0
    ) -> Float[np.ndarray, "H A"]: ...


def require_fit(
    candidate: Acts,
    probes: Sequence[tuple[Mapping[str, np.ndarray], str]],
    action: ActionFeature,
    *,
    running: Acts | None = None,
    max_jump: float | None = None,
    tolerance: float = 0.25,
) -> None:
    """Asks the candidate for a chunk on each probe and refuses what no robot should be sent.

    Args:
        probes: (observation without batch axis, instruction) pairs.
        running: the version in use; with it and `max_jump`, the first action of the candidate may
            differ from the running version's by at most `max_jump` of each joint's range, on
            average over the probes.
        tolerance: how far outside the position limits an action may lie, as a share of the joint's
            range; the arbiter clamps the rest. Far outside means a broken normalisation.

    Raises:
        AdoptionRefused: wrong shape, not finite, outside limits, or jumping.
    """
    low, high = np.asarray(action.limits.position, np.float64).T
    span = high - low
    jumps: list[np.ndarray] = []
    for number, (observation, instruction) in enumerate(probes):
        chunk = np.asarray(candidate.act(observation, instruction, seed=number), np.float64)
        if chunk.ndim != 2 or chunk.shape[1] != action.size:
            raise AdoptionRefused(
                f"probe {number}: chunk of shape {chunk.shape}; expected (H, {action.size})"
            )
        if not np.isfinite(chunk).all():
            raise AdoptionRefused(f"probe {number}: the chunk holds NaN or infinity")
        outside = np.maximum(low - chunk, chunk - high).max(axis=0) / span
        if (outside > tolerance).any():
            joint = int(outside.argmax())
            raise AdoptionRefused(
                f"probe {number}: {action.names[joint]} reaches "
                f"{outside[joint]:.0%} of its range beyond its limits; at most {tolerance:.0%} "
                "is clamped. Is the policy's normalisation that of this cell?"
            )
        if running is not None and max_jump is not None:
            before = np.asarray(running.act(observation, instruction, seed=number), np.float64)
            jumps.append(np.abs(chunk[0] - before[0]) / span)
    if jumps and max_jump is not None:
        mean = np.mean(jumps, axis=0)
        if (mean > max_jump).any():
            joint = int(mean.argmax())
            raise AdoptionRefused(
                f"{action.names[joint]} would jump by {mean[joint]:.0%} of its range from the "
                f"running version; the bound is {max_jump:.0%}"
            )
