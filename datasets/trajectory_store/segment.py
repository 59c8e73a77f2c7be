"""`Segment`: consecutive ticks of one episode on their way into a store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import numpy as np

from trajectory_store.coding import encode_frame
from trajectory_store.schema import Column, Episode, FrameArray


@dataclass
class Segment:
    """Some consecutive ticks of one episode, with its row of the table as it stands after them."""

    episode: Episode
    """`first_row` and `end_row` count from 0 at the episode's first tick."""
    data: dict[str, Any]
    """Column -> (n, ...). References to frames hold an index into `frames`, counted from the
    episode's first frame, in [:, 0]. Lists of rows until `pack` makes arrays of them."""
    frames: Mapping[str, Sequence[Any]]
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
        self.frames = {
            key: [
                f if isinstance(f, bytes) else encode_frame(images[key].feature, f) for f in frames
            ]
            for key, frames in self.frames.items()
        }
