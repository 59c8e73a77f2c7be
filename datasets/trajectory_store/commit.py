"""Turns segments of an episode into the chunks of one atomic commit.

A commit rewrites the last, partly filled chunk of each column and adds whole shards of frames;
shards are never rewritten and never shared by two episodes, so committed frames stay where they
are.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import icechunk
import numpy as np

from trajectory_store.coding import (
    EPISODE_ROWS,
    pack_column,
    pack_shard,
    pack_strings,
    unpack_strings,
)
from trajectory_store.durability import commit_session
from trajectory_store.errors import StoreBusy
from trajectory_store.head import Head, last_chunk
from trajectory_store.repository import Snapshot, set_many, translated
from trajectory_store.schema import BRANCH, CHUNK_ROWS, Episode
from trajectory_store.segment import Segment

Put = Callable[[Any, dict[str, bytes]], None]
"""Writes chunks, by zarr key, into the store of a session."""


def commit(
    repository: icechunk.Repository,
    location: str,
    head: Head,
    segments: Sequence[Segment],
    message: str = "ticks",
    *,
    durable: bool = True,
    put: Put | None = None,
) -> Head:
    """Writes the segments after `head` in one atomic commit and returns the new head.

    Args:
        durable: survives a power cut when this returns (`durability.py`).
        put: sends chunks on their way; with it each shard of frames goes as soon as it is packed,
            so that an episode larger than memory can pass. Nothing is visible before the commit.

    Raises:
        StoreUnavailable: nothing of it was committed, or the answer was lost; `read_head` tells.
    """
    with translated(location):
        session = _session(repository, location, head)
    values: dict[str, bytes] = {}
    rows, table, n_episodes = head.rows, list(head.table_tail), head.n_episodes
    table_first = n_episodes - len(table)
    """Number of the first episode that `table` holds."""
    shards, metadata = dict(head.shards), dict(head.metadata)
    parts: dict[str, list[np.ndarray]] = {name: [tail] for name, tail in head.tails.items()}
    open_frames = {k: list(v) for k, v in head.open_frames.items()}
    if put is not None:
        with translated(location):
            put(session.store, _room_for_frames(head, segments))

    for segment in segments:
        n = segment.n_ticks
        last = Episode.from_json(table[-1]) if table else None
        if last is not None and last.uuid == segment.episode.uuid:
            first_row = last.first_row
        else:
            first_row, open_frames = rows, {}
            table.append("")
            n_episodes += 1
        table[-1] = segment.episode.replace(
            first_row=first_row, end_row=first_row + segment.episode.end_row
        ).to_json()
        places: dict[str, np.ndarray] = {}
        for key, frames in segment.frames.items():
            array = head.frames[key]
            found = [(*p,) for p in open_frames.get(key, [])]
            base = segment.first_frame[key] - len(found)
            for start in range(0, len(frames), array.shard):
                shard = shards[key]
                data, spans = pack_shard(frames[start : start + array.shard], array.shard)
                if put is None:
                    values[array.shard_key(shard)] = data
                else:
                    with translated(location):
                        put(session.store, {array.shard_key(shard): data})
                found += [(shard * array.shard + i, o, s) for i, (o, s) in enumerate(spans)]
                shards[key] = shard + 1
            references = segment.data[array.reference][:, 0] - base
            seen = segment.data[array.reference][:, 0] >= 0
            place = np.full((n, 3), -1, np.int32)
            if found and n:
                place[seen] = np.array(found, np.int32)[references[seen]]
            places[array.reference] = place
            open_frames[key] = found[-1:]
        for name, column in head.columns.items():
            rows_of = places.get(name, segment.data.get(name))
            if rows_of is None:
                rows_of = np.full((n, *column.shape), column.fill, column.numpy)
            parts[name].append(rows_of)
        rows += n

    first_chunk = head.rows // CHUNK_ROWS
    tails: dict[str, np.ndarray] = {}
    for name, column in head.columns.items():
        merged = np.concatenate(parts[name]).astype(column.numpy, copy=False)
        if rows != head.rows:
            for start in range(0, len(merged), CHUNK_ROWS):
                chunk = first_chunk + start // CHUNK_ROWS
                piece = merged[start : start + CHUNK_ROWS]
                values[column.chunk_key(chunk)] = pack_column(column, piece)
        tails[name] = merged[len(merged) - rows % CHUNK_ROWS :].copy()
        metadata[name] = _grown(metadata[name], rows)
    for key, array in head.frames.items():
        metadata[key] = _grown(metadata[key], shards[key] * array.shard)
    metadata["episodes"] = _grown(metadata["episodes"], n_episodes)
    for start in range(0, len(table), EPISODE_ROWS):
        chunk = (table_first + start) // EPISODE_ROWS
        values[f"episodes/c/{chunk}"] = pack_strings(table[start : start + EPISODE_ROWS])
    for name, node in metadata.items():
        if node is not head.metadata[name]:
            values[f"{name}/zarr.json"] = json.dumps(node).encode()

    new = Head(
        snapshot_id="",
        writer=head.writer,
        contract=head.contract,
        contracts=head.contracts,
        features=head.features,
        rows=rows,
        n_episodes=n_episodes,
        last_segment=segments[-1].id if segments else head.last_segment,
        columns=head.columns,
        frames=head.frames,
        shards=shards,
        metadata=metadata,
        tails=tails,
        table_tail=table[last_chunk(n_episodes) * EPISODE_ROWS - table_first :],
        open_frames=open_frames,
        fed_by=head.fed_by,
    )
    values["zarr.json"] = new.root_node()
    with translated(location):
        (put or set_many)(session.store, values)
        new.snapshot_id = commit_session(repository, location, session, message, durable=durable)
    return new


def _room_for_frames(head: Head, segments: Sequence[Segment]) -> dict[str, bytes]:
    """zarr.json of the frame arrays, as long as they will be: chunks must lie inside."""
    out: dict[str, bytes] = {}
    for key, array in head.frames.items():
        more = sum(-(-len(s.frames.get(key, ())) // array.shard) for s in segments)
        node = _grown(head.metadata[key], (head.shards[key] + more) * array.shard)
        out[f"{key}/zarr.json"] = json.dumps(node).encode()
    return out


def _session(repository: icechunk.Repository, location: str, head: Head) -> icechunk.Session:
    """Refuses to write over what somebody else committed: then our lock was lost."""
    session = repository.writable_session(BRANCH)
    if session.snapshot_id != head.snapshot_id:
        raise StoreBusy(
            f"{location}: somebody else committed {session.snapshot_id} after our "
            f"{head.snapshot_id}; a store has one writer. Find the other process; ours stops here."
        )
    return session


def replace_episodes(
    repository: icechunk.Repository,
    location: str,
    head: Head,
    changed: dict[int, Episode],
    message: str,
    also: Callable[[Any], None] | None = None,
) -> Head:
    """Rewrites rows of the episode table, by number, in one commit.

    Args:
        also: further changes to the same session's store.
    """
    with translated(location):
        snapshot = Snapshot(location, repository, repository.lookup_branch(BRANCH))
        session = _session(repository, location, head)
    values: dict[str, bytes] = {}
    tail = head.table_tail
    for chunk in sorted({number // EPISODE_ROWS for number in changed}):
        data = snapshot.get_chunk("episodes", chunk, f"episodes/c/{chunk}")
        texts = unpack_strings(data, f"{location}: episodes, chunk {chunk}")
        texts = texts[: min(EPISODE_ROWS, head.n_episodes - chunk * EPISODE_ROWS)]
        for number, episode in changed.items():
            if number // EPISODE_ROWS == chunk:
                texts[number % EPISODE_ROWS] = episode.to_json()
        values[f"episodes/c/{chunk}"] = pack_strings(texts)
        if chunk == last_chunk(head.n_episodes):
            tail = texts
    with translated(location):
        set_many(session.store, values)
        if also is not None:
            also(session.store)
        snapshot_id = commit_session(repository, location, session, message)
    return replace(head, snapshot_id=snapshot_id, table_tail=list(tail))


def rewrite_tails(repository: icechunk.Repository, location: str, head: Head) -> None:
    """Writes the last chunk of every column again, from `head`."""
    chunk = head.rows // CHUNK_ROWS
    put_raw(
        repository,
        location,
        {
            head.columns[name].chunk_key(chunk): pack_column(head.columns[name], rows)
            for name, rows in head.tails.items()
            if len(rows)
        },
        "rewrite last chunks",
    )


def put_raw(
    repository: icechunk.Repository, location: str, values: dict[str, bytes], message: str
) -> None:
    """Commits ready-made chunks, by zarr key."""
    with translated(location):
        session = repository.writable_session(BRANCH)
        set_many(session.store, values)
        commit_session(repository, location, session, message)


def _grown(node: dict[str, Any], rows: int) -> dict[str, Any]:
    """The same zarr.json with another length; the same object when nothing changes."""
    shape = list(node["shape"])
    return node if shape[0] == rows else node | {"shape": [rows, *shape[1:]]}
