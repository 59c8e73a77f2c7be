"""The simulated robot as a ROS 2 node: speaks like a robot's driver and its cameras.

    python -m sim.nodes.robot --ros-args -r __ns:=/CELL -p contract:=FILE

Publishes /clock, `joint_states`, `sim/scene_state` and `cameras/...`, all stamped with the tick's
time k * dt, which grows over resets and never goes back. Obeys `command` and the `reset` events.
A robot that was started anew goes on in the cell's time, but never with an episode of the one
before: its scene is another.

In lockstep (`sim.lockstep` in the contract) tick k + 1 follows when the command stamped k * dt has
arrived; between episodes everything stands still. Otherwise a wall timer drives it at
`control_hz * real_time_factor`, and a command older than `command_timeout_s` means hold.
"""

import array
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from jaxtyping import Float
from rclpy.node import Node
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import CameraInfo, CompressedImage, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.nodes.common import (
    STEADY,
    Diagnostics,
    UserError,
    latched,
    monotonic_s,
    reliable,
    run,
    set_stamp,
    stamp_ns,
)
from sim.camera import Camera, Exposure, close_darkrooms
from sim.cell import Cell, Stream, make_cell
from trajectory_store import Contract, load_contract

REPUBLISH_AFTER_S = 2.0
"""Lockstep: a tick that nobody answered is said again, for an arbiter that was restarted."""
HISTORY_S = 0.5
"""The robot begins when it has been told nothing old for so long."""


class RobotNode(Node):
    """See the module. Raises UserError or ContractError for wrong parameters."""

    def __init__(self, **node_options: Any) -> None:
        super().__init__(
            "robot",
            # It is the clock; subscribing to itself would cost a callback every tick.
            parameter_overrides=[Parameter("use_sim_time", value=False)],
            start_parameter_services=False,
            **node_options,
        )
        path = self.declare_parameter("contract", "").value
        if not path:
            raise UserError("robot: no contract; pass `--ros-args -p contract:=FILE`")
        self.contract: Contract = load_contract(path)
        factor = float(self.declare_parameter("real_time_factor", 1.0).value or 0.0)
        timeout_s = float(self.declare_parameter("command_timeout_s", 0.25).value or 0.0)
        if factor <= 0 or timeout_s <= 0:
            raise UserError(
                f"robot: real_time_factor is {factor} and command_timeout_s {timeout_s}; "
                "both must be > 0"
            )
        self.lockstep = bool(self.contract.sim.get("lockstep", False))
        self.cell: Cell = make_cell(self.contract)
        # Pictures take longer than a tick of a fast cell. In real time a thread of their own draws
        # them; in lockstep time stands still anyway.
        self._artist = None if self.lockstep else ThreadPoolExecutor(1, "artist")
        self._in_artist(self.cell.warm_up)
        self.tick = 1
        """k; the scene shows time k * dt."""
        self.refused: dict[str, int] = {}
        """Commands that were not obeyed, by reason."""
        self._dt_ns = self.contract.dt_ns
        self._episode: str | None = None
        self._running = False
        self._command: np.ndarray | None = None
        self._command_at = -math.inf
        self._command_timeout_s = timeout_s
        self._names = list(self.contract.action.names)
        self._sent: np.ndarray | None = None
        self._said_at = monotonic_s()

        self._time = self.create_publisher(ClockMessage, "/clock", reliable(1))
        self._clock_message = ClockMessage()
        self._voices = [
            _Voice(self.create_publisher(JointState, topic, reliable(10)), stream)
            for topic, stream in self.cell.streams.items()
        ]
        self._eyes = {
            key: _Eye(self, key, feature.topic) for key, feature in self.contract.images.items()
        }
        self._reset_done = self.create_client(Trigger, "supervisor/reset_done")
        topic = self.contract.action.topic
        self.create_subscription(JointTrajectory, topic, self._on_command, reliable(1))
        self._born_ns, self._told_s = time.time_ns(), monotonic_s()
        """What was published before is history, told again to a late joiner."""
        self._caught_up = False
        self._missed: dict[str, Any] | None = None
        """A reset that was asked for before we were there, and has not been answered."""
        on_event: Any = self._on_event
        self.create_subscription(String, "events", on_event, latched(200))
        self._past = self.create_subscription(
            DiagnosticStatus, "arbiter/state", self._on_arbiter, latched()
        )
        self._catching_up = self.create_timer(HISTORY_S / 2, self._catch_up, clock=STEADY)
        self._diagnostics = Diagnostics(self, self.diagnose)
        if self.lockstep:
            self.create_timer(REPUBLISH_AFTER_S / 4, self._say_again, clock=STEADY)
        else:
            self.cell.reset(seed=0)
            period_s = 1.0 / (self.contract.control_hz * factor)
            self.create_timer(period_s, self._on_timer, clock=STEADY)

    def close(self) -> None:
        """Frees cameras and models."""
        self._in_artist(self.cell.close)
        self._in_artist(close_darkrooms)
        if self._artist is not None:
            self._artist.shutdown()

    def _in_artist(self, work: Callable[[], None]) -> None:
        """Runs what touches OpenGL in the one thread that draws, and waits for it."""
        if self._artist is None:
            work()
        else:
            self._artist.submit(work).result()

    @property
    def stamp_ns(self) -> int:
        return self.tick * self._dt_ns

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        values: dict[str, Any] = {
            "tick": self.tick,
            "episode": self._episode or "",
            "running": self._running,
        }
        values |= {f"refused {reason}": count for reason, count in self.refused.items()}
        return DiagnosticStatus.OK, "", values

    # What was before -----------------------------------------------------------------------------

    def _on_arbiter(self, message: DiagnosticStatus) -> None:
        """How late it is in the cell."""
        for pair in message.values:
            if pair.key == "stamp_ns":
                self._be_no_earlier_than(int(pair.value))

    def _be_no_earlier_than(self, ns: int) -> None:
        if not self._running and ns > self.stamp_ns:
            self.tick = math.ceil(ns / self._dt_ns)

    def _catch_up(self) -> None:
        if monotonic_s() - self._told_s < HISTORY_S:
            return
        self.destroy_timer(self._catching_up)
        self.destroy_subscription(self._past)
        self._caught_up = True
        if self._missed is not None:
            self._reset(self._missed)

    # Episodes ------------------------------------------------------------------------------------

    def _on_event(self, message: String, info: Any) -> None:
        try:
            event = json.loads(message.data)
            kind, said_ns = event["type"], int(event.get("stamp_ns", 0))
        except (ValueError, KeyError, TypeError):
            self._refuse("event that is not JSON with a type")
            return
        self._be_no_earlier_than(said_ns)
        missed = self._missed
        if missed is not None and (kind == "reset" or event.get("episode") == missed["episode"]):
            self._missed = None  # another came, or another robot answered
        if info["source_timestamp"] < self._born_ns:
            self._told_s = monotonic_s()
            if kind == "reset" and "episode" in event:
                self._missed = event
            return
        if kind == "reset":
            self._reset(event)
        elif kind == "episode_start" and event.get("episode") == self._episode:
            self._running = True
            self._advance_if_commanded()
        elif kind == "episode_end" and event.get("episode") == self._episode:
            self._running = False
            self._episode = None

    def _reset(self, event: dict[str, Any]) -> None:
        try:
            task, seed = str(event["task"]), int(event["seed"])
            self.cell.reset(seed=seed, options={"task": task})
        except (KeyError, TypeError, ValueError) as error:
            self.get_logger().error(f"cannot reset: {error}")
            return
        self._episode = event.get("episode")
        self._running = False
        self._command, self._command_at = None, -math.inf
        self._sent = None
        self.tick += 1
        self._say()
        if not self._reset_done.wait_for_service(timeout_sec=5.0):
            self.get_logger().error(
                "reset done, but supervisor/reset_done does not answer; is the supervisor running?"
            )
            return
        self._reset_done.call_async(Trigger.Request())

    # Motion --------------------------------------------------------------------------------------

    def _on_command(self, message: JointTrajectory) -> None:
        command = self._read(message)
        if command is None:
            return
        if self.lockstep and stamp_ns(message.header.stamp) != self.stamp_ns:
            self._refuse("command stamped for another tick")
            return
        if not self.lockstep and self._episode is not None and not self._running:
            return  # the scene was just put elsewhere; whoever commands has not noticed yet
        self._command, self._command_at = command, monotonic_s()
        if self.lockstep:
            self._advance_if_commanded()

    def _advance_if_commanded(self) -> None:
        """One control step in lockstep, if an episode runs and the tick's command is here."""
        if self._running and self._command is not None and self.lockstep:
            command, self._command = self._command, None
            self._step(command)

    def _on_timer(self) -> None:
        if not self._caught_up:
            return
        fresh = monotonic_s() - self._command_at <= self._command_timeout_s
        fresh_command = self._command if fresh else None
        hold = self.cell.hold_command(self._sent)
        self._step(hold if fresh_command is None else fresh_command)

    def _step(self, command: Float[np.ndarray, " A"]) -> None:
        self._sent = command
        self.cell.advance(command)  # clips to the contract's limits, whatever the arbiter did
        self.tick += 1
        self._say()

    def _read(self, message: JointTrajectory) -> Float[np.ndarray, " A"] | None:
        """The command in the contract's order; None for one that must not be obeyed."""
        points: Any = message.points
        if len(points) != 1:
            return self._refuse("command without exactly one point")
        values = points[0].positions
        names = list(message.joint_names)
        if names == self._names and len(values) == len(self._names):
            command = np.array(values)
        elif sorted(names) == sorted(self._names) and len(values) == len(names):
            command = np.array([values[names.index(name)] for name in self._names])
        else:
            return self._refuse("command with wrong joint names or length")
        if not np.isfinite(command).all():
            return self._refuse("command with NaN or infinity")
        return command

    def _refuse(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self.get_logger().warning(
            f"refused: {reason} ({self.refused[reason]} so far)", throttle_duration_sec=5.0
        )

    # Speech --------------------------------------------------------------------------------------

    def _say(self) -> None:
        """Publishes the tick, the clock first and the joint states last: they start the arbiter."""
        self._said_at = monotonic_s()
        stamp = self._clock_message.clock
        set_stamp(stamp, self.stamp_ns)
        self._time.publish(self._clock_message)
        for key, eye in self._eyes.items():
            if not self.cell.frame_due(key):
                continue
            camera = self.cell.camera(key)
            if self._artist is None:
                eye.publish(camera, camera.exposure, self.stamp_ns)
            elif eye.busy:
                self._refuse("frame, as the one before is still being drawn")
            else:
                eye.busy = True
                self._artist.submit(eye.develop, camera, camera.lend(), self.stamp_ns)
        for voice in reversed(self._voices):
            voice.publish(stamp)

    def _say_again(self) -> None:
        if self._episode is not None and monotonic_s() - self._said_at >= REPUBLISH_AFTER_S:
            self._say()


class _Voice:
    """A JointState topic; the message and its buffers are made once."""

    def __init__(self, publisher: Any, stream: Stream) -> None:
        self._publisher = publisher
        self._message = JointState(name=list(stream.names))
        self._copies: list[tuple[np.ndarray, np.ndarray]] = []
        for field in ("position", "velocity", "effort"):
            source = getattr(stream, field)
            if source is not None:
                setattr(self._message, field, array.array("d", bytes(8 * len(source))))
                # The setter copied; write into the message's own array from now on.
                own = np.frombuffer(getattr(self._message, field))
                self._copies.append((own, source))

    def publish(self, stamp: Any) -> None:
        for target, source in self._copies:
            target[:] = source
        self._message.header.stamp = stamp
        self._publisher.publish(self._message)


class _Eye:
    """A camera's topics."""

    def __init__(self, node: Node, key: str, topic: str) -> None:
        self._image = node.create_publisher(CompressedImage, topic, reliable(5))
        folder = topic.partition("/image_raw")[0]
        self._info = node.create_publisher(CameraInfo, f"{folder}/camera_info", latched())
        self._frame_id = f"{key.removeprefix('observation.images.')}_optical"
        self._message = CompressedImage(format="jpeg")
        self._message.header.frame_id = self._frame_id
        self._said_info = False
        self.busy = False
        """A frame is with the thread that draws."""

    def develop(self, camera: Camera, exposure: Exposure, stamp_ns: int) -> None:
        """`publish` for another thread."""
        try:
            self.publish(camera, exposure, stamp_ns)
        finally:
            camera.give_back(exposure)
            self.busy = False

    def publish(self, camera: Camera, exposure: Exposure, stamp_ns: int) -> None:
        set_stamp(self._message.header.stamp, stamp_ns)
        if not self._said_info:
            self._said_info = True
            self._info.publish(self._camera_info(camera))
        self._message.data = array.array("B", exposure.jpeg())
        self._image.publish(self._message)

    def _camera_info(self, camera: Camera) -> CameraInfo:
        """A pinhole without distortion, centred."""
        focal = camera.height / 2 / math.tan(math.radians(camera.fovy_deg) / 2)
        x, y = camera.width / 2, camera.height / 2
        message = CameraInfo(height=camera.height, width=camera.width, distortion_model="plumb_bob")
        message.header.stamp = self._message.header.stamp
        message.header.frame_id = self._frame_id
        message.d = [0.0] * 5
        message.k = [focal, 0.0, x, 0.0, focal, y, 0.0, 0.0, 1.0]
        message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
        message.p = [focal, 0.0, x, 0.0, 0.0, focal, y, 0.0, 0.0, 0.0, 1.0, 0.0]
        return message


def main(arguments: list[str] | None = None) -> int:
    return run(RobotNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
