"""Segments that the store does not take wait here, on a local disk, bounded and in order.

One file per segment: a line of JSON (what), then the arrays and frames. A file is written under a
temporary name, synced and renamed, so a file that has its name is whole. Delivery is exactly once
because the store's last commit names the last segment in it (`last_segment`).
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trajectory_store.durability import sync
from trajectory_store.errors import SpoolFull, StoreUnavailable
from trajectory_store.schema import Episode
from trajectory_store.segment import Segment

log = logging.getLogger(__name__)


def default_folder(location: str) -> Path:
    """Under $XDG_STATE_HOME, one folder per store."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    name = hashlib.sha256(location.encode()).hexdigest()[:16]
    return Path(state) / "vla_post" / "spool" / name


class Spool:
    """The waiting room of one store."""

    def __init__(self, location: str, folder: str | Path | None, limit_bytes: int) -> None:
        self.folder = default_folder(location) if folder is None else Path(folder)
        self._limit = limit_bytes
        self._files: dict[str, tuple[Path, int]] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._files)

    @property
    def n_bytes(self) -> int:
        return sum(size for _, size in self._files.values())

    def left_behind(self, last_segment: str) -> Iterator[Segment]:
        """Segments of an earlier process that the store does not have yet, in order."""
        found = sorted(self.folder.glob("*.segment")) if self.folder.is_dir() else []
        names = [p.stem.split("-", 1)[1] for p in found]
        if last_segment in names:
            found = found[names.index(last_segment) + 1 :]
        if found:
            log.warning("%s: delivering %d segments of an earlier run", self.folder, len(found))
        for path in found:
            yield read_segment(path)

    def clear(self) -> None:
        for path in self.folder.glob("*.segment") if self.folder.is_dir() else ():
            path.unlink(missing_ok=True)
        self._files.clear()

    def add(self, segments: list[Segment]) -> None:
        """Writes what is not here yet and lets its memory go.

        Raises:
            SpoolFull: the bound is reached; the segment stays in memory.
            StoreUnavailable: the spool's own disk fails.
        """
        for segment in segments:
            if segment.id in self._files:
                segment.data, segment.frames = {}, {}
                continue
            if self.n_bytes + segment.n_bytes > self._limit:
                raise SpoolFull(
                    f"{self.folder}: the spool holds {self.n_bytes >> 20} MiB, its limit is "
                    f"{self._limit >> 20} MiB. Bring the store back or raise the limit."
                )
            self._number += 1
            path = self.folder / f"{self._number:09d}-{segment.id}.segment"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                size = write_segment(path, segment)
            except OSError as error:
                raise StoreUnavailable(f"{self.folder}: cannot spool ({error})") from error
            self._files[segment.id] = (path, size)
            segment.data, segment.frames = {}, {}

    def restore(self, segment: Segment) -> None:
        """Reads a spooled segment's arrays and frames back."""
        if segment.id in self._files and not segment.data:
            whole = read_segment(self._files[segment.id][0])
            segment.data, segment.frames = whole.data, whole.frames

    def remove(self, segments: list[Segment]) -> None:
        for segment in segments:
            path, _ = self._files.pop(segment.id, (None, 0))
            if path is not None:
                path.unlink(missing_ok=True)


def write_segment(path: Path, segment: Segment) -> int:
    """Atomically; returns the size in bytes. The segment is packed."""
    arrays = {k: np.ascontiguousarray(v) for k, v in segment.data.items()}
    header: dict[str, Any] = {
        "id": segment.id,
        "episode": segment.episode.to_json(),
        "first_frame": segment.first_frame,
        "data": {k: [a.dtype.str, list(a.shape)] for k, a in arrays.items()},
        "frames": {k: [len(f) for f in frames] for k, frames in segment.frames.items()},
    }
    temporary = path.with_suffix(".part")
    try:
        with temporary.open("wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            for array in arrays.values():
                file.write(array.tobytes())
            for frames in segment.frames.values():
                for frame in frames:
                    file.write(frame)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        temporary.replace(path)
        sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return size


def read_segment(path: Path) -> Segment:
    with path.open("rb") as file:
        header = json.loads(file.readline())
        data: dict[str, Any] = {}
        for name, (kind, shape) in header["data"].items():
            dtype = np.dtype(kind)
            size = dtype.itemsize * int(np.prod(shape, dtype=int))
            data[name] = np.frombuffer(file.read(size), dtype).reshape(shape)
        frames = {k: [file.read(n) for n in sizes] for k, sizes in header["frames"].items()}
    episode = Episode.from_json(header["episode"])
    return Segment(episode, data, frames, header["first_frame"], header["id"])
