"""Looking after a store: labels, deletion and `gc`. Copies between stores: `copying.py`.

Everything that writes takes the writer's lock, so it is refused while a robot records into the
store. Nothing is deleted before `gc`, and then only by its policy.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import icechunk
import numpy as np

from trajectory_store.commit import replace_episodes
from trajectory_store.durability import prune_backups, settle
from trajectory_store.errors import EpisodeState, StoreError
from trajectory_store.head import Head, read_head
from trajectory_store.lock import WriterLock
from trajectory_store.reader import Store
from trajectory_store.repository import (
    delete_many,
    normalise,
    open_repository,
    translated,
)
from trajectory_store.schema import BRANCH, Episode, Outcome

log = logging.getLogger(__name__)


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
