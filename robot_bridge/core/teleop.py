"""From a device in a person's hand to a deadman, a target and requests. No ROS, no device files.

A key map (YAML) says what the keys and axes of a device mean; `Teleop` applies it once a tick:

- The deadman must be seen released before it counts, so that nothing drives by being plugged in.
- Its press asks for control; its release, or a device that is gone, lets go at once.
- Motion is a rate: what an axis says is integrated into a set-point for `absolute` actions, and is
  the displacement itself for `delta` actions.

A: number of joints of the contract's action.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from robot_bridge.core.joints import JointReader, NamesError
from robot_bridge.core.kinematics import Kinematics
from trajectory_store.contract import Contract

Vector = NDArray[np.float64]
DAMPING = 0.01
"""Of tool to joint velocities: bounds joint rates at singular poses by |tool| / (2 * DAMPING)."""
CARTESIAN = ("x", "y", "z", "roll", "pitch", "yaw")
Request = Literal[
    "start_episode", "success", "failure", "cancel", "reset_done", "takeover", "hand_back",
    "resume_policy", "estop", "reset_estop",
]  # fmt: skip
MAPS = Path(__file__).parents[1] / "teleop_maps"


class KeyMapError(ValueError):
    """A key map that is not understood, or does not fit the cell; one line per problem."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Motion(_Part):
    """One way to move something: an axis, or a pair of keys."""

    moves: str
    """x, y, z, roll, pitch, yaw (the tool), `selected` (the joint that was chosen), or a joint."""
    axis: str = ""
    plus: tuple[str, ...] = ()
    """Keys that move it up."""
    minus: tuple[str, ...] = ()
    scale: float = 1.0


class KeyMap(_Part):
    """What a device's keys and axes mean. Keys are named as the device names them."""

    device: Literal["keyboard", "gamepad", "spacemouse"]
    deadman: Annotated[tuple[str, ...], Field(min_length=1)]
    """Any of them held keeps the deadman pressed."""
    motion_keeps_deadman: bool = False
    """Keys that move also keep it pressed, for a terminal that reports one key at a time."""
    takeover_on_deadman: bool = True
    """Pressing the deadman asks for control. Otherwise a key of `requests` does."""
    requests: dict[str, Request] = {}
    motion: tuple[Motion, ...] = ()
    gripper: tuple[str, ...] = ()
    """Keys that open and close it, by turns."""
    select_next: tuple[str, ...] = ()
    select_previous: tuple[str, ...] = ()
    select: tuple[str, ...] = ()
    """Key i chooses joint i."""
    deadzone: Annotated[float, Field(ge=0, lt=1)] = 0.1
    linear_m_s: Annotated[float, Field(gt=0)] = 0.1
    angular_rad_s: Annotated[float, Field(gt=0)] = 0.5
    joint_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Of a joint's velocity limit, at full deflection."""
    delta_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of a displacement's limit, at full deflection."""
    buttons: tuple[str, ...] = ()
    """Gamepads of another layout: names by the kernel's numbers."""
    axes: tuple[str, ...] = ()


def load_key_map(source: str | Path) -> KeyMap:
    """By path, or by the name of a shipped one.

    Raises:
        KeyMapError: no such file, no YAML, or wrong fields, one line each.
    """
    path = MAPS / f"{source}.yaml" if (MAPS / f"{source}.yaml").is_file() else Path(source)
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in MAPS.glob("*.yaml")))
        raise KeyMapError(f"{path}: {error.strerror}; shipped key maps are {known}") from error
    except yaml.YAMLError as error:
        raise KeyMapError(f"{path}: this is not YAML: {error}") from error
    try:
        return KeyMap.model_validate(data)
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise KeyMapError("\n".join(lines)) from None


@dataclass(frozen=True)
class Output:
    """What a tick of teleoperation comes to."""

    deadman: bool
    target: Vector | None
    """(A,) in the contract's order and unit; None while the deadman is up."""
    requests: tuple[str, ...] = ()


class Teleop:
    """Applies a key map to the readings of a device; see the module.

    Args:
        folder: of the contract file, for the kinematic model that it names.

    Raises:
        KeyMapError: the map moves something that the cell does not have.
    """

    def __init__(self, contract: Contract, keys: KeyMap, *, folder: Path | None = None) -> None:
        self.keys = keys
        self.jog = Jog(contract, keys, folder=folder)
        self._moving = {key for m in keys.motion for key in (*m.plus, *m.minus)}
        self._armed = False
        self._deadman = False

    def step(
        self,
        held: frozenset[str],
        pressed: Sequence[str],
        axes: Mapping[str, float],
        *,
        present: bool,
        current: Vector | None,
        driving: bool,
        dt_s: float,
    ) -> Output:
        """One tick.

        Args:
            held, pressed, axes, present: the device's reading.
            current: (A,) measured joints, or what was last sent on `delta` cells.
            driving: the arbiter follows the human.
            dt_s: since the last tick.
        """
        if not present:
            self._armed = self._deadman = False
            return Output(False, None)
        requests = [self.keys.requests[key] for key in pressed if key in self.keys.requests]
        self._choose(pressed)
        down = bool(held.intersection(self.keys.deadman))
        if self._deadman and self.keys.motion_keeps_deadman:
            down = down or bool(held & self._moving)
        self._armed = self._armed or not down
        before, self._deadman = self._deadman, down and self._armed
        if not self._deadman:
            return Output(False, None, tuple(requests))
        if not before and not driving and self.keys.takeover_on_deadman:
            requests.append("takeover")
        if not before or not driving:
            self.jog.begin(current)
        if any(key in pressed for key in self.keys.gripper):
            self.jog.toggle_gripper()
        target = self.jog.step(self._rates(held, axes), dt_s if driving else 0.0)
        return Output(True, target, tuple(requests))

    def _choose(self, pressed: Sequence[str]) -> None:
        for key in pressed:
            if key in self.keys.select_next:
                self.jog.select(self.jog.selected + 1)
            elif key in self.keys.select_previous:
                self.jog.select(self.jog.selected - 1)
            elif key in self.keys.select:
                self.jog.select(self.keys.select.index(key))

    def _rates(self, held: frozenset[str], axes: Mapping[str, float]) -> dict[str, float]:
        """What moves -> in [-1, 1]."""
        rates: dict[str, float] = {}
        for motion in self.keys.motion:
            value = axes.get(motion.axis, 0.0)
            zone = self.keys.deadzone
            value = 0.0 if abs(value) <= zone else (value - np.sign(value) * zone) / (1 - zone)
            value += bool(held.intersection(motion.plus)) - bool(held.intersection(motion.minus))
            rates[motion.moves] = rates.get(motion.moves, 0.0) + motion.scale * float(value)
        return {name: max(-1.0, min(1.0, value)) for name, value in rates.items()}


class Jog:
    """Integrates rates into targets of one cell."""

    def __init__(self, contract: Contract, keys: KeyMap, *, folder: Path | None = None) -> None:
        action, limits = contract.action, contract.action.limits
        self.names = action.names
        self._delta = action.mode == "delta"
        self._low, self._high = np.array(limits.position, np.float64).T.copy()
        self._keys = keys
        reach = np.minimum(np.abs(self._low), np.abs(self._high)) * keys.delta_fraction
        velocity = np.array(limits.velocity or (self._high - self._low) / 10.0)
        self._velocity = velocity
        self._speed = reach if self._delta else velocity * keys.joint_fraction
        grippers = action.held or tuple(n for n in action.names if "grip" in n or "finger" in n)
        self._gripper = action.names.index(grippers[0]) if grippers else None
        self._kinematics = None
        self._axes: dict[str, int] = {}
        """Delta cells: which action is a displacement along x, y, z."""
        if self._delta:
            for axis in "xyz":
                hits = [i for i, n in enumerate(action.names) if n.endswith(f"_d{axis}")]
                if len(hits) == 1:
                    self._axes[axis] = hits[0]
        elif contract.safety.workspace is not None and contract.safety.workspace.model:
            box = contract.safety.workspace
            if folder is not None:
                self._kinematics = Kinematics(folder / box.model, box.site, action.names)
        self.selected = 0
        self._target: Vector | None = None
        self._check(keys)

    @property
    def can_move(self) -> tuple[str, ...]:
        """What a key map may move here."""
        tool = CARTESIAN if self._kinematics is not None else tuple(self._axes)
        return (*tool, "selected", *self.names)

    def _check(self, keys: KeyMap) -> None:
        """A name that no cell knows is a mistake; a tool axis that this one lacks is left out."""
        unknown = {m.moves for m in keys.motion} - {*CARTESIAN, "selected", *self.names}
        if unknown:
            raise KeyMapError(
                f"the key map moves {', '.join(sorted(unknown))}; this cell has "
                f"{', '.join(self.can_move)}"
            )

    def select(self, index: int) -> None:
        self.selected = index % len(self.names)

    def begin(self, current: Vector | None) -> None:
        """Starts from where the robot is."""
        if current is None:
            current = np.clip(np.zeros(len(self.names)), self._low, self._high)
        self._target = np.clip(current, self._low, self._high)
        if self._delta:
            held = self._target.copy()
            self._target[:] = 0.0
            if self._gripper is not None:
                self._target[self._gripper] = held[self._gripper]

    def toggle_gripper(self) -> None:
        """To the other end of its range."""
        if self._gripper is not None and self._target is not None:
            i = self._gripper
            middle = (self._low[i] + self._high[i]) / 2
            self._target[i] = self._low[i] if self._target[i] > middle else self._high[i]

    def step(self, rates: Mapping[str, float], dt_s: float) -> Vector:
        """(A,): the target after `dt_s` at these rates."""
        assert self._target is not None, "begin() comes first"
        if self._delta:
            out = np.zeros(len(self.names))
            if self._gripper is not None:
                out[self._gripper] = self._target[self._gripper]
        else:
            out = self._target
        tool = np.zeros(6)
        for name, rate in rates.items():
            if name in CARTESIAN and self._kinematics is not None:
                axis = CARTESIAN.index(name)
                tool[axis] = rate * (self._keys.linear_m_s, self._keys.angular_rad_s)[axis > 2]
                continue
            index = self._index(name)
            if index is not None and rate:
                out[index] += rate * self._speed[index] * (1.0 if self._delta else dt_s)
        if tool.any() and self._kinematics is not None:
            jacobian = self._kinematics.twist_jacobian(out)
            damped = jacobian @ jacobian.T + DAMPING**2 * np.eye(6)
            joint_rates = jacobian.T @ np.linalg.solve(damped, tool)
            # Near a singular pose the tool slows down, rather than leaving its direction.
            joint_rates /= max(1.0, float(np.max(np.abs(joint_rates) / self._velocity)))
            out = out + joint_rates * dt_s
        out = np.clip(out, self._low, self._high)
        if not self._delta:
            self._target = out
        return out.copy()

    def _index(self, name: str) -> int | None:
        if name == "selected":
            return self.selected
        if name in CARTESIAN and name not in self.names:
            return self._axes.get(name)
        return self.names.index(name)


class LeaderJoint(_Part):
    """Where one joint of the action comes from."""

    joint: str
    """Name in the leader's JointState."""
    scale: float = 1.0
    offset: float = 0.0
    """Added after scaling, in the action's unit. Irrelevant to the arbiter's clutch, which starts
    from wherever the robot is, but it keeps the leader inside the robot's range."""


class Leader:
    """A leader arm's joints as the target; the arbiter's clutch makes it relative.

    Args:
        joints: action's joint -> where it comes from; those left out have the leader's same name.
        max_age_s: a leader that is silent for longer counts as unplugged.

    Raises:
        KeyMapError: the cell is commanded in displacements, or a joint is not one of its own.
    """

    def __init__(
        self,
        contract: Contract,
        joints: Mapping[str, LeaderJoint] | None = None,
        *,
        max_age_s: float = 0.1,
    ) -> None:
        action = contract.action
        if action.mode != "absolute":
            raise KeyMapError(
                f"a leader arm sets joint positions; cell {contract.cell!r} takes displacements"
            )
        given = dict(joints or {})
        unknown = sorted(set(given) - set(action.names))
        if unknown:
            raise KeyMapError(
                f"the leader map sets {', '.join(unknown)}; this cell has {', '.join(action.names)}"
            )
        sources = [given.get(name, LeaderJoint(joint=name)) for name in action.names]
        self._reader = JointReader([source.joint for source in sources])
        self._scale = np.array([source.scale for source in sources])
        self._offset = np.array([source.offset for source in sources])
        self._max_age_s = max_age_s
        self._seen_s = -np.inf
        self._target: Vector | None = None
        self.problem = "no message of the leader arm yet"

    def hear(self, names: Any, positions: Any, mono_s: float) -> None:
        """A JointState of the leader; one that does not fit counts as silence."""
        try:
            values = self._reader.read(names, positions)
        except NamesError as error:
            self._target, self.problem = None, f"the leader arm's joints: {error}"
            return
        if not np.isfinite(values).all():
            self._target, self.problem = None, "the leader arm's joints are not finite"
            return
        self._target, self._seen_s = values * self._scale + self._offset, mono_s
        self.problem = ""

    def target(self, mono_s: float) -> Vector | None:
        """(A,), or None when it is silent; `problem` says why."""
        if self._target is None:
            return None
        if mono_s - self._seen_s > self._max_age_s:
            self.problem = f"the leader arm is silent for {mono_s - self._seen_s:.1f} s"
            return None
        return self._target
