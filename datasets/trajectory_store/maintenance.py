"""Looking after a store: labels, deletion, merge and split, and `gc`.

Everything that writes takes the writer's lock, so it is refused while a robot records into the
store. Nothing is deleted before `gc`, and then only by its policy.
"""

import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import icechunk
import numpy as np

from trajectory_store.commit import commit, replace_episodes
from trajectory_store.contract import Contract
from trajectory_store.durability import prune_backups, restore_repo_file, settle
from trajectory_store.errors import EpisodeState, StoreError
from trajectory_store.head import Head, is_store, read_head
from trajectory_store.layout import create, evolve
from trajectory_store.lock import WriterLock
from trajectory_store.reader import Store
from trajectory_store.repository import (
    create_repository,
    delete_many,
    normalise,
    open_repository,
    translated,
)
from trajectory_store.schema import BRANCH, Episode, Outcome
from trajectory_store.segment import Segment

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""Called with (what, done, of)."""


def _quiet(_what: str, _done: int, _of: int) -> None:
    return


@contextmanager
def editing(location: str, who: str) -> Generator[tuple[icechunk.Repository, Head]]:
    """Holds the writer's lock of an existing store.

    Raises:
        StoreBusy, NotAStore
    """
    repository = open_repository(location)
    lock = WriterLock(location, who)
    lock.acquire()
    try:
        yield repository, read_head(repository, location)
    finally:
        lock.release()


def change_episodes(
    path: str | Path, uuids: Sequence[str], change: Callable[[Episode], Episode], message: str
) -> list[Episode]:
    """Applies `change` to episodes (uuid, or its first characters) in one commit.

    Raises:
        EpisodeState: unknown or ambiguous uuid, or the episode is running; nothing was changed.
    """
    location = normalise(path)
    with editing(location, message) as (repository, head):
        store = Store(location)
        number = {e.uuid: i for i, e in enumerate(store.table)}
        changed: dict[int, Episode] = {}
        for uuid in uuids:
            episode = store.episode(uuid)
            if episode.is_open:
                raise EpisodeState(
                    f"{location}: episode {episode.uuid} was never ended; "
                    "run `vla-post store repair` first"
                )
            changed[number[episode.uuid]] = change(episode)
        replace_episodes(repository, location, head, changed, message)
    return list(changed.values())


def relabel(
    path: str | Path,
    uuids: Sequence[str],
    *,
    outcome: Outcome | str | None = None,
    task: str | None = None,
    instruction: str | None = None,
    notes: str | None = None,
) -> list[Episode]:
    """Changes the labels of episodes; the ticks stay as recorded.

    Raises:
        StoreError: unknown outcome, or a task that the store's contract does not know.
    """
    try:
        label = None if outcome is None else Outcome(outcome)
    except ValueError:
        raise StoreError(f"outcome is {outcome!r}; expected one of {', '.join(Outcome)}") from None
    if task is not None:
        known = {t for c in Store(path).contracts.values() for t in c.tasks}
        if task not in known:
            raise StoreError(f"task is {task!r}; the store knows {', '.join(sorted(known))}")

    def change(e: Episode) -> Episode:
        return e.replace(
            outcome=label or e.outcome,
            task=task or e.task,
            instruction=e.instruction if instruction is None else instruction,
            notes=e.notes if notes is None else notes,
        )

    return change_episodes(path, uuids, change, "relabel")


def delete(path: str | Path, uuids: Sequence[str]) -> list[Episode]:
    """Hides episodes from readers; `undelete` brings them back until `gc` frees their frames."""
    return change_episodes(path, uuids, lambda e: e.replace(deleted=True), "delete")


def undelete(path: str | Path, uuids: Sequence[str]) -> list[Episode]:
    """Raises:
    EpisodeState: gc has freed an episode's frames already.
    """

    def change(e: Episode) -> Episode:
        if e.purged:
            raise EpisodeState(f"episode {e.uuid}: gc has freed its frames; it cannot come back")
        return e.replace(deleted=False)

    return change_episodes(path, uuids, change, "undelete")


# Copying between stores


def episode_segment(store: Store, episode: Episode, target: Head) -> Segment:
    """A whole episode as a segment of another store; frames as their encoded bytes."""
    data: dict[str, np.ndarray] = {}
    frames: dict[str, list[bytes]] = {}
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
        frames[key] = store.read_frames(key, places[first[seen]])
        order = np.full(len(numbers), -1)
        order[seen] = np.arange(seen.sum())
        places[:, 0] = order[back]
    for key in target.frames:
        frames.setdefault(key, [])
        data.setdefault(target.frames[key].reference, np.full((len(episode), 3), -1, np.int32))
    relative = episode.replace(first_row=0, end_row=len(episode))
    return Segment(relative, data, frames, dict.fromkeys(frames, 0))


def _remap_bits(bits: np.ndarray, old: list[str], new: list[str]) -> np.ndarray:
    out = np.zeros_like(bits)
    for i, key in enumerate(old):
        out |= ((bits >> i) & 1).astype(bits.dtype) << new.index(key)
    return out


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

    Run again after an interruption, it goes on with what is missing. This is also how a robot's
    store is delivered to the fleet's: `merge([local], "s3://...")`.

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
    lock = WriterLock(location, writer)
    lock.acquire()
    copied: list[str] = []
    try:
        restore_repo_file(location)
        if not is_store(location):
            contract = stores[0].contract
            create_repository(location, lambda r: create(r, location, contract, writer))
            lock.refresh()
        repository = open_repository(location)
        head = read_head(repository, location)
        known = {e.uuid for e in Store(location).table}
        wanted = [
            (s, e)
            for s in stores
            for e in s.table
            if not (e.is_open or e.deleted or e.damaged or e.purged)
            and e.uuid not in known
            and keep(e)
        ]
        for done, (store, episode) in enumerate(wanted):
            progress(episode.uuid, done, len(wanted))
            if episode.uuid in known:
                continue  # in two sources
            contract = store.contracts[episode.contract_sha256]
            head = _admit(repository, location, head, contract)
            segment = episode_segment(store, episode, head)
            head = commit(repository, location, head, [segment], "merge")
            known.add(episode.uuid)
            copied.append(episode.uuid)
            lock.refresh()
        progress("", len(wanted), len(wanted))
    finally:
        lock.release()
    return copied


def _admit(repository: icechunk.Repository, location: str, head: Head, contract: Contract) -> Head:
    if contract.sha256 in head.contracts:
        return head
    evolve(repository, location, head, contract)
    return read_head(repository, location)


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


# Freeing space


@dataclass(frozen=True)
class GcReport:
    snapshots_expired: int
    chunks_deleted: int
    bytes_deleted: int
    episodes_purged: int


def gc(path: str | Path, *, keep_days: float = 7.0, now: datetime | None = None) -> GcReport:
    """Expires snapshots older than `keep_days` and frees what only they refer to.

    Frames of deleted episodes are freed as well: until now `undelete` brought them back. Snapshots
    that a learner logged can be read again only while they are younger than `keep_days`.

    Raises:
        StoreBusy: a writer holds the store.
    """
    if keep_days < 0:
        raise StoreError(f"keep_days is {keep_days}; expected 0 or more")
    location = normalise(path)
    before = (now or datetime.now(UTC)) - timedelta(days=keep_days)
    with editing(location, "gc") as (repository, head):
        store = Store(location)
        gone = {
            i: e.replace(purged=True)
            for i, e in enumerate(store.table)
            if e.deleted and not e.purged
        }
        if gone:
            keys: list[str] = []
            for episode in gone.values():
                for array in store.frames.values():
                    places = store.read(array.reference, episode)
                    shards = np.unique(places[places[:, 0] >= 0, 0] // array.shard)
                    keys += [array.shard_key(s) for s in shards.tolist()]
            replace_episodes(
                repository, location, head, gone, "purge", also=lambda s: delete_many(s, keys)
            )
        with translated(location):
            expired = repository.expire_snapshots(older_than=before)
            settle(location)  # a power cut must not bring back what refers to deleted files
            freed = repository.garbage_collect(delete_object_older_than=before)
        prune_backups(location)
        settle(location)
        assert repository.lookup_branch(BRANCH)
    return GcReport(len(expired), freed.chunks_deleted, freed.bytes_deleted, len(gone))
