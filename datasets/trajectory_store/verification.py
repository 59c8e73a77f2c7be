"""`verify` recomputes every checksum and reports damage per chunk and episode; `repair` sets it
aside."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trajectory_store.coding import EPISODE_ROWS, decode_frame, unpack_strings, unseal
from trajectory_store.commit import put_raw, replace_episodes, rewrite_tails
from trajectory_store.durability import restore_repo_file
from trajectory_store.errors import DamagedChunk
from trajectory_store.head import read_head, read_root
from trajectory_store.lock import WriterLock
from trajectory_store.reader import Store
from trajectory_store.repository import Snapshot, normalise, open_repository, translated
from trajectory_store.schema import BRANCH, CHUNK_ROWS, Episode, Outcome

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
    """One broken chunk, or one statement about an episode that does not hold."""

    array: str
    chunk: str
    """zarr key; empty when the problem is not one of bytes."""
    reason: str
    episodes: tuple[str, ...]
    """uuids of the episodes that it touches."""


@dataclass
class Report:
    location: str
    snapshot_id: str
    chunks: int = 0
    frames: int = 0
    damage: list[Damage] = field(default_factory=list[Damage])
    open_episodes: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        return not self.damage and not self.open_episodes

    @property
    def damaged_episodes(self) -> set[str]:
        return {uuid for d in self.damage for uuid in d.episodes}


Progress = Callable[[str, int, int], None]


def _quiet(_what: str, _done: int, _of: int) -> None:
    return


def verify(path: str | Path, *, decode: bool = False, progress: Progress = _quiet) -> Report:
    """Reads everything that the newest snapshot refers to.

    Args:
        decode: also decode every frame, which finds images that were broken when they arrived.

    Raises:
        NotAStore, NewerFormat, DamagedChunk (of the episode table; `repair` looks for an older one)
    """
    store = Store(path)
    report = Report(store.location, store.snapshot_id)
    table = [e for e in store.table if not e.purged]
    report.open_episodes = [e.uuid for e in table if e.is_open]
    names = list(store.columns)
    for i, name in enumerate(names):
        progress(name, i, len(names) + len(store.frames))
        column = store.columns[name]
        for chunk in range(-(-store.rows // CHUNK_ROWS)):
            report.chunks += 1
            key = column.chunk_key(chunk)
            try:
                store.read_chunk(name, chunk)
            except DamagedChunk as error:
                first = chunk * CHUNK_ROWS
                touched = _touching(table, first, first + CHUNK_ROWS)
                report.damage.append(Damage(name, key, str(error), touched))
    for i, key in enumerate(store.frames):
        progress(key, len(names) + i, len(names) + len(store.frames))
        for episode in table:
            _verify_frames(store, key, episode, decode, report)
    _verify_table(store, report)
    return report


def _touching(table: list[Episode], first: int, end: int) -> tuple[str, ...]:
    return tuple(e.uuid for e in table if e.first_row < end and e.end_row > first)


def _verify_frames(store: Store, key: str, e: Episode, decode: bool, report: Report) -> None:
    array = store.frames[key]
    try:
        places = store.read(array.reference, e)
    except DamagedChunk:
        return  # reported with the column
    places = np.unique(places[places[:, 0] >= 0], axis=0)
    for shard in np.unique(places[:, 0] // array.shard).tolist():
        report.chunks += 1
        chunk = array.shard_key(shard)
        mine = places[places[:, 0] // array.shard == shard]
        try:
            data = store.snapshot.get_chunk(key, shard, chunk)
        except DamagedChunk:
            data = None
        what = f"{store.location}: {key}, shard {shard}"
        bad: list[str] = []
        if data is None:
            report.damage.append(Damage(key, chunk, f"{what} is missing", (e.uuid,)))
            continue
        try:
            unseal(data[-(16 * array.shard + 4) :], f"{what} (index)")
        except DamagedChunk as error:
            bad.append(str(error))
        for frame, offset, size in mine.tolist():
            report.frames += 1
            try:
                image = unseal(data[offset : offset + size + 4], f"{what}, frame {frame}")
                if decode:
                    decode_frame(array.feature, image)
            except DamagedChunk as error:
                bad.append(str(error))
            except (ValueError, RuntimeError) as error:
                bad.append(f"{what}, frame {frame} does not decode ({error})")
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            report.damage.append(Damage(key, chunk, bad[0] + more, (e.uuid,)))


def _verify_table(store: Store, report: Report) -> None:
    """The table agrees with itself and with the columns."""
    row = 0
    for e in store.table:
        problems: list[str] = []
        if e.first_row != row or e.end_row < e.first_row or e.end_row > store.rows:
            problems.append(f"rows {e.first_row} to {e.end_row} follow row {row}")
        row = e.end_row
        try:
            stamps = store.read("stamp_ns", slice(e.first_row, e.end_row))
            source = store.read("source", slice(e.first_row, e.end_row))
        except DamagedChunk:
            continue
        if len(stamps) and (np.diff(stamps) <= 0).any():
            problems.append("stamps do not increase")
        if len(stamps) and (stamps[0] != e.start_ns or stamps[-1] != e.end_ns):
            problems.append("start or end stamp differs from the ticks")
        if any((source[a:b] != s).any() for a, b, s in e.runs()):
            problems.append("the runs of sources differ from the ticks")
        report.damage += [Damage("episodes", "", f"{e.uuid}: {p}", (e.uuid,)) for p in problems]
    if row != store.rows:
        report.damage.append(Damage("episodes", "", f"ends at row {row} of {store.rows}", ()))


def repair(path: str | Path, *, progress: Progress = _quiet) -> Report:
    """Closes interrupted episodes and sets damaged ones aside; deletes nothing.

    A damaged chunk of the episode table is taken from the newest snapshot where it is whole. A
    damaged last chunk of a column is replaced by the fill value, so that recording can go on; the
    damaged bytes stay reachable through the older snapshots until gc.

    Returns:
        What was found before the repair.

    Raises:
        StoreBusy
        DamagedChunk: the episode table is damaged in every snapshot.
    """
    location = normalise(path)
    lock = WriterLock(location, "repair")
    lock.acquire()
    try:
        restore_repo_file(location)
        repository = open_repository(location)
        _restore_table(location)
        report = verify(location, progress=progress)
        head = read_head(repository, location, tolerant=True)
        table = Store(location).table
        damaged = report.damaged_episodes
        changed: dict[int, Episode] = {}
        for i, e in enumerate(table):
            new = e
            if e.is_open:
                note = "closed by repair"
                notes = "\n".join(n for n in (e.notes, note) if n)
                new = new.replace(outcome=Outcome.INTERRUPTED, notes=notes)
            if e.uuid in damaged and not e.damaged:
                new = new.replace(damaged=True)
            if new is not e:
                changed[i] = new
        if changed:
            head = replace_episodes(repository, location, head, changed, "repair")
        if any(d.chunk and d.array in head.columns for d in report.damage):
            rewrite_tails(repository, location, head)
    finally:
        lock.release()
    return report


def _restore_table(location: str) -> None:
    """Puts back chunks of the episode table that are damaged in the newest snapshot."""
    repository = open_repository(location)
    with translated(location):
        newest = Snapshot(location, repository, repository.lookup_branch(BRANCH))
    count = int(read_root(newest)["episodes"])
    restored: dict[str, bytes] = {}
    for chunk in range(-(-count // EPISODE_ROWS)):
        key = f"episodes/c/{chunk}"
        try:
            unpack_strings(newest.get_chunk("episodes", chunk, key), key)
        except DamagedChunk as damage:
            restored[key] = _older_table(location, newest.snapshot_id, chunk, count, damage)
    if restored:
        put_raw(repository, location, restored, "restore the episode table")


def _older_table(location: str, newest: str, chunk: int, count: int, damage: DamagedChunk) -> bytes:
    repository = open_repository(location)
    key = f"episodes/c/{chunk}"
    needed = min(EPISODE_ROWS, count - chunk * EPISODE_ROWS)
    for info in repository.ancestry(snapshot_id=newest):
        data = Snapshot(location, repository, info.id).get_chunk("episodes", chunk, key)
        try:
            texts = unpack_strings(data, key)
        except DamagedChunk:
            continue
        if all(texts[:needed]):
            log.warning("%s: %s taken from snapshot %s", location, key, info.id)
            assert data is not None
            return data
    raise damage
