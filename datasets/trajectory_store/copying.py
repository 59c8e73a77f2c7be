"""Copies of whole episodes from store to store, each exactly once: merge, split, delivery.

Exactly once holds by construction. An episode's rows and its uuid in the table are one commit, and
a commit is accepted only on the snapshot whose table was read before (icechunk's conditional write;
`commit.py` insists on the parent). Whoever copies therefore knows that the uuid was not there, and
a commit whose answer was lost, or that arrives late, finds either its own work done or another
parent. The lock only keeps two writers from getting in each other's way.
"""

import hashlib
import socket
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from trajectory_store.commit import Put, commit, replace_episodes
from trajectory_store.contract import Contract
from trajectory_store.durability import restore_repo_file
from trajectory_store.errors import StoreError, StoreTaken
from trajectory_store.head import Head, is_store, read_head
from trajectory_store.layout import create, evolve
from trajectory_store.lock import WriterLock
from trajectory_store.reader import Store
from trajectory_store.repository import create_repository, normalise, open_repository, translated
from trajectory_store.schema import BRANCH, Episode
from trajectory_store.segment import Segment

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of)."""


def _quiet(_what: str, _done: int, _of: int) -> None:
    return


@dataclass(frozen=True, kw_only=True)
class Feeder:
    """The one store that a robot's place at the fleet is fed from, as that place remembers it."""

    first: str
    """Uuid of its first episode: no other store has it, wherever it is moved."""
    store: str
    host: str
    since: str

    @classmethod
    def of(cls, store: Store) -> "Feeder":
        """Args:
        store: has an episode.
        """
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        host = socket.gethostname()
        return cls(first=store.table[0].uuid, store=store.location, host=host, since=since)


class Target:
    """A store that receives copies. It is made when the first episode comes.

    What it holds is kept in memory between calls of `held`, and read again after any error and
    whenever somebody else has committed.

    Args:
        writer: named to others while it is held.
        put: see `commit.commit`.
        take_over: feed it from now on, whoever did before.
    """

    def __init__(
        self, location: str, writer: str, *, put: Put | None = None, take_over: bool = False
    ) -> None:
        self.location = location
        self._take_over = take_over
        self.episodes: dict[str, Episode] = {}
        """By uuid, in the order of the table."""
        self._writer, self._put = writer, put
        self._lock = WriterLock(location, writer)
        self._head: Head | None = None

    @contextmanager
    def held(self, contract: Contract, feeder: Feeder | None = None) -> Generator[None]:
        """Holds the writer's lock; `add` and `change` need it.

        The lock is for this moment only. That a place belongs to one robot, also while that one is
        away, is written in the store: with the first commit under a feeder.

        Args:
            contract: of the first episode, if the store has to be made.
            feeder: this place is its own, and nobody else's; None: anybody's.

        Raises:
            StoreBusy: somebody else writes there.
            StoreTaken: it is another feeder's.
            StoreUnavailable
        """
        self._lock.acquire()
        try:
            self._open(contract)
            if feeder is not None:
                self._claim(feeder)
            yield
        except BaseException:
            self._head = None  # a commit may have arrived whose answer did not
            raise
        finally:
            self._lock.release()

    def _claim(self, feeder: Feeder) -> None:
        assert self._head is not None
        known = self._head.fed_by
        if known.get("first") == feeder.first:
            return
        if known and not self._take_over:
            raise StoreTaken(
                f"{self.location}: belongs to the store {known['store']} on {known['host']}, which "
                f"has delivered here since {known['since']}; two robots never share a place. Give "
                "this one a name of its own (`--name`, or its store's folder). Only if the other "
                f"store is gone for good: `vla-post uplink {feeder.store} DEST --once --take-over`"
            )
        self._head.fed_by = asdict(feeder)

    def still_held(self) -> None:
        """Renews the lock; for long uploads. Raises StoreBusy when it was lost."""
        self._lock.refresh()

    def _open(self, contract: Contract) -> None:
        if self._head is not None:
            with translated(self.location):
                newest = self._repository.lookup_branch(BRANCH)
            if newest == self._head.snapshot_id:
                return
        restore_repo_file(self.location)
        if not is_store(self.location):
            writer = self._writer
            create_repository(self.location, lambda r: create(r, self.location, contract, writer))
            self._lock.refresh()
        self._repository = open_repository(self.location)
        self._head = read_head(self._repository, self.location)
        table = Store(self.location, self._head.snapshot_id).table
        self.episodes = {e.uuid: e for e in table}

    def add(self, store: Store, episode: Episode) -> bool:
        """Copies a finished episode in one commit; False when it is there already."""
        return bool(self.add_all(store, [episode]))

    def add_all(self, store: Store, episodes: Sequence[Episode]) -> list[str]:
        """Copies finished episodes, those that are not there yet, all in one commit.

        Returns:
            uuids of the episodes copied now.

        Raises:
            SchemaMismatch: an episode's contract contradicts the target's.
        """
        new = {e.uuid: e for e in episodes if e.uuid not in self.episodes}
        if not new:
            return []
        assert self._head is not None, "only inside `held`"
        for digest in {e.contract_sha256 for e in new.values()} - self._head.contracts.keys():
            evolve(self._repository, self.location, self._head, store.contracts[digest])
            self._head = read_head(self._repository, self.location)
        segments = [episode_segment(store, e, self._head) for e in new.values()]
        row = self._head.rows
        self._head = commit(
            self._repository, self.location, self._head, segments, "copy", put=self._put
        )
        for uuid, episode in new.items():
            self.episodes[uuid] = episode.replace(first_row=row, end_row=row + len(episode))
            row += len(episode)
        self._take_over = False
        self._lock.refresh()
        return list(new)

    def change(self, changed: Mapping[str, Episode]) -> None:
        """Rewrites rows of the table, by uuid, in one commit."""
        assert self._head is not None, "only inside `held`"
        number = {uuid: i for i, uuid in enumerate(self.episodes)}
        rows = {number[uuid]: episode for uuid, episode in changed.items()}
        self._head = replace_episodes(self._repository, self.location, self._head, rows, "labels")
        self.episodes |= changed


def fit_to_copy(e: Episode) -> bool:
    """Finished, and neither hidden nor damaged: fit to be copied."""
    return not (e.is_open or e.deleted or e.damaged or e.purged)


def merge(
    sources: Iterable[str | Path | Store],
    target: str | Path,
    *,
    keep: Callable[[Episode], bool] = lambda e: True,
    writer: str = "merge",
    progress: Progress = _quiet,
) -> list[str]:
    """Copies finished episodes into `target`, each exactly once by its uuid; one commit per
    episode.

    Run again after an interruption, it goes on with what is missing. `uplink.py` does so for a
    robot's store, for ever.

    Returns:
        uuids of the episodes copied now.

    Raises:
        SchemaMismatch: the stores' contracts contradict each other; nothing was copied from there.
    """
    location = normalise(target)
    stores = [s if isinstance(s, Store) else Store(s) for s in sources]
    if not stores:
        raise StoreError("nothing to merge: no source store given")
    for store in stores:
        if store.location == location:
            raise StoreError(f"{location}: cannot be merged into itself")
    copied: list[str] = []
    to = Target(location, writer)
    with to.held(stores[0].contract):
        wanted = [
            (s, e)
            for s in stores
            for e in s.table
            if fit_to_copy(e) and e.uuid not in to.episodes and keep(e)
        ]
        for done, (store, episode) in enumerate(wanted):
            progress(episode.uuid, done, len(wanted))
            if to.add(store, episode):  # it may be in two sources
                copied.append(episode.uuid)
        progress("", len(wanted), len(wanted))
    return copied


def split(
    source: str | Path,
    target: str | Path,
    *,
    by: str,
    fraction: float = 0.9,
    progress: Progress = _quiet,
) -> dict[str, list[str]]:
    """Copies a store's episodes into several under `target`, one folder each.

    Args:
        by: `task`, `outcome`, `operator`, `policy_version`, or `fraction` (folders `a` with about
            `fraction` of the episodes and `b` with the rest, decided by each uuid's hash, so that
            an episode always lands on the same side).

    Returns:
        Folder name -> uuids copied now.
    """
    fields = ("task", "outcome", "operator", "policy_version")
    if by != "fraction" and by not in fields:
        raise StoreError(f"by is {by!r}; expected fraction or one of {', '.join(fields)}")
    if not 0 < fraction < 1:
        raise StoreError(f"fraction is {fraction}; expected between 0 and 1")
    store = Store(source)

    def name(e: Episode) -> str:
        if by == "fraction":
            digest = hashlib.sha256(e.uuid.encode()).digest()
            return "a" if int.from_bytes(digest[:8], "big") / 2**64 < fraction else "b"
        return str(getattr(e, by) or "none").replace("/", "_")

    names = sorted({name(e) for e in store.episodes})
    base = normalise(target)
    return {
        n: merge(
            [store],
            f"{base}/{n}",
            keep=lambda e, n=n: name(e) == n,
            writer="split",
            progress=progress,
        )
        for n in names
    }


def episode_segment(store: Store, episode: Episode, target: Head) -> Segment:
    """A whole episode as a segment of another store; frames as their encoded bytes, read late."""
    data: dict[str, np.ndarray] = {}
    frames: dict[str, Sequence[Any]] = {}
    names = [n for n in store.columns if n in target.columns]
    for name in names:
        data[name] = store.read(name, episode).copy()
    for name in ("late", "dropped"):
        data[name] = _remap_bits(data[name], list(store.info.features), target.features)
    for key, array in store.frames.items():
        if key not in target.frames:
            continue
        places = data[array.reference]
        numbers, first, back = np.unique(places[:, 0], return_index=True, return_inverse=True)
        seen = numbers >= 0
        frames[key] = StoredFrames(store, key, places[first[seen]])
        order = np.full(len(numbers), -1)
        order[seen] = np.arange(seen.sum())
        places[:, 0] = order[back]
    for key in target.frames:
        frames.setdefault(key, [])
        data.setdefault(target.frames[key].reference, np.full((len(episode), 3), -1, np.int32))
    relative = episode.replace(first_row=0, end_row=len(episode))
    return Segment(relative, data, frames, dict.fromkeys(frames, 0))


class StoredFrames(Sequence[bytes]):
    """Frames of a store that are read when they are asked for.

    Args:
        places: (n, 3), see `Store.read_frames`.
    """

    def __init__(self, store: Store, key: str, places: np.ndarray) -> None:
        self._store, self._key, self._places = store, key, places.copy()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return self._store.read_frames(self._key, self._places[index])
        return self._store.read_frames(self._key, self._places[index][None])[0]


def _remap_bits(bits: np.ndarray, old: list[str], new: list[str]) -> np.ndarray:
    out = np.zeros_like(bits)
    for i, key in enumerate(old):
        out |= ((bits >> i) & 1).astype(bits.dtype) << new.index(key)
    return out
