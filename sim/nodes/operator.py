"""The scripted operator as a ROS 2 node: the person who runs a session at a simulated cell.

    python -m sim.nodes.operator --ros-args -r __ns:=/CELL -p contract:=FILE -p episodes:=20

For each episode it sets the supervisor's task and seed, starts it, lets the policy go, watches
the scene, takes over through the teleop topics with the deadman held, hands back, and labels
success. It ends with status 0 after its last episode. Parameters: `episodes`, `tasks` (round robin;
all of the contract's by default), `seed` (of the first episode; then the next), `reset_s` (wall
time between episodes, in which a person would put the scene back), `operator` (its name),
`shared_attention` (true: takes over only while the broker of `sim.nodes.attention` sends somebody),
and every field of `sim.operator.OperatorConfig`.
"""

import array
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue, SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState, Joy
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from robot_bridge.nodes.common import (
    STEADY,
    Diagnostics,
    UserError,
    latched,
    reliable,
    run,
    set_stamp,
    stamp_ns,
)
from sim.cell import SCENE_TOPIC, make_cell
from sim.nodes.attention import GRANTED, WANTED
from sim.operator import Mode, OperatorConfig, Request, ScriptedOperator
from trajectory_store import Contract, load_contract

RETRY_S = 0.5
"""After a refused request."""
ANSWER_S = 5.0
"""Until an answer counts as lost: a service loses it when it has not discovered its client yet."""
SILENCE = "no answer"
HANDOVERS = {"set_intervention", "resume_policy"}
"""Requests that change who drives."""


class OperatorNode(Node):
    """See the module. `finished` turns true after the last episode's end.

    Raises UserError or ContractError for wrong parameters.
    """

    def __init__(self, **node_options: Any) -> None:
        super().__init__(
            "operator",
            # All its times are message stamps; following /clock would cost a callback every tick.
            parameter_overrides=[Parameter("use_sim_time", value=False)],
            start_parameter_services=False,
            **node_options,
        )
        path = self.declare_parameter("contract", "").value
        if not path:
            raise UserError("operator: no contract; pass `--ros-args -p contract:=FILE`")
        self.contract: Contract = load_contract(path)
        self._lockstep = bool(self.contract.sim.get("lockstep", False))
        self._episodes = self._parameter("episodes", 1)
        self._seed = self._parameter("seed", 0)
        self._reset_s = self._parameter("reset_s", 0.0)
        self._name = self._parameter("operator", "scripted")
        self._tasks = [task for task in self._parameter("tasks", [""]) if task]
        self._tasks = self._tasks or list(self.contract.tasks)
        unknown = sorted(set(self._tasks) - set(self.contract.tasks))
        if unknown:
            raise UserError(
                f"operator: no task {', '.join(unknown)} in the contract; it knows "
                f"{', '.join(self.contract.tasks)}"
            )
        rules = {
            field.name: self._parameter(field.name, field.default)
            for field in dataclasses.fields(OperatorConfig)
        }
        try:
            config = OperatorConfig(**rules)
        except ValueError as error:
            raise UserError(f"operator: {error}") from error
        cell = make_cell(self.contract)
        self._scene_names = cell.scene_names
        cell.close()
        self._operator = ScriptedOperator(self.contract, self._scene_names, config)

        self.finished = False
        self._number = 0
        """Episodes that have been started."""
        self._uuid: str | None = None
        self._starting = False
        """An episode was asked for, and nothing says yet which one came of it."""
        self._playing = False
        """The policy was let go; ticks are answered."""
        self._scene: tuple[int, np.ndarray] | None = None
        self._answered_ns = -1
        self._answer: tuple[Joy, JointState | None] | None = None
        self._executed: tuple[int, np.ndarray, Mode] | None = None
        self._fault = ""
        self._first_ns = 0
        self._human_ticks = self._ticks = 0
        self._pending: dict[str, Any] = {}
        """Requests that wait for an answer, by service."""
        self._order: list[int] | None = None
        self._retry: dict[str, Any] = {}

        self._joy = self.create_publisher(Joy, "teleop/joy", reliable(1))
        self._target = self.create_publisher(JointState, "teleop/joint_target", reliable(1))
        self._clients_of = {
            "start_episode": self.create_client(Trigger, "supervisor/start_episode"),
            "end_episode": self.create_client(SetBool, "supervisor/end_episode"),
            "set_intervention": self.create_client(SetBool, "supervisor/set_intervention"),
            "resume_policy": self.create_client(Trigger, "supervisor/resume_policy"),
            "reset_estop": self.create_client(Trigger, "supervisor/reset_estop"),
            "set_parameters": self.create_client(SetParameters, "supervisor/set_parameters"),
        }
        self.create_subscription(JointState, SCENE_TOPIC, self._on_scene, reliable(10))
        self.create_subscription(JointState, "arbiter/executed", self._on_executed, reliable(50))
        self.create_subscription(DiagnosticStatus, "arbiter/state", self._on_state, latched())
        self._diagnostics = Diagnostics(self, self.diagnose)
        self._waiting = self.create_timer(0.2, self._wait_for_services, clock=STEADY)
        self.create_subscription(String, "events", self._on_event, latched(200))
        self._shared = bool(self._parameter("shared_attention", False))
        self._attended = not self._shared
        self._wants, self._ticket = False, 0
        if self._shared:
            self._wanted = self.create_publisher(String, WANTED, reliable(10))
            self.create_subscription(String, GRANTED, self._on_granted, latched())
            self.create_timer(1.0, self._say_wants, clock=STEADY)

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        values = {
            "episode": self._number,
            "episodes": self._episodes,
            "takeovers": self._operator.takeovers,
            "human_ticks": self._human_ticks,
            "ticks": self._ticks,
        }
        waits = "waits for attention" if self._wants and not self._attended else ""
        level = DiagnosticStatus.WARN if self._fault else DiagnosticStatus.OK
        return level, f"the arbiter stopped: {self._fault}" if self._fault else waits, values

    # Attention -----------------------------------------------------------------------------------

    def _on_granted(self, message: String) -> None:
        ticket = json.loads(message.data)["cells"].get(self.get_namespace())
        self._attended = self._wants and ticket == self._ticket

    def _say_wants(self) -> None:
        said = {"cell": self.get_namespace(), "ticket": self._ticket, "wants": self._wants}
        self._wanted.publish(String(data=json.dumps(said)))

    def _want(self, wants: bool) -> None:
        """Asks the fleet's broker for somebody, or lets them go."""
        if self._shared and wants != self._wants:
            self._wants, self._attended = wants, False
            self._ticket += wants
            self._say_wants()

    def _wait_for_services(self) -> None:
        """Begins the session once the supervisor's services are there."""
        missing = [n for n, c in self._clients_of.items() if not c.service_is_ready()]
        if missing:
            self.get_logger().info(
                f"waiting for supervisor/{missing[0]}", throttle_duration_sec=5.0
            )
            return
        self.destroy_timer(self._waiting)
        self._next_episode()

    # Episodes ------------------------------------------------------------------------------------

    def _next_episode(self) -> None:
        if self._number >= self._episodes:
            self.finished = True
            self.get_logger().info("session over")
            return
        if self._shared and self._operator.config.drive_from_start:
            self._want(True)
            if not self._attended:
                self._after(0.1, "attention", self._next_episode)
                return
        task = self._tasks[self._number % len(self._tasks)]
        seed = self._seed + self._number
        self._number += 1
        self._uuid, self._playing, self._scene = None, False, None
        self._starting = False
        request = SetParameters.Request(
            parameters=[
                _parameter_message("task", task),
                _parameter_message("seed", seed),
                _parameter_message("operator", self._name),
            ]
        )
        self._call("set_parameters", request, self._on_parameters)

    def _on_parameters(self, response: SetParameters.Response) -> None:
        refused = [result.reason for result in response.results if not result.successful]
        if refused:
            self.get_logger().error(f"the supervisor refused the episode: {'; '.join(refused)}")
            self._after(RETRY_S, "set_parameters", self._again)
            return
        self._start_episode(self._number)

    def _again(self) -> None:
        self._number -= 1
        self._next_episode()

    def _start_episode(self, number: int) -> None:
        if self._uuid is not None or number != self._number:
            return  # the event of its start came instead of the answer
        self._starting = True
        self._call("start_episode", Trigger.Request(), self._on_started)

    def _on_started(self, response: Trigger.Response) -> None:
        if response.success:
            self._uuid, self._starting = response.message, False
            return
        self.get_logger().info(f"waiting to start: {response.message}", throttle_duration_sec=5.0)
        number = self._number
        self._after(RETRY_S, "start_episode", lambda: self._start_episode(number))

    def _on_event(self, message: String) -> None:
        event = json.loads(message.data)
        kind = event.get("type")
        if kind == "episode_start" and (event["episode"] == self._uuid or self._is_ours(event)):
            self._uuid, self._starting = event["episode"], False
            self._begin(event)
        elif kind == "episode_end" and self._uuid is not None and event["episode"] == self._uuid:
            self._end(event)

    def _is_ours(self, event: dict[str, Any]) -> bool:
        """The uuid may be on its way, or lost, when the event of its start is already here."""
        asked = (self._tasks[(self._number - 1) % len(self._tasks)], self._seed + self._number - 1)
        return self._starting and (event["task"], event["seed"]) == asked

    def _begin(self, event: dict[str, Any]) -> None:
        self._operator.begin(event["task"], int(event["seed"]))
        self._task = event["task"]
        self._first_ns = int(event["start_stamp_ns"])
        self._answered_ns, self._answer, self._executed = -1, None, None
        self._human_ticks = self._ticks = 0
        if self._operator.config.drive_from_start:
            self._playing = True
            self._react()
        else:
            self._resume()

    def _end(self, event: dict[str, Any]) -> None:
        self._playing = False
        self._want(False)
        self.get_logger().info(
            f"episode {self._number}/{self._episodes} {self._task} seed "
            f"{self._seed + self._number - 1}: {event.get('outcome')}, {self._ticks} ticks, "
            f"human {self._human_ticks / max(self._ticks, 1):.0%}, "
            f"takeovers {self._operator.takeovers}"
        )
        if self._reset_s > 0 and self._number < self._episodes:
            self._after(self._reset_s, "reset", self._next_episode)
        else:
            self._next_episode()

    def _resume(self) -> None:
        self._call("resume_policy", Trigger.Request(), self._on_resumed)

    def _on_resumed(self, response: Trigger.Response) -> None:
        if self._playing or self._uuid is None:
            return
        if not response.success:
            self.get_logger().info(
                f"waiting for the policy: {response.message}", throttle_duration_sec=5.0
            )
            self._after(RETRY_S, "resume_policy", self._resume)
            return
        self._playing = True
        self._react()

    # Ticks ---------------------------------------------------------------------------------------

    def _on_state(self, message: DiagnosticStatus) -> None:
        values = {pair.key: pair.value for pair in message.values}
        fault = values.get("reason", "") if values.get("mode") == Mode.FAULT else ""
        if fault and fault != self._fault:
            self.get_logger().warning(f"the arbiter stopped: {fault}; resetting it")
            self._after(RETRY_S, "reset_estop", self._reset_fault)
        self._fault = fault

    def _reset_fault(self) -> None:
        self._call("reset_estop", Trigger.Request(), self._note)

    def _on_executed(self, message: JointState) -> None:
        driver = message.header.frame_id.partition(":")[0]
        mode = {"policy": Mode.POLICY, "human": Mode.HUMAN}.get(driver, Mode.HOLD)
        self._executed = (
            stamp_ns(message.header.stamp),
            np.array(message.position),
            mode,
        )
        if self._playing:
            self._ticks += 1
            self._human_ticks += mode is Mode.HUMAN
        self._react()

    def _on_scene(self, message: JointState) -> None:
        tick_ns = stamp_ns(message.header.stamp)
        if tick_ns == self._answered_ns and self._answer is not None:
            self._publish(*self._answer)  # said again, for an arbiter that was restarted
            return
        if self._order is None:
            names = list(message.name)
            self._order = [names.index(name) for name in self._scene_names]
        self._scene = (tick_ns, np.array(message.position)[self._order])
        self._react()

    def _react(self) -> None:
        """Answers the newest tick, once what was sent at the tick before is known."""
        if not self._playing or self._scene is None:
            return
        tick_ns, scene = self._scene
        if tick_ns <= self._answered_ns or tick_ns < self._first_ns:
            return
        executed, mode = None, Mode.POLICY
        if tick_ns > self._first_ns:
            before_ns = tick_ns - self.contract.dt_ns
            if self._executed is not None:
                executed, mode = self._executed[1], self._executed[2]
            if self._lockstep and (self._executed is None or self._executed[0] < before_ns):
                return  # on its way
        action = self._operator.step(scene, executed, mode, attended=self._attended)
        self._answered_ns = tick_ns
        for request in action.requests:
            self._ask(request)
        if Request.SUCCESS in action.requests:
            self._playing = False
        if not self._operator.config.drive_from_start:
            self._want(self._operator.wants_attention)
        if not self._playing:
            return
        stamp = Joy().header.stamp
        set_stamp(stamp, tick_ns)
        joy = Joy(buttons=[int(action.deadman)])
        joy.header.stamp = stamp
        target = None
        if action.command is not None:
            target = JointState(name=list(self.contract.action.names))
            target.header.stamp = stamp
            target.header.frame_id = self._name
            target.position = array.array("d", action.command)
        self._answer = (joy, target)
        # While a request is on its way the answer waits. The arbiter waits for the operator, so the
        # change of drivers costs a few ticks, not as many as a service call takes.
        if not self._handing_over():
            self._publish(joy, target)

    def _handing_over(self) -> bool:
        return not HANDOVERS.isdisjoint(self._pending)

    def _publish(self, joy: Joy, target: JointState | None) -> None:
        if target is not None:
            self._target.publish(target)
        self._joy.publish(joy)

    def _ask(self, request: Request) -> None:
        if request is Request.INTERVENE:
            self._call("set_intervention", SetBool.Request(data=True), self._on_handover)
        elif request is Request.RELEASE:
            self._call("set_intervention", SetBool.Request(data=False), self._on_handover)
        elif request is Request.RESUME and "resume_policy" not in self._pending:
            self._call("resume_policy", Trigger.Request(), self._on_handover)
        elif request is Request.SUCCESS:
            self._call("end_episode", SetBool.Request(data=True), self._note)

    def _on_handover(self, response: Any) -> None:
        self._note(response)
        if self._playing and self._answer is not None and not self._handing_over():
            self._publish(*self._answer)

    # Services ------------------------------------------------------------------------------------

    def _note(self, response: Any) -> None:
        if not response.success:
            self.get_logger().info(f"refused: {response.message}", throttle_duration_sec=5.0)

    def _call(self, name: str, request: Any, then: Callable[[Any], None]) -> None:
        """Calls a service of the supervisor; `then` runs with the response, or a refusal when
        none comes, unless the next episode has begun meanwhile."""
        client, number = self._clients_of[name], self._number
        call = self._pending[name] = client.call_async(request)

        def answered(response: Any) -> None:
            self.destroy_timer(patience)
            if self._pending.get(name) is call:
                del self._pending[name]
            if number == self._number:
                then(response)

        def late() -> None:
            client.remove_pending_request(call)
            answered(_silence(request))

        patience = self.create_timer(ANSWER_S, late, clock=STEADY)
        call.add_done_callback(lambda future: answered(future.result()))

    def _after(self, delay_s: float, name: str, action: Callable[[], None]) -> None:
        """Runs `action` once, later."""

        def fire() -> None:
            self.destroy_timer(self._retry.pop(name))
            action()

        if name not in self._retry:
            self._retry[name] = self.create_timer(delay_s, fire, clock=STEADY)

    def _parameter(self, name: str, default: Any) -> Any:
        value = self.declare_parameter(name, default).value
        if isinstance(default, float) and isinstance(value, int):
            return float(value)
        return default if value is None else value


def _silence(request: Any) -> Any:
    """What a service that does not answer has said."""
    if isinstance(request, SetParameters.Request):
        result = SetParametersResult(successful=False, reason=SILENCE)
        return SetParameters.Response(results=[result])
    kind = SetBool if isinstance(request, SetBool.Request) else Trigger
    return kind.Response(success=False, message=SILENCE)


def _parameter_message(name: str, value: str | int) -> ParameterMessage:
    if isinstance(value, str):
        content = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)
    else:
        content = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)
    return ParameterMessage(name=name, value=content)


def main(arguments: list[str] | None = None) -> int:
    return run(OperatorNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
