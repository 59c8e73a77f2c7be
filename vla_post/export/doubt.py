"""Doubt: how much the chunks of an ensemble, or of one policy's samples, disagree.

HG-DAgger, arXiv:1810.02890, Eq. H3-H4 of our specification. n members or samples, H chunk length,
A action size. A hint for the person who may take over; it never takes over by itself. The threshold
is learned after the fact, from the doubts at the moments at which people did take over. Numpy only,
so that a robot needs nothing more.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vla_post.export.runtime import ChunkPolicy, StoredObservation


def chunk_doubt(chunks: Float[np.ndarray, "n H A"], *, steps: int | None = None) -> float:
    """|diag(covariance of the outputs)|, as a mean over the first `steps` of the chunk (H3).

    In the square of the action's unit; 0 for members that agree, and for a single one.

    Args:
        steps: those that will be executed; None means all.
    """
    variance = chunks[:, :steps].astype(np.float64).var(axis=0)
    return float(np.linalg.norm(variance, axis=-1).mean())


def sample_chunks(
    policy: ChunkPolicy,
    observation: StoredObservation,
    instruction: str,
    *,
    samples: int,
    seed: int = 0,
) -> Float[np.ndarray, "n H A"]:
    """What the policy might do at one observation, n times, in a single batch."""
    batch = {key: np.repeat(value[None], samples, axis=0) for key, value in observation.items()}
    return policy.act_batch(batch, [instruction] * samples, seed + np.arange(samples))


def policy_doubt(
    policy: ChunkPolicy,
    observation: StoredObservation,
    instruction: str,
    *,
    samples: int = 4,
    steps: int | None = None,
    seed: int = 0,
) -> float:
    """Doubt of one policy from several samples at one observation, in a single batch.

    A policy without noise (ACT) has none; ask an ensemble of versions instead.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}; doubt needs at least 2")
    chunks = sample_chunks(policy, observation, instruction, samples=samples, seed=seed)
    return chunk_doubt(chunks, steps=steps)


def ensemble_doubt(
    policies: Sequence[ChunkPolicy],
    observation: StoredObservation,
    instruction: str,
    *,
    steps: int | None = None,
    seed: int = 0,
) -> float:
    """Doubt of several policies at one observation, all with the same noise."""
    chunks = np.stack([policy.act(observation, instruction, seed) for policy in policies])
    return chunk_doubt(chunks, steps=steps)


class DoubtMeter:
    """Learns from takeovers what doubt is too much."""

    def __init__(self, takeovers: Sequence[float] = ()) -> None:
        self.takeovers = list(takeovers)
        """Doubt at each takeover, in the order in which they happened."""

    def took_over(self, doubt: float) -> None:
        self.takeovers.append(float(doubt))

    @property
    def threshold(self) -> float | None:
        """Mean of the last quarter of the doubts at takeovers (H4); None before the first.

        Later ones count because the policy has become better by then.
        """
        if not self.takeovers:
            return None
        last = self.takeovers[-max(1, len(self.takeovers) // 4) :]
        return float(np.mean(last))

    def hint(self, doubt: float) -> bool:
        """Whether to tell the operator: more doubt than people used to let pass."""
        return self.threshold is not None and doubt > self.threshold
