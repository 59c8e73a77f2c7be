"""How the next chunk joins the one that the robot executes while the policy computes.

Rows are ticks: row i of a chunk is the command of the tick at stamp + i * dt. A policy that can
continue a chunk gets the rows that are still to come and how many of them will have run when its
answer arrives (real-time chunking); the chunk of any other policy is blended over the overlap.

H chunk length, A action size, k rows of overlap.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robot_bridge.core.latency import Latency
from trajectory_store.contract import Contract

if TYPE_CHECKING:
    from vla_post.export.runtime import ChunkPolicy

Rows = NDArray[np.float64]


class Seam:
    """Remembers what was sent and how long an inference takes, in ticks of the cell's own time.

    Args:
        dt_ns: control period.
        lockstep: time stands still during inference, so nothing runs meanwhile.
    """

    def __init__(self, dt_ns: int, *, lockstep: bool = False) -> None:
        self._dt_ns = dt_ns
        self._lockstep = lockstep
        self._sent: deque[tuple[int, Rows]] = deque(maxlen=1)
        self._ticks = Latency(window=64)

    def sent(self, stamp_ns: int, rows: Rows, now_ns: int) -> None:
        """A chunk left for the arbiter.

        Args:
            now_ns: the cell's time when it left; the observation was taken at `stamp_ns`.
        """
        self._sent.append((stamp_ns, rows))
        # The tick after `now` may be under way already: its row is as good as executed.
        self._ticks.add(max(0, now_ns - stamp_ns) // self._dt_ns + 1)

    def forget(self) -> None:
        """The robot stopped following: the next chunk starts afresh."""
        self._sent.clear()

    def restart_latency(self) -> None:
        """Another policy: the warm-up counts anew."""
        self._ticks = Latency(window=64)

    def previous(self, tick_ns: int, fresh_ns: int) -> Rows | None:
        """(k, A): what the running chunk still has for this tick and later; None if nothing.

        Args:
            fresh_ns: chunks of observations before this moment are not followed any more.
        """
        if not self._sent or self._sent[0][0] < fresh_ns:
            return None
        stamp, rows = self._sent[0]
        consumed = (tick_ns - stamp + self._dt_ns // 2) // self._dt_ns
        return rows[consumed:] if 0 <= consumed < len(rows) else None

    @property
    def delay(self) -> int:
        """Rows that will have run when the next chunk arrives: the slow end of what was seen."""
        if self._lockstep:
            return 0
        slow = self._ticks.quantile(0.95)
        return 1 if slow is None else int(np.ceil(slow))


def blend(previous: Rows, chunk: Rows, delay: int) -> Rows:
    """(H, A): the old rows while they run anyway, then over the overlap from old to new.

    Args:
        previous: (k, A), k <= H.
        chunk: (H, A), from the same tick on.
    """
    overlap = len(previous)
    delay = min(delay, overlap)
    row = np.arange(overlap)
    weight = np.clip((overlap - row) / (overlap - delay + 1), 0.0, 1.0)
    weight = np.where(row < delay, 1.0, weight)[:, None]
    out = chunk.copy()
    out[:overlap] = weight * previous + (1.0 - weight) * chunk[:overlap]
    return out


@dataclass(frozen=True)
class Question:
    """One inference."""

    stamp_ns: int
    """Of the observation."""
    observation: Mapping[str, NDArray[Any]]
    instruction: str
    seed: int
    previous: Rows | None = None
    """(k, A): the rest of the running chunk; None to start afresh."""
    delay: int = 0


def ask(policy: "ChunkPolicy", question: Question, contract: Contract, *, guide: bool) -> Rows:
    """(H, A) in float64: the policy's chunk, checked, and joined to the running one.

    Args:
        guide: let a policy that can do so continue the running chunk itself; else blend.

    Raises:
        ValueError: wrong shape, or not finite.
        Exception: whatever the policy raises.
    """
    q, previous = question, question.previous
    if previous is not None and guide and policy.takes_previous:
        answer = policy.act(q.observation, q.instruction, q.seed, previous=previous, delay=q.delay)
        previous = None
    else:
        answer = policy.act(q.observation, q.instruction, q.seed)
    chunk = np.asarray(answer)
    wanted = (contract.chunk_horizon, contract.action.size)
    if chunk.shape != wanted:
        raise ValueError(f"it returned a chunk of shape {chunk.shape}; expected {wanted}")
    if not np.isfinite(chunk).all():
        raise ValueError("it returned NaN or infinity")
    chunk = chunk.astype(np.float64)
    return chunk if previous is None else blend(previous, chunk, q.delay)
