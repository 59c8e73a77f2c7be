"""`Store` reads one snapshot of one store; `FleetView` holds many stores and refreshes them
cheaply."""

import logging
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from trajectory_store.coding import (
    EPISODE_ROWS,
    decode_frame,
    unpack_column,
    unpack_strings,
    unseal,
)
from trajectory_store.contract import Contract
from trajectory_store.errors import (
    DamagedChunk,
    EpisodeState,
    FeatureMissing,
    NotAStore,
    StoreError,
    StoreUnavailable,
)
from trajectory_store.head import read_contracts, read_root
from trajectory_store.repository import (
    Snapshot,
    find_stores,
    is_url,
    normalise,
    open_repository,
    translated,
)
from trajectory_store.schema import (
    BRANCH,
    CHUNK_ROWS,
    Column,
    Episode,
    FrameArray,
    columns,
    frame_arrays,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreInfo:
    """What the root group says; read in one go."""

    rows: int
    n_episodes: int
    writer: str
    features: tuple[str, ...]
    last_segment: str


class Store:
    """A reader of one consistent snapshot. `refresh` moves it to the newest.

    Opening reads a few small objects and the episode table; columns and frames are read when asked
    for.
    """

    def __init__(self, path: str | Path, snapshot_id: str | None = None) -> None:
        """Opens the newest snapshot, or the one named.

        Raises:
            NotAStore, NewerFormat, StoreUnavailable, DamagedChunk
        """
        self.location = normalise(path)
        self._repository = open_repository(self.location)
        self._parsed: dict[int, tuple[bytes | None, list[Episode]]] = {}
        """Chunk of the episode table -> its bytes, and what they say."""
        self._load(snapshot_id or self._newest())

    def _newest(self) -> str:
        with translated(self.location):
            return self._repository.lookup_branch(BRANCH)

    def _load(self, snapshot_id: str) -> None:
        snapshot = Snapshot(self.location, self._repository, snapshot_id)
        root, contracts = read_root(snapshot), read_contracts(snapshot)
        self.snapshot = snapshot  # from here on nothing is read, so a store never moves halfway
        self.info = StoreInfo(
            rows=int(root["rows"]),
            n_episodes=int(root["episodes"]),
            writer=root["writer"],
            features=tuple(root["features"]),
            last_segment=root["last_segment"],
        )
        self.contracts = {sha: Contract.model_validate(c) for sha, c in contracts.items()}
        self.contract = self.contracts[root["contract"]]
        self.columns: dict[str, Column] = {}
        self.frames: dict[str, FrameArray] = {}
        for contract in self.contracts.values():
            self.columns |= columns(contract)
            for key, array in frame_arrays(contract).items():
                self.frames.setdefault(key, array)
        self.rows = self.info.rows
        self._table: list[Episode] | None = None

    def refresh(self) -> bool:
        """Moves to the newest snapshot; True when there is one. Cheap when nothing happened."""
        newest = self._newest()
        if newest == self.snapshot_id:
            return False
        self._load(newest)
        return True

    def go_to(self, snapshot_id: str) -> None:
        """Moves to a snapshot that was named before.

        Raises:
            StoreUnavailable: it has expired.
        """
        if snapshot_id != self.snapshot_id:
            self._load(snapshot_id)

    @property
    def snapshot_id(self) -> str:
        """Names exactly what this reader sees; a run that logs it can be repeated."""
        return self.snapshot.snapshot_id

    @property
    def table(self) -> list[Episode]:
        """Every episode, in order of recording: also running, deleted and damaged ones."""
        if self._table is None:
            table: list[Episode] = []
            count = self.info.n_episodes
            for chunk in range(-(-count // EPISODE_ROWS)):
                data = self.snapshot.get_chunk("episodes", chunk, f"episodes/c/{chunk}")
                known = self._parsed.get(chunk)
                if known is None or known[0] != data:  # most chunks never change again
                    texts = unpack_strings(data, f"{self.location}: episodes, chunk {chunk}")
                    rows = texts[: count - chunk * EPISODE_ROWS]
                    known = self._parsed[chunk] = (data, [Episode.from_json(t) for t in rows])
                table += known[1]
            self._table = table[:count]
        return self._table

    @property
    def episodes(self) -> list[Episode]:
        """Finished episodes that are neither deleted nor set aside as damaged."""
        return [e for e in self.table if not (e.is_open or e.deleted or e.damaged)]

    def episode(self, uuid: str) -> Episode:
        """By uuid, or by its first characters.

        Raises:
            EpisodeState: none, or several.
        """
        found = [e for e in self.table if e.uuid.startswith(uuid)]
        if len(found) != 1:
            what = "no episode" if not found else f"{len(found)} episodes"
            raise EpisodeState(
                f"{self.location}: {what} with uuid {uuid!r}; `vla-post store ls` lists them"
            )
        return found[0]

    def read(self, key: str, rows: slice | Episode | Sequence[int] | np.ndarray) -> np.ndarray:
        """Values of a column or decoded frames of an image feature, one per row.

        Args:
            rows: an episode, a slice, or row numbers in any order.

        Returns:
            (len(rows), ...) in the dtype of the column; images (len(rows), height, width, C).

        Raises:
            FeatureMissing: unknown key, or no frame had arrived at one of the rows.
            DamagedChunk
        """
        numbers = self._numbers(rows)
        if key in self.frames:
            array = self.frames[key]
            out = np.empty((len(numbers), *array.feature.shape), array.numpy)
            for i, data in enumerate(self.read_encoded(key, numbers)):
                decode_frame(array.feature, data, out[i])
            return out
        if key not in self.columns:
            raise FeatureMissing(
                f"{self.location}: no {key!r}; it has {', '.join([*self.frames, *self.columns])}"
            )
        column = self.columns[key]
        out = np.empty((len(numbers), *column.shape), column.numpy)
        for chunk in np.unique(numbers // CHUNK_ROWS).tolist():
            mine = numbers // CHUNK_ROWS == chunk
            out[mine] = self.read_chunk(key, chunk)[numbers[mine] % CHUNK_ROWS]
        return out

    def read_encoded(
        self, key: str, rows: slice | Episode | Sequence[int] | np.ndarray
    ) -> list[bytes]:
        """Frames as they are stored, bit for bit as the camera sent them."""
        numbers = self._numbers(rows)
        places = self.read(self.frames[key].reference, numbers)
        if len(places) and places[:, 0].min() < 0:
            at = int(numbers[places[:, 0] < 0][0])
            raise FeatureMissing(f"{self.location}: no frame of {key} had arrived at row {at}")
        return self.read_frames(key, places)

    def read_frames(self, key: str, places: np.ndarray) -> list[bytes]:
        """Encoded frames by their references (n, 3): the values of `<key>.frame`."""
        array = self.frames[key]
        wanted = []
        for frame, offset, size in places.tolist():
            shard = frame // array.shard
            wanted.append((key, shard, array.shard_key(shard), offset, offset + size + 4))
        frames = self.snapshot.get_ranges(wanted)
        return [
            unseal(data, f"{self.location}: {key}, frame {place[0]} (chunk {want[2]})")
            for data, place, want in zip(frames, places, wanted, strict=True)
        ]

    def read_chunk(self, name: str, chunk: int) -> np.ndarray:
        """(CHUNK_ROWS, ...) rows of a column; those past `rows` hold the fill value."""
        column = self.columns[name]
        data = self.snapshot.get_chunk(name, chunk, column.chunk_key(chunk))
        return unpack_column(column, data, f"{self.location}: {name}, chunk {chunk}")

    def _numbers(self, rows: slice | Episode | Sequence[int] | np.ndarray) -> np.ndarray:
        if isinstance(rows, Episode):
            return np.arange(rows.first_row, rows.end_row)
        if isinstance(rows, slice):
            return np.arange(*rows.indices(self.rows))
        numbers = np.asarray(rows, np.int64).reshape(-1)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self.rows):
            raise StoreError(
                f"{self.location}: rows {numbers.min()} to {numbers.max()} asked for; it has rows "
                f"0 to {self.rows - 1}"
            )
        return numbers

    def __repr__(self) -> str:
        return f"Store({self.location!r}, snapshot {self.snapshot_id}, {self.rows} rows)"


class FleetView:
    """Every store at or under a prefix (a folder or `s3://bucket/prefix`), as one.

    New stores are found and new episodes seen at `refresh`; in between nothing changes.
    """

    def __init__(self, prefix: str | Path | Iterable[str | Path], *, threads: int = 8) -> None:
        """Args:
        prefix: one prefix, or several; a store may be named directly.
        """
        many = [prefix] if isinstance(prefix, (str, Path)) else list(prefix)
        self.prefixes = [normalise(p) for p in many]
        self.stores: list[Store] = []
        self.problems: dict[str, StoreError] = {}
        """Location -> why it could not be read at the last refresh."""
        self._threads = threads
        self.refresh()
        for problem in self.problems.values():
            raise problem

    @classmethod
    def of(cls, stores: Sequence[Store]) -> Self:
        """A view of stores that are open already, at their snapshots."""
        view = cls.__new__(cls)
        view.prefixes = [s.location for s in stores]
        view.stores, view.problems, view._threads = list(stores), {}, 8
        return view

    def refresh(self) -> bool:
        """Sees what writers committed since; True when anything is new.

        A store that cannot be read just now stays at its snapshot, or out of the view if it is
        new, and `problems` says why: one robot's disk or network must not stop a learner.

        Raises:
            NotAStore: a prefix that does not exist.
        """
        before, self.problems = self.problems, {}
        known = {s.location: s for s in self.stores}
        places: list[str] = []
        for prefix in self.prefixes:
            try:
                places += self._find(prefix, known)
            except StoreUnavailable as error:
                self.problems[prefix] = error
        with ThreadPoolExecutor(self._threads) as pool:
            moved = list(pool.map(self._refreshed, known.values()))
            fresh = list(pool.map(self._opened, [p for p in places if p not in known]))
        for location in self.problems.keys() - before.keys():
            log.warning("%s", self.problems[location])
        found = [s for s in fresh if s is not None]
        self.stores = sorted([*known.values(), *found], key=lambda s: s.location)
        return any(moved) or bool(found)

    def _refreshed(self, store: Store) -> bool:
        try:
            return store.refresh()
        except (StoreUnavailable, DamagedChunk, NotAStore) as error:
            self.problems[store.location] = error
            return False

    def _opened(self, location: str) -> Store | None:
        """A store whose writer has not made its first commit yet is left for the next refresh."""
        try:
            return Store(location)
        except NotAStore:
            return None
        except (StoreUnavailable, DamagedChunk) as error:
            self.problems[location] = error
            return None

    def _find(self, prefix: str, known: Collection[str]) -> list[str]:
        if not is_url(prefix) and not Path(prefix).exists():
            raise NotAStore(f"{prefix}: no such folder; expected stores in or under it")
        return list(find_stores(prefix, known))

    @property
    def episodes(self) -> list[Episode]:
        """Finished, neither deleted nor damaged, of all stores."""
        return [e for s in self.stores for e in s.episodes]

    @property
    def snapshot_ids(self) -> dict[str, str]:
        """Location -> snapshot: what a run must log to be repeatable."""
        return {s.location: s.snapshot_id for s in self.stores}
