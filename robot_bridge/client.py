"""One cell as a person or a program at it sees it: state, events, cameras, requests, teleoperation.

    with CellClient(load_contract("my_cell.yaml")) as cell:
        cell.wait_until(lambda: cell.state.mode == "HOLD")
        cell.request("start_episode", task="lift-cube")
        cell.ask("resume_policy").result().success

The terminal client, the teleop devices, the console and the fleet use this class. It has a ROS
context and a thread of its own: properties are snapshots that any thread may read, `listen` and
`drive` call back in the client's thread and must not block there.
"""

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import numpy as np
import rclpy
import simplejpeg
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.core.events import Event, EventError, parse_event
from robot_bridge.dds import use_default_profile
from robot_bridge.driving import Driving, Hand
from robot_bridge.nodes.common import (
    STEADY,
    Diagnose,
    Diagnostics,
    best_effort,
    latched,
    reliable,
    stamp_ns,
)
from robot_bridge.nodes.streams import image_array
from robot_bridge.requests import Requests
from robot_bridge.snapshots import (
    Chunk,
    Frame,
    Health,
    Joints,
    Reply,
    State,
    read_chunk,
    read_health,
    read_joints,
    read_state,
)
from trajectory_store.contract import Contract


class CellClient:
    """See the module. `close` (or the context manager) ends the thread and frees everything.

    Args:
        namespace: empty for the contract's cell name.
        name: of the ROS node.
        remappings: as the cell's own, where its driver publishes elsewhere.
        arguments: a process's own, for ROS to read (`--ros-args ...`).
    """

    def __init__(
        self,
        contract: Contract,
        *,
        namespace: str = "",
        name: str = "client",
        remappings: Mapping[str, str] | None = None,
        arguments: Sequence[str] | None = None,
    ) -> None:
        self.contract = contract
        self.namespace = "/" + (namespace or contract.cell).strip("/")
        self.lockstep = bool(contract.sim.get("lockstep", False))
        self._simulated = bool(contract.sim)
        self._state, self._joints, self._executed = State(), None, None
        self._chunk: Chunk | None = None
        self._active: dict[str, Any] = {}
        self._health: dict[str, Health] = {}
        self._frames: dict[str, Frame] = {}
        self._events: deque[Event] = deque(maxlen=1000)
        self._episode: dict[str, Any] | None = None
        self._listeners: list[Callable[[str, Any], None]] = []
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._driving: Driving | None = None
        use_default_profile()
        self._context = rclpy.Context()
        words = [w for a, b in (remappings or {}).items() for w in ("-r", f"{a}:={b}")]
        rclpy.init(
            args=list(arguments or []),
            context=self._context,
            signal_handler_options=SignalHandlerOptions.NO,
        )
        self._node = rclpy.create_node(
            name,
            namespace=self.namespace,
            context=self._context,
            cli_args=["--ros-args", *words] if words else None,
            start_parameter_services=False,
        )
        node = self._node
        self._watched: dict[str, Any] = {}
        self._requests = Requests(node)
        subscribe = node.create_subscription
        subscribe(DiagnosticStatus, "arbiter/state", self._on_state, latched())
        # In lockstep a driver's answer moves the cell on, so no tick may be lost.
        quality = reliable(10) if self.lockstep else best_effort(5)
        subscribe(JointState, "joint_states", self._on_joints, quality)
        subscribe(JointState, "arbiter/executed", self._on_executed, best_effort(5))
        subscribe(JointTrajectory, "policy/action_chunk", self._on_chunk, reliable(1))
        subscribe(String, "policy/active", self._on_active, latched())
        subscribe(String, "events", self._on_event, latched(200))
        subscribe(DiagnosticArray, "/diagnostics", self._on_diagnostics, reliable(10))
        node.create_timer(0.05, self._requests.look_after, clock=STEADY)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(node)
        self._closing = False
        self._thread = threading.Thread(target=self._spin, name=f"client {self.namespace}")
        self._thread.start()

    # What the cell says ---------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._state

    @property
    def joints(self) -> Joints | None:
        return self._joints

    @property
    def executed(self) -> Joints | None:
        """The last command that was sent; `label` is `policy:V#C`, `human:NAME` or `hold`."""
        return self._executed

    @property
    def chunk(self) -> Chunk | None:
        return self._chunk

    @property
    def policy(self) -> Mapping[str, Any]:
        """`policy/active`: version, backend, step, sha256. Empty without a policy runner."""
        return self._active

    @property
    def health(self) -> Mapping[str, Health]:
        """Node name (`/cell/arbiter`) -> its last word in /diagnostics; this cell's nodes only."""
        return dict(self._health)

    @property
    def events(self) -> list[Event]:
        """The last thousand; a new client first gets the cell's last 200."""
        return list(self._events)

    @property
    def episode(self) -> Mapping[str, Any] | None:
        """Of the running episode: episode (uuid), task, instruction, operator, seed, and
        start_stamp_ns once it began; None between episodes."""
        return self._episode

    @property
    def caught_up(self) -> bool:
        """Has heard of the arbiter, and of every event that the arbiter has heard of."""
        newest = self._events[-1].seq if self._events else 0
        return bool(self._state.mode) and newest >= self._state.event_seq

    def listen(self, callback: Callable[[str, Any], None]) -> None:
        """Calls `callback(kind, value)` at every change, in the client's thread.

        Kinds: state, joints, executed, chunk, policy, health, event, frame.
        """
        self._listeners.append(callback)

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = 10.0) -> bool:
        """Blocks until the condition holds; it is looked at whenever something was heard."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.2))
        return True

    def subscribe(self, kind: Any, topic: str, callback: Callable[[Any], None]) -> None:
        """Any other topic, best effort; the callback runs in the client's thread."""

        def subscribe() -> None:
            self._node.create_subscription(kind, topic, callback, best_effort(5))

        self._do(subscribe)

    # Cameras

    def watch(self, key: str) -> None:
        """Subscribes to a camera of the contract. Raises ValueError for an unknown key."""
        feature = self.contract.images.get(key)
        if feature is None:
            raise ValueError(
                f"no camera {key!r} in the contract of {self.contract.cell}; it has "
                f"{', '.join(self.contract.images) or 'none'}"
            )

        def compressed(message: CompressedImage) -> None:
            self._on_frame(key, message, bytes(message.data))

        def raw(message: Image) -> None:
            image = np.ascontiguousarray(image_array(message))
            space = "RGB" if image.shape[2] == 3 else "GRAY"
            self._on_frame(key, message, simplejpeg.encode_jpeg(image, feature.quality, space))

        def subscribe() -> None:
            if key not in self._watched:
                kinds: dict[str, tuple[Any, Any]] = {
                    "sensor_msgs/CompressedImage": (CompressedImage, compressed),
                    "sensor_msgs/Image": (Image, raw),
                }
                kind, callback = kinds[feature.type]
                self._watched[key] = self._node.create_subscription(
                    kind, feature.topic, callback, best_effort(1)
                )

        self._do(subscribe)

    def unwatch(self, key: str) -> None:
        def unsubscribe() -> None:
            subscription = self._watched.pop(key, None)
            if subscription is not None:
                self._node.destroy_subscription(subscription)
            self._frames.pop(key, None)

        self._do(unsubscribe)

    def frame(self, key: str) -> Frame | None:
        """The newest picture of a watched camera; older ones are dropped, never queued."""
        return self._frames.get(key)

    # Requests -------------------------------------------------------------------------------------

    def ask(
        self,
        name: str,
        *,
        task: str | None = None,
        seed: int | None = None,
        operator: str | None = None,
        instruction: str | None = None,
        timeout_s: float = 5.0,
    ) -> "Future[Reply]":
        """Sends one of `robot_bridge.requests.REQUESTS`; from any thread.

        The reply always comes, in `timeout_s`.

        Args:
            task, seed, operator, instruction: of `start_episode`: parameters of the supervisor, set
                first. What is not given keeps its last value; an empty instruction is the task's.

        Raises:
            ValueError: no such request.
        """
        given = {"task": task, "seed": seed, "operator": operator, "instruction": instruction}
        values = {key: value for key, value in given.items() if value is not None}
        return self._requests.ask(name, values, timeout_s, self._do)

    def shadow(self, wanted: str, *, timeout_s: float = 5.0) -> "Future[Reply]":
        """Lets a candidate run beside the active policy, moving nothing: a version of the
        registry, `newest`, or none if empty. `health` of the runner tells how they compare."""
        return self._requests.shadow(wanted, timeout_s, self._do)

    def request(self, name: str, **options: Any) -> Reply:
        """`ask`, and waits for the reply. Not from the client's own thread."""
        return self.ask(name, **options).result()

    # Teleoperation --------------------------------------------------------------------------------

    def drive(self, hand: Callable[[int, Joints | None], Hand], *, operator: str = "") -> None:
        """Publishes the operator's deadman and target until `release`.

        See `robot_bridge.driving`. Control is given when `takeover` was asked for and the deadman
        is held. After `hand` raised nothing more is published, so the arbiter holds.

        Args:
            hand: (stamp in the cell's time, the newest joints) -> Hand; in the client's thread.
        """

        def begin() -> None:
            self._end_drive()
            self._driving = Driving(
                self._node, self.contract, hand, operator=operator, now_ns=self.now_ns
            )
            if self._joints is not None:
                self._driving.joints(self._joints)  # a lockstep cell stands still at this tick

        self._do(begin)

    def report(self, diagnose: Diagnose) -> None:
        """Publishes how this program is in /diagnostics, once a second; in the client's thread."""
        self._do(lambda: setattr(self, "_diagnostics", Diagnostics(self._node, diagnose)))

    def release(self) -> None:
        """Lets go of the deadman and takes the publishers away."""
        self._do(self._end_drive)

    def now_ns(self) -> int:
        """The cell's time: of the newest joint states where it is simulated, else of the clock."""
        if not self._simulated:
            return time.time_ns()
        return 0 if self._joints is None else self._joints.stamp_ns

    # ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets go of the deadman, ends the thread, answers what was still asked."""
        if not self._closing:
            self._closing = True
            self._executor.wake()
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _spin(self) -> None:
        try:
            while not self._closing:
                self._executor.spin_once(timeout_sec=0.2)
        except ExternalShutdownException:
            pass
        finally:
            self._end_drive()
            self._requests.close()
            self._executor.shutdown()
            self._node.destroy_node()
            self._context.try_shutdown()

    def _do(self, action: Callable[[], None]) -> None:
        """Runs it in the client's thread, after everything that was given before."""
        if threading.current_thread() is self._thread:
            action()
        else:
            # rclpy runs the newest of several waiting tasks first; our own queue keeps the order.
            self._actions.put(action)
            self._executor.create_task(self._act)

    def _act(self) -> None:
        self._actions.get_nowait()()

    def _tell(self, kind: str, value: Any) -> None:
        for listener in self._listeners:
            listener(kind, value)
        with self._changed:
            self._changed.notify_all()

    # What arrives

    def _on_state(self, message: DiagnosticStatus) -> None:
        self._state = read_state(message)
        self._tell("state", self._state)

    def _on_joints(self, message: JointState) -> None:
        joints = self._joints = read_joints(message)
        if self._driving is not None:
            self._driving.joints(joints)
        self._tell("joints", joints)

    def _on_executed(self, message: JointState) -> None:
        self._executed = read_joints(message)
        self._tell("executed", self._executed)

    def _on_chunk(self, message: JointTrajectory) -> None:
        self._chunk = read_chunk(message)
        self._tell("chunk", self._chunk)

    def _on_active(self, message: String) -> None:
        try:
            active = json.loads(message.data)
        except ValueError:
            return
        if isinstance(active, dict):
            self._active = active
            self._tell("policy", active)

    def _on_event(self, message: String) -> None:
        try:
            event = parse_event(message.data)
        except EventError:
            return
        self._events.append(event)
        if event.type == "reset":
            self._episode = dict(event.fields)
        elif event.type == "episode_start":
            self._episode = (self._episode or {}) | dict(event.fields)
        elif event.type == "episode_end":
            self._episode = None
        self._tell("event", event)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        entries: Any = message.status
        for status in entries:
            name = str(status.name)
            if name.startswith(self.namespace + "/"):
                health = read_health(status)
                self._health[name] = health
                self._tell("health", (name, health))

    def _on_frame(self, key: str, message: Any, jpeg: bytes) -> None:
        before = self._frames.get(key)
        seq = 1 if before is None else before.seq + 1
        self._frames[key] = frame = Frame(key, seq, stamp_ns(message.header.stamp), jpeg)
        self._tell("frame", frame)

    def _end_drive(self) -> None:
        if self._driving is not None:
            self._driving.close()
            self._driving = None
