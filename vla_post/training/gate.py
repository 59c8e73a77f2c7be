"""Is a version better than the one that runs? The learner's critic values both, before adoption.

B batch, S sampled chunks, H chunk length, W width of the noise.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vla_post.batch import Batch, Policy
from vla_post.export.registry import SCORES

SAMPLES = 4
"""S: chunks of each policy per observation, from equal noise for both."""


@runtime_checkable
class Judge(Protocol):
    """A learner whose critic can value somebody's policy."""

    def judge(
        self, policy: Policy, batch: Batch, noise: Float[Tensor, "B S H W"]
    ) -> Float[Tensor, " B"]:
        """Estimated value of what the policy would do at each observation."""
        ...


class NoJudge(ValueError):
    """A gate was asked for and the algorithm has no critic; the message says what has."""


def require_judge(learner: object) -> Judge:
    """Raises NoJudge unless the learner can value a policy."""
    if not isinstance(learner, Judge):
        raise NoJudge(
            f"{type(learner).__name__} has no critic, so it cannot tell whether a version is "
            "better: train with aloe or uni-o4, or leave out the gate (--gate-margin)"
        )
    return learner


@torch.no_grad()
def compare(
    judge: Judge, candidate: Any, running: Any, batches: Sequence[Batch], *, against: int
) -> dict[str, float]:
    """Mean values of both on the same observations with the same noise, as `SCORES`.

    Args:
        candidate, running: policies with `horizon` and `noise_size`.
        against: number of the version that runs.
    """
    generator = torch.Generator().manual_seed(0)
    totals = [0.0, 0.0]
    for batch in batches:
        shape = (len(batch), SAMPLES, candidate.horizon, candidate.noise_size)
        noise = torch.randn(shape, generator=generator).to(batch.action.device)
        for place, policy in enumerate((candidate, running)):
            totals[place] += float(judge.judge(policy, batch, noise).mean()) / len(batches)
    return dict(zip(SCORES, (*totals, float(against)), strict=True))
