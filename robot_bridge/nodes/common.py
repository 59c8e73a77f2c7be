"""What the nodes share: QoS, stamps, the lifecycle base and the way a process runs one node."""

import array
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from robot_bridge.core.chunking import Rows
from robot_bridge.dds import use_default_profile
from trajectory_store.contract import Contract, ContractError, load_contract

Diagnose = Callable[[], tuple[bytes, str, dict[str, Any]]]
"""Level, one line, values."""
STEADY = Clock(clock_type=ClockType.STEADY_TIME)
DELIVERY_S = 2.0
"""A reader that has died is waited for at most so long."""
LINGER_S = 5.0
"""How long a node that was told to stop may go on with what `CellNode.unfinished` names."""


def reliable(depth: int) -> QoSProfile:
    return QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE)


def best_effort(depth: int) -> QoSProfile:
    return QoSProfile(depth=depth, reliability=ReliabilityPolicy.BEST_EFFORT)


def latched(depth: int = 1) -> QoSProfile:
    """Late joiners get the last `depth` messages."""
    return QoSProfile(
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )


def stamp_ns(stamp: Any) -> int:
    """Of a builtin_interfaces/Time."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def set_stamp(stamp: Any, ns: int) -> None:
    stamp.sec, stamp.nanosec = divmod(ns, 1_000_000_000)


def chunk_message(contract: Contract) -> JointTrajectory:
    """A chunk's message; `fill_chunk` puts numbers into it."""
    message = JointTrajectory(joint_names=list(contract.action.names))
    points: list[JointTrajectoryPoint] = []
    for i in range(contract.chunk_horizon):
        point = JointTrajectoryPoint()
        set_stamp(point.time_from_start, (i + 1) * contract.dt_ns)
        points.append(point)
    message.points = points
    return message


def fill_chunk(message: JointTrajectory, stamp: int, frame_id: str, chunk: Rows) -> None:
    set_stamp(message.header.stamp, stamp)
    message.header.frame_id = frame_id
    for point, row in zip(message.points, chunk, strict=True):
        point.positions = array.array("d", row.tobytes())


def deliver(publisher: Any) -> None:
    """Before a publisher goes: waits until the readers that are there have its last messages."""
    publisher.wait_for_all_acked(Duration(seconds=DELIVERY_S))


class Diagnostics:
    """Publishes once a second, in /diagnostics, how a node is. Every node of a cell has one.

    Args:
        diagnose: -> level, one line, values.
    """

    def __init__(self, node: Node, diagnose: Diagnose) -> None:
        self._node, self._diagnose = node, diagnose
        name = f"{node.get_namespace()}/{node.get_name()}".replace("//", "/")
        self._status = DiagnosticStatus(name=name)
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", reliable(10))
        node.create_timer(1.0, self.publish, clock=STEADY)

    def publish(self) -> None:
        level, text, values = self._diagnose()
        self._status.level, self._status.message = level, text
        self._status.values = [KeyValue(key=k, value=str(v)) for k, v in values.items()]
        message = DiagnosticArray(status=[self._status])
        set_stamp(message.header.stamp, self._node.get_clock().now().nanoseconds)
        self._publisher.publish(message)


class UserError(Exception):
    """A mistake in parameters or files; the message is all that the user sees."""


class CellNode(LifecycleNode):
    """A lifecycle node of one cell.

    Parameters: `contract` (path), `autostart` (bool: configure and activate at once, for machines
    without a supervisor). Subclasses fill in `setup`, `teardown` and `diagnose`; entities live from
    `setup` to `teardown`, and `self.live` tells whether the node is active.

    On a lockstep cell the node's times are the stamps of the messages; it does not follow /clock,
    as that would cost every node a callback a tick.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, start_parameter_services=False, **options)
        self.live = False
        self._problem_text = ""
        """Why it could not be configured."""
        path = str(self.declare_parameter("contract", "").value or "")
        if not path:
            raise UserError(f"{name}: no contract; pass `--ros-args -p contract:=FILE`")
        self.contract_path = Path(path)
        self.contract: Contract = load_contract(path)
        self.lockstep = bool(self.contract.sim.get("lockstep", False))
        if self.lockstep:
            self.set_parameters([Parameter("use_sim_time", value=False)])
        self._diagnostics = Diagnostics(self, self._how_it_is)

    # For subclasses

    def setup(self) -> None:
        """Creates everything. Raises UserError or any error; the node then stays unconfigured."""

    def teardown(self) -> None:
        """Ends threads and closes files; destroys what `setup` made."""

    def started(self) -> None:
        """The node became active."""

    def stopped(self) -> None:
        """The node is no longer active."""

    def unfinished(self) -> bool:
        """After a signal: is there work that must not be cut off? Asked again until `LINGER_S`."""
        return False

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        """Level, one line, values."""
        return DiagnosticStatus.OK, "", {}

    # Lifecycle

    def autostart(self) -> bool:
        """Configures and activates if the parameter says so; False when that failed."""
        if not self.declare_parameter("autostart", False).value:
            return True
        success = TransitionCallbackReturn.SUCCESS
        return self.trigger_configure() == success and self.trigger_activate() == success

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            self.setup()
        except Exception as error:
            self._explain("configure", error)
            self.teardown()
            return TransitionCallbackReturn.FAILURE
        self._problem_text = ""
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        super().on_activate(state)
        self.live = True
        self.started()
        self.get_logger().info("active")
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.live = False
        self.stopped()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.teardown()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.live = False
        self.teardown()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.live = False
        self.teardown()
        return TransitionCallbackReturn.SUCCESS

    def _explain(self, doing: str, error: Exception) -> None:
        if isinstance(error, UserError | ContractError | ValueError | OSError):
            text = f"cannot {doing}: {error}"
        else:
            import traceback

            text = f"cannot {doing}: {traceback.format_exc()}"
        self._problem_text = text
        self.get_logger().error(text)

    def _how_it_is(self) -> tuple[bytes, str, dict[str, Any]]:
        level, text, values = self.diagnose()
        if not self.live:
            level, text = DiagnosticStatus.STALE, self._problem_text or "not active"
        return level, text, values


def run(make: Callable[[], Node], arguments: list[str] | None = None) -> int:
    """The body of a node's process: 0 after a signal, 2 for a user's mistake, 1 otherwise.

    SIGINT and SIGTERM both end the executor, and so does a node that sets `finished` or an
    `exit_status`; the node then leaves by its own `teardown`, so that files are closed. A second
    signal while it does so changes nothing.
    """
    use_default_profile()
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    stop = False

    def on_signal(*_: Any) -> None:
        nonlocal stop
        stop = True
        executor.wake()

    executor = SingleThreadedExecutor()
    node: Node | None = None
    status = 0
    try:
        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)
        node = make()
        executor.add_node(node)
        if isinstance(node, CellNode) and not node.autostart():
            status = 1
        while not (stop or status or getattr(node, "finished", False)):
            executor.spin_once(timeout_sec=0.5)
            status = getattr(node, "exit_status", 0)
        deadline = monotonic_s() + LINGER_S
        while isinstance(node, CellNode) and node.unfinished() and monotonic_s() < deadline:
            executor.spin_once(timeout_sec=0.05)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (UserError, ContractError) as error:
        print(error, file=sys.stderr)
        status = 2
    finally:
        if node is not None:
            close = getattr(node, "teardown", None) or getattr(node, "close", None)
            if close is not None:
                close()
            executor.remove_node(node)
            node.destroy_node()
        rclpy.try_shutdown()
    return status


def monotonic_s() -> float:
    return time.monotonic()
