"""The supervisor: brings the lifecycle nodes up, answers the operator, writes the events.

    python -m robot_bridge.nodes.supervisor --ros-args -r __ns:=/CELL -p contract:=FILE

Parameters (settable at run time): `task`, `seed`, `operator` of the next episode; `instruction`:
other words than the task's; `auto_resume`: an episode starts with the policy driving. At start-up:
`manage` (bring up `managed_nodes` in order, and again when one was restarted), `events_log` (a file
that gets every event as one JSON line). Operators' devices put notes on `operator/notes`.
"""

import json
import sys
import uuid
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.task import Future
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from robot_bridge.core.align import CLOCK_JUMP_NS
from robot_bridge.core.events import (
    Event,
    EventError,
    EventType,
    EventWriter,
    parse_event,
    read_note,
)
from robot_bridge.nodes.common import (
    STEADY,
    UserError,
    deliver,
    latched,
    monotonic_s,
    reliable,
    run,
    set_stamp,
    stamp_ns,
)
from trajectory_store.contract import load_contract

ANSWER_S = 2.0
"""How long the arbiter may take to answer a forwarded request."""


class SupervisorNode(Node):
    def __init__(self, **options: Any) -> None:
        super().__init__("supervisor", **options)
        path = str(self.declare_parameter("contract", "").value or "")
        if not path:
            raise UserError("supervisor: no contract; pass `--ros-args -p contract:=FILE`")
        self.contract = load_contract(path)
        self.lockstep = bool(self.contract.sim.get("lockstep", False))
        if self.lockstep:
            self.set_parameters([Parameter("use_sim_time", value=False)])
        self.declare_parameter("task", next(iter(self.contract.tasks)))
        self.declare_parameter("seed", 0)
        self.declare_parameter("operator", "")
        self.declare_parameter("instruction", "")
        self.declare_parameter("auto_resume", False)
        self._manage = bool(self.declare_parameter("manage", False).value)
        names = self.declare_parameter("managed_nodes", ["recorder", "arbiter", "runner"]).value
        self.add_on_set_parameters_callback(self._check_parameters)
        log = str(self.declare_parameter("events_log", "").value or "")
        self._writer = EventWriter()
        try:
            self._orphan = self._read_log(Path(log)) if log else None
            self._log = Path(log).open("a", encoding="utf-8") if log else None  # noqa: SIM115
        except OSError as error:
            raise UserError(f"supervisor: events_log {log}: {error.strerror}") from error
        self._episode: dict[str, Any] | None = None
        self._started = False
        self._reset_is_done = False
        self._newest_ns = 0
        self._watched_ns = 0
        self._mode = ""
        self._version: int | None = None
        self._events = self.create_publisher(String, "events", latched(200))
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", reliable(10))
        if self.lockstep:  # elsewhere the clock tells the time, and 500 messages a second do not
            on_joint_state: Any = self._on_joint_state
            self.create_subscription(JointState, "joint_states", on_joint_state, reliable(10))
        self.create_subscription(DiagnosticStatus, "arbiter/state", self._on_state, latched())
        self.create_subscription(String, "policy/active", self._on_active, latched())
        self.create_subscription(String, "operator/notes", self._on_note, reliable(50))
        # A service that awaits holds the default group; the answer must come in through another.
        self._forwarding = ReentrantCallbackGroup()
        self._arbiter = {
            name: self.create_client(kind, f"arbiter/{name}", callback_group=self._forwarding)
            for name, kind in (
                ("set_intervention", SetBool),
                ("resume_policy", Trigger),
                ("estop", Trigger),
                ("reset_estop", Trigger),
            )
        }
        self.create_service(Trigger, "~/start_episode", self._on_start_episode)
        self.create_service(SetBool, "~/end_episode", self._on_end_episode)
        self.create_service(Trigger, "~/cancel_episode", self._on_cancel_episode)
        on_reset_done: Any = self._on_reset_done
        self.create_service(Trigger, "~/reset_done", on_reset_done)
        self.create_service(SetBool, "~/set_intervention", self._on_set_intervention)
        self.create_service(Trigger, "~/resume_policy", self._on_resume_policy)
        self.create_service(Trigger, "~/estop", self._on_estop)
        self.create_service(Trigger, "~/reset_estop", self._on_reset_estop)
        self._wards = [_Ward(self, str(name)) for name in names or []] if self._manage else []
        if self._wards:
            self.create_timer(0.1, self._look_after, clock=STEADY)
        self.create_timer(1.0, self._publish_diagnostics, clock=STEADY)
        if not self.lockstep:
            self.create_timer(0.05, self._watch_time)

    def close(self) -> None:
        if self._episode is not None and self._started:
            self._finish("aborted", reason="the supervisor was shut down")
        deliver(self._events)
        if self._log is not None:
            self._log.close()

    def _check_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            if parameter.name == "task" and parameter.value not in self.contract.tasks:
                return SetParametersResult(
                    successful=False,
                    reason=f"no task {parameter.value!r}; the contract knows "
                    f"{', '.join(sorted(self.contract.tasks))}",
                )
        return SetParametersResult(successful=True)

    # Events

    def _read_log(self, path: Path) -> Event | None:
        """Continues the numbering; returns the start of an episode that has no end."""
        running: Event | None = None
        if not path.exists():
            return None
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = parse_event(line)
            except EventError:
                continue  # the line that a power cut left half written
            self._writer.seq = event.seq
            if event.type == EventType.EPISODE_START:
                running = event
            elif event.type == EventType.EPISODE_END:
                running = None
        return running

    def _end_orphan(self) -> None:
        """Ends the episode of a supervisor that died: nobody watched it since."""
        orphan, self._orphan = self._orphan, None
        if orphan is not None and self._episode is None:
            self._episode = dict(orphan.fields)
            self._finish(
                "aborted",
                reason="the supervisor was restarted",
                end_ns=max(self.now_ns(), orphan.integer("start_stamp_ns")),
            )

    def say(self, kind: EventType, stamp: int | None = None, **fields: Any) -> None:
        event = self._writer.make(kind, self.now_ns() if stamp is None else stamp, **fields)
        text = event.to_json()
        self._events.publish(String(data=text))
        if self._log is not None:
            self._log.write(text + "\n")
            self._log.flush()

    def now_ns(self) -> int:
        """The cell's time: of the newest tick in lockstep, else of the clock."""
        return self._newest_ns if self.lockstep else self.get_clock().now().nanoseconds

    def _episode_fields(self) -> dict[str, Any]:
        return {} if self._episode is None else {"episode": self._episode["episode"]}

    # Episodes

    def _on_start_episode(self, _: Any, response: Trigger.Response) -> Trigger.Response:
        self._end_orphan()
        if self._episode is not None:
            return _reply(response, False, f"episode {self._episode['episode']} is running")
        not_up = [ward.name for ward in self._wards if not ward.active]
        if not_up:
            return _reply(response, False, f"not active yet: {', '.join(not_up)}")
        task = str(self.get_parameter("task").value)
        self._episode = {
            "episode": str(uuid.uuid4()),
            "task": task,
            "instruction": str(self.get_parameter("instruction").value)
            or self.contract.task(task).instruction,
            "operator": str(self.get_parameter("operator").value),
            "seed": int(self.get_parameter("seed").value or 0),
        }
        self._started = self._reset_is_done = False
        self._episode["reset_ns"] = self.now_ns()
        self.say(
            EventType.RESET,
            **{k: self._episode[k] for k in ("episode", "task", "seed")},
        )
        return _reply(response, True, self._episode["episode"])

    async def _on_reset_done(self, _: Any, response: Trigger.Response) -> Trigger.Response:
        if self._episode is None or self._started:
            return _reply(response, False, "no episode waits for a reset")
        self._reset_is_done = True
        await self._maybe_begin()
        return _reply(response, True, self._episode["episode"])

    async def _maybe_begin(self) -> None:
        """Begins once the scene is reset and, in lockstep, its first tick was seen."""
        episode = self._episode
        if episode is None or self._started or not self._reset_is_done:
            return
        if self.lockstep and self._newest_ns <= episode["reset_ns"]:
            return
        self._reset_is_done = False
        if self.get_parameter("auto_resume").value:
            answer = await self._forward("resume_policy", Trigger.Request())
            if not answer.success:
                self.get_logger().warning(f"auto_resume: {answer.message}")
        if self._episode is not episode:
            return
        self._started = True
        start = self.now_ns()
        episode["start_stamp_ns"] = start
        limit_s = self.contract.task(episode["task"]).time_limit_s
        episode["limit_ns"] = start + round(limit_s * 1e9)
        keys = ("episode", "task", "instruction", "operator", "seed", "start_stamp_ns")
        self.say(EventType.EPISODE_START, start, **{k: episode[k] for k in keys})

    def _on_end_episode(self, request: Any, response: SetBool.Response) -> SetBool.Response:
        if self._episode is None or not self._started:
            return _reply(response, False, "no episode is running")
        uid = self._episode["episode"]
        self._finish("success" if request.data else "failure", reason="label")
        return _reply(response, True, uid)

    def _on_cancel_episode(self, _: Any, response: Trigger.Response) -> Trigger.Response:
        if self._episode is None:
            return _reply(response, False, "no episode is running")
        uid = self._episode["episode"]
        self._finish("aborted", reason="cancelled")
        return _reply(response, True, uid)

    def _finish(
        self, outcome: str, *, reason: str, truncated: bool = False, end_ns: int | None = None
    ) -> None:
        episode = self._episode
        assert episode is not None
        end = self.now_ns() if end_ns is None else end_ns
        if outcome in ("success", "failure"):
            kind = EventType.SUCCESS if outcome == "success" else EventType.FAILURE
            self.say(kind, end, **self._episode_fields())
        self._episode = None
        self.say(
            EventType.EPISODE_END,
            end,
            episode=episode["episode"],
            task=episode["task"],
            outcome=outcome,
            truncated=truncated,
            reason=reason,
            end_stamp_ns=end,
        )

    async def _on_joint_state(self, message: JointState) -> None:
        stamp = stamp_ns(message.header.stamp)
        if stamp > self._newest_ns:
            self._newest_ns = stamp
            if self._orphan is not None:
                self._end_orphan()
            if self._reset_is_done:
                await self._maybe_begin()
            elif self.lockstep:
                self._watch_time()

    def _watch_time(self) -> None:
        if self._orphan is not None:
            self._end_orphan()
        episode, before, now = self._episode, self._watched_ns, self.now_ns()
        self._watched_ns = now
        if episode is None or not self._started:
            return
        if now < before - CLOCK_JUMP_NS:
            self._finish("aborted", reason="the clock jumped back", end_ns=before)
        elif now >= episode["limit_ns"]:
            self._finish(
                "failure",
                reason="time_limit",
                truncated=True,
                end_ns=episode["limit_ns"] - self.contract.dt_ns,
            )

    # What others report

    def _on_state(self, message: DiagnosticStatus) -> None:
        values: dict[str, str] = {}
        for pair in message.values:
            values[pair.key] = pair.value
        mode, before = values.get("mode", ""), self._mode
        self._mode = mode
        if mode == before:
            return
        stamp = int(values.get("stamp_ns", 0)) or None
        if mode == "HUMAN":
            self.say(EventType.TAKEOVER, stamp, **self._episode_fields())
        elif before == "HUMAN":
            self.say(
                EventType.RELEASE, stamp, reason=values.get("reason", ""), **self._episode_fields()
            )
        if mode == "FAULT":
            self.say(EventType.STOP, stamp, reason=values.get("reason", ""))
        elif before == "FAULT":
            self.say(EventType.STOP_RESET, stamp)

    def _on_active(self, message: String) -> None:
        try:
            active = json.loads(message.data)
            version = int(active["version"])
        except (ValueError, KeyError, TypeError):
            self.get_logger().warning(f"policy/active is not understood: {message.data[:80]}")
            return
        if version != self._version:
            self._version = version
            fields = {k: active[k] for k in ("sha256", "step") if k in active}
            self.say(EventType.POLICY_SWITCH, version=version, **fields)

    def _on_note(self, message: String) -> None:
        """What an operator's device did, for the diary; anything else is not let in."""
        try:
            fields = read_note(message.data)
        except EventError as error:
            self.get_logger().warning(str(error), throttle_duration_sec=5.0)
            return
        self.say(EventType(fields.pop("type")), **fields)

    # Requests that the arbiter answers

    async def _on_set_intervention(self, request: Any, response: Any) -> Any:
        return _copy(response, await self._forward("set_intervention", request))

    async def _on_resume_policy(self, request: Any, response: Any) -> Any:
        return _copy(response, await self._forward("resume_policy", request))

    async def _on_estop(self, request: Any, response: Any) -> Any:
        return _copy(response, await self._forward("estop", request))

    async def _on_reset_estop(self, request: Any, response: Any) -> Any:
        return _copy(response, await self._forward("reset_estop", request))

    async def _forward(self, name: str, request: Any) -> Any:
        """The arbiter's answer, or a refusal when it does not come."""
        client = self._arbiter[name]
        silent = Trigger.Response(success=False, message="the arbiter does not answer")
        if not client.service_is_ready():
            return silent
        answer = Future(executor=self.executor)
        call = client.call_async(request)

        def done(future: Any) -> None:
            if not answer.done():
                answer.set_result(future.result())

        def late() -> None:
            self.destroy_timer(timer)
            if not answer.done():
                client.remove_pending_request(call)
                answer.set_result(silent)

        call.add_done_callback(done)
        timer = self.create_timer(ANSWER_S, late, callback_group=self._forwarding, clock=STEADY)
        result = await answer
        if not timer.is_canceled() and result is not silent:
            self.destroy_timer(timer)
        return result

    # Lifecycle

    def _look_after(self) -> None:
        """Brings the wards up in order: a later one waits for the earlier ones."""
        for ward in self._wards:
            ward.look()
        for ward in self._wards:
            if not ward.active:
                ward.raise_up()
                return

    def _publish_diagnostics(self) -> None:
        message = DiagnosticArray()
        set_stamp(message.header.stamp, self.get_clock().now().nanoseconds)
        values = {ward.name: "active" if ward.active else "not active" for ward in self._wards}
        down = [name for name, state in values.items() if state != "active"]
        message.status = [
            DiagnosticStatus(
                level=DiagnosticStatus.ERROR if down else DiagnosticStatus.OK,
                name=f"{self.get_namespace()}/supervisor",
                message=f"not active: {', '.join(down)}" if down else "",
                values=[KeyValue(key=k, value=v) for k, v in values.items()],
            )
        ]
        self._diagnostics.publish(message)


class _Ward:
    """One lifecycle node under the supervisor's care."""

    LOOK_S = 0.5
    SILENCE_S = 2.0
    """Without an answer for this long an active node counts as lost. DDS itself takes 5 s to miss
    a killed process, and never misses a hung one."""
    LOST_S = 5.0
    """A transition was lost, with the process that was asked, when a node has answered other
    questions without a pause for so long and not this one. One that is busy (loading a policy takes
    minutes on a busy machine) answers nothing; asking it again would end in a transition that is
    not allowed any more, which ends the node."""

    def __init__(self, node: SupervisorNode, name: str) -> None:
        self.name, self._node = name, node
        self.state = State.PRIMARY_STATE_UNKNOWN
        self._get = node.create_client(GetState, f"{name}/get_state")
        self._change = node.create_client(ChangeState, f"{name}/change_state")
        self._asked_at = self._changed_at = -1e9
        self._question: Any = None
        self._asking = self._changing = False
        self._answers_since = self._answered_at = -1e9
        """It answers without a pause from then to then."""

    @property
    def active(self) -> bool:
        return self.state == State.PRIMARY_STATE_ACTIVE

    def look(self) -> None:
        now = monotonic_s()
        if not self._get.service_is_ready():
            self._lose("gone")
            self._asking = self._changing = False
            return
        if self._asking:
            if now - self._asked_at < self.SILENCE_S:
                return
            self._get.remove_pending_request(self._question)
            # A node that is busy with a transition (loading a policy) may be silent for long.
            if not self._changing:
                self._lose("silent")
        period = self.LOOK_S if self.active else 0.1
        if now - self._asked_at < period:
            return
        self._asked_at, self._asking = now, True
        self._question = self._get.call_async(GetState.Request())
        self._question.add_done_callback(self._on_state)

    def _on_state(self, future: Any) -> None:
        self._asking = False
        if future.result() is None:
            return
        now = monotonic_s()
        if now - self._answered_at > self.SILENCE_S or self._answers_since < self._changed_at:
            self._answers_since = now
        self._answered_at = now
        state = future.result().current_state.id
        if state == self.state:
            return
        was_active, self.state = self.active, state
        if self.active:
            self._node.say(EventType.NODE, node=self.name, state="active")
        elif was_active:
            self._node.say(EventType.NODE, node=self.name, state="lost")

    def _lose(self, state: str) -> None:
        if self.active:
            self._node.say(EventType.NODE, node=self.name, state="lost")
            self._node.get_logger().error(f"{self.name} is {state}")
        self.state = State.PRIMARY_STATE_UNKNOWN

    def raise_up(self) -> None:
        transition = {
            State.PRIMARY_STATE_UNCONFIGURED: Transition.TRANSITION_CONFIGURE,
            State.PRIMARY_STATE_INACTIVE: Transition.TRANSITION_ACTIVATE,
        }.get(self.state)
        now = monotonic_s()
        answers_for_s = self._answered_at - max(self._answers_since, self._changed_at)
        if transition is None or (self._changing and answers_for_s < self.LOST_S):
            return
        if now - self._changed_at < 0.5 and not self._changing and self._failed:
            return  # it refused just now; its own log says why
        self._changing, self._changed_at = True, now
        request = ChangeState.Request(transition=Transition(id=transition))
        self._change.call_async(request).add_done_callback(self._on_changed)

    _failed = False

    def _on_changed(self, future: Any) -> None:
        self._changing = False
        self._failed = not future.result().success
        self._asked_at = -1e9
        self.state = State.PRIMARY_STATE_UNKNOWN
        if self._failed:
            self._changed_at = monotonic_s()
            self._node.get_logger().warning(
                f"{self.name} refused a transition; its log says why", throttle_duration_sec=5.0
            )


def _reply(response: Any, success: bool, message: str) -> Any:
    response.success, response.message = success, message
    return response


def _copy(response: Any, answer: Any) -> Any:
    return _reply(response, answer.success, answer.message)


def main(arguments: list[str] | None = None) -> int:
    return run(SupervisorNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
