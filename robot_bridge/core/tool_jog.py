"""Tool velocities to joint velocities: damped least squares on the contract's kinematic model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
DAMPING = 0.01
"""Bounds joint rates at singular poses: by |tool| / (2 * DAMPING)."""


class ToolJog:
    """One arm. Needs mujoco, which reads MJCF and URDF.

    Args:
        site: site (MJCF) or body (URDF link) that is the tool.
        names: the action's; those that are no joint of the model (a gripper) never move.

    Raises:
        ValueError: the model lacks the tool or every joint; the message names what it has.
    """

    def __init__(self, model: Path, site: str, names: Sequence[str]) -> None:
        import mujoco

        mj: Any = mujoco
        self._mj = mj
        self._model = mj.MjModel.from_xml_path(str(model))
        self._data = mj.MjData(self._model)
        self._site = mj.mj_name2id(self._model, mj.mjtObj.mjOBJ_SITE, site)
        self._body = mj.mj_name2id(self._model, mj.mjtObj.mjOBJ_BODY, site)
        if self._site < 0 and self._body < 0:
            raise ValueError(f"{model}: no site and no body is called {site!r}")
        ids = [mj.mj_name2id(self._model, mj.mjtObj.mjOBJ_JOINT, name) for name in names]
        if max(ids) < 0:
            raise ValueError(f"{model}: none of the joints {', '.join(names)} is in the model")
        self._from = [i for i, joint in enumerate(ids) if joint >= 0]
        joints = [joint for joint in ids if joint >= 0]
        self._qpos = self._model.jnt_qposadr[joints]
        self._dof = self._model.jnt_dofadr[joints]
        self._jacobian = np.zeros((6, self._model.nv))

    def joint_rates(self, position: Vector, tool: Vector) -> Vector:
        """(A,) per second.

        Args:
            position: (A,) joint positions.
            tool: (6,) m/s and rad/s along and about the base frame's axes.
        """
        mj, data = self._mj, self._data
        data.qpos[self._qpos] = position[self._from]
        mj.mj_kinematics(self._model, data)
        mj.mj_comPos(self._model, data)
        if self._site >= 0:
            mj.mj_jacSite(self._model, data, self._jacobian[:3], self._jacobian[3:], self._site)
        else:
            mj.mj_jacBody(self._model, data, self._jacobian[:3], self._jacobian[3:], self._body)
        jacobian = self._jacobian[:, self._dof]
        gram = jacobian @ jacobian.T + DAMPING**2 * np.eye(6)
        out = np.zeros(len(position))
        out[self._from] = jacobian.T @ np.linalg.solve(gram, tool)
        return out
