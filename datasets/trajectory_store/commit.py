"""Turns segments of an episode into the chunks of one atomic commit.

A commit rewrites the last, partly filled chunk of each column and adds whole shards of frames;
shards are never rewritten and never shared by two episodes, so committed frames stay where they
are.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import icechunk
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, VLenUTF8Codec, ZstdCodec

from trajectory_store.coding import (
    EPISODE_ROWS,
    encode_frame,
    pack_column,
    pack_shard,
    pack_strings,
    unpack_column,
    unpack_strings,
)
from trajectory_store.contract import Contract
from trajectory_store.errors import DamagedChunk, NewerFormat, NotAStore, StoreBusy
from trajectory_store.repository import (
    BRANCH,
    Snapshot,
    is_url,
    open_repository,
    repository_exists,
    set_many,
    translated,
)
from trajectory_store.schema import (
    CHUNK_ROWS,
    FORMAT,
    FORMAT_VERSION,
    Column,
    Episode,
    FrameArray,
    columns,
    frame_arrays,
    require_compatible,
)


@dataclass
class Segment:
    """Some consecutive ticks of one episode, with its row of the table as it stands after them."""

    episode: Episode
    """`first_row` and `end_row` count from 0 at the episode's first tick."""
    data: dict[str, Any]
    """Column -> (n, ...). References to frames hold an index into `frames`, counted from the
    episode's first frame, in [:, 0]. Lists of rows until `pack` makes arrays of them."""
    frames: dict[str, list[Any]]
    """New in this segment; encoded bytes after `pack`."""
    first_frame: dict[str, int]
    """Number of the segment's first frame within the episode."""
    id: str = field(default_factory=lambda: uuid4().hex)
    n_ticks: int = 0

    def __post_init__(self) -> None:
        self.n_ticks = len(self.data["stamp_ns"])

    @property
    def n_bytes(self) -> int:
        """About; bounds memory, so it need not be exact."""
        images = (f for frames in self.frames.values() for f in frames)
        return 256 * self.n_ticks + sum(
            len(f) if isinstance(f, bytes) else f.nbytes for f in images
        )

    def pack(self, known: dict[str, Column], images: dict[str, FrameArray]) -> None:
        """Lists become arrays and images become bytes. In the background; again does nothing."""
        for name, values in self.data.items():
            if not isinstance(values, np.ndarray):
                column = known[name]
                rows = np.asarray(values, column.numpy)
                self.data[name] = rows.reshape(len(values), *column.shape)
        for key, frames in self.frames.items():
            feature = images[key].feature
            self.frames[key] = [
                f if isinstance(f, bytes) else encode_frame(feature, f) for f in frames
            ]


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

    def root(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "writer": self.writer,
            "rows": self.rows,
            "episodes": self.n_episodes,
            "last_segment": self.last_segment,
            "shards": self.shards,
            "features": self.features,
            "contract": self.contract.sha256,
        }


def group(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


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


def create(repository: icechunk.Repository, location: str, contract: Contract, writer: str) -> None:
    """First commit of a store: groups and empty arrays."""
    with translated(location):
        session = repository.writable_session(BRANCH)
        zarr.create_group(
            session.store,
            attributes={
                "format": FORMAT,
                "writer": writer,
                "rows": 0,
                "episodes": 0,
                "last_segment": "",
                "shards": dict.fromkeys(contract.images, 0),
                "features": list(contract.observations),
                "contract": contract.sha256,
            },
        )
        root = zarr.open_group(session.store, mode="r+")
        root.create_group("contracts", attributes={contract.sha256: contract.to_dict()})
        root.create_array(
            "episodes",
            shape=(0,),
            chunks=(EPISODE_ROWS,),
            dtype="string",
            serializer=VLenUTF8Codec(),
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
        )
        for column in columns(contract).values():
            _create_column(root, column, 0)
        for frames in frame_arrays(contract).values():
            _create_frames(root, frames)
        session.commit("create")


def _create_column(root: zarr.Group, column: Column, rows: int) -> None:
    root.create_array(
        column.name,
        shape=(rows, *column.shape),
        chunks=(CHUNK_ROWS, *column.shape),
        dtype=column.dtype,
        fill_value=column.fill,
        serializer=BytesCodec() if column.numpy.itemsize > 1 else BytesCodec(endian=None),
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        dimension_names=("tick", *(f"{column.name}_dim{i}" for i in range(len(column.shape)))),
        attributes={"names": list(column.names)} if column.names else {},
    )


def _create_frames(root: zarr.Group, frames: FrameArray) -> None:
    feature = frames.feature
    if feature.codec == "raw":
        serializer: Any = BytesCodec() if frames.numpy.itemsize > 1 else BytesCodec(endian=None)
    else:
        import imagecodecs.zarr as codecs  # registers the codecs; slow to import

        codecs.register_codecs()
        serializer = codecs.Jpeg(level=feature.quality) if feature.codec == "jpeg" else codecs.Png()
    root.create_array(
        frames.key,
        shape=(0, *feature.shape),
        chunks=(1, *feature.shape),
        shards=(frames.shard, *feature.shape),
        dtype=frames.numpy.name,
        serializer=serializer,
        compressors=[Crc32cCodec()],
        dimension_names=("frame", "y", "x", "channel"),
        attributes={"unit": feature.unit, "frames_per_shard": frames.shard},
    )


def evolve(repository: icechunk.Repository, location: str, head: Head, contract: Contract) -> None:
    """Makes an existing store fit for another contract: adds features and tasks, or refuses.

    Raises:
        SchemaMismatch
    """
    require_compatible(head.contract, contract, where=location)
    for old in head.contracts.values():
        require_compatible(Contract.model_validate(old), contract, where=location)
    with translated(location):
        session = repository.writable_session(BRANCH)
        root = zarr.open_group(session.store, mode="r+")
        for column in columns(contract).values():
            if column.name not in head.columns:
                _create_column(root, column, head.rows)
        for frames in frame_arrays(contract).values():
            if frames.key not in head.frames:
                _create_frames(root, frames)
        shards = dict.fromkeys(contract.images, 0) | head.shards
        features = head.features + [k for k in contract.observations if k not in head.features]
        root.attrs.update({"shards": shards, "features": features, "contract": contract.sha256})
        root["contracts"].attrs.update({contract.sha256: contract.to_dict()})
        session.commit("schema")


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
        chunk = _last_chunk(count)
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
    )


def commit(
    repository: icechunk.Repository,
    location: str,
    head: Head,
    segments: Sequence[Segment],
    message: str = "ticks",
) -> Head:
    """Writes the segments after `head` in one atomic commit and returns the new head.

    Raises:
        StoreUnavailable: nothing of it was committed, or the answer was lost; `read_head` tells.
    """
    values: dict[str, bytes] = {}
    rows, table, n_episodes = head.rows, list(head.table_tail), head.n_episodes
    table_first = n_episodes - len(table)
    """Number of the first episode that `table` holds."""
    shards, metadata = dict(head.shards), dict(head.metadata)
    parts: dict[str, list[np.ndarray]] = {name: [tail] for name, tail in head.tails.items()}
    open_frames = {k: list(v) for k, v in head.open_frames.items()}

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
                values[array.shard_key(shard)] = data
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
        table_tail=table[_last_chunk(n_episodes) * EPISODE_ROWS - table_first :],
        open_frames=open_frames,
    )
    values["zarr.json"] = group(new.root())
    with translated(location):
        session = _session(repository, location, head)
        set_many(session.store, values)
        new.snapshot_id = session.commit(message)
    return new


def _last_chunk(n_episodes: int) -> int:
    """Chunk of the table that holds the last episode, full or not: it may still be running."""
    return max(n_episodes - 1, 0) // EPISODE_ROWS


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
        if chunk == _last_chunk(head.n_episodes):
            tail = texts
    with translated(location):
        set_many(session.store, values)
        if also is not None:
            also(session.store)
        snapshot_id = session.commit(message)
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
        session.commit(message)


def _grown(node: dict[str, Any], rows: int) -> dict[str, Any]:
    """The same zarr.json with another length; the same object when nothing changes."""
    shape = list(node["shape"])
    return node if shape[0] == rows else node | {"shape": [rows, *shape[1:]]}
