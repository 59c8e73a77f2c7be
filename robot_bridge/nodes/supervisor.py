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

from diagnostic_msgs.msg import DiagnosticStatus
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
    Diagnostics,
    UserError,
    deliver,
    latched,
    reliable,
    run,
    stamp_ns,
)
from robot_bridge.nodes.ward import Ward
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
        self._mode = self._robot = ""
        self._ended_seq = self._arbiter_seq = 0
        """Number of the event that ended the last episode, and of the last event that the arbiter
        has heard."""
        self._hearing: list[Future] = []
        """Set when the arbiter has heard of that end."""
        self._version: int | None = None
        self._events = self.create_publisher(String, "events", latched(200))
        if self.lockstep:  # elsewhere the clock tells the time, and 500 messages a second do not
            on_joint_state: Any = self._on_joint_state
            self.create_subscription(JointState, "joint_states", on_joint_state, reliable(10))
        # A service that awaits holds the default group; what it waits for comes in through another.
        self._forwarding = ReentrantCallbackGroup()
        self.create_subscription(
            DiagnosticStatus,
            "arbiter/state",
            self._on_state,
            latched(),
            callback_group=self._forwarding,
        )
        self.create_subscription(String, "policy/active", self._on_active, latched())
        self.create_subscription(String, "operator/notes", self._on_note, reliable(50))
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
        # In a group that nothing holds: a stop must not wait until another request was answered.
        forwarded: tuple[tuple[str, Any, Any], ...] = (
            ("set_intervention", SetBool, self._on_set_intervention),
            ("resume_policy", Trigger, self._on_resume_policy),
            ("estop", Trigger, self._on_estop),
            ("reset_estop", Trigger, self._on_reset_estop),
        )
        for name, kind, answer in forwarded:
            self.create_service(kind, f"~/{name}", answer, callback_group=self._forwarding)
        self._wards = [Ward(self, str(name), self.say) for name in (names or []) if self._manage]
        if self._wards:
            self.create_timer(0.1, self._look_after, clock=STEADY)
        self._diagnostics = Diagnostics(self, self.diagnose)
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
            answer = await self._forward_in_order("resume_policy", Trigger.Request())
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
        self._ended_seq = self._writer.seq

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
        self._arbiter_seq = int(values.get("event_seq", 0))
        if self._arbiter_seq >= self._ended_seq:
            hearing, self._hearing = self._hearing, []
            for future in hearing:
                if not future.done():
                    future.set_result(True)
        robot, known = values.get("robot", ""), self._robot
        self._robot = robot or known
        if known and self._robot != known and self._started and self._episode is not None:
            # It goes on in another scene, or from where somebody moved it: not this episode.
            self._finish("interrupted", reason="the robot was restarted")
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
        forward = self._forward_in_order if request.data else self._forward
        return _copy(response, await forward("set_intervention", request))

    async def _on_resume_policy(self, request: Any, response: Any) -> Any:
        return _copy(response, await self._forward_in_order("resume_policy", request))

    async def _on_estop(self, request: Any, response: Any) -> Any:
        return _copy(response, await self._forward("estop", request))

    async def _on_reset_estop(self, request: Any, response: Any) -> Any:
        return _copy(response, await self._forward("reset_estop", request))

    async def _forward_in_order(self, name: str, request: Any) -> Any:
        """`_forward`, once the arbiter has heard of the last episode's end.

        Requests and events travel apart. An arbiter that heard of the end after the request would
        stop whom the request had just let drive. One that stays silent about it is asked anyway.
        """
        if self._arbiter_seq < self._ended_seq:
            heard = Future(executor=self.executor)
            self._hearing.append(heard)
            await self._patiently(heard, False)
        return await self._forward(name, request)

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

        call.add_done_callback(done)
        result = await self._patiently(answer, silent)
        if result is silent:
            client.remove_pending_request(call)
        return result

    async def _patiently(self, answer: Future, otherwise: Any) -> Any:
        """The future's result, or `otherwise` when it takes longer than `ANSWER_S`."""

        def late() -> None:
            if not answer.done():
                answer.set_result(otherwise)

        timer = self.create_timer(ANSWER_S, late, callback_group=self._forwarding, clock=STEADY)
        result = await answer
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

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        values: dict[str, Any] = {
            ward.name: "active" if ward.active else "not active" for ward in self._wards
        }
        down = [name for name, state in values.items() if state != "active"]
        level = DiagnosticStatus.ERROR if down else DiagnosticStatus.OK
        return level, f"not active: {', '.join(down)}" if down else "", values


def _reply(response: Any, success: bool, message: str) -> Any:
    response.success, response.message = success, message
    return response


def _copy(response: Any, answer: Any) -> Any:
    return _reply(response, answer.success, answer.message)


def main(arguments: list[str] | None = None) -> int:
    return run(SupervisorNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
