"""The difference of two safetensors files, bit for bit: what a new version sends over the network.

Floats that moved a little have bit patterns that are close as integers, so per tensor

    difference = zigzag( bits(new) - bits(base) )        in integers of the tensor's own width

has leading zeros, which grouping the bytes by significance (byte shuffle) and zstd remove. Tensors
that did not change take no room, so training an adapter or a head alone sends that alone. Works
for every dtype; nothing is rounded.
"""

import json
import struct

import imagecodecs
import numpy as np

_MAGIC = b"VPDELTA1"
_LEVEL = 3
_WIDTH = {
    name: width
    for width, names in ((8, "F64 I64 U64"), (4, "F32 I32 U32"), (2, "F16 BF16 I16 U16"))
    for name in names.split()
}
"""Bytes of an element; other dtypes are taken byte by byte."""


class NoDelta(ValueError):
    """The two files do not hold the same tensors, or one is no safetensors file."""


def encode(base: bytes, new: bytes) -> bytes:
    """What makes `new` of `base`.

    Raises:
        NoDelta: names, shapes, dtypes or places of tensors differ.
    """
    header, data = _split(base)
    other, wanted = _split(new)
    if header != other or len(data) != len(wanted):
        raise NoDelta("the files do not hold the same tensors")
    entries: list[tuple[str, int]] = []
    parts: list[bytes] = []
    for name, width, start, stop in _tensors(header):
        if data[start:stop] == wanted[start:stop]:
            continue
        unsigned = np.dtype(f"<u{width}")
        a = np.frombuffer(data[start:stop], unsigned)
        b = np.frombuffer(wanted[start:stop], unsigned)
        signed = (b - a).view(f"<i{width}")  # wraps around, and `decode` wraps back
        zigzag = ((signed << 1) ^ (signed >> (8 * width - 1))).view(np.uint8)
        shuffled = np.ascontiguousarray(zigzag.reshape(-1, width).T)
        packed = bytes(imagecodecs.zstd_encode(shuffled.tobytes(), level=_LEVEL))
        entries.append((name, len(packed)))
        parts.append(packed)
    index = json.dumps(entries).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(index)), index, *parts])


def decode(base: bytes, delta: bytes) -> bytes:
    """The new file. Whether it is the right one, its hash says.

    Raises:
        NoDelta: `delta` is none, or was not made on `base`.
    """
    if not delta.startswith(_MAGIC):
        raise NoDelta("not a difference of two safetensors files")
    header, data = _split(base)
    (length,) = struct.unpack_from("<I", delta, len(_MAGIC))
    at = len(_MAGIC) + 4
    entries: list[tuple[str, int]] = json.loads(delta[at : at + length])
    at += length
    places = {name: (width, start, stop) for name, width, start, stop in _tensors(header)}
    out = bytearray(data)
    for name, size in entries:
        if name not in places:
            raise NoDelta(f"made on another file: tensor {name!r} is not in the base")
        width, start, stop = places[name]
        shuffled = np.frombuffer(imagecodecs.zstd_decode(delta[at : at + size]), np.uint8)
        at += size
        if len(shuffled) != stop - start:
            raise NoDelta(f"made on another file: tensor {name!r} has another size")
        zigzag = np.ascontiguousarray(shuffled.reshape(width, -1).T).view(f"<u{width}").ravel()
        one = np.array(1, zigzag.dtype)
        difference = (zigzag >> one) ^ (~(zigzag & one) + one)
        bits = np.frombuffer(data[start:stop], f"<u{width}") + difference
        out[start:stop] = bits.tobytes()
    return base[: len(base) - len(data)] + bytes(out)


def _split(file: bytes) -> tuple[bytes, memoryview]:
    """Header (JSON) and tensor bytes of a safetensors file."""
    if len(file) < 8:
        raise NoDelta("no safetensors file")
    (length,) = struct.unpack_from("<Q", file)
    if length > len(file) - 8:
        raise NoDelta("no safetensors file")
    return file[8 : 8 + length], memoryview(file)[8 + length :]


def _tensors(header: bytes) -> list[tuple[str, int, int, int]]:
    """(name, bytes of an element, start, stop) of each tensor."""
    try:
        entries = json.loads(header)
        return [
            (name, _WIDTH.get(entry["dtype"], 1), *entry["data_offsets"])
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoDelta(f"no safetensors file ({error})") from error
