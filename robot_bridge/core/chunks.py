"""A policy's chunk as it comes over the wire: `policy/action_chunk`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robot_bridge.core.joints import JointReader
from trajectory_store.contract import Contract

POLICY_ERROR = "error: "
"""Opens the frame_id of an empty chunk by which the runner says that its policy failed."""


@dataclass(frozen=True)
class Chunk:
    stamp_ns: int
    version: int
    chunk_id: int
    points: NDArray[np.float64]
    """(H, A) in contract order; point i is the command of the tick at stamp + i * dt."""


class ChunkReader:
    """Reads the chunks of one cell."""

    def __init__(self, contract: Contract) -> None:
        self._horizon = contract.chunk_horizon
        self._names = JointReader(contract.action.names, exact=True)

    def read(self, stamp_ns: int, names: Any, points: Sequence[Any], frame_id: str) -> Chunk:
        """A chunk that the contract allows.

        Args:
            points: H points of A values in the order of `names`.
            frame_id: `VERSION#CHUNK`, or `POLICY_ERROR` and a reason.

        Raises:
            ValueError: wrong names, length or label, or not finite; or the policy's own reason.
        """
        if frame_id.startswith(POLICY_ERROR):
            raise ValueError(frame_id.removeprefix(POLICY_ERROR))
        version, _, number = frame_id.partition("#")
        if not (version.isdecimal() and number.isdecimal()):
            raise ValueError(f"frame_id is {frame_id!r}; expected VERSION#CHUNK, two integers")
        if len(points) != self._horizon:
            raise ValueError(
                f"it has {len(points)} points; the contract's chunk_horizon is {self._horizon}"
            )
        rows = np.stack([self._names.read(names, p) for p in points])
        if not np.isfinite(rows).all():
            raise ValueError("it holds NaN or infinity")
        return Chunk(stamp_ns, int(version), int(number), rows)
