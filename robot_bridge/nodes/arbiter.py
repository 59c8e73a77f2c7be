"""The arbiter's node: the only publisher of commands.

    python -m robot_bridge.nodes.arbiter --ros-args -r __ns:=/CELL -p contract:=FILE

Parameters: `enable_button` (the deadman's index in Joy), `stamp_commands` (false: stamp zero, which
tells a ros2_control controller to begin at once), `lockstep_wait_s`, `real_time_factor`.

On a lockstep cell it ticks when the joint states of a tick have arrived, together with what the
mode needs, at most `lockstep_wait_s` later. Otherwise a timer at the contract's `control_hz` ticks.
"""

import array
import sys
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import TwistStamped
from sensor_msgs.msg import JointState, Joy
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from robot_bridge.core.arbiter import NEEDS_CHUNK, Arbiter
from robot_bridge.core.events import EventError, EventType, parse_event
from robot_bridge.core.joints import JointReader, NamesError
from robot_bridge.core.modes import Decision, Mode
from robot_bridge.nodes.common import (
    STEADY,
    CellNode,
    deliver,
    latched,
    monotonic_s,
    reliable,
    run,
    set_stamp,
    stamp_ns,
)

STATE_PERIOD_S = 0.1
ROBOT_TOPIC = "joint_states"


class ArbiterNode(CellNode):
    def __init__(self, **options: Any) -> None:
        super().__init__("arbiter", **options)
        self._wait_s = float(self.declare_parameter("lockstep_wait_s", 10.0).value or 10.0)
        self._speed = float(self.declare_parameter("real_time_factor", 1.0).value or 1.0)
        self._stamp_commands = bool(self.declare_parameter("stamp_commands", True).value)
        self._deadman_button = int(self.declare_parameter("enable_button", 0).value or 0)

    def setup(self) -> None:
        contract = self.contract
        self.core = Arbiter(contract, lockstep=self.lockstep, folder=self.contract_path.parent)
        action, box = contract.action, contract.safety.workspace
        self._measured = JointReader(action.names) if action.mode == "absolute" else None
        self._tool = JointReader(box.names) if box is not None and box.names else None
        self._in_episode = not self.lockstep
        self._attached = False
        self._pending_ns: int | None = None
        self._pending_since = 0.0
        self._last_ns = 0
        self._event_seq = 0
        self._robots: set[bytes] = set()
        """Every publisher of joint states that was ever there, by its DDS identity: a driver that
        is started again gets another one."""
        self._robot = ""
        """The newest of them."""
        self._said: tuple[Any, ...] = ()

        self._command: Any
        if action.message == "std_msgs/Float64MultiArray":
            self._command = Float64MultiArray()
            publish_type: Any = Float64MultiArray
        else:
            self._point = JointTrajectoryPoint()
            set_stamp(self._point.time_from_start, contract.dt_ns)
            self._command = JointTrajectory(joint_names=list(action.names), points=[self._point])
            publish_type = JointTrajectory
        self._executed = JointState(name=list(action.names))
        self._state = DiagnosticStatus(name="arbiter", hardware_id=contract.cell)
        self._command_publisher = self.create_publisher(publish_type, action.topic, reliable(1))
        self._executed_publisher = self.create_publisher(
            JointState, "arbiter/executed", reliable(50)
        )
        self._state_publisher = self.create_publisher(DiagnosticStatus, "arbiter/state", latched())
        self._estop_publisher = self.create_publisher(Bool, "safety/estop", latched())
        self._joints = self.create_subscription(
            JointState, ROBOT_TOPIC, self._on_joint_state, reliable(10)
        )
        self._subscriptions_made = [
            self._joints,
            self.create_subscription(
                JointTrajectory, "policy/action_chunk", self._on_chunk, reliable(1)
            ),
            self.create_subscription(
                JointState, "teleop/joint_target", self._on_target, reliable(1)
            ),
            self.create_subscription(TwistStamped, "teleop/twist", self._on_twist, reliable(1)),
            self.create_subscription(Joy, "teleop/joy", self._on_joy, reliable(1)),
            self.create_subscription(String, "events", self._on_event, latched(200)),
        ]
        self._services_made = [
            self.create_service(SetBool, "~/set_intervention", self._on_set_intervention),
            self.create_service(Trigger, "~/resume_policy", self._on_resume),
            self.create_service(Trigger, "~/estop", self._on_estop),
            self.create_service(Trigger, "~/reset_estop", self._on_reset_estop),
        ]
        self._timers_made = [
            self.create_timer(STATE_PERIOD_S, self._say_state, clock=STEADY),
            self.create_timer(0.2, self._look_round, clock=STEADY),
            (
                self.create_timer(0.02, self._watch_wait, clock=STEADY)
                if self.lockstep
                else self.create_timer(1.0 / contract.control_hz, self._on_timer)
            ),
        ]

    def teardown(self) -> None:
        for name, destroy in (
            ("_timers_made", self.destroy_timer),
            ("_subscriptions_made", self.destroy_subscription),
            ("_services_made", self.destroy_service),
        ):
            for entity in self.__dict__.pop(name, []):
                destroy(entity)
        for name in ("_command", "_executed", "_state", "_estop"):
            publisher = self.__dict__.pop(f"{name}_publisher", None)
            if publisher is not None:
                if name == "_executed":
                    deliver(publisher)  # what was executed is recorded, to the last tick
                self.destroy_publisher(publisher)

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        if not self.live:
            return DiagnosticStatus.STALE, "", {}
        core = self.core
        level = DiagnosticStatus.ERROR if core.mode is Mode.FAULT else DiagnosticStatus.OK
        return level, core.reason, {"mode": core.mode, "clips": sum(core.gate.counts.values())}

    # Inputs

    def _on_joint_state(self, message: JointState) -> None:
        stamp = stamp_ns(message.header.stamp)
        now = self._now_s()
        try:
            self.core.joint_state(
                stamp,
                self._measured.read(message.name, message.position) if self._measured else None,
                self._tool.read(message.name, message.position) if self._tool else None,
                now,
            )
        except NamesError as error:
            self.core.joint_state_unreadable(str(error), now)
        if self.lockstep:
            if stamp != self._pending_ns:
                # A tick that the robot repeats has been waited for since it first came.
                self._pending_ns, self._pending_since = stamp, now
            self._try_tick()

    def _on_chunk(self, message: JointTrajectory) -> None:
        problem = self.core.offer_chunk(
            stamp_ns(message.header.stamp),
            message.joint_names,
            [point.positions for point in message.points],  # pyright: ignore[reportGeneralTypeIssues]
            message.header.frame_id,
            self._now_ns(),
        )
        if problem:
            self.get_logger().warning(problem, throttle_duration_sec=2.0)
        self._try_tick()

    def _on_target(self, message: JointState) -> None:
        problem = self.core.human_target(
            stamp_ns(message.header.stamp), message.name, message.position, self._now_s()
        )
        if problem:
            self.get_logger().warning(problem, throttle_duration_sec=2.0)
        self._try_tick()

    def _on_twist(self, message: TwistStamped) -> None:
        linear = message.twist.linear
        problem = self.core.human_twist(
            stamp_ns(message.header.stamp), (linear.x, linear.y, linear.z), self._now_s()
        )
        if problem:
            self.get_logger().warning(problem, throttle_duration_sec=2.0)
        self._try_tick()

    def _on_joy(self, message: Joy) -> None:
        button = self._deadman_button
        held = len(message.buttons) > button and message.buttons[button] == 1
        self._attached = True
        self.core.joy(stamp_ns(message.header.stamp), held, self._now_s())
        self._try_tick()

    def _on_event(self, message: String) -> None:
        try:
            event = parse_event(message.data)
        except EventError as error:
            self.get_logger().warning(str(error))
            return
        self._event_seq = event.seq
        if event.type == EventType.EPISODE_START:
            start = event.integer("start_stamp_ns")
            self.core.episode_started(event.text("operator"), start)
            self._in_episode = True
        elif event.type == EventType.EPISODE_END:
            self.core.episode_ended()
            self._in_episode = not self.lockstep
        self._say_state(only_if_changed=True)
        self._try_tick()

    # Requests

    def _on_set_intervention(
        self, request: SetBool.Request, response: SetBool.Response
    ) -> SetBool.Response:
        return self._answer(response, self.core.set_intervention(request.data, self._now_s()))

    def _on_resume(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if not self.live:
            response.success, response.message = False, "the arbiter is not active"
            return response
        self._look_at_robot()  # a new one, noticed after this, would stop the policy again
        return self._answer(response, self.core.resume(self._next_tick_ns(), self._now_s()))

    def _on_estop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._estop_publisher.publish(Bool(data=True))
        return self._answer(response, self.core.estop())

    def _on_reset_estop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._estop_publisher.publish(Bool(data=False))
        return self._answer(response, self.core.reset_estop())

    def _answer(self, response: Any, answer: Any) -> Any:
        response.success, response.message = answer.success, str(answer.message)
        self._say_state(only_if_changed=True)
        self._try_tick()
        return response

    # Ticks

    def _now_s(self) -> float:
        """Seconds for the watchdogs: monotonic, in the speed of the cell's own time."""
        return monotonic_s() * self._speed

    def _now_ns(self) -> int:
        if self.lockstep:
            return self._last_ns if self._pending_ns is None else self._pending_ns
        return self.get_clock().now().nanoseconds

    def _next_tick_ns(self) -> int:
        """The first tick that a request made now can still change."""
        if not self.lockstep:
            return self._now_ns()
        return self._last_ns + 1 if self._pending_ns is None else self._pending_ns

    def _try_tick(self) -> None:
        """Lockstep: takes the pending tick if nothing is missing any more."""
        pending = self._pending_ns
        if pending is None or not self.lockstep or not self._in_episode or not self.live:
            return
        if not self.core.waits_for(pending, self._now_s(), self._attached):
            self._take(pending, "")

    def _watch_wait(self) -> None:
        """Lockstep: gives up on what does not come."""
        pending = self._pending_ns
        if pending is None or not self._in_episode or not self.live:
            return
        wanted = self.core.waits_for(pending, self._now_s(), self._attached)
        patience = self._wait_s if wanted == NEEDS_CHUNK else self._wait_s / 4
        if not wanted or self._now_s() - self._pending_since > patience:
            self._take(pending, wanted)

    def _on_timer(self) -> None:
        if self.live:
            self._take(self._now_ns(), "")

    def _take(self, tick_ns: int, gave_up_on: str) -> None:
        decision = self.core.tick(
            tick_ns, self._now_s(), operator_attached=self._attached, gave_up_on=gave_up_on
        )
        self._pending_ns, self._last_ns = None, tick_ns
        if decision is not None:
            self._send(decision)
        self._say_state(only_if_changed=True)

    def _send(self, decision: Decision) -> None:
        values = array.array("d", decision.command.tobytes())
        message = self._command
        if isinstance(message, JointTrajectory):
            self._point.positions = values
            if self._stamp_commands:
                set_stamp(message.header.stamp, decision.tick_ns)
        else:
            message.data = values
        self._command_publisher.publish(message)
        executed = self._executed
        executed.position = values
        set_stamp(executed.header.stamp, decision.tick_ns)
        executed.header.frame_id = decision.label
        self._executed_publisher.publish(executed)

    def _look_round(self) -> None:
        """What changes slowly: who else is there."""
        self._attached = self.count_publishers("teleop/joy") > 0
        others = self.count_publishers(self._command_publisher.topic_name) - 1
        if others > 0 and self.live and self.core.mode is not Mode.FAULT:
            self.core.fault(
                f"{others} other publisher of {self._command_publisher.topic_name}; "
                "one arbiter drives a cell"
            )
        self._look_at_robot()
        self._try_tick()

    def _look_at_robot(self) -> None:
        found = {
            bytes(publisher.endpoint_gid)
            for publisher in self.get_publishers_info_by_topic(self._joints.topic_name)
        }
        new = found - self._robots
        if new:
            if self._robots:
                self.core.robot_restarted()
            self._robots |= new
            self._robot = min(new).hex()
            self._say_state()
        elif not found and self._robots and self.core.mode in (Mode.POLICY, Mode.HUMAN):
            self.core.robot_gone()

    def _say_state(self, *, only_if_changed: bool = False) -> None:
        core = self.core
        said = (
            core.mode, core.phase, core.reason, core.operator, core.fresh_ns, self._event_seq
        )  # fmt: skip
        if (only_if_changed and said == self._said) or not self.live:
            return
        self._said = said
        state = self._state
        state.level = {
            Mode.FAULT: DiagnosticStatus.ERROR,
            Mode.HOLD: DiagnosticStatus.WARN,
        }.get(core.mode, DiagnosticStatus.OK)
        state.message = f"{core.mode}: {core.reason}" if core.reason else str(core.mode)
        values = {
            "mode": core.mode,
            "phase": core.phase,
            "reason": core.reason,
            "operator": core.operator,
            "chunk_age_ms": f"{core.chunk_age_ns / 1e6:.1f}",
            "stamp_ns": self._last_ns,
            "fresh_ns": core.fresh_ns,
            "event_seq": self._event_seq,
            "robot": self._robot,
            "late_chunks": core.late_chunks,
        } | {f"clipped_{joint}": count for joint, count in core.gate.counts.items()}
        state.values = [KeyValue(key=k, value=str(v)) for k, v in values.items()]
        self._state_publisher.publish(state)


def main(arguments: list[str] | None = None) -> int:
    return run(ArbiterNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
