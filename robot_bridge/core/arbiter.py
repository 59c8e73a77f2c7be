"""Who drives: the one place where commands are made.

HOLD -> POLICY on `resume` only, with a fresh chunk. POLICY or HOLD -> HUMAN on request with the
deadman held. HUMAN -> HOLD on release, silence or a lost link; never straight back to the policy.
Anything -> FAULT on an emergency stop or a latched fault; FAULT -> HOLD by an operator's reset.

Stamps are nanoseconds of the cell's clock, watchdogs run on seconds of a monotonic clock; both are
arguments, so tests need no real time. Not thread-safe: one owner, one thread.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robot_bridge.core.chunks import POLICY_ERROR, Chunk, ChunkReader
from robot_bridge.core.joints import JointReader, NamesError
from robot_bridge.core.modes import Answer, Decision, Mode, Phase
from robot_bridge.core.safety import Gate, Gated, UnsafeCommand
from trajectory_store.contract import Contract

Vector = NDArray[np.float64]

OPERATOR_LAG_TICKS = 4
"""In lockstep an attached operator is never further behind than this."""
TAKEOVER_PATIENCE_S = 5.0
"""A request for control lapses when the deadman is not pressed within this time."""
FRESH_CHUNK_PATIENCE_S = 5.0
"""After `resume` in real time: how long to stand still for the first chunk."""

NEEDS_CHUNK = "a chunk"
NEEDS_COMMAND = "the operator's command"
NEEDS_JOY = "the operator's joy message"


class Arbiter:
    """State machine, freshness rules and the safety gate of one cell.

    Args:
        lockstep: simulated time stands still until the command of a tick is sent. Then a chunk is
            followed for `execute_steps` and a human's command must carry the tick's very stamp.
        folder: where the contract lies; see `Gate`.
    """

    def __init__(
        self, contract: Contract, *, lockstep: bool = False, folder: Path | None = None
    ) -> None:
        self.contract = contract
        self.lockstep = lockstep
        self.gate = Gate(contract, folder)
        self.mode = Mode.HOLD
        self.phase = Phase.STEADY
        self.reason = "not resumed yet"
        self.operator = ""
        self.fresh_ns = 0
        """Chunks of older observations are refused: the time of the last resume."""
        self.chunk_age_ns = 0
        self.late_chunks = 0
        self._dt_ns = contract.dt_ns
        self._safety = contract.safety
        self._names = JointReader(contract.action.names, exact=True)
        self._chunks = ChunkReader(contract)
        self._held_names = tuple(contract.action.held)
        self._chunk: Chunk | None = None
        self._blend_from: tuple[int, Vector] | None = None
        self._measured: Vector | None = None
        self._tool: Vector | None = None
        self._joint_stamp_ns: int | None = None
        self._joint_mono_s = 0.0
        self._joint_problem = ""
        self._joy_stamp_ns = -(1 << 62)
        self._joy_mono_s = -1e9
        self._deadman = False
        self._operator_silent = False
        self._target: Vector | None = None
        self._target_stamp_ns = 0
        self._target_mono_s = -1e9
        self._clutch: Vector | None = None
        self._request_mono_s: float | None = None
        self._resume_mono_s = 0.0
        self._for_want_of_a_chunk = False
        """HOLD because the policy fell silent; it may still say why."""
        self._last: Decision | None = None
        self._last_mono_s: float | None = None
        self._missed = 0

    # What arrives

    def joint_state(
        self, stamp_ns: int, measured: Vector | None, tool: Vector | None, mono_s: float
    ) -> None:
        """A sample of the robot.

        Args:
            measured: (A,) positions of the action's joints, for `absolute` actions.
            tool: (3,) tool position, where the workspace is a box of state names.
        """
        finite = all(v is None or bool(np.isfinite(v).all()) for v in (measured, tool))
        self._joint_problem = "" if finite else "joint states are not finite"
        if finite:
            self._measured, self._tool = measured, tool
        if self._joint_stamp_ns is None or stamp_ns >= self._joint_stamp_ns:
            self._joint_stamp_ns = stamp_ns
        self._joint_mono_s = mono_s

    def joint_state_unreadable(self, problem: str, mono_s: float) -> None:
        self._joint_problem = f"joint states are unreadable: {problem}"
        self._joint_mono_s = mono_s

    def robot_restarted(self) -> None:
        """Another process speaks for the robot: where it stands is not known until it says so."""
        self._to_hold("the robot was restarted: what runs there now is not what ran before")
        self._measured = self._tool = None
        self._joint_stamp_ns, self._joint_problem = None, ""
        self.gate.reset(None)

    def robot_gone(self) -> None:
        """Nobody speaks for the robot. In real time its joint states have been stale for long."""
        self._joint_problem = "the robot is gone: nobody publishes joint states"
        self._to_hold(self._joint_problem)

    def offer_chunk(
        self,
        stamp_ns: int,
        names: Any,
        points: Sequence[Any],
        frame_id: str,
        now_ns: int,
    ) -> str:
        """Takes a chunk, or says why not. In POLICY a malformed chunk leads to HOLD.

        Args:
            points: H points of A values in the order of `names`.
            frame_id: `VERSION#CHUNK`.
            now_ns: the cell's time.
        """
        try:
            chunk = self._chunks.read(stamp_ns, names, points, frame_id)
            if stamp_ns > now_ns + self._dt_ns:
                ahead_ms = (stamp_ns - now_ns) / 1e6
                raise ValueError(f"its observation lies {ahead_ms:.0f} ms in the future")
        except ValueError as error:
            reason = f"chunk refused: {error}"
            if self.mode is Mode.POLICY:
                self._to_hold(reason)
            elif self._for_want_of_a_chunk and frame_id.startswith(POLICY_ERROR):
                self.reason = reason  # why it did not come
            return reason
        if stamp_ns < self.fresh_ns or (
            self._chunk is not None and stamp_ns < self._chunk.stamp_ns
        ):
            self.late_chunks += 1
            return "chunk refused: its observation is older than the hand-back or the current chunk"
        self._chunk = chunk
        return ""

    def joy(self, stamp_ns: int, deadman: bool, mono_s: float) -> None:
        """A sign of life of the operator's device. Older ones than the last are ignored."""
        if stamp_ns < self._joy_stamp_ns:
            return
        self._joy_stamp_ns, self._joy_mono_s, self._deadman = stamp_ns, mono_s, deadman
        self._operator_silent = False
        if self.mode is Mode.HUMAN and not deadman:
            self._to_hold("operator released the deadman")

    def human_target(self, stamp_ns: int, names: Any, values: Any, mono_s: float) -> str:
        """The human's command for all joints; in HUMAN an unreadable one leads to HOLD."""
        try:
            target = self._names.read(names, values)
            if not np.isfinite(target).all():
                raise UnsafeCommand("it holds NaN or infinity")
        except (NamesError, UnsafeCommand) as error:
            reason = f"teleop command refused: {error}"
            if self.mode is Mode.HUMAN:
                self._to_hold(reason)
            return reason
        if stamp_ns >= self._target_stamp_ns:
            self._target, self._target_stamp_ns, self._target_mono_s = target, stamp_ns, mono_s
        return ""

    def human_twist(self, stamp_ns: int, linear: Sequence[float], mono_s: float) -> str:
        """The human's command as a jog of the tool, on cells of displacements `_dx`, `_dy`, `_dz`.

        Args:
            linear: x, y, z in m/s; in [-1, 1] where the action's unit is `normalised`. Joints in
                `held` (the gripper) keep their value, the others rest.
        """
        action = self.contract.action
        axes = [i for i, n in enumerate(action.names) if n.endswith(("_dx", "_dy", "_dz"))]
        if action.mode != "delta" or len(axes) != 3:
            return "teleop/twist needs an action with displacements _dx, _dy, _dz"
        target = self.gate.still()
        scale = 1.0 if action.unit == "normalised" else 1.0 / self.contract.control_hz
        target[axes] = np.asarray(linear, dtype=np.float64) * scale
        return self.human_target(stamp_ns, action.names, target, mono_s)

    # Requests

    def set_intervention(self, wanted: bool, mono_s: float) -> Answer:
        if self.mode is Mode.FAULT:
            return Answer(False, f"in FAULT: {self.reason}")
        if not wanted:
            self._request_mono_s = None
            if self.phase is Phase.TAKEOVER:
                self.phase = Phase.STEADY
            if self.mode is Mode.HUMAN:
                self._to_hold("operator handed back")
            return Answer(True, self.mode)
        if self.mode is Mode.HUMAN:
            return Answer(True, "already driving")
        self._request_mono_s = mono_s
        if self.phase is Phase.STEADY:
            self.phase = Phase.TAKEOVER
        return Answer(True, "HUMAN as soon as the deadman is held")

    def resume(self, now_ns: int, mono_s: float) -> Answer:
        """HOLD -> POLICY. Chunks whose observation is older than now are never run."""
        if self.mode is Mode.POLICY:
            return Answer(True, "the policy is driving already")
        if self.mode is not Mode.HOLD:
            return Answer(False, f"the policy resumes from HOLD only; the mode is {self.mode}")
        if self._joint_problem:
            return Answer(False, self._joint_problem)
        self.mode, self.phase = Mode.POLICY, Phase.HANDBACK
        self._for_want_of_a_chunk = False
        self.reason = "waiting for a fresh chunk"
        self.fresh_ns = now_ns
        self._request_mono_s = None
        self._resume_mono_s = mono_s
        if self._chunk is not None and self._chunk.stamp_ns < now_ns:
            # One that was inferred from the current observation may have come before the request.
            self._chunk = None
        self._blend_from = None
        return Answer(True, "the policy drives from its next inference on")

    def estop(self, who: str = "operator") -> Answer:
        self._fault(f"emergency stop by {who}")
        return Answer(True, "stopped; reset_estop leads to HOLD")

    def reset_estop(self) -> Answer:
        if self.mode is not Mode.FAULT:
            return Answer(True, f"nothing to reset, the mode is {self.mode}")
        self.mode, self.phase, self.reason = Mode.HOLD, Phase.STEADY, "reset after a stop"
        self._missed, self._last_mono_s = 0, None
        return Answer(True, "HOLD")

    def fault(self, reason: str) -> None:
        """Latches FAULT for a reason that the caller found (two arbiters, a broken input)."""
        self._fault(reason)

    def episode_started(self, operator: str, start_ns: int = 0) -> None:
        """A new scene. A simulated robot was put elsewhere; a real one stands where it stood."""
        self.operator = operator
        if self.contract.sim:
            self.gate.reset(None)
        self._operator_silent = False
        if self._joy_stamp_ns < start_ns:
            self._joy_stamp_ns, self._deadman = -(1 << 62), False
        if self._target_stamp_ns < start_ns:
            self._target = None
        self._clutch, self._blend_from = None, None

    def episode_ended(self) -> None:
        if self.mode in (Mode.POLICY, Mode.HUMAN):
            self._to_hold("episode ended")
        self._chunk = None

    # Ticks

    def waits_for(self, tick_ns: int, mono_s: float, operator_attached: bool) -> str:
        """Lockstep: what this tick still needs; empty when it can be taken."""
        if self._last is not None and tick_ns <= self._last.tick_ns:
            return ""
        self._advance(tick_ns, mono_s, operator_attached)
        if self.mode is Mode.HUMAN and self._target_stamp_ns < tick_ns:
            return NEEDS_COMMAND
        if self.mode is Mode.POLICY:
            step = self._step_of(tick_ns)
            if step is None or step >= self.contract.execute_steps:
                return NEEDS_CHUNK
        lag = OPERATOR_LAG_TICKS * self._dt_ns
        waited_for = operator_attached and not self._operator_silent
        if waited_for and self._joy_stamp_ns < tick_ns - lag:
            return NEEDS_JOY
        return ""

    def tick(
        self,
        tick_ns: int,
        mono_s: float,
        *,
        operator_attached: bool = False,
        gave_up_on: str = "",
    ) -> Decision | None:
        """The command of one control tick. Never raises; what goes wrong becomes HOLD or FAULT.

        None until it is known where the robot stands: a set-point out of thin air would slam it.

        Args:
            gave_up_on: lockstep: what `waits_for` still wanted when its time ran out.
        """
        if self._last is not None and tick_ns == self._last.tick_ns:
            return self._last
        self._watch_loop(tick_ns, mono_s)
        self._advance(tick_ns, mono_s, operator_attached)
        if gave_up_on == NEEDS_JOY:
            # Nobody moves the stick; waiting at every tick would only slow the cell down.
            self._operator_silent = True
        elif gave_up_on:
            self._to_hold(f"{gave_up_on} did not come in time")
            self._for_want_of_a_chunk = gave_up_on == NEEDS_CHUNK
        if not self.gate.delta and self._measured is None and self.gate.last is None:
            return None
        decision = self._decide(tick_ns, mono_s)
        self._last, self._last_mono_s = decision, mono_s
        return decision

    def _advance(self, tick_ns: int, mono_s: float, operator_attached: bool) -> None:
        """Transitions that depend on the operator's signals alone."""
        if self._request_mono_s is not None:
            if self._deadman and self._operator_alive(tick_ns, mono_s):
                self._to_human()
            elif mono_s - self._request_mono_s > TAKEOVER_PATIENCE_S:
                self._request_mono_s = None
                if self.phase is Phase.TAKEOVER:
                    self.phase = Phase.STEADY
        if self.mode is Mode.HUMAN:
            if not operator_attached:
                self._to_hold("the operator's link is lost")
            elif not self._operator_alive(tick_ns, mono_s):
                self._to_hold("no sign of the operator")

    def _operator_alive(self, tick_ns: int, mono_s: float) -> bool:
        timeout_ms = self._safety.teleop_timeout_ms
        if self.lockstep:
            return tick_ns - self._joy_stamp_ns <= timeout_ms * 1e6
        return mono_s - self._joy_mono_s <= timeout_ms / 1e3

    def _watch_loop(self, tick_ns: int, mono_s: float) -> None:
        """Late loops and jumping clocks, in real time."""
        if self._last is None or self._last_mono_s is None:
            return
        if tick_ns < self._last.tick_ns:
            self._chunk = None
            self.fresh_ns = min(self.fresh_ns, tick_ns)
            self._joint_stamp_ns = None
            self._joy_stamp_ns = self._target_stamp_ns = -(1 << 62)
            if self.mode is not Mode.FAULT:
                self._to_hold("the clock jumped back")
        if self.lockstep:
            return
        missed = int((mono_s - self._last_mono_s) * self.contract.control_hz + 0.5) - 1
        self._missed = self._missed + missed if missed > 0 else 0
        if self._missed >= self._safety.overrun_ticks and self.mode is not Mode.FAULT:
            self._fault(f"the control loop missed {self._missed} ticks in a row")

    def _decide(self, tick_ns: int, mono_s: float) -> Decision:
        if self.mode in (Mode.POLICY, Mode.HUMAN):
            problem = self._robot_problem(tick_ns, mono_s)
            if problem:
                self._stale(problem)
        try:
            if self.mode is Mode.POLICY:
                return self._policy(tick_ns, mono_s)
            if self.mode is Mode.HUMAN:
                return self._human(tick_ns, mono_s)
        except UnsafeCommand as error:
            self._to_hold(str(error))
        return self._hold(tick_ns)

    def _robot_problem(self, tick_ns: int, mono_s: float) -> str:
        if self._joint_problem:
            return self._joint_problem
        if self._joint_stamp_ns is None:
            return "no joint states yet"
        limit_ms = self._safety.joint_state_max_age_ms
        age_ms = (tick_ns - self._joint_stamp_ns) / 1e6
        if not self.lockstep:
            age_ms = max(age_ms, (mono_s - self._joint_mono_s) * 1e3)
        if age_ms > limit_ms:
            return f"joint states are {age_ms:.0f} ms old, the limit is {limit_ms:.0f} ms"
        return ""

    def _step_of(self, tick_ns: int) -> int | None:
        """Index of this tick in the current chunk; None if there is none or it has run out."""
        if self._chunk is None:
            return None
        step = (tick_ns - self._chunk.stamp_ns + self._dt_ns // 2) // self._dt_ns
        return int(step) if 0 <= step < len(self._chunk.points) else None

    def _policy(self, tick_ns: int, mono_s: float) -> Decision:
        step = self._step_of(tick_ns)
        if step is None:
            if self.phase is Phase.HANDBACK and self._chunk is None and not self.lockstep:
                if mono_s - self._resume_mono_s <= FRESH_CHUNK_PATIENCE_S:
                    return self._hold(tick_ns)
                self._to_hold("no fresh chunk after resuming; does the policy runner live?")
            else:
                self._stale("the chunk has run out" if self._chunk else "no chunk")
            self._for_want_of_a_chunk = self.mode is Mode.HOLD
            return self._hold(tick_ns)
        chunk = self._chunk
        assert chunk is not None
        self.chunk_age_ns = tick_ns - chunk.stamp_ns
        if self.chunk_age_ns > self._safety.chunk_max_age_ms * 1e6:
            self._stale(f"the chunk is {self.chunk_age_ns / 1e6:.0f} ms old")
            return self._hold(tick_ns)
        if self.gate.last is None and not self.gate.delta:
            self.gate.reset(self._measured)
        desired = self._blend(tick_ns, chunk.points[step])
        gated = self.gate.pass_through(desired, self._tool)
        label = f"policy:{chunk.version}#{chunk.chunk_id}"
        return self._done(tick_ns, gated, label, step)

    def _blend(self, tick_ns: int, desired: Vector) -> Vector:
        """From standing still to the chunk, over `blend_ms` after a hand-back."""
        if self.phase is not Phase.HANDBACK:
            return desired
        length_ns = self._safety.blend_ms * 1e6
        if self._blend_from is None:
            self._blend_from = (tick_ns, self.gate.still(self._measured))
            self.reason = "blending into a fresh chunk"
        start_ns, still = self._blend_from
        weight = 1.0 if length_ns <= 0 else (tick_ns - start_ns + self._dt_ns) / length_ns
        if weight >= 1.0:
            self.phase, self.reason, self._blend_from = Phase.STEADY, "", None
            return desired
        return (1.0 - weight) * still + weight * desired

    def _human(self, tick_ns: int, mono_s: float) -> Decision:
        timeout_ms = self._safety.teleop_timeout_ms
        silent = (
            self._target_stamp_ns < tick_ns
            if self.lockstep
            else (mono_s - self._target_mono_s) * 1e3 > timeout_ms
        )
        if self._target is None or silent:
            self._to_hold("no command of the operator")
            return self._hold(tick_ns)
        wanted = self._target
        if not self.gate.delta:
            # Clutch: the first command continues where the robot is told to be, and a joint at its
            # limit turns round at once when the human does.
            if self._clutch is None:
                if self.gate.last is None:
                    self.gate.reset(self._measured)
                start = self.gate.last if self.gate.last is not None else wanted
                self._clutch = start - wanted
            wanted = wanted + self._clutch
            self._clutch = self._clutch + (self.gate.inside(wanted) - wanted)
        gated = self.gate.pass_through(wanted, self._tool)
        return self._done(tick_ns, gated, f"human:{self.operator or 'operator'}", None)

    def _hold(self, tick_ns: int) -> Decision:
        return self._done(tick_ns, self.gate.hold(self._measured), "hold", None)

    def _done(self, tick_ns: int, gated: Gated, label: str, step: int | None) -> Decision:
        return Decision(tick_ns, gated.command, label, self.mode, gated.clipped, step)

    # Transitions

    def _to_hold(self, reason: str) -> None:
        if self.mode is Mode.FAULT:
            return
        self.mode, self.phase, self.reason = Mode.HOLD, Phase.STEADY, reason
        self._for_want_of_a_chunk = False
        self._chunk, self._blend_from, self._clutch = None, None, None

    def _to_human(self) -> None:
        self.mode, self.phase, self.reason = Mode.HUMAN, Phase.STEADY, ""
        self._for_want_of_a_chunk = False
        self._request_mono_s = None
        self._chunk, self._blend_from, self._clutch = None, None, None

    def _fault(self, reason: str) -> None:
        self._to_hold(reason)
        if self.mode is not Mode.FAULT:
            self.mode, self.reason = Mode.FAULT, reason
        self._request_mono_s = None

    def _stale(self, reason: str) -> None:
        """The contract says what stale inputs lead to; slowing down is the gate's work."""
        if self._safety.stale == "stop":
            self._fault(reason)
        else:
            self._to_hold(reason)
