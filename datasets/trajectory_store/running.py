"""The episode being recorded: checks of each tick, and the rows since the last segment.

No threads and no disk here; `writer.py` owns both.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trajectory_store.coding import check_frame
from trajectory_store.contract import Contract
from trajectory_store.errors import BadTick
from trajectory_store.schema import AGE_ABSENT, Episode, Source, Tick, columns
from trajectory_store.segment import Segment


class RunningEpisode:
    """Rows and new frames of one episode, until `cut` takes them away."""

    def __init__(self, contract: Contract, episode: Episode, features: list[str]) -> None:
        """Args:
        features: of the store; their order is that of the bits of `late` and `dropped`.
        """
        self.contract = contract
        self.episode = episode
        self._bits = {key: i for i, key in enumerate(features)}
        self._columns = list(columns(contract))
        self._last: dict[str, Any] = {}
        """Last value of each feature, for ticks without a new one."""
        self._last_stamp: dict[str, int] = {}
        self._n_frames = dict.fromkeys(contract.images, 0)
        self._rows: dict[str, list[Any]] = {}
        self._frames: dict[str, list[bytes | np.ndarray]] = {}
        self._start_segment()

    def _start_segment(self) -> None:
        self._rows = {name: [] for name in self._columns}
        self._frames = {key: [] for key in self.contract.images}

    @property
    def n_waiting(self) -> int:
        """Ticks since the last cut."""
        return len(self._rows["stamp_ns"])

    def append(self, tick: Tick) -> None:
        """Adds the tick, or raises BadTick and leaves everything as it was."""
        row, fresh = self._check(tick)
        for key in self.contract.images:
            if key in fresh:
                self._frames[key].append(fresh[key])
                self._n_frames[key] += 1
                self._last[key] = fresh[key]
            row[f"{key}.frame"] = (self._n_frames[key] - 1, 0, 0)
        for name, value in row.items():
            self._rows[name].append(value)
        episode = self.episode
        if len(episode.first_seen) < len(self._last):
            seen = dict(episode.first_seen)
            seen = {key: seen.get(key, len(episode)) for key in self._last}
            episode = episode.replace(first_seen=tuple(seen.items()))
        first, source = len(episode) == 0, int(tick.source)
        changed = first or episode.sources[-1][1] != source
        took_over = changed and source == Source.HUMAN and not first
        self.episode = episode.replace(
            end_row=episode.end_row + 1,
            start_ns=tick.stamp_ns if first else episode.start_ns,
            end_ns=tick.stamp_ns,
            sources=(*episode.sources, (len(episode), source)) if changed else episode.sources,
            interventions=episode.interventions + took_over,
        )

    def cut(self) -> Segment | None:
        """The ticks since the last cut, as a segment; None when there is nothing to say."""
        if self.n_waiting == 0 and self.episode.outcome is None:
            return None
        first = {k: count - len(self._frames[k]) for k, count in self._n_frames.items()}
        # Plain lists: whoever commits it packs and encodes them.
        segment = Segment(self.episode, self._rows, self._frames, first)
        self._start_segment()
        return segment

    def _check(self, tick: Tick) -> tuple[dict[str, Any], Mapping[str, bytes | np.ndarray]]:
        """Row of the tick, and its new frames. Nothing is changed before all of it is valid."""
        contract, size = self.contract, self.contract.action.size
        if tick.stamp_ns < 0:
            raise BadTick(f"stamp_ns is {tick.stamp_ns}; expected nanoseconds, not negative")
        if len(self.episode) and tick.stamp_ns <= self.episode.end_ns:
            raise BadTick(
                f"stamp_ns is {tick.stamp_ns}, not after the tick before at "
                f"{self.episode.end_ns}; stamps increase strictly inside an episode"
            )
        unknown = tick.observation.keys() - contract.observations.keys()
        if unknown:
            raise BadTick(
                f"found {sorted(unknown)}; cell {contract.cell!r} declares "
                f"{sorted(contract.observations)}"
            )
        row: dict[str, Any] = {}
        fresh: dict[str, bytes | np.ndarray] = {}
        stamps: dict[str, int] = {}
        for key, feature in contract.observations.items():
            value = tick.observation.get(key)
            before = self._last_stamp.get(key)
            if value is None:
                value, stamp = self._last.get(key), before
            else:
                stamp = int(tick.stamps.get(key, tick.stamp_ns))
                if stamp < 0 or (before is not None and stamp < before):
                    raise BadTick(
                        f"{key}: sensor stamp {stamp} ns after {before} ns; stamps are not "
                        "negative and never run backwards inside an episode"
                    )
            age = AGE_ABSENT if stamp is None else tick.stamp_ns - stamp
            row[f"{key}.age_ns"] = max(min(age, 2**31 - 1), AGE_ABSENT)
            if stamp is not None:
                stamps[key] = stamp
            if feature.is_image:
                last = self._last.get(key)
                if value is not None and value is not last and not _same(value, last):
                    fresh[key] = check_frame(key, feature, value)
            elif value is None:
                row[key] = np.full(feature.shape, np.nan, np.float32)
            else:
                row[key] = _vector(key, value, feature.shape[0])
        row["action"] = _vector("action", tick.action, size)
        nothing = np.full(size, np.nan, np.float32)
        for name, value in (
            ("action.policy", tick.action_policy),
            ("action.human", tick.action_human),
        ):
            row[name] = nothing if value is None else _vector(name, value, size)
        if not np.isfinite(tick.reward):
            raise BadTick(f"reward is {tick.reward}; expected a finite number")
        try:
            row["source"] = int(Source(tick.source))
        except ValueError:
            raise BadTick(f"source is {tick.source!r}; expected one of {list(Source)}") from None
        for name, value in (("late", tick.late), ("dropped", tick.dropped)):
            strangers = set(value) - self._bits.keys()
            if strangers:
                raise BadTick(f"{name} names {sorted(strangers)}, which the contract does not")
            row[name] = sum(1 << self._bits[k] for k in set(value))
        for name, value, bits in (
            ("policy_version", tick.policy_version, 32),
            ("chunk_id", tick.chunk_id, 32),
            ("chunk_step", tick.chunk_step, 16),
        ):
            if not 0 <= value < 1 << bits:
                raise BadTick(f"{name} is {value}; expected 0 to {(1 << bits) - 1}")
            row[name] = value
        row |= {
            "reward": tick.reward,
            "terminated": bool(tick.terminated),
            "truncated": bool(tick.truncated),
            "stamp_ns": tick.stamp_ns,
        }
        self._last_stamp.update(stamps)
        for key in contract.vectors:
            if key in tick.observation and tick.observation[key] is not None:
                self._last[key] = row[key]
        return row, fresh


def _same(a: Any, b: Any) -> bool:
    """Equal frames; cheap when they differ early, which camera frames do."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return (
            isinstance(a, np.ndarray)
            and isinstance(b, np.ndarray)
            and a.shape == b.shape
            and bool(np.array_equal(a, b))
        )
    return b is not None and a == b


def _vector(name: str, value: Any, size: int) -> np.ndarray:
    try:
        vector = np.array(value, np.float32)
    except (TypeError, ValueError) as error:
        raise BadTick(f"{name}: found {value!r}, expected {size} numbers ({error})") from None
    if vector.shape != (size,):
        raise BadTick(f"{name}: found shape {vector.shape}, expected ({size},)")
    if not np.isfinite(vector).all():
        raise BadTick(
            f"{name}: found {vector.tolist()}; NaN and infinity are not data. Leave the feature "
            "out of the tick when the sensor gave nothing"
        )
    return vector
