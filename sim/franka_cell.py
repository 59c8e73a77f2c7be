"""A Franka-like arm as a cell: seven position-controlled joints, a gripper, three cameras.

Physics at 500 Hz, control at the contract's rate. The command is absolute: joint angles in rad and
the distance between the fingers in m; the drive follows it no faster than the contract's velocity.
"""

from functools import cache
from pathlib import Path
from typing import Any

import mujoco as _mujoco
import numpy as np
from jaxtyping import Float

from sim.cell import JOINT_TOPIC, SCENE_TOPIC, Cell, Stream
from trajectory_store import Contract

mujoco: Any = _mujoco  # its names come from compiled modules, which pyright cannot read

MODEL = Path(__file__).with_name("franka_arm.xml")
ARM_NAMES = tuple(f"joint{n}" for n in range(1, 8))
JOINT_NAMES = (*ARM_NAMES, "gripper")
SCENE_NAMES = (
    "hand_x", "hand_y", "hand_z", *JOINT_NAMES,
    "cube_x", "cube_y", "cube_z", "cube_yaw", "goal_x", "goal_y", "goal_z",
    "success", "task_reward",
)  # fmt: skip
"""`hand` is the point between the finger tips. The cube has no front: its yaw is within +-pi/4."""
TASKS = ("lift-cube", "place-cube")
HOME = np.array([0.0, 0.0, 0.0, -np.pi / 2, 0.0, np.pi / 2, np.pi / 4])
CUBE = 0.04
"""Edge, in m."""
LIFTED = 0.1
"""The cube's height above its place on the table that counts as lifted."""
NEAR = 0.025
"""Distance from the goal that counts as on it."""


class FrankaCell(Cell):
    """`vla_post/Franka-v0`; see `Cell` for spaces, options and info."""

    scene_names = SCENE_NAMES
    render_camera = "front"

    def __init__(
        self,
        contract: Contract | str | Path,
        task: str | None = None,
        *,
        images: bool = True,
        render_mode: str | None = None,
    ) -> None:
        self._model = arm_model()
        self._data = mujoco.MjData(self._model)
        self._scene = np.zeros(len(SCENE_NAMES))
        self._joints = Stream(JOINT_NAMES, np.zeros(8), np.zeros(8), np.zeros(8))
        self.streams = {
            JOINT_TOPIC: self._joints,
            SCENE_TOPIC: Stream(SCENE_NAMES, self._scene),
        }
        super().__init__(contract, task, images=images, render_mode=render_mode)
        if self.contract.action.names != JOINT_NAMES or self.contract.action.mode != "absolute":
            raise ValueError(
                f"the Franka cell takes absolute commands of {', '.join(JOINT_NAMES)}; contract "
                f"{self.contract.cell!r} has {self.contract.action.mode} "
                f"{', '.join(self.contract.action.names)}"
            )
        self._substeps = round(1.0 / (self.contract.control_hz * self._model.opt.timestep))
        velocity = self.contract.action.limits.velocity
        self._step = np.array(velocity or [np.inf] * 8) / self.contract.control_hz
        self._goal = self._model.body_mocapid[self._model.body("goal").id]
        self._cube = self._model.joint("cube").qposadr[0]
        self._tool = self._model.site("tool").id
        self._set_point = np.zeros(8)

    def _known_task(self, task: str) -> bool:
        return task in TASKS

    def _reset_scene(self, task: str, seed: int) -> None:
        random = np.random.default_rng(seed)
        data = self._data
        mujoco.mj_resetData(self._model, data)
        data.qpos[:7] = HOME + random.uniform(-0.05, 0.05, 7)
        data.qpos[7:9] = 0.04
        cube = random.uniform((0.4, -0.2), (0.6, 0.2))
        yaw = random.uniform(-np.pi / 4, np.pi / 4)
        goal = random.uniform((0.4, -0.25), (0.6, 0.25))
        while np.linalg.norm(goal - cube) < 0.12:
            goal = random.uniform((0.4, -0.25), (0.6, 0.25))
        quat_wxyz = (np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2))
        data.qpos[self._cube : self._cube + 7] = (*cube, CUBE / 2, *quat_wxyz)
        # A task without a goal hides the spot under the table.
        data.mocap_pos[self._goal] = (*goal, 0.0 if task == "place-cube" else -0.1)
        self._set_point = np.append(data.qpos[:7], 0.08)
        data.ctrl[:] = self._control()
        mujoco.mj_forward(self._model, data)
        self._measure(task)

    def _advance(self, command: Float[np.ndarray, " A"]) -> None:
        low, high = self._set_point - self._step, self._set_point + self._step
        self._set_point = np.clip(command, low, high)
        self._data.ctrl[:] = self._control()
        mujoco.mj_step(self._model, self._data, self._substeps)
        mujoco.mj_forward(self._model, self._data)
        self._measure(self.task)

    def _physics(self) -> tuple[str, Any, Any]:
        return "franka", self._model, self._data

    def _current_command(self) -> Float[np.ndarray, " A"]:
        return self._joints.position.copy()

    def _control(self) -> Float[np.ndarray, " 8"]:
        """Actuators move one finger; the other mirrors it."""
        return np.append(self._set_point[:7], self._set_point[7] / 2)

    def _measure(self, task: str) -> None:
        data, joints = self._data, self._joints
        assert joints.velocity is not None
        assert joints.effort is not None
        joints.position[:] = np.append(data.qpos[:7], data.qpos[7:9].sum())
        joints.velocity[:] = np.append(data.qvel[:7], data.qvel[7:9].sum())
        joints.effort[:] = data.actuator_force
        hand = data.site_xpos[self._tool]
        cube = data.qpos[self._cube : self._cube + 3]
        w, _, _, z = data.qpos[self._cube + 3 : self._cube + 7]
        yaw = (2 * np.arctan2(z, w) + np.pi / 4) % (np.pi / 2) - np.pi / 4
        goal = data.mocap_pos[self._goal]
        width = joints.position[7]
        distance = float(np.linalg.norm(hand - cube))
        height = float(cube[2] - CUBE / 2)
        held = distance < 0.03 and width < CUBE + 0.008
        reward = 3 * (1 - np.tanh(5 * distance)) + 2.0 * held
        if task == "lift-cube":
            reward += 5 * np.clip(height / LIFTED, 0, 1)
            self.success = held and height > LIFTED
        else:
            off = float(np.linalg.norm(cube[:2] - goal[:2]))
            reward += 4 * (1 - np.tanh(5 * off))
            self.success = off < NEAR and height < 0.01 and width > CUBE + 0.015
        self.success = bool(self.success)
        self.task_reward = 10.0 if self.success else float(reward)
        self._scene[:] = (
            *hand, *joints.position, *cube, yaw, *goal, self.success, self.task_reward,
        )  # fmt: skip


@cache
def arm_model() -> Any:
    """The compiled model; shared, since cells change their data only."""
    return mujoco.MjModel.from_xml_path(str(MODEL))


class Kinematics:
    """Pose of the tool and damped-least-squares steps, on joint angles alone."""

    def __init__(self) -> None:
        self._model = arm_model()
        self._data = mujoco.MjData(self._model)
        self._tool = self._model.site("tool").id
        self._jacobian = np.zeros((6, self._model.nv))

    def pose(
        self, arm: Float[np.ndarray, "7"]
    ) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3 3"]]:
        """Position and rotation of the tool in the base frame."""
        self._data.qpos[:7] = arm
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        rotation = self._data.site_xmat[self._tool].reshape(3, 3).copy()
        return self._data.site_xpos[self._tool].copy(), rotation

    def towards(
        self,
        arm: Float[np.ndarray, "7"],
        position: Float[np.ndarray, "3"],
        yaw: float,
        *,
        lead_m: float,
        lead_rad: float = 0.3,
        damping: float = 0.05,
    ) -> Float[np.ndarray, "7"]:
        """Joint angles one step nearer to `position`, fingers down and turned to `yaw`.

        Args:
            lead_m, lead_rad: the step's largest translation and rotation.
        """
        here, rotation = self.pose(arm)
        cos, sin = np.cos(yaw), np.sin(yaw)
        wanted = np.array([[cos, sin, 0], [sin, -cos, 0], [0, 0, -1.0]])
        shift = position - here
        shift *= min(1.0, lead_m / max(float(np.linalg.norm(shift)), 1e-9))
        turn = 0.5 * np.cross(rotation, wanted, axisa=0, axisb=0, axisc=0).sum(axis=1)
        turn *= min(1.0, lead_rad / max(float(np.linalg.norm(turn)), 1e-9))
        mujoco.mj_jacSite(
            self._model, self._data, self._jacobian[:3], self._jacobian[3:], self._tool
        )
        jacobian = self._jacobian[:, :7]
        inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + damping**2 * np.eye(6))
        rest = (np.eye(7) - inverse @ jacobian) @ (0.1 * (HOME - arm))
        return arm + inverse @ np.concatenate([shift, turn]) + rest


class FrankaExpert:
    """Picks the cube up, and puts it on the goal if the task says so."""

    SPEED = 0.05
    """Largest distance by which the command leads the hand, in m; the drive's lag is 0.1 s."""
    ABOVE = 0.1

    def __init__(self, task: str) -> None:
        self._task = task
        self._kinematics = Kinematics()

    def act(self, scene: Float[np.ndarray, " S"]) -> Float[np.ndarray, "8"]:
        hand, arm, width = scene[:3], scene[3:10], scene[10]
        cube, yaw, goal = scene[11:14], scene[14], scene[15:18]
        target, gripper = self._plan(hand, width, cube, goal)
        command = self._kinematics.towards(arm, target, yaw, lead_m=self.SPEED)
        return np.append(command, gripper)

    def retreat(self, scene: Float[np.ndarray, " S"]) -> Float[np.ndarray, "8"]:
        up = scene[:3] + np.array([0.0, 0.0, 0.1])
        command = self._kinematics.towards(scene[3:10], up, scene[14], lead_m=self.SPEED)
        return np.append(command, 0.08)

    def _plan(
        self,
        hand: Float[np.ndarray, "3"],
        width: float,
        cube: Float[np.ndarray, "3"],
        goal: Float[np.ndarray, "3"],
    ) -> tuple[Float[np.ndarray, "3"], float]:
        """Where the tool should be, and how wide the gripper."""
        above = np.array([0.0, 0.0, self.ABOVE])
        aside = float(np.linalg.norm(hand[:2] - cube[:2]))
        height = hand[2] - cube[2]
        placing = self._task == "place-cube"
        off_goal = float(np.linalg.norm(cube[:2] - goal[:2]))
        on_table = cube[2] < CUBE / 2 + 0.006
        if placing and off_goal < NEAR * 0.8 and on_table:
            if width > CUBE + 0.01:
                return hand + above, 0.08
            return hand.copy(), 0.08
        held = aside < 0.015 and abs(height) < 0.015 and width < CUBE + 0.004
        if held and not placing:
            return cube + 2 * above, 0.0
        if held:
            if off_goal < NEAR * 0.6:
                return np.array([*goal[:2], CUBE / 2]), 0.0
            if cube[2] < 0.07 and off_goal > 0.05:
                return hand + above, 0.0
            return np.array([*goal[:2], 0.1]), 0.0
        if aside > 0.02 and height < 0.06:
            return np.array([*hand[:2], cube[2] + self.ABOVE]), 0.08
        if aside > 0.008 and height > 0.03:
            return cube + above * 0.8, 0.08
        if height > 0.008:
            return (cube if width > 0.07 else hand), 0.08
        return cube.copy(), 0.0
