"""From messages to rows: one `trajectory_store.Tick` for each tick that the arbiter executed.

A row waits until every stream has said what it has to say about its tick, at most `grace_s`; rows
leave in order. Recorded is what was sent, with both proposals beside it.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robot_bridge.core.align import CLOCK_JUMP_NS, Aligner
from robot_bridge.core.chunks import Chunk
from trajectory_store.contract import Contract
from trajectory_store.schema import Source, Tick

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Executed:
    stamp_ns: int
    command: Vector
    label: str
    mono_s: float


@dataclass(frozen=True)
class Ending:
    """How an episode ended, for its last row."""

    stamp_ns: int
    outcome: str
    truncated: bool = False
    reason: str = ""


@dataclass(frozen=True)
class RateCheck:
    """One stream over an episode."""

    key: str
    rate_hz: float
    min_rate_hz: float
    received: int
    lost: int

    @property
    def good(self) -> bool:
        return self.rate_hz >= self.min_rate_hz

    def __str__(self) -> str:
        return (
            f"{self.key}: {self.rate_hz:.1f} Hz, the contract asks for {self.min_rate_hz:g} Hz "
            f"({self.received} received, {self.lost} lost)"
        )


class EpisodeAssembler:
    """Collects one episode at a time.

    Streams, chunks and human commands may arrive before `begin` and keep a short memory, because
    topics are not ordered among each other. For the same reason a row is held back for
    `hold_back_s`: ticks that were executed after the stamp of the end are not part of the episode,
    although they may be known before the end is.
    """

    def __init__(
        self, contract: Contract, *, grace_s: float = 0.25, hold_back_s: float = 0.3
    ) -> None:
        self.contract = contract
        self.grace_s = grace_s
        self.hold_back_s = hold_back_s
        self._aligner = Aligner(contract, capacity=4096)
        self._executed: deque[Executed] = deque()
        self._chunks: deque[Chunk] = deque(maxlen=64)
        self._human: deque[tuple[int, Vector]] = deque(maxlen=1024)
        self._start_ns: int | None = None
        self._ending: Ending | None = None
        self._ending_mono_s = 0.0
        self._heard_mono_s = 0.0
        self._previous: Tick | None = None
        self._last_row_ns = -1
        self._dropped: set[str] = set()
        self._received = dict.fromkeys(contract.observations, 0)
        self._lost = dict.fromkeys(contract.observations, 0)
        self.rows = 0

    # What arrives

    def push(self, key: str, stamp_ns: int, value: Any) -> None:
        """A sample of an observation feature: vector (D,), encoded bytes or an image array."""
        self._aligner.push(key, stamp_ns, value)
        if self._start_ns is not None and stamp_ns >= self._start_ns:
            self._received[key] += 1

    def lost(self, key: str, count: int) -> None:
        """Messages of a feature that never arrived, by their sequence numbers."""
        if self._start_ns is not None and count:
            self._lost[key] += count
            self._dropped.add(key)

    def chunk(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)

    def human(self, stamp_ns: int, command: Vector) -> None:
        self._human.append((stamp_ns, command))

    def executed(self, stamp_ns: int, command: Vector, label: str, mono_s: float) -> None:
        self._heard_mono_s = mono_s
        if self._executed and stamp_ns <= self._executed[-1].stamp_ns:
            back_ns = self._executed[-1].stamp_ns - stamp_ns
            if back_ns < CLOCK_JUMP_NS or self._start_ns is not None:
                return  # a tick that the arbiter said again, or an episode that is being aborted
            self._executed.clear()
            self._chunks.clear()
            self._human.clear()
            self._aligner.clear()
        self._executed.append(Executed(stamp_ns, command, label, mono_s))
        if self._start_ns is None and len(self._executed) > 512:
            self._executed.popleft()

    def begin(self, start_ns: int) -> None:
        self._start_ns, self._ending, self._previous = start_ns, None, None
        self.rows = 0
        self._last_row_ns = -1
        self._dropped.clear()
        self._received = dict.fromkeys(self._received, 0)
        self._lost = dict.fromkeys(self._lost, 0)
        for key, ring in self._aligner.rings.items():
            self._received[key] = ring.count_since(start_ns)

    def end(self, ending: Ending, mono_s: float) -> None:
        self._ending, self._ending_mono_s = ending, mono_s

    @property
    def ending(self) -> bool:
        """`end` was called and `finish` not yet."""
        return self._ending is not None

    @property
    def problems(self) -> list[str]:
        """Why an episode that was interrupted was."""
        ending = self._ending
        if ending is None or ending.outcome != "interrupted" or not ending.reason:
            return []
        return [ending.reason]

    @property
    def outcome(self) -> str:
        return "" if self._ending is None else self._ending.outcome

    # What leaves

    def rows_ready(self, mono_s: float) -> Iterator[Tick]:
        """Finished rows in order. The newest one is kept back until `finish` or a newer one.

        It is kept back because only the end of the episode tells whether it is the last.
        """
        while self._executed and self._start_ns is not None:
            first = self._executed[0]
            if first.stamp_ns < self._start_ns:
                self._executed.popleft()
                continue
            if self._ending is not None and first.stamp_ns > self._ending.stamp_ns:
                return
            if self._ending is None and mono_s - first.mono_s < self.hold_back_s:
                return
            if self._unfinished(first) and mono_s - first.mono_s < self.grace_s:
                return
            self._executed.popleft()
            row = self._row(first)
            if row is None:
                continue
            if self._previous is not None:
                self.rows += 1
                yield self._previous
            self._previous = row

    def finished(self, mono_s: float) -> bool:
        """After `end`: nothing of this episode is still to be expected."""
        if self._ending is None:
            return False
        if any(e.stamp_ns > self._ending.stamp_ns for e in self._executed):
            return True
        # The end may overtake a whole queue of ticks: wait until no more come.
        return mono_s - max(self._ending_mono_s, self._heard_mono_s) >= self.grace_s

    def finish(self) -> tuple[Tick | None, list[RateCheck]]:
        """The last row, with the reward and the flags of the end, and the streams' rates."""
        assert self._ending is not None
        assert self._start_ns is not None
        last, ending = self._previous, self._ending
        if last is not None:
            success = ending.outcome == "success"
            real_end = ending.outcome in ("success", "failure") and not ending.truncated
            last.reward = 1.0 if success else 0.0
            last.terminated, last.truncated = real_end, not real_end
            self.rows += 1
        seconds = max(ending.stamp_ns - self._start_ns + self.contract.dt_ns, 1) / 1e9
        rates = [
            RateCheck(key, self._received[key] / seconds, f.min_rate_hz, self._received[key], lost)
            for (key, f), lost in zip(
                self.contract.observations.items(), self._lost.values(), strict=True
            )
        ]
        self._start_ns, self._ending, self._previous = None, None, None
        return last, rates

    def _unfinished(self, executed: Executed) -> bool:
        tick_ns = executed.stamp_ns
        if self._aligner.pending(tick_ns):
            return True
        driver, _, who = executed.label.partition(":")
        if driver == "policy":
            return not any(f"{c.version}#{c.chunk_id}" == who for c in self._chunks)
        if driver == "human":
            return not self._human or self._human[-1][0] < tick_ns
        return False

    def _row(self, executed: Executed) -> Tick | None:
        tick_ns = executed.stamp_ns
        aligned = self._aligner.at(tick_ns)
        if aligned.missing:
            # Nothing was ever seen of a feature: the row cannot be filled, and zeros would lie.
            self._dropped.update(aligned.missing)
            return None
        self._aligner.drop_before(tick_ns - 1_000_000_000)
        driver, _, who = executed.label.partition(":")
        source = {"policy": Source.POLICY, "human": Source.HUMAN}.get(driver, Source.HOLD)
        proposal, chunk, step = self._proposal(tick_ns, who if driver == "policy" else None)
        own = source is Source.POLICY and chunk is not None
        dropped, self._dropped = self._dropped, set()
        return Tick(
            observation=aligned.values,
            action=executed.command.astype(np.float32),
            source=source,
            stamp_ns=tick_ns,
            stamps=aligned.stamps,
            action_policy=proposal,
            action_human=self._human_at(tick_ns) if source is Source.HUMAN else None,
            policy_version=chunk.version if chunk is not None else 0,
            chunk_id=chunk.chunk_id if own and chunk is not None else 0,
            chunk_step=step if own else 0,
            late=aligned.stale,
            dropped=dropped,
        )

    def _proposal(
        self, tick_ns: int, label: str | None
    ) -> tuple[NDArray[np.float32] | None, Chunk | None, int]:
        """What the policy proposed: the executed chunk, else the newest that covers the tick."""
        dt_ns = self.contract.dt_ns
        for chunk in reversed(self._chunks):
            if label is not None and f"{chunk.version}#{chunk.chunk_id}" != label:
                continue
            step = (tick_ns - chunk.stamp_ns + dt_ns // 2) // dt_ns
            if 0 <= step < len(chunk.points):
                return chunk.points[step].astype(np.float32), chunk, int(step)
            if label is None and step >= 0:
                break  # older ones do not reach further
        return None, None, 0

    def _human_at(self, tick_ns: int) -> NDArray[np.float32] | None:
        for stamp_ns, command in reversed(self._human):
            if stamp_ns <= tick_ns:
                return command.astype(np.float32)
        return None
