"""Where the tool is for given joint positions, and the box that it must not leave.

The model is the MJCF or URDF file that the contract names; MuJoCo reads both and is used for its
kinematics alone (tens of microseconds a pose). Its world frame is the robot's base frame. Joints
of the model that the action does not command (fingers) stay at their zero.

A: number of joints of the action feature.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trajectory_store.contract import ContractError, Workspace

Vector = NDArray[np.float64]

MARGIN_M = 1e-3
"""How far inside the box a command is moved that points out of it."""
_UNIT_INERTIA = {"ixx": "1", "iyy": "1", "izz": "1", "ixy": "0", "ixz": "0", "iyz": "0"}
"""MuJoCo wants one for every moving body; kinematics does not look at it."""
_DAMPING = 0.02
_STEPS = 8


class Kinematics:
    """Position of one site or link.

    Args:
        names: joints of the action, in the order of its vectors.

    Raises:
        ContractError: no file, not a model, no such site or link, or none of the joints is in it.
    """

    def __init__(self, path: Path, site: str, names: Sequence[str]) -> None:
        try:
            import mujoco as _mujoco
        except ImportError:
            raise ContractError(
                "safety.workspace.model needs MuJoCo for forward kinematics; install "
                "vla-post[robot], or give the box by `names`"
            ) from None
        self._mujoco: Any = _mujoco
        self._model: Any = _load(_mujoco, path)
        self._data: Any = self._mujoco.MjData(self._model)
        self._is_site, self._point = self._find(path, site)
        index: list[int] = []
        joints: list[int] = []
        for i, name in enumerate(names):
            joint = self._id("JOINT", name)
            if joint >= 0:
                index.append(i)
                joints.append(joint)
        if not joints:
            raise ContractError(
                f"{path}: none of the action's joints ({', '.join(names)}) is in this model; it "
                f"has {', '.join(self._known('JOINT')) or 'no joints'}"
            )
        free = {int(self._mujoco.mjtJoint.mjJNT_FREE), int(self._mujoco.mjtJoint.mjJNT_BALL)}
        if any(int(self._model.jnt_type[j]) in free for j in joints):
            raise ContractError(f"{path}: the action's joints must be hinges or slides")
        self._index = np.array(index)
        self._position = self._model.jnt_qposadr[joints]
        self._velocity = self._model.jnt_dofadr[joints]
        self._jacobian = np.zeros((3, self._model.nv))
        self._size = len(names)

    def position(self, joints: Vector) -> Vector:
        """(3,) in m of the point, for joint positions (A,)."""
        self._data.qpos[self._position] = joints[self._index]
        self._mujoco.mj_kinematics(self._model, self._data)
        where = self._data.site_xpos if self._is_site else self._data.xpos
        return where[self._point].copy()

    def jacobian(self, joints: Vector) -> tuple[Vector, Vector]:
        """((3,) position, (3, A) derivative by the action's joints)."""
        position = self.position(joints)
        self._mujoco.mj_comPos(self._model, self._data)
        find = self._mujoco.mj_jacSite if self._is_site else self._mujoco.mj_jacBody
        find(self._model, self._data, self._jacobian, None, self._point)
        out = np.zeros((3, self._size))
        out[:, self._index] = self._jacobian[:, self._velocity]
        return position, out

    def twist_jacobian(self, joints: Vector) -> Vector:
        """(6, A): velocity of the point and rotation of its body, by the action's joints."""
        self.position(joints)
        self._mujoco.mj_comPos(self._model, self._data)
        find = self._mujoco.mj_jacSite if self._is_site else self._mujoco.mj_jacBody
        turning = np.zeros_like(self._jacobian)
        find(self._model, self._data, self._jacobian, turning, self._point)
        out = np.zeros((6, self._size))
        out[:, self._index] = np.vstack([self._jacobian, turning])[:, self._velocity]
        return out

    def _id(self, kind: str, name: str) -> int:
        return self._mujoco.mj_name2id(
            self._model, getattr(self._mujoco.mjtObj, f"mjOBJ_{kind}"), name
        )

    def _known(self, kind: str) -> list[str]:
        count = {"JOINT": self._model.njnt, "SITE": self._model.nsite, "BODY": self._model.nbody}
        of = getattr(self._mujoco.mjtObj, f"mjOBJ_{kind}")
        names = (self._mujoco.mj_id2name(self._model, of, i) for i in range(count[kind]))
        return [name for name in names if name]

    def _find(self, path: Path, site: str) -> tuple[bool, int]:
        for kind in ("SITE", "BODY"):
            number = self._id(kind, site)
            if number >= 0:
                return kind == "SITE", number
        known = self._known("SITE") + self._known("BODY")
        raise ContractError(
            f"{path}: safety.workspace.site is {site!r}, which is neither a site nor a link of "
            f"this model; it has {', '.join(known)}"
        )


class ToolBox:
    """Keeps the tool inside the contract's workspace box."""

    def __init__(self, box: Workspace, kinematics: Kinematics) -> None:
        self._kinematics = kinematics
        self._low, self._high = np.array(box.low), np.array(box.high)

    def outside_m(self, joints: Vector) -> float:
        """How far the tool is outside the box; 0 inside."""
        tool = self._kinematics.position(joints)
        return float(np.maximum(self._low - tool, tool - self._high).max().clip(min=0.0))

    def nearest(self, joints: Vector, low: Vector, high: Vector) -> Vector:
        """(A,) near `joints` whose tool position is inside, by damped least squares.

        A command that points out of the box so becomes one along its wall. Where the steps do not
        get inside, the gate stops the robot.
        """
        inner_low, inner_high = self._low + MARGIN_M, self._high - MARGIN_M
        for _ in range(_STEPS):
            tool, jacobian = self._kinematics.jacobian(joints)
            shift = np.clip(tool, inner_low, inner_high) - tool
            if not shift.any():
                break
            square = jacobian @ jacobian.T + _DAMPING**2 * np.eye(3)
            joints = np.clip(joints + jacobian.T @ np.linalg.solve(square, shift), low, high)
        return joints


def _load(mujoco: Any, path: Path) -> Any:
    """Compiles an MJCF or URDF file."""
    try:
        if path.suffix.lower() == ".urdf":
            return mujoco.MjModel.from_xml_string(_bones(path))
        return mujoco.MjModel.from_xml_path(str(path))
    except OSError as error:
        raise ContractError(
            f"{path}: safety.workspace.model cannot be read ({error.strerror or error}); the path "
            "is relative to the contract's folder"
        ) from error
    except (ValueError, ElementTree.ParseError) as error:
        if not path.exists():
            raise ContractError(
                f"{path}: no such file; safety.workspace.model is relative to the contract's folder"
            ) from error
        raise ContractError(f"{path}: not a model that MuJoCo reads ({error})") from error


def _bones(path: Path) -> str:
    """A URDF without its shapes, whose meshes lie in ROS packages, and with every link kept."""
    root = ElementTree.parse(path).getroot()
    for link in root.findall("link"):
        for shape in (*link.findall("visual"), *link.findall("collision")):
            link.remove(shape)
        if link.find("inertial") is None:
            inertial = ElementTree.SubElement(link, "inertial")
            ElementTree.SubElement(inertial, "mass", {"value": "1"})
            ElementTree.SubElement(inertial, "inertia", _UNIT_INERTIA)
    for old in root.findall("mujoco"):
        root.remove(old)
    extension = ElementTree.SubElement(root, "mujoco")
    ElementTree.SubElement(
        extension,
        "compiler",
        fusestatic="false",
        balanceinertia="true",
        boundmass="1e-6",
        boundinertia="1e-9",
    )
    return ElementTree.tostring(root, encoding="unicode")
