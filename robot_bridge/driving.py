"""An operator's hand on the teleop topics: deadman, and what the robot should do.

In real time both are published at the contract's `control_hz`, at least `TELEOP_HZ`. On a lockstep
cell they answer each tick with the tick's stamp, no faster than the cell's real time, since a
person cannot drive a robot that moves as fast as a computer simulates it.

Whatever ends the publishing (a release, an error, the end of the process) ends in HOLD: by the
deadman, by silence, or because the link is gone.
"""

import array
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from sensor_msgs.msg import JointState, Joy

from robot_bridge.core.joints import JointReader, NamesError
from robot_bridge.nodes.common import STEADY, reliable, set_stamp
from robot_bridge.snapshots import Joints
from trajectory_store.contract import Contract

TELEOP_HZ = 50.0
"""Slowest rate in real time; the arbiter's time-out (`safety.teleop_timeout_ms`) is a few of it."""
AGAIN_S = 0.1
"""Lockstep: a tick that stands is answered again, for an arbiter that was restarted."""


@dataclass(frozen=True)
class Hand:
    """What the operator's device says at one tick."""

    deadman: bool
    target: NDArray[np.float64] | None = None
    """(A,) in the contract's action order and unit; None says nothing about motion."""


class Driving:
    """Publishes until `close`; lives in the thread that spins `node`, all but `say_now`.

    Args:
        hand: (stamp in the cell's time, the newest joints) -> Hand.
        operator: a name, for the events and the store.
        now_ns: the cell's time.
    """

    def __init__(
        self,
        node: Node,
        contract: Contract,
        hand: Callable[[int, Joints | None], Hand],
        *,
        operator: str,
        now_ns: Callable[[], int],
    ) -> None:
        self._node, self._hand, self._operator, self._now_ns = node, hand, operator, now_ns
        self._lockstep = bool(contract.sim.get("lockstep", False))
        self._names = list(contract.action.names)
        self._joints: Joints | None = None
        self._answered_ns = -1
        self._next_s = 0.0
        self._closed = False
        self._saying = threading.Lock()
        self.error: Exception | None = None
        """What `hand` raised; nothing is published any more."""
        self._joy = node.create_publisher(Joy, "teleop/joy", reliable(1))
        self._target = node.create_publisher(JointState, "teleop/joint_target", reliable(1))
        self._period_s = 1.0 / contract.control_hz
        if self._lockstep:
            self._timer = node.create_timer(0.002, self._when_due, clock=STEADY)
        else:
            period_s = min(self._period_s, 1.0 / TELEOP_HZ)
            self._timer = node.create_timer(period_s, self._say, clock=STEADY)

    def joints(self, joints: Joints) -> None:
        """The newest sample of the robot."""
        self._joints = joints

    def _when_due(self) -> None:
        """Lockstep: the tick that stands, a control period after the last answer."""
        if self._joints is None:
            return
        now, tick_ns = time.monotonic(), self._joints.stamp_ns
        if now >= self._next_s + (AGAIN_S if tick_ns == self._answered_ns else 0.0):
            self._answered_ns, self._next_s = tick_ns, now + self._period_s
            self._say()

    def _say(self) -> None:
        with self._saying:
            if self.error is None and not self._closed:
                self._publish()

    def _publish(self) -> None:
        tick_ns = self._answered_ns if self._lockstep else self._now_ns()
        try:
            hand = self._hand(tick_ns, self._joints)
        except Exception as error:
            self.error = error
            self._node.get_logger().error(f"the operator's device failed: {error}")
            return
        if hand.target is not None:
            target = JointState(name=self._names, position=array.array("d", hand.target.tolist()))
            set_stamp(target.header.stamp, tick_ns)
            target.header.frame_id = self._operator
            self._target.publish(target)
        self._publish_joy(tick_ns, hand.deadman)

    def say_now(self) -> None:
        """In real time: at once instead of at the next period; from any thread."""
        if not self._lockstep:
            self._say()

    def _publish_joy(self, tick_ns: int, deadman: bool) -> None:
        joy = Joy(buttons=[int(deadman)])
        set_stamp(joy.header.stamp, tick_ns)
        joy.header.frame_id = self._operator
        self._joy.publish(joy)

    def close(self) -> None:
        """Lets go of the deadman, and takes the publishers away."""
        with self._saying:
            self._closed = True
        self._node.destroy_timer(self._timer)
        self._publish_joy(self._answered_ns if self._lockstep else self._now_ns(), False)
        publishers: tuple[Any, ...] = (self._joy, self._target)
        for publisher in publishers:
            self._node.destroy_publisher(publisher)


def measured(contract: Contract, joints: Joints | None) -> NDArray[np.float64] | None:
    """(A,) positions of the action's joints; None where the cell's joints have other names."""
    if joints is None:
        return None
    try:
        return JointReader(contract.action.names).read(list(joints.names), joints.position)
    except NamesError:
        return None
