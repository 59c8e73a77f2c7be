"""The empty store: its groups and arrays, and what another contract adds to them."""

from typing import Any

import icechunk
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, VLenUTF8Codec, ZstdCodec

from trajectory_store.coding import EPISODE_ROWS
from trajectory_store.contract import Contract
from trajectory_store.durability import commit_session
from trajectory_store.head import Head
from trajectory_store.repository import translated
from trajectory_store.schema import (
    BRANCH,
    CHUNK_ROWS,
    FORMAT,
    Column,
    FrameArray,
    columns,
    frame_arrays,
    require_compatible,
)


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
        commit_session(repository, location, session, "schema")
