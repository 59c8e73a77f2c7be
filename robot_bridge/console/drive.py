"""A hold: the browser's deadman and axes become the hand that the arbiter follows.

The browser says `drive` about 25 times a second while something is held. A hold ends by release,
by silence, or when a message came too late; the next one needs a fresh press. Nothing here knows
ROS or the web, and times are arguments.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trajectory_store.contract import Contract

MAX_LEAD_MS = 100.0
"""A command may not come from further in the future than clocks can be wrong."""
DEFAULT_SPEED = 0.25
"""Per second, for joints whose velocity the contract does not limit, in the joint's unit."""
MAX_STEP_S = 0.1
"""Longest time over which one answer integrates."""


def max_age_ms(contract: Contract) -> float:
    """A command that was given longer ago is dropped: the scene has moved on. 300 by default."""
    return 1.2 * contract.safety.teleop_timeout_ms


def silence_ms(contract: Contract) -> float:
    """A hold without a message for so long is over, before the arbiter's own time-out: 200."""
    return 0.8 * contract.safety.teleop_timeout_ms


class CommandRefused(ValueError):
    """A command is malformed, late or out of order; `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Drive:
    """One message of the browser."""

    seq: int
    """Rises with every command of a connection."""
    sent_ms: float
    """On the server's clock, as the browser knows it."""
    hold: int
    """Which press of the deadman this is; 0 means that nothing is held."""
    axes: Mapping[str, float] = field(default_factory=dict[str, float])
    """Action name -> rate in [-1, 1]; what is not named rests."""
    speed: float = 0.25
    """Share of the contract's velocity limits, in (0, 1]."""


class Order:
    """Sequence and age of one connection's commands."""

    def __init__(self) -> None:
        self._last = -1
        self.dropped = 0

    def check(self, seq: int, sent_ms: float, now_ms: float, max_age: float) -> None:
        """Raises CommandRefused; the sequence number counts as used all the same."""
        if seq <= self._last:
            self.dropped += 1
            raise CommandRefused("order", f"command {seq} came after {self._last}")
        self._last = seq
        age = now_ms - sent_ms
        if not math.isfinite(age) or age > max_age:
            self.dropped += 1
            raise CommandRefused("late", f"the command was {age:.0f} ms old; nothing was done")
        if age < -MAX_LEAD_MS:
            self.dropped += 1
            raise CommandRefused("clock", "the command carries a time that has not come yet")


class Hold:
    """The hand of one operator at one cell. Not thread-safe: one owner.

    Args:
        contract: tells names, limits and whether actions are set-points or displacements.
    """

    def __init__(self, contract: Contract) -> None:
        self._names = contract.action.names
        self._delta = contract.action.mode == "delta"
        held = set(contract.action.held)
        self._keeps = np.array([not self._delta or name in held for name in self._names])
        """Axes that integrate: set-points, and the gripper of a displacement cell."""
        self.silence_ms = silence_ms(contract)
        limits = contract.action.limits
        low, high = np.array(limits.position, np.float64).T
        self._low, self._high = low, high
        self._rate = np.array(limits.velocity or [DEFAULT_SPEED] * len(self._names), np.float64)
        if self._delta:
            # A gripper crosses its range in half a second.
            self._rate = np.where(self._keeps, (high - low) * 2.0, high)
        self.number = 0
        """Of the press that is held; 0 while none is."""
        self._refused = 0
        """Presses up to this one are over."""
        self._heard_ms = -math.inf
        self._answered_ms = -math.inf
        self._axes = np.zeros(len(self._names))
        self._speed = 0.0
        self._target: NDArray[np.float64] | None = None

    def hear(self, drive: Drive, now_ms: float) -> str:
        """Takes a message: `begin`, `end`, `` (goes on) or `over` (this press has ended already).

        Raises:
            CommandRefused: an axis that the cell does not have, or a value that is no rate.
        """
        axes = np.zeros(len(self._names))
        for name, value in drive.axes.items():
            if name not in self._names:
                raise CommandRefused(
                    "axis", f"no axis {name!r}; this cell has {', '.join(self._names)}"
                )
            if not math.isfinite(value) or abs(value) > 1.0:
                raise CommandRefused("axis", f"axis {name} is {value}; expected -1 to 1")
            axes[self._names.index(name)] = value
        if not 0.0 < drive.speed <= 1.0:
            raise CommandRefused("speed", f"speed is {drive.speed}; expected a share in (0, 1]")
        if drive.hold == 0:
            return "end" if self.end() else ""
        if drive.hold <= self._refused:
            return "over"
        begin = drive.hold != self.number
        self._heard_ms, self._axes, self._speed = now_ms, axes, drive.speed
        if begin:
            self.number, self._target = drive.hold, None
            self._answered_ms = now_ms
        return "begin" if begin else ""

    def end(self) -> bool:
        """Lets go; True if something was held."""
        was, self.number = self.number, 0
        self._refused = max(self._refused, was)
        return was != 0

    def silent(self, now_ms: float) -> bool:
        """The browser fell silent while holding: a frozen page, a cut link."""
        return self.number != 0 and now_ms - self._heard_ms > self.silence_ms

    def target(
        self, now_ms: float, measured: NDArray[np.float64] | None, dt_s: float | None = None
    ) -> NDArray[np.float64] | None:
        """(A,) the command of this moment while held; None if nothing can be said.

        Args:
            measured: (A,) where the robot is; the last command on cells of displacements.
            dt_s: time that this answer stands for; by default since the last one.
        """
        if self.number == 0 or self.silent(now_ms):
            return None
        if self._target is None:
            if measured is not None:
                self._target = np.array(measured, np.float64)
            elif self._delta:
                self._target = np.zeros(len(self._names))
            else:
                return None
        passed = (now_ms - self._answered_ms) / 1e3 if dt_s is None else dt_s
        self._answered_ms = now_ms
        step = self._axes * self._rate * self._speed
        moved = self._target + step * min(max(passed, 0.0), MAX_STEP_S)
        wanted = np.where(self._keeps, moved, step)
        self._target = np.clip(wanted, self._low, self._high)
        return self._target
