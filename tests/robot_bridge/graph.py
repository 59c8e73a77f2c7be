"""A cell of real processes; the test plays the robot and the operator over real DDS."""

import array
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import simplejpeg
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from safetensors.numpy import save_file
from sensor_msgs.msg import CompressedImage, JointState, Joy
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
from robot_bridge.dds import use_default_profile
from robot_bridge.nodes.common import latched, reliable, set_stamp, stamp_ns
from trajectory_store.contract import Contract

REPEAT_AFTER_S = 0.5
"""Well below `lockstep_wait_s`: a node that was restarted may discover the robot only after the
first tick of an episode was said."""
DEADLINE_S = float(os.environ.get("VLA_POST_TEST_DEADLINE_S", "120"))
ANSWER_S = 15.0
"""Until a request is sent again. A busy machine answers late, and a node that has not discovered
this one's reader yet loses its answer: the request may have been carried out all the same."""


def checkpoint(folder: Path, contract: Contract, value: float = 0.25) -> Path:
    """A folder that the registry takes for a checkpoint of the fake runner."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"value": np.array([value], np.float32)}, folder / "model.safetensors")
    card = {
        "format": "vla_post/checkpoint/1",
        "kind": "fake",
        "contract": contract.to_json(),
        "contract_sha256": contract.sha256,
        "statistics": {},
    }
    (folder / "vla_post.json").write_text(json.dumps(card))
    return folder


class Cell:
    """Starts supervisor, arbiter and what is asked for; everything else is this object.

    Lockstep robot: publishes tick k + 1 when the command of tick k came, while `moving`. Like
    `sim.nodes.robot` it repeats a tick that nobody answered: a command may be lost, for its queue
    holds one, and a second publisher of commands overwrites it.
    """

    def __init__(
        self,
        contract: Contract,
        folder: Path,
        *,
        runner: Mapping[str, Any] | None = None,
        sim_time: bool = False,
        runner_module: str = "fake_runner",
        **config: Any,
    ) -> None:
        self.contract = contract
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "cell.yaml"
        path.write_text(json.dumps(contract.to_dict(), indent=1))
        specs = cell_nodes(
            CellConfig(
                contract=path,
                simulated=False,
                events_log=folder / "events.jsonl",
                **config,
            )
        )
        changes = {
            "runner": {"module": runner_module, "parameters": dict(runner or {})},
            "arbiter": {"parameters": {"lockstep_wait_s": 2.0, "stamp_commands": True}},
        }
        for i, spec in enumerate(specs):
            change = dict(changes.get(spec.name, {}))
            change["parameters"] = dict(spec.parameters) | change.get("parameters", {})
            change["parameters"]["use_sim_time"] = sim_time
            specs[i] = dataclasses.replace(spec, **change)
        self.group = ProcessGroup(
            specs,
            log_dir=folder / "logs",
            environment={"PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"},
        )
        use_default_profile()
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node(
            "robot",
            namespace=f"/{contract.cell}",
            context=self.context,
            start_parameter_services=False,
        )
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.names = list(contract.observations["observation.state"].names)
        self.position = [0.0, 0.5, 0.2, 0.0]  # inside the workspace box
        self.tick = 1
        self.moving = False
        self._said_at = 0.0
        self.frozen: set[str] = set()
        """Cameras that are silent."""
        self.episode: str | None = None
        self.before_say: Callable[[], None] = lambda: None
        self.commands: list[tuple[int, list[float]]] = []
        self.executed: list[tuple[int, str, list[float]]] = []
        self.state: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self.active: dict[str, Any] = {}
        self.chunks: list[tuple[int, str, np.ndarray]] = []
        self.diagnostics: dict[str, tuple[int, str]] = {}
        self._values: dict[str, dict[str, str]] = {}
        node = self.node
        self._joints = node.create_publisher(JointState, "joint_states", reliable(10))
        self._cameras = {
            key: (node.create_publisher(CompressedImage, f.topic, reliable(5)), f)
            for key, f in contract.images.items()
        }
        self._joy = node.create_publisher(Joy, "teleop/joy", reliable(1))
        self._target = node.create_publisher(JointState, "teleop/joint_target", reliable(1))
        self._clients: dict[str, Any] = {}
        subscribe = node.create_subscription
        subscribe(JointTrajectory, "command", self._on_command, reliable(1))
        subscribe(JointState, "arbiter/executed", self._on_executed, reliable(50))
        subscribe(DiagnosticStatus, "arbiter/state", self._on_state, latched())
        subscribe(String, "events", self._on_event, latched(200))
        subscribe(String, "policy/active", self._on_active, latched())
        subscribe(JointTrajectory, "policy/action_chunk", self._on_chunk, reliable(50))
        subscribe(DiagnosticArray, "/diagnostics", self._on_diagnostics, reliable(10))

    # The robot

    def now_ns(self) -> int:
        """Of a robot in real time."""
        return self.node.get_clock().now().nanoseconds

    def say(self) -> None:
        self._said_at = time.monotonic()
        self.before_say()
        ns = self.tick * self.contract.dt_ns
        image = np.full((16, 16, 3), self.tick % 256, np.uint8)
        for key, (publisher, feature) in self._cameras.items():
            if key in self.frozen:
                continue
            every = max(1, round(self.contract.control_hz / feature.rate_hz))
            if self.tick % every == 1 % every:
                frame = CompressedImage(format="jpeg")
                set_stamp(frame.header.stamp, ns)
                frame.data = array.array("B", simplejpeg.encode_jpeg(image))
                publisher.publish(frame)
        message = JointState(name=self.names, position=array.array("d", self.position))
        set_stamp(message.header.stamp, ns)
        self._joints.publish(message)

    def _on_command(self, message: JointTrajectory) -> None:
        ns = stamp_ns(message.header.stamp)
        self.commands.append((ns, list(message.points[0].positions)))
        if self.moving and ns == self.tick * self.contract.dt_ns:
            self.tick += 1
            self.say()

    def _on_event(self, message: String) -> None:
        event = json.loads(message.data)
        self.events.append(event)
        if event["type"] == "reset":
            # A frame belongs to the first tick of a scene.
            self.tick += 1
            self.tick += -(self.tick - 1) % 4
            self.episode, self.moving = event["episode"], True
            self.say()
            self.call_later("supervisor/reset_done", Trigger)
        elif event["type"] == "episode_end" and event["episode"] == self.episode:
            self.moving = False

    # What the others say

    def _on_executed(self, message: JointState) -> None:
        ns = stamp_ns(message.header.stamp)
        self.executed.append((ns, message.header.frame_id, list(message.position)))

    def _on_state(self, message: DiagnosticStatus) -> None:
        self.state = {pair.key: pair.value for pair in message.values}

    def _on_active(self, message: String) -> None:
        self.active = json.loads(message.data)

    def _on_chunk(self, message: JointTrajectory) -> None:
        rows = np.array([point.positions for point in message.points])
        self.chunks.append((stamp_ns(message.header.stamp), message.header.frame_id, rows))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.diagnostics[status.name] = (int.from_bytes(status.level), status.message)
            self._values[status.name] = {pair.key: pair.value for pair in status.values}

    def said(self, name: str) -> dict[str, str]:
        """The values in a node's last diagnostics."""
        return self._values.get(name, {})

    # The operator

    def operator(self, *, deadman: bool, target: list[float] | None = None) -> None:
        """A joy message of this tick, and a command with it."""
        ns = self.tick * self.contract.dt_ns
        if target is not None:
            names = list(self.contract.action.names)
            message = JointState(name=names, position=array.array("d", target))
            set_stamp(message.header.stamp, ns)
            self._target.publish(message)
        joy = Joy(buttons=[int(deadman)])
        set_stamp(joy.header.stamp, ns)
        self._joy.publish(joy)

    def call_later(self, service: str, kind: Any, **fields: Any) -> Any:
        client = self._clients.setdefault(service, self.node.create_client(kind, service))
        return client.call_async(kind.Request(**fields))

    def call(self, service: str, kind: Any = Trigger, **fields: Any) -> Any:
        client = self._clients.setdefault(service, self.node.create_client(kind, service))
        self.until(client.service_is_ready, f"service {service}")
        deadline = time.monotonic() + DEADLINE_S
        while True:  # a request that was sent to a node that is being restarted is lost
            future = client.call_async(kind.Request(**fields))
            patience = time.monotonic() + ANSWER_S
            self.until(
                lambda f=future, p=patience: f.done() or time.monotonic() > p, f"{service}'s answer"
            )
            if future.done():
                return future.result()
            client.remove_pending_request(future)
            assert time.monotonic() < deadline, f"no answer of {service}"

    def set_parameters(self, *, of: str = "supervisor", **values: Any) -> list[str]:
        """Why they were refused; empty for those that were not. The supervisor's may not be."""

        def message(name: str, value: Any) -> ParameterMessage:
            if isinstance(value, bool):
                content = ParameterValue(type=ParameterType.PARAMETER_BOOL, bool_value=value)
            elif isinstance(value, int):
                content = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)
            else:
                content = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)
            return ParameterMessage(name=name, value=content)

        answer = self.call(
            f"{of}/set_parameters",
            SetParameters,
            parameters=[message(name, value) for name, value in values.items()],
        )
        assert of != "supervisor" or all(result.successful for result in answer.results), answer
        return [result.reason for result in answer.results]

    def start_episode(self, task: str = "reach", *, resume: bool = True) -> str:
        """Until the first tick was taken. One that a failed attempt at a test left is cancelled."""
        if self.moving:
            self.call("supervisor/cancel_episode")
            self.until(lambda: not self.moving, "the end of the last attempt's episode")
        self.set_parameters(task=task, auto_resume=resume, operator="ann")
        seen = len(self.events)
        refused = ""

        def uuid() -> str:
            """Of the event, which is said once, however often it was asked for."""
            return next((e["episode"] for e in self.events[seen:] if e["type"] == "reset"), "")

        def started() -> bool:
            nonlocal refused
            answer = self.call("supervisor/start_episode")
            refused = "" if answer.success else answer.message
            return answer.success or bool(uuid())

        self.until(started, "start_episode")
        self.until(uuid, f"the episode's reset ({refused})")
        self.until(lambda: self.has_event("episode_start", episode=uuid()), "the episode's start")
        return uuid()

    def end_episode(self, success: bool = True) -> None:
        answer = self.call("supervisor/end_episode", SetBool, data=success)
        outcome = "success" if success else "failure"
        ended = {"episode": self.episode, "outcome": outcome}
        if not answer.success:  # unless it was carried out, and that answer was lost
            self.until(lambda: self.has_event("episode_end", **ended), answer.message)
        self.until(lambda: not self.moving, "the end of the episode")

    # Waiting

    def has_event(self, kind: str, **fields: Any) -> bool:
        return any(
            e["type"] == kind and all(e.get(k) == v for k, v in fields.items()) for e in self.events
        )

    def until(
        self, condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S
    ) -> None:
        """Spins until the condition holds."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            self.executor.spin_once(timeout_sec=0.02)
            self.group.poll()
            if self.moving and time.monotonic() - self._said_at > REPEAT_AFTER_S:
                self.say()
            if time.monotonic() > deadline:
                logs = {name: self.group.last_words(name, 8) for name in self.group.pids()}
                raise AssertionError(
                    f"waited {deadline_s} s for {what}; state {self.state}; the robot "
                    f"{'moves' if self.moving else 'rests'} at tick {self.tick}, last commands for "
                    f"{[ns // self.contract.dt_ns for ns, _ in self.commands[-5:]]}; "
                    f"last events {self.events[-3:]}; logs {logs}"
                )

    def ticks(self, n: int) -> None:
        """Until the arbiter executed n more."""
        goal = len(self.executed) + n
        self.until(lambda: len(self.executed) >= goal, f"{n} more ticks")

    def mode(self, mode: str) -> None:
        self.until(lambda: self.state.get("mode") == mode, f"mode {mode}")

    def up(self, deadline_s: float = DEADLINE_S) -> None:
        """Until every managed node is active."""
        name = f"/{self.contract.cell}/supervisor"
        self.until(
            lambda: self.diagnostics.get(name) == (0, ""), "all nodes to be active", deadline_s
        )

    def __enter__(self) -> "Cell":
        self.group.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.group.stop()
        finally:
            self.executor.shutdown()
            self.node.destroy_node()
            self.context.try_shutdown()
