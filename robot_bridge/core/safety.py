"""The safety gate: what may leave the arbiter. A software stop, not a certified safety function.

A command that is not finite is refused. Everything else is moved inside the contract's limits:
position, and where declared velocity, acceleration, jerk and step, by an online trajectory of the
ruckig library that starts at the previous command. The gate keeps one invariant: from what was
sent, a full stop inside the position limits and the workspace box is always possible. A new command
that would break it is replaced by the next point of that stop.

A: number of joints of the action feature.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from ruckig import (
    ControlInterface,
    InputParameter,
    Result,
    Ruckig,
    RuckigError,
    Synchronization,
    Trajectory,
)

from robot_bridge.core.kinematics import Kinematics, ToolBox
from trajectory_store.contract import Contract, ContractError

Vector = NDArray[np.float64]

JERK_AHEAD = 3
"""Control periods that a jerk-limited trajectory looks ahead."""
_SLACK = 1e-9
_WALL_M = 1e-6
"""Rounding at the wall of the workspace box."""
"""Relative room for rounding when a state is handed back to ruckig."""


class UnsafeCommand(ValueError):
    """A command that no clamp can repair: not finite, or of the wrong length."""


@dataclass(frozen=True)
class Gated:
    command: Vector
    """(A,), inside every declared limit."""
    clipped: tuple[str, ...] = ()
    """Joints whose command was changed."""


class Gate:
    """Limits for one cell.

    For an `absolute` action the trajectory is that of the set-points. For a `delta` action it is
    the integral of the displacements, so that velocity limits bound a displacement and acceleration
    limits its change; joints in `held` (a gripper) are only clamped.

    Args:
        folder: where the contract lies; the model of its workspace box is relative to it.

    Raises:
        ContractError: the workspace box names states that no action moves, or a model that cannot
            be used, or jerk is limited without acceleration.
    """

    def __init__(self, contract: Contract, folder: Path | None = None) -> None:
        action, limits = contract.action, contract.action.limits
        self.names = action.names
        self.size = action.size
        self.delta = action.mode == "delta"
        self.counts = dict.fromkeys(action.names, 0)
        """How often each joint was clipped since the process started."""
        self._dt_s = 1.0 / contract.control_hz
        self._low, self._high = np.array(limits.position, dtype=np.float64).T.copy()
        self._held = np.array([name in action.held for name in action.names])
        if limits.jerk and not limits.acceleration:
            raise ContractError(
                "limits.jerk is declared without limits.acceleration; a jerk limit needs both"
            )
        self._box = _Box(contract)
        self._tool_box = _tool_box(contract, folder or Path())
        if not self.delta:
            self._low = np.maximum(self._low, self._box.absolute_low)
            self._high = np.minimum(self._high, self._box.absolute_high)
        self._online: _Online | None = None
        if limits.velocity or limits.acceleration or limits.step:
            self._online = _Online(contract, self._low, self._high, self._tool_box)
        self.last: Vector | None = None
        """The previous command, (A,)."""

    def reset(self, command: Vector | None = None) -> None:
        """Starts over at rest, at this set-point (the measured position) or nowhere yet."""
        self.last = None if command is None else np.clip(command, self._low, self._high)
        if self._online is not None:
            self._online.reset(self.last if not self.delta else np.zeros(self.size))

    def neutral(self) -> Vector:
        """What stays put when nothing was ever sent and nothing measured: zero, inside limits."""
        return np.clip(np.zeros(self.size), self._low, self._high)

    def inside(self, desired: Vector) -> Vector:
        """The nearest position inside the limits and the box; no memory, no rates."""
        clipped = np.clip(desired, self._low, self._high)
        if self._tool_box is None:
            return clipped
        return self._tool_box.nearest(clipped, self._low, self._high)

    def still(self, measured: Vector | None = None) -> Vector:
        """(A,) what `hold` comes to rest at when nothing moves; changes nothing."""
        if self.last is None:
            start = measured if measured is not None and not self.delta else self.neutral()
            return np.clip(start, self._low, self._high)
        return np.where(self._held, self.last, 0.0) if self.delta else self.last.copy()

    def hold(self, measured: Vector | None = None) -> Gated:
        """Comes to rest as fast as the limits allow, and stays.

        Args:
            measured: (A,) position to hold if nothing was sent yet; `absolute` actions only.
        """
        if self.last is None:
            self.reset(measured if measured is not None and not self.delta else self.neutral())
        assert self.last is not None
        if self._online is not None:
            command = self._online.brake()
            if self.delta:
                command = np.where(self._held, self.last, command)
        else:
            command = np.where(self._held, self.last, 0.0) if self.delta else self.last.copy()
        self.last = np.clip(command, self._low, self._high)
        return Gated(self.last)

    def pass_through(self, desired: Vector, tool: Vector | None = None) -> Gated:
        """The nearest allowed command.

        Args:
            desired: (A,).
            tool: (3,) measured tool position, where the workspace box is given by state names.

        Raises:
            UnsafeCommand: not finite, or of the wrong length.
        """
        if desired.shape != (self.size,):
            raise UnsafeCommand(f"command of shape {list(desired.shape)} for {self.size} joints")
        if not np.isfinite(desired).all():
            bad = [n for n, v in zip(self.names, desired, strict=True) if not np.isfinite(v)]
            raise UnsafeCommand(f"command is not finite: {', '.join(bad)}")
        if self.last is None:
            self.reset(self.neutral() if self.delta else desired)
        assert self.last is not None
        command = self.inside(desired)
        if self.delta and tool is not None:
            command = self._box.stop_outward(command, tool)
        if self._online is not None:
            online = self._online.step(command)
            command = np.where(self._held, command, online) if self.delta else online
            command = np.clip(command, self._low, self._high)
        elif self._tool_box is not None:
            bound = self._tool_box.outside_m(self.last) + _WALL_M
            if self._tool_box.outside_m(command) > bound:
                command = self.last
        self.last = command
        changed = np.abs(command - desired) > 1e-6
        if not changed.any():
            return Gated(command)
        clipped = tuple(n for n, c in zip(self.names, changed, strict=True) if c)
        for name in clipped:
            self.counts[name] += 1
        return Gated(command, clipped)


def _tool_box(contract: Contract, folder: Path) -> ToolBox | None:
    """The workspace box where it is given by a model."""
    box = contract.safety.workspace
    if box is None or not box.model:
        if box is not None and not box.names:
            raise ContractError(
                "safety.workspace has neither `model` and `site` nor `names`: the tool's position "
                "would be unknown, and the box without effect"
            )
        return None
    if contract.action.mode != "absolute":
        raise ContractError(
            "safety.workspace.model needs an `absolute` action of joint positions; a `delta` cell "
            "gives its box by `names`"
        )
    return ToolBox(box, Kinematics(folder / box.model, box.site, contract.action.names))


class _Box:
    """The workspace box where it is given by names of states or joints."""

    def __init__(self, contract: Contract) -> None:
        names = contract.action.names
        self.absolute_low = np.full(len(names), -np.inf)
        self.absolute_high = np.full(len(names), np.inf)
        self._axes: list[tuple[int, int]] = []
        """(index of the action, axis of the box)"""
        box = contract.safety.workspace
        if box is None:
            return
        self._low, self._high = np.array(box.low), np.array(box.high)
        for axis, state in enumerate(box.names):
            moves = displacement_name(state) if contract.action.mode == "delta" else state
            if moves not in names:
                raise ContractError(
                    f"safety.workspace.names has {state!r}, but no action is called {moves!r}; "
                    f"the actions are {', '.join(names)}"
                )
            index = names.index(moves)
            self._axes.append((index, axis))
            if contract.action.mode == "absolute":
                self.absolute_low[index] = box.low[axis]
                self.absolute_high[index] = box.high[axis]

    def stop_outward(self, command: Vector, tool: Vector) -> Vector:
        """Removes displacements that lead out of the box from its border or from outside."""
        for index, axis in self._axes:
            if (tool[axis] <= self._low[axis] and command[index] < 0) or (
                tool[axis] >= self._high[axis] and command[index] > 0
            ):
                command[index] = 0.0
        return command


def displacement_name(state: str) -> str:
    """`ee_x` -> `ee_dx`: how a delta action calls the displacement of a state."""
    stem, _, last = state.rpartition("_")
    return f"{stem}_d{last}" if stem else f"d{last}"


class _Online:
    """Follows targets within velocity, acceleration and jerk limits, one control period a call.

    State: position, velocity, acceleration of the commanded trajectory. For delta actions position
    is rebased to zero after every call and a command is the distance travelled.
    """

    def __init__(self, contract: Contract, low: Vector, high: Vector, box: ToolBox | None) -> None:
        self._box = box
        action, limits = contract.action, contract.action.limits
        n, self._dt = action.size, 1.0 / contract.control_hz
        dt = self._dt
        self._delta = action.mode == "delta"
        velocity = np.array(limits.velocity or [1e6] * n, dtype=np.float64)
        acceleration = np.array(limits.acceleration or [np.inf] * n, dtype=np.float64)
        self._low, self._high = low, high
        if self._delta:
            velocity = np.minimum(velocity, np.minimum(np.abs(low), np.abs(high)) / dt)
            if limits.step:
                acceleration = np.minimum(acceleration, np.array(limits.step) / dt**2)
            self._low, self._high = np.full(n, -np.inf), np.full(n, np.inf)
        elif limits.step:
            velocity = np.minimum(velocity, np.array(limits.step) / dt)
        # Held joints of a delta action do not move by this trajectory; any positive limit will do.
        held = np.array([self._delta and name in action.held for name in action.names])
        self._velocity = np.where(held, 1e6, np.maximum(velocity, 1e-9))
        self._acceleration = acceleration
        self._ruckig = Ruckig(n, dt)
        self._trajectory = Trajectory(n)
        self._input = InputParameter(n)
        self._stop = InputParameter(n)
        for parameter in (self._input, self._stop):
            parameter.max_velocity = self._velocity.tolist()
            parameter.max_acceleration = acceleration.tolist()
            if limits.jerk:
                parameter.max_jerk = list(limits.jerk)
        # Within a jerk limit a target cannot be met in one period: the trajectory aims at where
        # the target will be a few periods later, or it would swing around it.
        self._ahead = JERK_AHEAD if limits.jerk else 1
        self._input.minimum_duration = self._ahead * dt
        self._stop.control_interface = ControlInterface.Velocity
        self._stop.synchronization = Synchronization.No
        self._stop.target_velocity = [0.0] * n
        self._stop.target_acceleration = [0.0] * n
        self.reset(None)

    def reset(self, position: Vector | None) -> None:
        n = len(self._velocity)
        self._position = np.zeros(n) if position is None else position.copy()
        self._rate = np.zeros(n)
        self._change = np.zeros(n)
        self._target = self._position.copy()

    def step(self, target: Vector) -> Vector:
        """One period towards the target: the new set-point, or a delta action's displacement."""
        ahead = (target if self._delta else target - self._target) / self._dt
        self._target = np.zeros_like(target) if self._delta else target.copy()
        room = 1.0 - 1e-6
        ahead = np.clip(ahead, -self._velocity * room, self._velocity * room)
        # At a border the trajectory has to come to rest, whatever the stream of targets did before.
        ahead[(target <= self._low) | (target >= self._high)] = 0.0
        aim = np.clip(target + ahead * self._dt * (self._ahead - 1), self._low, self._high)
        for point, speed in ((aim, ahead), (target, np.zeros_like(ahead))):
            state = self._solve(point, speed)
            if state is not None and self._can_stop(*state):
                return self._accept(*state)
        return self.brake()

    def brake(self) -> Vector:
        """One period of the fastest stop."""
        if not self._rate.any() and not self._change.any():
            self._target = self._position.copy()
            return np.zeros_like(self._position) if self._delta else self._position.copy()
        if not self._calculate_stop(self._position, self._rate, self._change):
            # Cannot happen for a state that this class produced; standing still is what is left.
            self._rate[:] = 0.0
            self._change[:] = 0.0
            return np.zeros_like(self._position) if self._delta else self._position.copy()
        state = self._at(self._dt)
        out = self._accept(*state)
        self._target = self._position.copy()
        return out

    def _accept(self, position: Vector, rate: Vector, change: Vector) -> Vector:
        out = position - self._position if self._delta else position.copy()
        self._position = np.zeros_like(position) if self._delta else position
        self._rate, self._change = rate, change
        return out

    def _solve(self, target: Vector, speed: Vector) -> tuple[Vector, Vector, Vector] | None:
        parameter = self._input
        parameter.current_position = self._position.tolist()
        parameter.current_velocity = self._rate.tolist()
        parameter.current_acceleration = self._change.tolist()
        parameter.target_position = target.tolist()
        parameter.target_velocity = speed.tolist()
        for synchronization in (Synchronization.Time, Synchronization.No):
            parameter.synchronization = synchronization
            if self._calculate(parameter):
                return self._at(self._dt)
        return None

    def _calculate(self, parameter: InputParameter) -> bool:
        try:
            result = self._ruckig.calculate(parameter, self._trajectory)
        except RuckigError:  # rare numerical dead ends of the synchronised solution
            return False
        return result in (Result.Working, Result.Finished)

    def _at(self, time_s: float) -> tuple[Vector, Vector, Vector]:
        position, rate, change = (np.array(v) for v in self._trajectory.at_time(time_s))
        limit, bound = self._velocity * (1 - _SLACK), self._acceleration
        return position, np.clip(rate, -limit, limit), np.clip(change, -bound, bound)

    def _calculate_stop(self, position: Vector, rate: Vector, change: Vector) -> bool:
        parameter = self._stop
        parameter.current_position = position.tolist()
        parameter.current_velocity = rate.tolist()
        parameter.current_acceleration = change.tolist()
        return self._calculate(parameter)

    def _can_stop(self, position: Vector, rate: Vector, change: Vector) -> bool:
        """Does the fastest stop from this state stay within position limits and box?"""
        if self._delta:
            return True
        if not self._calculate_stop(position, rate, change):
            return False
        slack = _SLACK * (1.0 + np.abs(self._high) + np.abs(self._low))
        for i, extremum in enumerate(self._trajectory.position_extrema):
            if extremum.min < self._low[i] - slack[i] or extremum.max > self._high[i] + slack[i]:
                return False
        return self._box is None or self._stops_inside(self._box)

    def _stops_inside(self, box: ToolBox) -> bool:
        """Of the stop just calculated, at every set-point of it; outside, it must lead back."""
        bound = box.outside_m(self._position) + _WALL_M
        ticks = int(np.ceil(self._trajectory.duration / self._dt)) + 1
        times = (min(i * self._dt, self._trajectory.duration) for i in range(ticks))
        return all(
            box.outside_m(np.array(self._trajectory.at_time(time)[0])) <= bound for time in times
        )
