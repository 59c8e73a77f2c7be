"""Normalisation statistics of vectors and actions: streaming, bounded in memory, cached per
snapshot."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from trajectory_store.draws import Data, Filter, stores_of
from trajectory_store.errors import FeatureMissing, NothingToSample
from trajectory_store.reader import Store
from trajectory_store.schema import Episode

log = logging.getLogger(__name__)
BINS = 8192
"""Of the histograms that quantiles are read from: their error is the range divided by this."""
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class FeatureStats:
    """Of one vector feature, per dimension, in the contract's unit; float64 lists."""

    count: int
    mean: list[float]
    std: list[float]
    """Population standard deviation."""
    min: list[float]
    max: list[float]
    q01: list[float]
    q99: list[float]


def normalisation(
    data: Data,
    *,
    keys: Sequence[str] | None = None,
    filter: Filter | None = None,
    cache: bool = True,
) -> dict[str, FeatureStats]:
    """Mean, standard deviation, range and quantiles of every vector and the action.

    Two passes over the ticks. Cached in the user's cache folder under the snapshots, the episodes
    and the keys, so asking again is free until something is committed or relabelled.

    Args:
        keys: default: all vector observations, and `action`.
        filter: episodes, and by `sources` ticks, to count.

    Raises:
        NothingToSample, FeatureMissing
    """
    stores = stores_of(data)
    filter = filter or Filter()
    chosen = [(s, e) for s in stores for e in s.table if filter.keeps(e)]
    if not chosen:
        raise NothingToSample(
            f"{len(stores)} stores: no finished episode passes the filter; nothing to measure"
        )
    names = list(keys or _vectors(stores))
    for name in names:
        if not all(name in s.columns and s.columns[name].dtype == "float32" for s in stores):
            raise FeatureMissing(
                f"{name}: not a vector of every store; they share {', '.join(_vectors(stores))}"
            )
    file = _cache_file(chosen, names, filter)
    if cache and file.is_file():
        try:
            return {k: FeatureStats(**v) for k, v in json.loads(file.read_text()).items()}
        except (ValueError, TypeError):
            log.warning("%s: not readable, computing again", file)
    found = {name: _measure(chosen, name, filter) for name in names}
    if cache:
        text = json.dumps({k: asdict(v) for k, v in found.items()})
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_text(text)
            part.replace(file)
        except OSError as error:
            log.warning("%s: not cached (%s)", file, error)
    return found


def _vectors(stores: Sequence[Store]) -> list[str]:
    common = [
        {k for c in s.contracts.values() for k in c.vectors} & s.columns.keys() for s in stores
    ]
    return [*sorted(set.intersection(*common)), "action"] if common else ["action"]


def _cache_file(chosen: list[tuple[Store, Episode]], names: list[str], f: Filter) -> Path:
    digest = hashlib.sha256(f"1 {BINS} {names} {sorted(map(int, f.sources or ()))}".encode())
    for location, snapshot in sorted({(s.location, s.snapshot_id) for s, _ in chosen}):
        digest.update(f"{location} {snapshot}".encode())
    for _, episode in chosen:
        digest.update(episode.uuid.encode())
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vla_post" / "statistics" / f"{digest.hexdigest()[:32]}.json"


def _pieces(chosen: list[tuple[Store, Episode]], name: str, filter: Filter) -> Iterator[np.ndarray]:
    """Finite rows (n, D) in float64, piece by piece."""
    for store, e in chosen:
        for start in range(e.first_row, e.end_row, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, e.end_row))
            values = store.read(name, rows).astype(np.float64)
            keep = np.isfinite(values).all(axis=1)
            if filter.sources is not None:
                keep &= np.isin(store.read("source", rows), [int(s) for s in filter.sources])
            if keep.any():
                yield values[keep]


def _measure(chosen: list[tuple[Store, Episode]], name: str, filter: Filter) -> FeatureStats:
    count = 0
    mean = square = low = high = np.empty(0)
    for rows in _pieces(chosen, name, filter):
        # Chan, Golub and LeVeque (1979): pieces combine without losing digits.
        n, piece_mean = len(rows), rows.mean(0)
        piece_square = ((rows - piece_mean) ** 2).sum(0)
        if count == 0:
            mean, square, low, high = piece_mean, piece_square, rows.min(0), rows.max(0)
        else:
            delta = piece_mean - mean
            mean = mean + delta * n / (count + n)
            square = square + piece_square + delta**2 * count * n / (count + n)
            low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
        count += n
    if count == 0:
        raise NothingToSample(f"{name}: no tick with a value passes the filter")
    span = np.where(high > low, high - low, 1.0)
    histogram = np.zeros((len(low), BINS), np.int64)
    for rows in _pieces(chosen, name, filter):
        bins = np.minimum(((rows - low) / span * BINS).astype(np.int64), BINS - 1)
        for d in range(len(low)):
            histogram[d] += np.bincount(bins[:, d], minlength=BINS)
    share = histogram.cumsum(1) / count

    def quantile(q: float) -> list[float]:
        at = (share < q).sum(1)
        return _numbers(np.clip(low + (at + 0.5) / BINS * span, low, high))

    return FeatureStats(
        count=count,
        mean=_numbers(mean),
        std=_numbers(np.sqrt(square / count)),
        min=_numbers(low),
        max=_numbers(high),
        q01=quantile(0.01),
        q99=quantile(0.99),
    )


def _numbers(values: np.ndarray) -> list[float]:
    return [float(v) for v in values]
