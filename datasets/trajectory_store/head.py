"""`Head`: what the last commit of a store left behind, and how it is read back."""

import json
from dataclasses import dataclass, field
from typing import Any

import icechunk
import numpy as np

from trajectory_store.coding import EPISODE_ROWS, unpack_column, unpack_strings
from trajectory_store.contract import Contract
from trajectory_store.errors import DamagedChunk, NewerFormat, NotAStore
from trajectory_store.repository import (
    Snapshot,
    is_url,
    open_repository,
    repository_exists,
    translated,
)
from trajectory_store.schema import (
    BRANCH,
    CHUNK_ROWS,
    FORMAT,
    FORMAT_VERSION,
    Column,
    FrameArray,
    columns,
    frame_arrays,
)


@dataclass
class Head:
    """What the last commit left behind: all a writer needs to go on."""

    snapshot_id: str
    writer: str
    contract: Contract
    contracts: dict[str, dict[str, Any]]
    """Every contract of the store, by hash."""
    features: list[str]
    """Bits of `late` and `dropped`; only ever appended to."""
    rows: int
    n_episodes: int
    last_segment: str
    columns: dict[str, Column]
    frames: dict[str, FrameArray]
    shards: dict[str, int]
    """Shards in use, per image feature."""
    metadata: dict[str, dict[str, Any]]
    """zarr.json of each array."""
    tails: dict[str, np.ndarray]
    """Rows of the last chunk of each column."""
    table_tail: list[str]
    """Episodes of the last chunk of the table, as JSON."""
    open_frames: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    """Of the running episode: where its last frames lie, (frame, offset, bytes)."""
    fed_by: dict[str, str] = field(default_factory=dict[str, str])
    """The one store whose uplink delivers here (`copying.Feeder`); {} for any other store."""

    def root_node(self) -> bytes:
        """zarr.json of the root group."""
        attributes = {
            "format": FORMAT,
            "writer": self.writer,
            "rows": self.rows,
            "episodes": self.n_episodes,
            "last_segment": self.last_segment,
            "shards": self.shards,
            "features": self.features,
            "contract": self.contract.sha256,
        }
        attributes |= {"fed_by": self.fed_by} if self.fed_by else {}
        node = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        return json.dumps(node).encode()


def read_root(snapshot: Snapshot) -> dict[str, Any]:
    """Attributes of the root group.

    Raises:
        NotAStore: an icechunk repository of somebody else.
        NewerFormat
    """
    raw = snapshot.get("zarr.json")
    attributes = json.loads(raw).get("attributes", {}) if raw else {}
    found = attributes.get("format", "")
    if not str(found).startswith("vla_post/store/"):
        raise NotAStore(
            f"{snapshot.location}: an icechunk repository without a trajectory store (format "
            f"{found!r}, expected {FORMAT!r})"
        )
    if int(found.rsplit("/", 1)[1]) > FORMAT_VERSION:
        raise NewerFormat(
            f"{snapshot.location}: format {found}, this software reads up to {FORMAT}; update it"
        )
    return attributes


def read_contracts(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    raw = snapshot.get("contracts/zarr.json")
    return json.loads(raw)["attributes"] if raw else {}


def is_store(location: str) -> bool:
    """False where a store may be created: nothing there, or a creation on S3 that was cut short.

    Raises:
        NotAStore: somebody else's repository.
    """
    if not repository_exists(location):
        return False
    repository = open_repository(location)
    with translated(location):
        snapshot = Snapshot(location, repository, repository.lookup_branch(BRANCH))
    if is_url(location) and snapshot.get("zarr.json") is None:
        return False
    read_root(snapshot)
    return True


def read_head(repository: icechunk.Repository, location: str, *, tolerant: bool = False) -> Head:
    """The state after the last commit, read from the store.

    Raises:
        DamagedChunk: a last chunk is damaged; with `tolerant` its rows become the fill value.
    """
    with translated(location):
        snapshot = Snapshot(location, repository, repository.lookup_branch(BRANCH))
    root = read_root(snapshot)
    contracts = read_contracts(snapshot)
    every = [Contract.model_validate(c) for c in contracts.values()]
    known_columns: dict[str, Column] = {}
    known_frames: dict[str, FrameArray] = {}
    for contract in every:
        known_columns |= columns(contract)
        known_frames |= {k: v for k, v in frame_arrays(contract).items() if k not in known_frames}
    metadata: dict[str, dict[str, Any]] = {}
    for name in [*known_columns, *known_frames, "episodes"]:
        raw = snapshot.get(f"{name}/zarr.json")
        if raw is None:
            raise NotAStore(f"{location}: array {name} is missing; run `vla-post store verify`")
        metadata[name] = json.loads(raw)
    for key, frames in known_frames.items():
        shard = int(metadata[key]["attributes"]["frames_per_shard"])
        known_frames[key] = FrameArray(key, frames.feature, shard)
    rows, count = int(root["rows"]), int(root["episodes"])
    tails: dict[str, np.ndarray] = {}
    for name, column in known_columns.items():
        chunk, inside = divmod(rows, CHUNK_ROWS)
        if inside:
            what = f"{location}: {name}, chunk {chunk}"
            data = snapshot.get_chunk(name, chunk, column.chunk_key(chunk))
            try:
                tails[name] = unpack_column(column, data, what)[:inside]
            except DamagedChunk:
                if not tolerant:
                    raise
                tails[name] = unpack_column(column, None, what)[:inside]
        else:
            tails[name] = np.empty((0, *column.shape), column.numpy)
    open_frames: dict[str, list[tuple[int, int, int]]] = {}
    for key, frames in known_frames.items() if rows else ():
        column, chunk = known_columns[frames.reference], (rows - 1) // CHUNK_ROWS
        data = snapshot.get_chunk(column.name, chunk, column.chunk_key(chunk))
        try:
            last = unpack_column(column, data, f"{location}: {column.name}, chunk {chunk}")
        except DamagedChunk:
            if not tolerant:
                raise
            continue
        frame, offset, size = last[(rows - 1) % CHUNK_ROWS].tolist()
        if frame >= 0:
            open_frames[key] = [(frame, offset, size)]
    table_tail: list[str] = []
    if count:
        chunk = last_chunk(count)
        data = snapshot.get_chunk("episodes", chunk, f"episodes/c/{chunk}")
        what = f"{location}: episodes, chunk {chunk}"
        table_tail = unpack_strings(data, what)[: count - chunk * EPISODE_ROWS]
    return Head(
        snapshot_id=snapshot.snapshot_id,
        writer=root["writer"],
        contract=Contract.model_validate(contracts[root["contract"]]),
        contracts=contracts,
        features=root["features"],
        rows=rows,
        n_episodes=count,
        last_segment=root["last_segment"],
        columns=known_columns,
        frames=known_frames,
        shards=dict(root["shards"]),
        metadata=metadata,
        tails=tails,
        table_tail=table_tail,
        open_frames=open_frames,
        fed_by=dict(root.get("fed_by", {})),
    )


def last_chunk(n_episodes: int) -> int:
    """Chunk of the table that holds the last episode, full or not: it may still be running."""
    return max(n_episodes - 1, 0) // EPISODE_ROWS
