"""Brings streams of different rates to one control tick, by their true stamps.

One bounded ring per stream, sorted by the time of the sample (never by the time of its arrival).
Times are integer nanoseconds of the cell's clock. Not thread-safe: one owner, one thread.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trajectory_store.contract import Align, Contract, ObservationFeature

CLOCK_JUMP_NS = 1_000_000_000
"""A stamp that lies further back than this is a clock that was set back, not a late message."""

Value = Any
"""A vector (D,) float, or one camera frame as bytes or array; the aligner never looks inside."""


class Ring:
    """The last samples of one stream, sorted by stamp.

    Args:
        capacity: samples kept; the oldest leaves first.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._stamps: list[int] = []
        self._values: list[Value] = []
        self._capacity = capacity
        self.received = 0
        self.reordered = 0
        """Samples that arrived after one with a later stamp."""
        self.duplicates = 0

    def push(self, stamp_ns: int, value: Value) -> bool:
        """False when a sample of this very stamp is already there; the first one stays."""
        self.received += 1
        if not self._stamps or stamp_ns > self._stamps[-1]:
            self._stamps.append(stamp_ns)
            self._values.append(value)
        else:
            index = bisect_right(self._stamps, stamp_ns)
            if self._stamps[index - 1] == stamp_ns and index:
                self.duplicates += 1
                return False
            self.reordered += 1
            self._stamps.insert(index, stamp_ns)
            self._values.insert(index, value)
        if len(self._stamps) > self._capacity:
            del self._stamps[0], self._values[0]
        return True

    def __len__(self) -> int:
        return len(self._stamps)

    @property
    def newest_ns(self) -> int | None:
        return self._stamps[-1] if self._stamps else None

    def latest(self, tick_ns: int) -> tuple[int, Value] | None:
        """The last sample at or before the tick."""
        index = bisect_right(self._stamps, tick_ns)
        return (self._stamps[index - 1], self._values[index - 1]) if index else None

    def after(self, tick_ns: int) -> tuple[int, Value] | None:
        """The first sample after the tick."""
        index = bisect_right(self._stamps, tick_ns)
        return (self._stamps[index], self._values[index]) if index < len(self._stamps) else None

    def count_since(self, stamp_ns: int) -> int:
        """Samples at or after this stamp that are still kept."""
        return len(self._stamps) - bisect_right(self._stamps, stamp_ns - 1)

    def drop_before(self, stamp_ns: int) -> None:
        """Forgets what lies before the last sample at or before `stamp_ns`."""
        index = bisect_right(self._stamps, stamp_ns) - 1
        if index > 0:
            del self._stamps[:index], self._values[:index]

    def clear(self) -> None:
        self._stamps.clear()
        self._values.clear()


@dataclass(frozen=True)
class Aligned:
    """All streams at one tick."""

    tick_ns: int
    values: dict[str, Value]
    """By feature key; a feature without any usable sample is absent."""
    stamps: dict[str, int]
    """True stamp of the sample used; for interpolation that of the older neighbour."""
    missing: tuple[str, ...] = ()
    """No sample at all at or before the tick (or around it, for `nearest`)."""
    stale: tuple[str, ...] = ()
    """The sample is older than `max_age_ms`."""
    ages_ns: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def usable(self) -> bool:
        return not self.missing and not self.stale

    def why(self) -> str:
        """One line for a log or a HOLD reason; empty when usable."""
        parts = [f"{key} missing" for key in self.missing]
        parts += [f"{key} is {self.ages_ns[key] / 1e6:.0f} ms old" for key in self.stale]
        return ", ".join(parts)


class Aligner:
    """One ring per observation feature of a contract.

    `push` takes samples in any order; `at` reads them at a tick. The same tick may be read twice.
    """

    def __init__(self, contract: Contract, *, capacity: int = 512) -> None:
        self.features: dict[str, ObservationFeature] = dict(contract.observations)
        self.rings = {key: Ring(capacity) for key in self.features}
        self._period_ns = {k: round(1e9 / f.rate_hz) for k, f in self.features.items()}
        self._max_age_ns = {k: round(f.max_age_ms * 1e6) for k, f in self.features.items()}
        self._half_tick_ns = contract.dt_ns // 2

    def push(self, key: str, stamp_ns: int, value: Value) -> bool:
        return self.rings[key].push(stamp_ns, value)

    def pending(self, tick_ns: int) -> list[str]:
        """Features for which a better sample for this tick is still to be expected.

        `interpolate` and `nearest` want a sample at or after the tick. `latest` is complete when
        its sample is younger than one period of the stream: the next one is then not yet due.
        """
        return [key for key, ring in self.rings.items() if self._expects(key, ring, tick_ns)]

    def _expects(self, key: str, ring: Ring, tick_ns: int) -> bool:
        newest = ring.newest_ns
        if newest is None:
            return True
        if newest >= tick_ns:
            return False
        if self.features[key].align is not Align.LATEST:
            return True
        return tick_ns - newest + self._half_tick_ns >= self._period_ns[key]

    def at(self, tick_ns: int) -> Aligned:
        """Every stream at the tick by its contract rule; never extrapolates."""
        values: dict[str, Value] = {}
        stamps: dict[str, int] = {}
        ages: dict[str, int] = {}
        missing: list[str] = []
        stale: list[str] = []
        for key, feature in self.features.items():
            picked = self._pick(self.rings[key], feature.align, tick_ns)
            if picked is None:
                missing.append(key)
                continue
            stamp, value = picked
            age = tick_ns - stamp
            values[key], stamps[key], ages[key] = value, stamp, age
            if abs(age) > self._max_age_ns[key]:
                stale.append(key)
        return Aligned(tick_ns, values, stamps, tuple(missing), tuple(stale), ages)

    @staticmethod
    def _pick(ring: Ring, rule: Align, tick_ns: int) -> tuple[int, Value] | None:
        before = ring.latest(tick_ns)
        if rule is Align.LATEST or (before is not None and before[0] == tick_ns):
            return before
        after = ring.after(tick_ns)
        if rule is Align.NEAREST:
            if before is None or after is None:
                return before or after
            return before if tick_ns - before[0] <= after[0] - tick_ns else after
        if before is None or after is None:
            return before
        weight = (tick_ns - before[0]) / (after[0] - before[0])
        low: NDArray[Any] = np.asarray(before[1])
        return before[0], ((1.0 - weight) * low + weight * np.asarray(after[1])).astype(low.dtype)

    def drop_before(self, tick_ns: int) -> None:
        for ring in self.rings.values():
            ring.drop_before(tick_ns)

    def clear(self) -> None:
        """Forgets everything: the clock was set back."""
        for ring in self.rings.values():
            ring.clear()


class SequenceCounter:
    """Counts lost messages of one topic exactly, from the publisher's sequence numbers.

    DDS numbers the samples of a publisher 1, 2, 3, ... and a reliable reader delivers them in
    order. A number that goes back is a restarted publisher. What a publisher sent before we matched
    is no loss.
    """

    def __init__(self) -> None:
        self._last: int | None = None
        self.received = 0
        self.lost = 0

    def push(self, sequence: int) -> int:
        """Returns how many samples are missing between the previous one and this one."""
        self.received += 1
        last, self._last = self._last, sequence
        gap = 0 if last is None else max(0, sequence - last - 1)
        self.lost += gap
        return gap
