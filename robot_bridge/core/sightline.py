"""Where a chunk would lead the tool, and where that is in a camera's picture.

H steps of a chunk, A action size. Positions are in metres in the robot's base frame.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robot_bridge.core.kinematics import Kinematics
from robot_bridge.core.safety import displacement_name
from trajectory_store.contract import CameraView, Contract, ContractError

Vector = NDArray[np.float64]

NEAR_M = 0.01
"""What is nearer to a camera's plane than this is not in its picture."""


class ToolPath:
    """Tool positions of a chunk, by what `safety.workspace` says about the tool.

    Args:
        folder: where the contract lies; the workspace's model is relative to it.

    Raises:
        ContractError: the contract does not say where the tool is, or a model cannot be read.
    """

    def __init__(self, contract: Contract, folder: Path) -> None:
        box, action = contract.safety.workspace, contract.action
        self._kinematics: Kinematics | None = None
        self._columns: list[int] = []
        self._step_m: float | None = None
        self._states: tuple[str, ...] = ()
        if box is not None and box.model:
            self._kinematics = Kinematics(folder / box.model, box.site, action.names)
        elif box is not None and len(box.names) == 3:
            delta = action.mode == "delta"
            moves = [displacement_name(name) if delta else name for name in box.names]
            if any(name not in action.names for name in moves):
                raise ContractError(f"no actions {', '.join(moves)} that would move the tool")
            if delta and contract.view.step_m is None:
                raise ContractError(
                    "view.step_m is missing: how far one unit of a `delta` action moves the tool"
                )
            self._columns = [action.names.index(name) for name in moves]
            self._step_m = contract.view.step_m if delta else None
            self._states = box.names
        else:
            raise ContractError("safety.workspace does not say where the tool is")

    def positions(
        self, points: Vector, names: Sequence[str], measured: Vector
    ) -> NDArray[np.float64] | None:
        """(H, 3): the tool after each point (H, A) of a chunk.

        Args:
            names, measured: the joint states.

        Returns:
            None where the joint states do not say where the tool is.
        """
        if self._kinematics is not None:
            return np.array([self._kinematics.position(point) for point in points])
        where = points[:, self._columns]
        if self._step_m is None:
            return where
        if any(name not in names for name in self._states):
            return None
        here = measured[[list(names).index(name) for name in self._states]]
        return here + self._step_m * np.cumsum(where, axis=0)


def project(
    positions: NDArray[np.float64], view: CameraView, shape: Sequence[int]
) -> NDArray[np.float64]:
    """(n, 2) of the picture, x to the right and y down, in shares of its width and height.

    NaN for what is behind the camera; outside [0, 1] for what is beside its picture.

    Args:
        positions: (n, 3).
        shape: of the picture, (height, width, channels).
    """
    height, width = shape[0], shape[1]
    center = view.center_px or (width / 2, height / 2)
    seen = (positions - np.array(view.position_m)) @ _matrix(view.quat_wxyz)
    depth = np.where(seen[:, 2] > NEAR_M, seen[:, 2], np.nan)
    pixels = seen[:, :2] / depth[:, None] * np.array(view.focal_px) + np.array(center)
    return pixels / np.array([width, height])


def _matrix(quat_wxyz: Sequence[float]) -> NDArray[np.float64]:
    """Columns are the axes of the turned frame."""
    w, x, y, z = np.array(quat_wxyz, np.float64) / np.linalg.norm(quat_wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
