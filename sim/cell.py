"""What every simulated cell shares: a gymnasium environment shaped by its contract.

A cell measures streams of named values (`joint_states`, `sim/scene_state`, ...), exactly what the
robot's ROS node publishes; the contract picks from them by name. Physics belongs to subclasses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float

from sim.camera import Camera
from trajectory_store import Contract, ContractError, load_contract

SCENE_TOPIC = "sim/scene_state"
"""Privileged values: for the scripted operator, and for contracts that choose to see them."""
JOINT_TOPIC = "joint_states"

Observation = dict[str, np.ndarray]


class UnknownTask(ValueError):
    """The contract or the simulator has no such task; the message lists the known ones."""


class ResetNeeded(RuntimeError):
    """`step` before `reset`, or after the episode ended."""


@dataclass
class Stream:
    """Named values of one topic, in the fields of a JointState; arrays are overwritten in place."""

    names: tuple[str, ...]
    position: Float[np.ndarray, " N"]
    velocity: Float[np.ndarray, " N"] | None = None
    effort: Float[np.ndarray, " N"] | None = None


class Cell(gymnasium.Env[Observation, np.ndarray]):
    """A simulated cell: Dict observation under the contract's keys, Box action of its limits.

    Vectors are float32. Images (height, width, 3) uint8 keep their last frame until the next one
    is due at the camera's `rate_hz`, counted from the reset, and carry the contract's JPEG loss.

    `reset(seed=..., options={"task": ...})` changes the task of later episodes; without the option
    it stays. One seed and task give one scene. The episode is `terminated` by success and
    `truncated` at the task's time limit; the reward is 1 on success, else 0. `info` has `success`,
    `task_reward` (the simulator's dense reward), `scene` (values named by `scene_names`), `task`.

    Args:
        contract: a `Contract`, or the path of one.
        task: of the first episodes; the contract's first task by default.
        images: False leaves the images out of observations: cheap, for experts and rollouts, which
            read `image(key)` when they need one.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012

    scene_names: tuple[str, ...]
    streams: Mapping[str, Stream]
    render_camera: str = ""
    render_size: tuple[int, int] = (240, 320)

    def __init__(
        self,
        contract: Contract | str | Path,
        task: str | None = None,
        *,
        images: bool = True,
        render_mode: str | None = None,
    ) -> None:
        if not isinstance(contract, Contract):
            contract = load_contract(contract)
        self.contract = contract
        self.images = images
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": contract.control_hz}
        self.task = task if task is not None else next(iter(contract.tasks))
        self._require_task(self.task)
        self.tick = 0
        """Control steps since the reset."""
        self.success = False
        self.task_reward = 0.0
        self._over = True
        self._cameras: dict[str, dict[str, Camera]] = {}
        self._render_cameras: dict[str, Camera] = {}
        self._picks = {key: self._pick(key) for key in contract.vectors}
        self._periods = {
            key: max(1, round(contract.control_hz / feature.rate_hz))
            for key, feature in contract.images.items()
        }
        self._low, self._high = np.array(contract.action.limits.position, np.float64).T
        self.action_space = spaces.Box(
            self._low.astype(np.float32), self._high.astype(np.float32), dtype=np.float32
        )
        boxes: dict[str, spaces.Space[Any]] = {
            key: spaces.Box(-np.inf, np.inf, feature.shape, np.float32)
            for key, feature in contract.vectors.items()
        }
        if images:
            boxes |= {
                key: spaces.Box(0, 255, feature.shape, np.uint8)
                for key, feature in contract.images.items()
            }
        self.observation_space: Any = spaces.Dict(boxes)

    # What a simulator provides -------------------------------------------------------------------

    def _known_task(self, task: str) -> bool:
        raise NotImplementedError

    def _reset_scene(self, task: str, seed: int) -> None:
        """Builds the scene of `seed`, fills the streams, `success` and `task_reward`."""
        raise NotImplementedError

    def _advance(self, command: Float[np.ndarray, " A"]) -> None:
        """One control step; fills the streams, `success` and `task_reward`."""
        raise NotImplementedError

    def _physics(self) -> tuple[str, Any, Any]:
        """Id of the scene's meshes, MjModel, MjData of the current task."""
        raise NotImplementedError

    def _current_command(self) -> Float[np.ndarray, " A"]:
        """Cells with absolute actions: the set-point that keeps the robot where it is."""
        raise NotImplementedError

    def _camera_name(self, key: str) -> str:
        """The model's camera behind an image feature: `sim.cameras`, else the key's last word."""
        name = key.removeprefix("observation.images.")
        return self.contract.sim.get("cameras", {}).get(name, name)

    # gymnasium -----------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Raises UnknownTask for a task that the contract does not list."""
        super().reset(seed=seed)
        if options and "task" in options:
            self._require_task(options["task"])
            self.task = options["task"]
        scene_seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self.tick = 0
        self._over = False
        self._limit = round(self.contract.task(self.task).time_limit_s * self.contract.control_hz)
        self._reset_scene(self.task, scene_seed)
        self._expose()
        return self.observation(), self._info()

    def step(
        self, action: Float[np.ndarray, " A"]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Raises ResetNeeded without a running episode, ValueError for NaN or a wrong length."""
        if self._over:
            raise ResetNeeded("the episode is over; call reset() before step()")
        self.advance(action)
        terminated = self.success
        truncated = not terminated and self.tick >= self._limit
        self._over = terminated or truncated
        return self.observation(), float(terminated), terminated, truncated, self._info()

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(240, 320, 3) picture of the scene now, for people."""
        scene_id, model, data = self._physics()
        camera = self._render_cameras.get(scene_id)
        if camera is None:
            camera = Camera(scene_id, model, self.render_camera, *self.render_size, quality=95)
            self._render_cameras[scene_id] = camera
        camera.expose(data)
        return camera.picture()

    def close(self) -> None:
        self._cameras.clear()
        self._render_cameras.clear()

    # What the ROS node and the rollout use -------------------------------------------------------

    def advance(self, action: Float[np.ndarray, " A"]) -> None:
        """One control step without gymnasium's episode rules; frames that are due get exposed."""
        command = np.asarray(action, np.float64)
        if command.shape != self._low.shape or not np.isfinite(command).all():
            raise ValueError(
                f"action {action!r}: expected {len(self._low)} finite numbers in the order "
                f"{', '.join(self.contract.action.names)}"
            )
        self._advance(np.clip(command, self._low, self._high))
        self.tick += 1
        self._expose()

    def hold_command(self, sent: Float[np.ndarray, " A"] | None) -> Float[np.ndarray, " A"]:
        """The command that stays put: zero displacement, with `held` names as in `sent`.

        Args:
            sent: the last command, None before the first of an episode.
        """
        action = self.contract.action
        if action.mode == "absolute":
            return self._current_command() if sent is None else sent
        command = np.zeros(action.size)
        if sent is not None:
            held = [action.names.index(name) for name in action.held]
            command[held] = sent[held]
        return command

    def observation(self) -> Observation:
        """Everything the contract lists, as of the current tick."""
        out: Observation = {key: self.vector(key) for key in self._picks}
        if self.images:
            out |= {key: self.image(key).copy() for key in self._periods}
        return out

    def vector(self, key: str) -> Float[np.ndarray, " D"]:
        topic, field, index = self._picks[key]
        return getattr(self.streams[topic], field)[index].astype(np.float32)

    @property
    def scene(self) -> Float[np.ndarray, " S"]:
        """Copy of the privileged values, float64, named by `scene_names`."""
        return self.streams[SCENE_TOPIC].position.copy()

    def camera(self, key: str) -> Camera:
        """The camera of an image feature in the current task's scene."""
        scene_id, model, _ = self._physics()
        cameras = self._cameras.setdefault(scene_id, {})
        if key not in cameras:
            height, width, _ = self.contract.observations[key].shape
            quality = self.contract.observations[key].quality
            cameras[key] = Camera(scene_id, model, self._camera_name(key), height, width, quality)
        return cameras[key]

    def image(self, key: str) -> np.ndarray:
        """(height, width, 3) uint8 of the last frame that was due; read-only."""
        return self.camera(key).image()

    def jpeg(self, key: str) -> bytes:
        return self.camera(key).jpeg()

    def warm_up(self) -> None:
        """Loads every task's model and draws once, so that no later reset takes a second."""
        task = self.task
        for name in self.contract.tasks:
            self.reset(seed=0, options={"task": name})
            for key in self._periods:
                self.image(key)
        self.task = task

    def frame_due(self, key: str) -> bool:
        """A new frame of this camera was exposed at the current tick."""
        return self.tick % self._periods[key] == 0

    # ---------------------------------------------------------------------------------------------

    def _expose(self) -> None:
        for key in self._periods:
            if self.frame_due(key):
                self.camera(key).expose(self._physics()[2])

    def _info(self) -> dict[str, Any]:
        return {
            "success": self.success,
            "task_reward": self.task_reward,
            "scene": self.scene,
            "task": self.task,
        }

    def _pick(self, key: str) -> tuple[str, str, np.ndarray]:
        feature = self.contract.observations[key]
        stream = self.streams.get(feature.topic)
        known = stream.names if stream is not None else ()
        missing = [name for name in feature.names if name not in known]
        if missing or stream is None or getattr(stream, feature.field) is None:
            raise ContractError(
                f"{key}: this cell has no {feature.field} of {missing or list(feature.names)} on "
                f"topic {feature.topic!r}; its topics are "
                + "; ".join(f"{t}: {', '.join(s.names)}" for t, s in self.streams.items())
            )
        index = np.array([known.index(name) for name in feature.names])
        return feature.topic, feature.field, index

    def _require_task(self, task: str) -> None:
        if task not in self.contract.tasks or not self._known_task(task):
            known = ", ".join(t for t in self.contract.tasks if self._known_task(t))
            raise UnknownTask(
                f"cell {self.contract.cell!r} has no task {task!r}; it knows: {known or 'none'}"
            )


def make_cell(contract: Contract, task: str | None = None, *, images: bool = False) -> Cell:
    """The contract's cell without gymnasium's wrappers; images are drawn only when asked for."""
    env_id = contract.sim.get("env_id")
    if env_id is None:
        raise ValueError(
            f"contract of cell {contract.cell!r} has no `sim.env_id`: it describes a real robot"
        )
    cell = gymnasium.make(
        env_id, contract=contract, task=task, images=images, disable_env_checker=True
    ).unwrapped
    assert isinstance(cell, Cell)
    return cell
