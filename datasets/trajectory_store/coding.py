"""Bytes of a chunk: columns, the episode table, and shards of encoded frames.

Chunks are written and read here rather than through zarr's pipeline, because a frame must reach the
disk as the camera encoded it and a commit must not hold the interpreter for long. The layouts are
zarr v3's own (`bytes`, `vlen-utf8`, `zstd`, `crc32c`, `sharding_indexed`), so any zarr reader
opens them.
"""

import struct
from collections.abc import Sequence
from typing import Any

import google_crc32c
import imagecodecs
import numpy as np
import simplejpeg

from trajectory_store.contract import ObservationFeature
from trajectory_store.errors import BadTick, DamagedChunk
from trajectory_store.schema import CHUNK_ROWS, Column, frame_dtype

EPISODE_ROWS = 64
"""Episodes in a chunk of the table."""
_MISSING = 2**64 - 1


def seal(data: bytes) -> bytes:
    """Appends the crc32c that zarr's codec of that name expects."""
    return data + struct.pack("<I", google_crc32c.value(data))


def unseal(data: bytes | None, what: str) -> bytes:
    """Raises DamagedChunk when the checksum, or everything, is gone."""
    if data is None:
        raise DamagedChunk(f"{what}: the chunk is missing. {_REMEDY}")
    if len(data) < 4 or struct.unpack("<I", data[-4:])[0] != google_crc32c.value(data[:-4]):
        raise DamagedChunk(f"{what}: {len(data)} bytes whose checksum does not match. {_REMEDY}")
    return data[:-4]


_REMEDY = "Run `vla-post store verify` for the extent and `repair` to set the episodes aside."


def pack_column(column: Column, rows: np.ndarray) -> bytes:
    """Up to CHUNK_ROWS rows, padded with the fill value."""
    chunk = np.full((CHUNK_ROWS, *column.shape), column.fill, column.numpy.newbyteorder("<"))
    chunk[: len(rows)] = rows
    return seal(bytes(imagecodecs.zstd_encode(chunk.tobytes(), level=1)))


def unpack_column(column: Column, data: bytes | None, what: str) -> np.ndarray:
    """(CHUNK_ROWS, ...) array; a chunk that was never written holds the fill value."""
    if data is None:
        return np.full((CHUNK_ROWS, *column.shape), column.fill, column.numpy)
    raw = imagecodecs.zstd_decode(unseal(data, what))
    if len(raw) != CHUNK_ROWS * column.row_bytes:
        raise DamagedChunk(f"{what}: {len(raw)} bytes, expected {CHUNK_ROWS * column.row_bytes}")
    return np.frombuffer(raw, column.numpy).reshape(CHUNK_ROWS, *column.shape)


def pack_strings(texts: list[str]) -> bytes:
    """A chunk of the episode table (`vlen-utf8`)."""
    encoded = [t.encode() for t in texts] + [b""] * (EPISODE_ROWS - len(texts))
    raw = struct.pack("<I", len(encoded))
    raw += b"".join(struct.pack("<I", len(e)) + e for e in encoded)
    return seal(bytes(imagecodecs.zstd_encode(raw, level=1)))


def unpack_strings(data: bytes | None, what: str) -> list[str]:
    raw = bytes(imagecodecs.zstd_decode(unseal(data, what)))
    (count,) = struct.unpack_from("<I", raw)
    texts, at = [], 4
    for _ in range(count):
        (size,) = struct.unpack_from("<I", raw, at)
        texts.append(raw[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return texts


def pack_shard(frames: Sequence[bytes], size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """A shard of `size` frames, of which the first `len(frames)` are there.

    Returns:
        The shard, and (offset, bytes) of each frame, its checksum not counted.
    """
    parts: list[bytes] = []
    index = np.full((size, 2), _MISSING, "<u8")
    spans: list[tuple[int, int]] = []
    at = 0
    for i, frame in enumerate(frames):
        sealed = seal(frame)
        parts.append(sealed)
        index[i] = at, len(sealed)
        spans.append((at, len(frame)))
        at += len(sealed)
    return b"".join(parts) + seal(index.tobytes()), spans


def unpack_index(data: bytes, size: int, what: str) -> list[tuple[int, int] | None]:
    """(offset, bytes with checksum) of each frame of a whole shard."""
    raw = unseal(data[-(16 * size + 4) :], f"{what} (index)")
    pairs = np.frombuffer(raw, "<u8").reshape(size, 2)
    return [None if a == _MISSING else (int(a), int(n)) for a, n in pairs]


def encode_frame(feature: ObservationFeature, image: np.ndarray) -> bytes:
    """(height, width, C) -> bytes in the feature's codec."""
    if feature.codec == "raw":
        return np.ascontiguousarray(image).tobytes()
    if feature.codec == "png":
        return bytes(imagecodecs.png_encode(image if image.shape[2] > 1 else image[..., 0]))
    space = "GRAY" if image.shape[2] == 1 else "RGB"
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=feature.quality, colorspace=space
    )


def decode_frame(
    feature: ObservationFeature, data: bytes, out: np.ndarray | None = None
) -> np.ndarray:
    """Bytes -> (height, width, C); into `out` (contiguous) when given."""
    dtype = frame_dtype(feature)
    if feature.codec == "jpeg":
        space = "GRAY" if feature.shape[2] == 1 else "RGB"
        return simplejpeg.decode_jpeg(data, colorspace=space, buffer=out)
    if feature.codec == "png":
        image = imagecodecs.png_decode(data).reshape(feature.shape)
    else:
        image = np.frombuffer(data, dtype).reshape(feature.shape)
    if out is None:
        return image.copy()
    out[...] = image
    return out


def check_frame(key: str, feature: ObservationFeature, value: Any) -> bytes | np.ndarray:
    """Encoded bytes as they are, or a copy of an array, after comparing with the contract.

    Raises:
        BadTick
    """
    expected = tuple(feature.shape)
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        found = _encoded_shape(key, feature, data)
        if found[:2] != expected[:2]:
            raise BadTick(
                f"{key}: found a frame of {found[1]} x {found[0]}, expected "
                f"{expected[1]} x {expected[0]}; correct `shape` in the contract or the camera"
            )
        return data
    image = np.asarray(value)
    if image.shape != expected or image.dtype != frame_dtype(feature):
        raise BadTick(
            f"{key}: found an image {image.shape} {image.dtype}, expected {expected} "
            f"{frame_dtype(feature)}"
        )
    return image.copy()


def _encoded_shape(key: str, feature: ObservationFeature, data: bytes) -> tuple[int, ...]:
    if feature.codec == "jpeg":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise BadTick(f"{key}: {len(data)} bytes that are not a JPEG ({error})") from None
        return int(height), int(width)
    if feature.codec == "png":
        if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 33:
            raise BadTick(f"{key}: {len(data)} bytes that are not a PNG")
        width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
        wanted = 8 * frame_dtype(feature).itemsize, {1: 0, 3: 2}[feature.shape[2]]
        if (bits, colour) != wanted:
            # Read as another kind, the numbers would mean something else: 8 bit are no millimetres.
            raise BadTick(
                f"{key}: found a PNG of {bits} bits and colour type {colour}, expected {wanted[0]} "
                f"bits and type {wanted[1]} for {feature.unit} with {feature.shape[2]} channels"
            )
        return height, width
    size = int(np.prod(feature.shape)) * frame_dtype(feature).itemsize
    if len(data) != size:
        raise BadTick(f"{key}: found {len(data)} raw bytes, expected {size}")
    return feature.shape
