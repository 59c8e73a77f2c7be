"""The scripted operator: watches, takes over, drives, hands back, labels. No ROS here.

It sees what a person at the cell sees: the scene and the motion of the robot, never the policy.
The same core plays in a direct loop (`sim.rollout`) and behind the teleop topics
(`sim.nodes.operator`).
"""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float

from sim.expert import Expert, experts
from trajectory_store import Contract

ABSOLUTE_UNIT_S = 0.04
"""With absolute actions, differences are measured in what a joint can move in so many seconds."""
LEADER_RATE = 4.0
"""How fast the operator's hand closes in on where it wants the robot, per second."""

ASK_AGAIN = 25
"""Ticks without control after which an operator who wants to drive asks once more."""


class Mode(StrEnum):
    """Who drives, as `arbiter/state` says it."""

    POLICY = "POLICY"
    HUMAN = "HUMAN"
    HOLD = "HOLD"
    FAULT = "FAULT"


class Request(StrEnum):
    """What the operator asks for, each a service of the supervisor."""

    INTERVENE = "intervene"
    """Give me control; the deadman is held."""
    RELEASE = "release"
    RESUME = "resume"
    """Let the policy go on, from HOLD."""
    SUCCESS = "success"
    """The task is done."""


@dataclass(frozen=True)
class OperatorAction:
    """What the operator does at one tick."""

    deadman: bool
    command: Float[np.ndarray, " A"] | None
    """In the contract's action unit; None while not driving."""
    requests: tuple[Request, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OperatorConfig:
    """When the operator steps in, how it drives, and when it lets go. Times in control ticks.

    The rule: take over when the robot's motion, averaged over `window` ticks, disagrees with what
    the operator would do by more than `disagreement`, or when the task's progress has not improved
    by `progress_epsilon` for `stall` ticks; in both cases only after `patience` ticks of the
    policy.
    """

    window: int = 12
    disagreement: float = 0.7
    """Mean absolute difference per action dimension, in units of half the action's range (with
    absolute actions: of what the joint can move in 40 ms), each counted up to 2."""
    stall: int = 30
    progress_epsilon: float = 0.02
    """Smallest rise of the dense task reward that counts as progress."""
    patience: int = 12
    """The policy is left alone for so long after the start and after each hand-back."""
    reaction_delay: int = 8
    """From seeing the reason to asking for control (0.1 s at 80 Hz)."""
    min_drive: int = 32
    """An intervention lasts at least this long."""
    recovered: int = 8
    """Ticks of rising task reward in a row after which the scene counts as recovered."""
    drive_to_end: bool = False
    """Never hand back before the episode ends."""
    drive_from_start: bool = False
    """Drive the whole episode, as when demonstrations are collected; needs no policy."""
    max_takeovers: int = 2
    """An episode's last takeover is driven to the end."""
    retry_after: int = 30
    """When the hand has stayed in place for so long while driving, the operator backs off."""
    retry_moved: float = 0.015
    """Less than this, in metres, counts as staying in place."""
    retreat: int = 16
    """Length of backing off."""
    motor_noise: float = 0.05
    """Standard deviation of the command, in the units of `disagreement`."""
    policy_only: bool = False
    """Never take over: starts, watches and labels."""

    def __post_init__(self) -> None:
        for name in ("window", "stall", "min_drive", "recovered", "retry_after", "retreat"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1 tick")
        for name in ("patience", "reaction_delay", "max_takeovers", "motor_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


class ScriptedOperator:
    """Plays a person during one episode after another.

    Args:
        contract: of the cell; its tasks need scripted experts.
        scene_names: order of the values that `step` receives; needs `success`, `task_reward` and
            `hand_x`, `hand_y`, `hand_z`.
    """

    def __init__(
        self,
        contract: Contract,
        scene_names: tuple[str, ...],
        config: OperatorConfig | None = None,
    ) -> None:
        self.config = config or OperatorConfig()
        self._experts = experts(contract)
        self._expert: Expert | None = None
        self._success = scene_names.index("success")
        self._reward = scene_names.index("task_reward")
        self._hand = [scene_names.index(f"hand_{axis}") for axis in "xyz"]
        low, high = np.array(contract.action.limits.position, np.float64).T
        self._low, self._high = low, high
        self._absolute = contract.action.mode == "absolute"
        self._unit = (high - low) / 2
        if self._absolute:
            velocity = np.array(contract.action.limits.velocity or high - low)
            self._unit = velocity * ABSOLUTE_UNIT_S
            self._joints = [scene_names.index(name) for name in contract.action.names]
            self._follow = LEADER_RATE / contract.control_hz
        self._leader: Float[np.ndarray, " A"] | None = None
        self.takeovers = 0
        self._driving = self._due = False

    def begin(self, task: str, seed: int) -> None:
        """A new episode; `seed` fixes the motor noise. Raises KeyError for an unknown task."""
        self._expert = self._experts[task]
        self._random = np.random.default_rng([seed, 0x0B5E])
        self.takeovers = 0
        self._wanted: Float[np.ndarray, " A"] | None = None
        self._leader = None
        self._driving = False
        self._drive_ticks = 0
        self._labelled = False
        self._forget()

    @property
    def wants_attention(self) -> bool:
        """Somebody should look after this cell: a takeover is due, or is going on."""
        return self._driving or self._due

    def step(
        self,
        scene: Float[np.ndarray, " S"],
        executed: Float[np.ndarray, " A"] | None,
        mode: Mode,
        *,
        attended: bool = True,
    ) -> OperatorAction:
        """Reacts to tick k.

        Args:
            scene: privileged values at tick k.
            executed: what was sent at tick k - 1, if known.
            mode: who drives now, as far as the operator knows.
            attended: somebody is there to take over; in a fleet they may be at another cell.
        """
        assert self._expert is not None, "begin() comes first"
        if scene[self._success] >= 1 and not self._labelled:
            self._labelled, self._driving, self._due = True, False, False
            return OperatorAction(False, None, (Request.SUCCESS,))
        if self._labelled:
            return OperatorAction(False, None)
        wanted = self._expert.act(scene)
        if self._absolute and (mode is not Mode.HUMAN or self._leader is None):
            self._leader = scene[self._joints] if executed is None else executed
        reward = float(scene[self._reward])
        if self.config.drive_from_start and self.takeovers == 0:
            action = self._take_over(scene, wanted, reward)
        elif self._driving:
            action = self._drive(scene, wanted, reward, mode)
        elif mode is Mode.HOLD:
            self._forget()
            action = OperatorAction(False, None, (Request.RESUME,))
        else:
            action = self._watch(scene, wanted, reward, executed, mode, attended)
        self._wanted = wanted
        return action

    def _watch(
        self,
        scene: Float[np.ndarray, " S"],
        wanted: Float[np.ndarray, " A"],
        reward: float,
        executed: Float[np.ndarray, " A"] | None,
        mode: Mode,
        attended: bool,
    ) -> OperatorAction:
        """Judges the motion from k - 1 to k against what the operator wanted at k - 1."""
        config = self.config
        if mode is not Mode.POLICY or config.policy_only:
            return OperatorAction(False, None)
        self._policy_ticks += 1
        if executed is not None and self._wanted is not None:
            gap = np.abs(np.clip(executed, self._low, self._high) - self._wanted) / self._unit
            self._gaps.append(float(np.mean(np.minimum(gap, 2.0))))
        if reward > self._best + config.progress_epsilon:
            self._best, self._since_best = reward, 0
        else:
            self._since_best += 1
        drifts = len(self._gaps) == config.window and np.mean(self._gaps) > config.disagreement
        stalls = self._since_best >= config.stall
        if self._noticed is None:
            if self._policy_ticks > config.patience and (drifts or stalls):
                self._noticed = 0
        else:
            self._noticed += 1
        self._due = self._noticed is not None and self._noticed >= config.reaction_delay
        if not (self._due and attended):
            return OperatorAction(False, None)
        self._due = False
        return self._take_over(scene, wanted, reward)

    def _take_over(
        self, scene: Float[np.ndarray, " S"], wanted: Float[np.ndarray, " A"], reward: float
    ) -> OperatorAction:
        self._driving, self._drive_ticks, self._rising = True, 0, 0
        self._last_reward = reward
        self._path: deque[np.ndarray] = deque(maxlen=self.config.retry_after + 1)
        self._retreat_left, self._without = 0, 0
        self.takeovers += 1
        return OperatorAction(True, self._command(scene, wanted, Mode.POLICY), (Request.INTERVENE,))

    def _drive(
        self,
        scene: Float[np.ndarray, " S"],
        wanted: Float[np.ndarray, " A"],
        reward: float,
        mode: Mode,
    ) -> OperatorAction:
        config = self.config
        assert self._expert is not None
        self._without = 0 if mode is Mode.HUMAN else self._without + 1
        if self._without >= ASK_AGAIN:
            self._without = 0  # control was not given, or was lost
            return OperatorAction(True, self._command(scene, wanted, mode), (Request.INTERVENE,))
        if self._retreat_left > 0:
            self._retreat_left -= 1
            return OperatorAction(True, self._command(scene, self._expert.retreat(scene), mode))
        self._path.append(scene[self._hand])
        if (
            len(self._path) > config.retry_after
            and np.ptp(np.array(self._path), axis=0).max() < config.retry_moved
        ):
            self._path.clear()
            self._rising, self._retreat_left = 0, config.retreat
        if mode is Mode.HUMAN:
            self._drive_ticks += 1
        self._rising = self._rising + 1 if reward > self._last_reward else 0
        self._last_reward = reward
        whole = config.drive_to_end or config.drive_from_start
        last = whole or self.takeovers >= config.max_takeovers
        if not last and self._drive_ticks >= config.min_drive and self._rising >= config.recovered:
            self._driving = False
            self._forget()
            return OperatorAction(False, None, (Request.RELEASE,))
        return OperatorAction(True, self._command(scene, wanted, mode))

    def _command(
        self, scene: Float[np.ndarray, " S"], wanted: Float[np.ndarray, " A"], mode: Mode
    ) -> Float[np.ndarray, " A"]:
        """What the hand does. With absolute actions it moves a leader arm.

        The leader rests on the robot's last command until control is given, so nothing jumps; then
        it moves towards where the operator wants the robot to be, and keeps moving while the robot
        is not there, whatever offset the arbiter's clutch has put between the two.
        """
        noise = self._random.normal(0.0, 1.0, wanted.shape) * self._unit * self.config.motor_noise
        if not self._absolute:
            return np.clip(wanted + noise, self._low, self._high)
        assert self._leader is not None
        if mode is Mode.HUMAN:
            moved = self._leader + self._follow * (wanted - scene[self._joints])
            self._leader = np.clip(moved, self._low, self._high)
            return np.clip(self._leader + noise, self._low, self._high)
        return self._leader

    def _forget(self) -> None:
        """Judges the policy afresh."""
        self._due = False
        self._gaps: deque[float] = deque(maxlen=self.config.window)
        self._best, self._since_best = -np.inf, 0
        self._policy_ticks = 0
        self._noticed: int | None = None
        self._rising, self._last_reward = 0, -np.inf
        self._retreat_left = 0
