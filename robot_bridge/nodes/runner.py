"""The policy runner: observations in, action chunks out.

    python -m robot_bridge.nodes.runner --ros-args -r __ns:=/CELL -p contract:=FILE -p registry:=DIR

Parameters: `registry` (folder; its active version is adopted between episodes after its checks) or
`policy` (a checkpoint folder, or ws://HOST:PORT of a server), `backend` (torch, onnx or remote; the
token of a server is the environment's VLA_POST_TOKEN), `infer_while_human`, `max_jump` (see
`vla_post.export.require_fit`; 0 switches that check off), `chunking` (how a chunk joins the running
one: `rtc`, `blend`, `off`, or `auto`: off in lockstep, else rtc where the policy can, else blend),
`rtc_form`, `shadow` (a candidate beside the active policy: a folder, a version, or `newest`; with a
registry `~/set_parameters` changes it at run time, to a version, `newest` or nothing),
`shadow_log` (a file), `inference_timeout_s`, `insight_every` (the policy's doubt and its critic's
value, of every k-th chunk, in /diagnostics; 0: off), `insight_samples` (chunks to tell the doubt
from) and `takeovers` (a file that keeps the doubts at takeovers, for the threshold of the hint).

Inference runs in a thread of its own. A policy that raises, or returns NaN or a wrong shape, is
reported by an empty chunk whose frame_id says why, on which the arbiter holds. One that hangs is
reported in the same way, and the process ends, to be started again: nothing else frees a thread.
"""

import faulthandler
import json
import math
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import ParameterType, SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.duration import Duration
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.core.align import CLOCK_JUMP_NS, Aligned, Aligner
from robot_bridge.core.chunking import Question, Rows, Seam, ask
from robot_bridge.core.chunks import POLICY_ERROR
from robot_bridge.core.events import EventError, EventType, parse_event
from robot_bridge.core.latency import Latency
from robot_bridge.core.modes import Mode
from robot_bridge.core.takeovers import Takeovers
from robot_bridge.nodes.common import (
    STEADY,
    CellNode,
    UserError,
    best_effort,
    chunk_message,
    fill_chunk,
    latched,
    monotonic_s,
    reliable,
    run,
    set_stamp,
)
from robot_bridge.nodes.insight import Insight
from robot_bridge.nodes.scout import Probe, Scout
from robot_bridge.nodes.shadow import Proposal
from robot_bridge.nodes.streams import Streams, decode
from robot_bridge.nodes.versions import Loaded, Versions

if TYPE_CHECKING:
    from vla_post.export import ChunkPolicy

OBSERVATION_PATIENCE_S = 0.5
"""Lockstep: how long to wait for a frame that is due before going on without it."""
UNHEARD_S = 0.5
"""Lockstep: a chunk that moves nothing for so long is inferred and sent again."""
CHUNKING = ("auto", "rtc", "blend", "off")
FORMS = ("identity", "jacobian")


@dataclass(frozen=True)
class _Job:
    aligned: Aligned
    instruction: str
    seed: int
    previous: Rows | None
    delay: int
    started_s: float


class RunnerNode(CellNode):
    def __init__(self, **options: Any) -> None:
        super().__init__("runner", **options)

        def text(name: str, default: str = "") -> str:
            return str(self.declare_parameter(name, default).value or "")

        self._backend = text("backend", "torch")
        self._rtc_form = text("rtc_form", "identity")
        self._while_human = bool(self.declare_parameter("infer_while_human", False).value)
        self._max_jump = float(self.declare_parameter("max_jump", 0.0).value or 0.0)
        timeout = self.declare_parameter("inference_timeout_s", 10.0).value
        self._timeout_s = float(timeout or 0.0)
        self._task = text("task", next(iter(self.contract.tasks)))
        chunking = text("chunking", "auto")
        for name, value, known in (
            ("backend", self._backend, ("torch", "onnx", "remote")),
            ("rtc_form", self._rtc_form, FORMS),
            ("chunking", chunking, CHUNKING),
        ):
            if value not in known:
                raise UserError(f"runner: {name} is {value!r}; expected {', '.join(known)}")
        if self._timeout_s <= 0:
            raise UserError(f"runner: inference_timeout_s is {self._timeout_s}; it must be > 0")
        self._follows = chunking != "off" and not (chunking == "auto" and self.lockstep)
        self._guide = chunking != "blend"
        self._shadow = text("shadow")
        self._insight_every = int(self.declare_parameter("insight_every", 0).value or 0)
        self._insight_samples = int(self.declare_parameter("insight_samples", 4).value or 0)
        self._takeovers = Takeovers(self.contract, text("takeovers"))
        log = text("shadow_log")
        self._shadow_log = Path(log) if log else None
        self._versions = Versions(
            self.contract,
            self.load,
            registry=text("registry"),
            policy=text("policy"),
            backend=self._backend,
            cell=self.get_namespace().strip("/"),
        )
        self.exit_status = 0

    # Loading

    def load(self, path: Path | str) -> "ChunkPolicy":
        """A policy for this cell. Raises what `load_policy` raises."""
        from vla_post.export import load_policy

        # With `remote` a server's URL and a candidate's folder are told apart by their looks.
        named = "auto" if self._backend == "remote" else self._backend
        backend = cast(Literal["auto", "torch", "onnx"], named)
        form = cast(Literal["identity", "jacobian"], self._rtc_form)
        return load_policy(path, backend=backend, rtc_form=form)

    def setup(self) -> None:
        self._loaded = self._versions.first()
        self._insight = Insight(
            every=self._insight_every,
            samples=self._insight_samples,
            steps=self.contract.execute_steps,
            takeovers=self._takeovers,
        )
        self._unsure = False
        self._probes: list[Probe] = []
        self._aligner = Aligner(self.contract, capacity=64)
        self._mode = Mode.HOLD
        self._fresh_ns = 0
        self._tick_ns = -1
        self._tick_s = 0.0
        self._sent_s = 0.0
        self._episode: tuple[int, int] | None = None
        """(seed, start stamp) of the running episode."""
        self._instruction = self.contract.task(self._task).instruction
        self._asked_ns = -1
        self._busy = False
        self._job_s = 0.0
        self._hung = False
        self._seam = Seam(self.contract.dt_ns, lockstep=self.lockstep)
        self._chunk_id = 0
        self._errors = 0
        self._last_error = ""
        self.latency = Latency()

        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._done = self.create_guard_condition(self._on_done)
        lifespan = Duration(seconds=0 if self.lockstep else 1)
        self._chunk_publisher = self.create_publisher(
            JointTrajectory,
            "policy/action_chunk",
            QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, lifespan=lifespan),
        )
        self._active_publisher = self.create_publisher(String, "policy/active", latched())
        self._shadow_chunk_publisher = self.create_publisher(
            JointTrajectory, "policy/shadow_chunk", reliable(1)
        )
        self._shadow_publisher = self.create_publisher(String, "policy/shadow", reliable(10))
        self._message = chunk_message(self.contract)
        self._streams = Streams(
            self,
            self.contract,
            self._on_sample,
            vectors=reliable(10) if self.lockstep else best_effort(5),
            images=reliable(5) if self.lockstep else best_effort(1),
        )
        self._subscriptions_made = [
            self.create_subscription(DiagnosticStatus, "arbiter/state", self._on_state, latched()),
            self.create_subscription(String, "events", self._on_event, latched(200)),
        ]
        self._services_made = [
            self.create_service(Trigger, "~/reload_policy", self._on_reload),
            self.create_service(SetParameters, "~/set_parameters", self._on_set_parameters),
        ]
        self._timers_made = [
            self.create_timer(0.05, self._maybe_infer, clock=STEADY),
            self.create_timer(0.1, self._watch_inference, clock=STEADY),
        ]
        self._scout = Scout(
            self.contract,
            self._versions,
            running=lambda: self._loaded,
            probes=lambda: self._probes,
            ready=self._done.trigger,
            say_shadow=self._say_shadow,
            complain=self.get_logger().error,
            shadow=self._shadow,
            shadow_log=self._shadow_log,
            max_jump=self._max_jump,
        )
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()
        self._scout.start()

    def started(self) -> None:
        self._announce()

    def teardown(self) -> None:
        stop: threading.Event | None = self.__dict__.get("_stop")
        if stop is not None:
            stop.set()
            self._jobs.put(None)
        patience_s = 0.0 if self.__dict__.get("_hung") else 5.0
        thread: threading.Thread | None = self.__dict__.pop("_thread", None)
        if thread is not None:
            thread.join(timeout=patience_s)
        scout: Scout | None = self.__dict__.pop("_scout", None)
        if scout is not None:
            scout.close(patience_s)
        streams: Streams | None = self.__dict__.pop("_streams", None)
        if streams is not None:
            streams.close()
        removers: tuple[tuple[str, Callable[[Any], Any]], ...] = (
            ("_timers_made", self.destroy_timer),
            ("_subscriptions_made", self.destroy_subscription),
            ("_services_made", self.destroy_service),
        )
        for name, destroy in removers:
            for entity in self.__dict__.pop(name, []):
                destroy(entity)
        for name in ("_chunk", "_active", "_shadow_chunk", "_shadow"):
            publisher = self.__dict__.pop(f"{name}_publisher", None)
            if publisher is not None:
                self.destroy_publisher(publisher)
        loaded: Loaded | None = self.__dict__.pop("_loaded", None)
        if loaded is not None and not self._hung:
            loaded.policy.close()

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        if not self.live:
            return DiagnosticStatus.STALE, "", {}
        values = {
            "version": self._loaded.version,
            "chunks": self._chunk_id,
            "errors": self._errors,
            "delay_ticks": self._seam.delay,
        } | self.latency.summary_ms()
        # A policy on another machine says how much of that was the wire.
        values |= getattr(self._loaded.policy, "wire_ms", {})
        values |= self._scout.diagnose() | self._insight.diagnose()
        if "doubt" in values:
            values["hint"] = "true" if self._unsure else "false"
        if self._scout.refusal:
            return DiagnosticStatus.WARN, self._scout.refusal, values
        level = DiagnosticStatus.ERROR if self._last_error else DiagnosticStatus.OK
        return level, self._last_error, values

    # Inputs

    def _on_sample(self, key: str, stamp: int, value: Any) -> None:
        drives = self.contract.observations[key].topic == "joint_states"
        if drives and stamp < self._tick_ns - CLOCK_JUMP_NS:
            self._aligner.clear()
            self._seam.forget()
            self._tick_ns = self._asked_ns = -1
        self._aligner.push(key, stamp, value)
        if drives and stamp > self._tick_ns:
            self._tick_ns, self._tick_s = stamp, monotonic_s()
        self._maybe_infer()

    def _on_state(self, message: DiagnosticStatus) -> None:
        before = self._mode
        for pair in message.values:
            if pair.key == "mode":
                self._mode = Mode(pair.value)
            elif pair.key == "fresh_ns":
                self._fresh_ns = int(pair.value)
        if (before, self._mode) == (Mode.POLICY, Mode.HUMAN):  # which only a person can ask for
            self._insight.took_over(self._fresh_ns)
        self._hint()
        self._maybe_infer()

    def _on_event(self, message: String) -> None:
        try:
            event = parse_event(message.data)
        except EventError as error:
            self.get_logger().warning(str(error))
            return
        if event.type == EventType.EPISODE_START:
            self._instruction = event.text("instruction", self._instruction)
            self._episode = (event.integer("seed"), event.integer("start_stamp_ns"))
        elif event.type in (EventType.EPISODE_END, EventType.RESET):
            self._episode = None
            # The arbiter holds from here on; its word of it may still be on the way, and a chunk
            # that is inferred on the old one would cross the next resume.
            self._mode = Mode.HOLD
            self._seam.forget()
            self._maybe_swap()
        self._maybe_infer()

    # Inference

    def _maybe_infer(self) -> None:
        """Starts an inference if one is due and its observation is complete."""
        if self._busy or not self.live or self._tick_ns < 0:
            return
        driving = self._mode is Mode.POLICY
        if not driving and not (self._while_human and self._mode is Mode.HUMAN):
            return
        if self.lockstep and self._episode is None:
            return
        tick = self._tick_ns
        newest_useful = tick - (self.contract.execute_steps - 1) * self.contract.dt_ns
        if driving:
            newest_useful = max(newest_useful, self._fresh_ns)
        if tick < self._fresh_ns:
            return
        if self._asked_ns >= newest_useful and not self._unheard(driving):
            return
        young = monotonic_s() - self._tick_s < OBSERVATION_PATIENCE_S
        if self.lockstep and young and self._aligner.pending(tick):
            return
        aligned = self._aligner.at(tick)
        self._asked_ns = tick
        if not aligned.usable:
            self._fail(tick, f"the observation is not complete: {aligned.why()}")
            return
        seed, start = self._episode or (0, 0)
        steps = max(0, (tick - start) // self.contract.dt_ns)
        if not driving:
            self._seam.forget()
        previous = self._seam.previous(tick, self._fresh_ns) if self._follows else None
        self._job_s = monotonic_s()
        job = _Job(
            aligned,
            self._instruction,
            (seed * 100_003 + steps) % 2**31,
            previous,
            self._seam.delay,
            self._job_s,
        )
        self._busy = True
        self._jobs.put(job)

    def _unheard(self, driving: bool) -> bool:
        """Lockstep: time stands still although the chunk is out, so it did not reach the arbiter.

        It may have come while the arbiter still closed the episode before, and been dropped.
        """
        if not self.lockstep or not driving:
            return False
        return monotonic_s() - max(self._tick_s, self._sent_s) > UNHEARD_S

    def _watch_inference(self) -> None:
        """A policy that hangs: say so, and leave; whoever started this process starts it again."""
        if not self._busy or self._hung or monotonic_s() - self._job_s < self._timeout_s:
            return
        self._hung = True
        reason = f"the policy hangs: no answer within {self._timeout_s:g} s"
        self._fail(self._tick_ns, reason)
        self.get_logger().fatal(f"{reason}; this process ends, to be started again")
        self.exit_status = 1

    def _work(self) -> None:
        """The inference thread."""
        while (job := self._jobs.get()) is not None and not self._stop.is_set():
            # A policy that hangs while it keeps the interpreter's lock stops our timers as well.
            faulthandler.dump_traceback_later(self._timeout_s + 5.0, exit=True)
            try:
                self._infer(job)
            except Exception as error:
                self._fail(
                    job.aligned.tick_ns, f"the policy failed: {type(error).__name__}: {error}"
                )
            finally:
                faulthandler.cancel_dump_traceback_later()
            self._busy = False
            if not self._stop.is_set():
                self._done.trigger()

    def _infer(self, job: _Job) -> None:
        loaded, shadow, stamp = self._loaded, self._scout.shadow, job.aligned.tick_ns
        keys = dict.fromkeys(loaded.policy.observation_keys)
        if shadow is not None:
            keys |= dict.fromkeys(shadow.loaded.policy.observation_keys)
        observation = {
            key: decode(job.aligned.values[key], self.contract.observations[key]) for key in keys
        }
        question = Question(stamp, observation, job.instruction, job.seed, job.previous, job.delay)
        chunk = ask(loaded.policy, question, self.contract, guide=self._guide)
        if self._hung:
            return  # it answered after all, but the arbiter was told otherwise
        self._chunk_id += 1
        self._last_error = ""
        fill_chunk(self._message, stamp, f"{loaded.version}#{self._chunk_id}", chunk)
        self._chunk_publisher.publish(self._message)
        self._sent_s = monotonic_s()
        self._seam.sent(stamp, chunk, self._tick_ns)
        self.latency.add(self._sent_s - job.started_s)
        self._probes = [*self._probes[-3:], (observation, job.instruction)]
        if shadow is not None:
            shadow.offer(Proposal(question, loaded.version, self._chunk_id, chunk, self._guide))
        took_s = self._sent_s - job.started_s
        period_s = self.contract.execute_steps / self.contract.control_hz
        self._job_s = self._sent_s
        self._insight.look(
            loaded, question, chunk, math.inf if self.lockstep else period_s - took_s
        )

    def _say_shadow(self, proposal: Proposal, version: int, chunk: Rows, text: str) -> None:
        """From the shadow's thread."""
        message = chunk_message(self.contract)
        fill_chunk(message, proposal.question.stamp_ns, f"{version}#{proposal.chunk_id}", chunk)
        self._shadow_chunk_publisher.publish(message)
        self._shadow_publisher.publish(String(data=text))

    def _fail(self, tick_ns: int, reason: str) -> None:
        self._errors += 1
        self._seam.forget()
        self._last_error = reason
        self.get_logger().error(reason, throttle_duration_sec=2.0)
        message = JointTrajectory()
        set_stamp(message.header.stamp, tick_ns)
        message.header.frame_id = POLICY_ERROR + reason
        self._chunk_publisher.publish(message)
        self._sent_s = monotonic_s()

    def _on_done(self) -> None:
        self._maybe_swap()
        self._hint()
        self._maybe_infer()

    def _hint(self) -> None:
        """Says at once, and not with the next second, that the policy became unsure or sure."""
        unsure = self._mode is Mode.POLICY and self._insight.unsure(self._fresh_ns)
        if unsure != self._unsure:
            self._unsure = unsure
            self._diagnostics.publish()

    # Versions

    def _maybe_swap(self) -> None:
        """Adopts the candidate between episodes, or between chunks if the contract allows."""
        candidate = self._scout.candidate
        between = self._episode is None or self.contract.safety.swap == "chunk"
        if candidate is None or self._busy or not between:
            return
        old, self._loaded, self._scout.candidate = self._loaded, candidate, None
        old.policy.close()
        self.latency = Latency()
        self._seam.restart_latency()
        self._announce()

    def _announce(self) -> None:
        card = self._loaded.card
        self.get_logger().info(f"policy version {card['version']}")
        self._active_publisher.publish(String(data=json.dumps(card)))

    def _on_reload(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._versions.registry is None:
            response.success, response.message = False, "a fixed policy is running, no registry"
            return response
        self._scout.look_now()
        response.success = True
        response.message = "looking; a version that passes its checks is adopted between episodes"
        return response

    def _on_set_parameters(
        self, request: SetParameters.Request, response: SetParameters.Response
    ) -> SetParameters.Response:
        results: list[SetParametersResult] = []
        for parameter in cast(Any, request.parameters):
            reason = "of the runner's parameters only `shadow`, a text, changes at run time"
            if (parameter.name, parameter.value.type) == ("shadow", ParameterType.PARAMETER_STRING):
                try:
                    self._scout.want_shadow(str(parameter.value.string_value))
                    reason = ""
                except ValueError as error:
                    reason = str(error)
            results.append(SetParametersResult(successful=not reason, reason=reason))
        response.results = results
        return response


def main(arguments: list[str] | None = None) -> int:
    return run(RunnerNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
