"""Meta-World's Sawyer as a cell: 50 tasks, one MuJoCo model for each task that is used.

Facts about Meta-World 3.0 that this file depends on: the goal is observable only after
`_partially_observable = False` *and* dropping the cached observation space (which clips the goal
to zero); scenes follow a seed only with `seeded_rand_vec` and `env.seed(seed)` before `reset()`;
its `reset` runs `reset_model` twice, and some tasks depend on the first pass.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import mujoco as _mujoco
import numpy as np
from jaxtyping import Float

from sim.cell import JOINT_TOPIC, SCENE_TOPIC, Cell, Stream
from trajectory_store import Contract

mujoco: Any = _mujoco  # its names come from compiled modules, which pyright cannot read

_OBJECT = ("x", "y", "z", "qx", "qy", "qz", "qw")
STATE_NAMES = (
    "hand_x", "hand_y", "hand_z", "gripper_opening",
    *(f"object1_{axis}" for axis in _OBJECT),
    *(f"object2_{axis}" for axis in _OBJECT),
    "previous_hand_x", "previous_hand_y", "previous_hand_z", "previous_gripper_opening",
    "goal_x", "goal_y", "goal_z",
)  # fmt: skip
"""Meta-World's 39-vector without the objects one step ago, which nobody reads."""
STATE_INDEX = np.r_[0:22, 36:39]
"""Where `STATE_NAMES` are in the 39-vector."""
ROBOT_NAMES = ("ee_x", "ee_y", "ee_z", "gripper")


class MetaWorldCell(Cell):
    """`vla_post/MetaWorld-v0`; see `Cell` for spaces, options and info."""

    scene_names = (*STATE_NAMES, "success", "task_reward")
    render_camera = "corner"

    def __init__(
        self,
        contract: Contract | str | Path,
        task: str | None = None,
        *,
        images: bool = True,
        render_mode: str | None = None,
    ) -> None:
        self._robot = np.zeros(len(ROBOT_NAMES))
        self._scene = np.zeros(len(self.scene_names))
        self.streams = {
            JOINT_TOPIC: Stream(ROBOT_NAMES, self._robot),
            SCENE_TOPIC: Stream(self.scene_names, self._scene),
        }
        self._environments: dict[str, Any] = {}
        super().__init__(contract, task, images=images, render_mode=render_mode)

    def _known_task(self, task: str) -> bool:
        return f"{task}-v3" in _library()

    def _reset_scene(self, task: str, seed: int) -> None:
        if task not in self._environments:
            self._environments[task] = _environment(task)
        environment = self._environments[task]
        environment.seed(seed)
        vector, _ = environment.reset()
        self.success, self.task_reward = False, 0.0
        self._measure(vector)

    def _advance(self, command: Float[np.ndarray, " A"]) -> None:
        environment = self._environments[self.task]
        # The cell has its own time limit, and the ROS node may run a scene for as long as it likes.
        environment.curr_path_length = 0
        vector, reward, _, _, info = environment.step(command.astype(np.float32))
        self.success, self.task_reward = bool(info["success"] >= 1), float(reward)
        self._measure(vector)

    def _physics(self) -> tuple[str, Any, Any]:
        environment = self._environments[self.task]
        return f"metaworld/{self.task}", environment.model, environment.data

    def _measure(self, vector: Float[np.ndarray, "39"]) -> None:
        self._robot[:] = vector[:4]
        self._scene[:25] = vector[STATE_INDEX]
        self._scene[25:] = self.success, self.task_reward


def expert_vector(scene: Float[np.ndarray, "27"]) -> Float[np.ndarray, "39"]:
    """Meta-World's 39-vector from scene values; the objects one step ago stay zero."""
    vector = np.zeros(39)
    vector[STATE_INDEX] = scene[:25]
    return vector


@cache
def _library() -> dict[str, Any]:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    return dict(ALL_V3_ENVIRONMENTS)


@cache
def _pristine(task: str) -> Any:
    """Compiled once a process; every environment of the task gets a copy."""
    return _library()[f"{task}-v3"]().model


def _environment(task: str) -> Any:
    plain = _library()[f"{task}-v3"]
    compiled = _pristine(task)

    class Copied(plain):
        def _initialize_simulation(self) -> tuple[Any, Any]:
            model = copy.copy(compiled)
            return model, mujoco.MjData(model)

    environment = Copied()
    environment._partially_observable = False
    environment._freeze_rand_vec = False
    environment.seeded_rand_vec = True
    environment._set_task_called = True
    environment.__dict__.pop("sawyer_observation_space", None)  # recomputed with the goal's bounds
    return environment
