"""Which ticks a chunk may start at, and the draws: filters, parts of a mixture, weights, epochs.

Nothing is loaded here. Item numbers come from a counter-based generator, so a sequence follows from
the seed and the snapshots alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trajectory_store.errors import NothingToSample, StoreError
from trajectory_store.permutation import permute
from trajectory_store.reader import FleetView, Store
from trajectory_store.schema import Episode, Outcome, Source


def _everything(_: Episode) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which episodes count, and at which ticks a chunk may start. None means any."""

    tasks: Sequence[str] | None = None
    outcomes: Sequence[Outcome] | None = None
    sources: Sequence[Source] | None = None
    """A chunk starts only at ticks that one of these commanded."""
    policy_versions: Sequence[int] | None = None
    min_policy_version: int | None = None
    since_ns: int | None = None
    """Recorded at or after this wall-clock time, ns since 1970."""
    until_ns: int | None = None
    operators: Sequence[str] | None = None
    good_only: bool = False
    """Leave out episodes that the recorder found problems with."""
    include_running: bool = False
    """Also the episode that is being recorded, as far as it is committed."""
    where: Callable[[Episode], bool] = _everything

    def keeps(self, e: Episode) -> bool:
        return (
            (self.include_running or not e.is_open)
            and not (e.deleted or e.damaged)
            and len(e) > 0
            and (self.tasks is None or e.task in self.tasks)
            and (self.outcomes is None or e.outcome in self.outcomes)
            and (self.policy_versions is None or e.policy_version in self.policy_versions)
            and (self.min_policy_version is None or e.policy_version >= self.min_policy_version)
            and (self.since_ns is None or e.created_ns >= self.since_ns)
            and (self.until_ns is None or e.created_ns < self.until_ns)
            and (self.operators is None or e.operator in self.operators)
            and not (self.good_only and e.problems)
            and self.where(e)
        )


Data = FleetView | Store | Sequence[Store]


def stores_of(data: Data) -> list[Store]:
    if isinstance(data, FleetView):
        return data.stores
    return [data] if isinstance(data, Store) else list(data)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a mixture; its expected share is weight / sum of weights, exactly."""

    data: Data
    weight: float = 1.0
    filter: Filter = field(default_factory=Filter)
    name: str = ""
    balance_tasks: bool = False
    """Every task of the part gets the same share, however many episodes it has."""
    source_weights: Mapping[Source, float] | None = None
    """Relative weight of a start tick by who commanded it; missing ones count 1."""
    item_weights: Callable[[Episode], float | np.ndarray] | None = None
    """Relative weight of an episode's start ticks: one number, or (ticks,) of them."""


@dataclass(frozen=True)
class Place:
    """An episode as the sampler numbers it."""

    store: int
    index: int
    """In the sampler's arrays of episodes."""
    episode: Episode
    first_tick: int
    """Before it, some wanted feature had not arrived."""
    where: str
    """Location of the store, for messages."""


@dataclass
class Draw:
    """Item numbers of one batch, (B,) each."""

    store: np.ndarray
    episode: np.ndarray
    row: np.ndarray
    part: np.ndarray


@dataclass
class _Stratum:
    """Start ticks that are drawn alike: a part, or one task of it. Arrays have a row per run."""

    part: int
    first: np.ndarray
    """First row of each run of start ticks of one weight."""
    length: np.ndarray
    store: np.ndarray
    episode: np.ndarray
    weight: np.ndarray
    """Of one tick of the run."""
    share: float = 0.0

    def __post_init__(self) -> None:
        self.cum_ticks = np.cumsum(self.length)
        self.cum_weight = np.cumsum(self.weight * self.length)

    @property
    def n_ticks(self) -> int:
        return int(self.cum_ticks[-1])


class Draws:
    """The mixture's strata, and the position in its endless sequence of draws."""

    def __init__(
        self,
        parts: Sequence[Part],
        weights: Sequence[float],
        places: Sequence[Sequence[Place]],
        *,
        seed: int,
        replacement: bool,
    ) -> None:
        """Args:
            weights: of the parts.
            places: episodes of each part.

        Raises:
            NothingToSample, StoreError
        """
        self._seed, self._replacement = seed, replacement
        self._names = [p.name or str(i) for i, p in enumerate(parts)]
        self._strata: list[_Stratum] = []
        for number, (part, mine) in enumerate(zip(parts, places, strict=True)):
            tasks = sorted({p.episode.task for p in mine})
            groups = (
                [[p for p in mine if p.episode.task == t] for t in tasks]
                if part.balance_tasks
                else [mine]
            )
            for group in groups:
                runs = [run for place in group for run in _runs(part, place)]
                if runs:
                    first, length, store, episode, weight = map(
                        np.concatenate, zip(*runs, strict=True)
                    )
                    self._strata.append(_Stratum(number, first, length, store, episode, weight))
        if not self._strata:
            every = [p for mine in places for p in mine]
            raise NothingToSample(
                f"{every[0].where}: {len(every)} episodes pass the filters, and none has a tick "
                "that the wanted sources commanded and whose weight is above 0"
            )
        if not replacement and any(np.ptp(s.weight) > 0 for s in self._strata):
            raise StoreError(
                "weights per item need replacement=True; an epoch takes each tick once"
            )
        self.batch = self.epoch = 0
        self.counters = [0] * len(self._strata)
        self.share_out(weights)

    def share_out(self, weights: Sequence[float]) -> None:
        """Share of each stratum: its part's weight, split evenly among the part's strata."""
        present = {s.part for s in self._strata}
        total = sum(weights[p] for p in present)
        if not total > 0 or min(weights) < 0:
            raise StoreError(f"weights of the parts are {weights}; expected some above 0")
        for s in self._strata:
            siblings = sum(o.part == s.part for o in self._strata)
            s.share = weights[s.part] / total / siblings

    @property
    def n_ticks(self) -> int:
        return sum(s.n_ticks for s in self._strata)

    @property
    def shares(self) -> dict[str, float]:
        """Expected share of each part, by name (or number)."""
        out: dict[str, float] = {}
        for s in self._strata:
            out[self._names[s.part]] = out.get(self._names[s.part], 0.0) + s.share
        return out

    def share_by(self, group: np.ndarray, n_groups: int, part: str | None = None) -> np.ndarray:
        """(n_groups,) expected share of episodes by `group`, a number for each episode.

        Args:
            part: only what is drawn from there; None: from all.
        """
        out = np.zeros(n_groups)
        for s in self._strata:
            if part not in (None, self._names[s.part]):
                continue
            weight = s.weight * s.length
            out += s.share * np.bincount(group[s.episode], weight, n_groups) / weight.sum()
        return out

    def position(self) -> dict[str, Any]:
        return {"batch": self.batch, "epoch": self.epoch, "counters": list(self.counters)}

    def go(self, position: Mapping[str, Any]) -> None:
        counters = [int(c) for c in position["counters"]]
        if len(counters) != len(self._strata):
            raise StoreError(
                f"the state is of a mixture of {len(counters)} strata (parts, or tasks of "
                f"balanced parts); this one has {len(self._strata)}"
            )
        self.batch, self.epoch = int(position["batch"]), int(position["epoch"])
        self.counters = counters

    def next(self, size: int) -> Draw:
        """The next `size` items."""
        key = np.array([self._seed & (2**64 - 1), self.batch], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        self.batch += 1
        shares = np.cumsum([s.share for s in self._strata])
        which = np.searchsorted(shares, rng.random(size) * shares[-1], side="right")
        which = np.minimum(which, len(shares) - 1)
        position = rng.random(size)
        out = Draw(*(np.empty(size, np.int64) for _ in range(4)))
        for i in np.unique(which).tolist():
            s, mine = self._strata[i], which == i
            if self._replacement:
                at = position[mine] * s.cum_weight[-1]
                run = np.minimum(np.searchsorted(s.cum_weight, at, side="right"), len(s.length) - 1)
                into = (at - (s.cum_weight[run] - s.weight[run] * s.length[run])) / s.weight[run]
                tick = np.clip(into.astype(np.int64), 0, s.length[run] - 1)
            else:
                at = self._next_of_epoch(i, int(mine.sum()))
                run = np.searchsorted(s.cum_ticks, at, side="right")
                tick = at - (s.cum_ticks[run] - s.length[run])
            out.store[mine], out.episode[mine] = s.store[run], s.episode[run]
            out.row[mine], out.part[mine] = s.first[run] + tick, s.part
        return out

    def _next_of_epoch(self, stratum: int, count: int) -> np.ndarray:
        """The next `count` start ticks of the stratum's random order; orders follow one another."""
        size = self._strata[stratum].n_ticks
        first = self.counters[stratum]
        self.counters[stratum] = first + count
        turn, within = np.divmod(np.arange(first, first + count, dtype=np.int64), size)
        out = np.empty(count, np.int64)
        for t in np.unique(turn).tolist():
            mine = turn == t
            key = (self._seed, self.epoch, stratum, int(t))
            out[mine] = permute(within[mine], size, key)
        return out


_Runs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _runs(part: Part, place: Place) -> Iterator[_Runs]:
    """(first row, ticks, store, episode, weight of a tick) of the stretches of equal weight."""
    e = place.episode
    weight = np.zeros(len(e))
    by_source = part.source_weights or {}
    for start, stop, source in e.runs():
        if part.filter.sources is None or source in part.filter.sources:
            weight[start:stop] = by_source.get(Source(source), 1.0)
    weight[: place.first_tick] = 0
    if part.item_weights is not None:
        mine = np.asarray(part.item_weights(e), np.float64)
        if mine.shape not in ((), (len(e),)) or not (np.isfinite(mine) & (mine >= 0)).all():
            raise StoreError(
                f"item_weights of episode {e.uuid} is {mine.shape} from {mine.min(initial=0)} to "
                f"{mine.max(initial=0)}; expected one number, or {len(e)} of them, finite and not "
                "negative"
            )
        weight = weight * mine
    if (weight < 0).any():
        raise StoreError(f"source_weights is {by_source}; expected numbers that are not negative")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(weight)) + 1])
    lengths = np.diff(np.append(starts, len(e)))
    kept = weight[starts] > 0
    if kept.any():
        n = int(kept.sum())
        yield (
            e.first_row + starts[kept],
            lengths[kept],
            np.full(n, place.store),
            np.full(n, place.index),
            weight[starts[kept]],
        )
