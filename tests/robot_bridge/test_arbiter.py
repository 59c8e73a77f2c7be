"""The arbiter on a fake clock: no ROS, no waiting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_bridge.core.arbiter import Arbiter
from robot_bridge.core.chunks import POLICY_ERROR
from robot_bridge.core.modes import Decision, Mode, Phase
from trajectory_store.contract import Contract

from .cells import arm, cartesian
from .test_safety import assert_inside


class Rig:
    """An arbiter, a robot that follows perfectly, and the clock."""

    def __init__(self, contract: Contract, *, lockstep: bool = False) -> None:
        self.contract = contract
        self.core = Arbiter(contract, lockstep=lockstep)
        self.tick_ns = 10 * contract.dt_ns
        self.names = list(contract.action.names)
        self.position = np.zeros(contract.action.size)
        self.sent: list[Decision] = []
        self.chunk_id = 0
        self.robot_speaks = True
        self.attached = True

    @property
    def mono_s(self) -> float:
        return self.tick_ns / 1e9

    @property
    def last(self) -> Decision:
        return self.sent[-1]

    def step(self, n: int = 1, **options) -> Decision:
        for _ in range(n):
            self.tick_ns += self.contract.dt_ns
            if self.robot_speaks:
                tool = self.position[:3] if self.contract.safety.workspace else None
                self.core.joint_state(self.tick_ns, self.position.copy(), tool, self.mono_s)
            decision = self.core.tick(
                self.tick_ns, self.mono_s, operator_attached=self.attached, **options
            )
            assert decision is not None
            self.sent.append(decision)
            if self.contract.action.mode == "absolute":
                self.position = decision.command.copy()
        return self.last

    def chunk(self, points=0.0, *, stamp_ns: int | None = None, names=None, frame=None) -> str:
        shape = (self.contract.chunk_horizon, len(self.names))
        rows = np.broadcast_to(np.asarray(points, float), shape)
        self.chunk_id += 1
        return self.core.offer_chunk(
            self.tick_ns if stamp_ns is None else stamp_ns,
            names or self.names,
            list(rows),
            frame or f"3#{self.chunk_id}",
            self.tick_ns,
        )

    def operator(self, *, deadman: bool, target=None) -> None:
        self.core.joy(self.tick_ns, deadman, self.mono_s)
        if target is not None:
            self.core.human_target(
                self.tick_ns, self.names, list(np.asarray(target, float)), self.mono_s
            )

    def drive_policy(self, points=0.0) -> None:
        """Into POLICY, steady."""
        self.step()
        assert self.core.resume(self.tick_ns, self.mono_s).success
        for _ in range(20):
            self.chunk(points)
            self.step()
        assert self.core.mode is Mode.POLICY
        assert self.core.phase is Phase.STEADY

    def drive_human(self, target=None) -> None:
        self.core.set_intervention(True, self.mono_s)
        self.operator(deadman=True, target=self.position if target is None else target)
        self.step()
        assert self.core.mode is Mode.HUMAN


@pytest.fixture
def rig() -> Rig:
    return Rig(arm())


def test_a_restarted_robot_is_held_where_it_stands_now(rig):
    rig.drive_policy(0.5)
    rig.core.robot_restarted()
    assert rig.core.mode is Mode.HOLD
    assert rig.core.reason.startswith("the robot was restarted")
    # It has not said where it is: no command, and above all not the old one.
    assert rig.core.tick(rig.tick_ns + rig.contract.dt_ns, rig.mono_s) is None
    rig.position = np.array([-0.4, 0.7])
    np.testing.assert_allclose(rig.step().command, [-0.4, 0.7])
    assert rig.core.resume(rig.tick_ns, rig.mono_s).success


def test_a_robot_that_is_gone_cannot_be_driven_until_it_speaks(rig):
    rig.drive_policy(0.5)
    rig.core.robot_gone()
    assert (rig.core.mode, rig.core.reason) == (
        Mode.HOLD, "the robot is gone: nobody publishes joint states"
    )  # fmt: skip
    assert not rig.core.resume(rig.tick_ns, rig.mono_s).success
    rig.step()
    assert rig.core.resume(rig.tick_ns, rig.mono_s).success


def test_before_the_first_joint_state_nothing_is_sent():
    core = Arbiter(arm())
    assert core.tick(20_000_000, 0.02) is None


def test_hold_keeps_the_measured_position_and_ignores_chunks(rig):
    rig.position = np.array([0.3, -0.4])
    rig.step()
    rig.chunk(0.9)
    rig.step(5)
    assert rig.last.label == "hold"
    np.testing.assert_allclose(rig.last.command, [0.3, -0.4])


def test_the_policy_starts_on_resume_only_and_blends_in(rig):
    rig.step()
    rig.chunk(0.4)
    assert rig.step(3).mode is Mode.HOLD
    assert rig.core.resume(rig.tick_ns, rig.mono_s).success
    assert rig.step().label == "hold"
    assert rig.core.phase is Phase.HANDBACK
    commands = []
    for _ in range(30):
        assert rig.chunk(0.4) == ""
        commands.append(rig.step().command[0])
    assert rig.last.label == f"policy:3#{rig.chunk_id}"
    assert commands[-1] == pytest.approx(0.4, abs=1e-3)
    assert commands[0] < 0.01
    assert np.all(np.diff(commands) >= -1e-3)


def test_each_point_is_sent_at_its_own_tick_and_past_points_are_dropped():
    rig = Rig(cartesian())
    rig.drive_policy(0.0)
    ramp = np.linspace(0.1, 0.8, 8)[:, None] * np.ones(4)
    stamp = rig.tick_ns
    rig.step(2)
    assert rig.chunk(ramp, stamp_ns=stamp) == ""
    steps, values = [], []
    for _ in range(5):
        decision = rig.step()
        steps.append(decision.chunk_step)
        values.append(decision.command[0])
    assert steps == [3, 4, 5, 6, 7]
    np.testing.assert_allclose(values, ramp[3:, 0])
    assert rig.step().mode is Mode.HOLD
    assert rig.core.reason == "the chunk has run out"


def test_a_takeover_in_mid_chunk_acts_at_the_next_tick(rig):
    rig.drive_policy(0.5)
    rig.chunk(0.5)
    rig.step(2)
    rig.core.set_intervention(True, rig.mono_s)
    rig.operator(deadman=True, target=[0.0, 0.0])
    decision = rig.step()
    assert decision.label == "human:operator"
    assert rig.core.mode is Mode.HUMAN


def test_a_takeover_waits_for_the_deadman_and_lapses(rig):
    rig.drive_policy(0.2)
    rig.core.set_intervention(True, rig.mono_s)
    assert rig.core.phase is Phase.TAKEOVER
    for _ in range(10):
        rig.operator(deadman=False)
        rig.chunk(0.2)
        assert rig.step().label.startswith("policy")
    for _ in range(300):
        rig.chunk(0.2)
        rig.step()
    rig.operator(deadman=True, target=[0, 0])
    rig.chunk(0.2)
    assert rig.step().label.startswith("policy")


def test_the_first_human_command_continues_where_the_robot_is(rig):
    """The leader arm stands elsewhere; it moves the robot by what it moves itself."""
    rig.drive_policy(0.4)
    before = rig.last.command
    rig.drive_human(target=[-0.7, 1.6])
    assert np.abs(rig.last.command - before).max() < 0.02
    for _ in range(60):
        rig.operator(deadman=True, target=[-0.6, 1.4])
        rig.step()
    np.testing.assert_allclose(rig.last.command, before + np.array([0.1, -0.2]), atol=1e-3)


def test_a_clutched_joint_at_its_limit_turns_round_at_once(rig):
    rig.drive_policy(0.9)
    rig.drive_human(target=[0.0, 0.0])
    for _ in range(80):
        rig.operator(deadman=True, target=[5.0, 0.0])
        rig.step()
    assert rig.last.command[0] == pytest.approx(1.0)
    for _ in range(60):
        rig.operator(deadman=True, target=[4.8, 0.0])
        rig.step()
    assert rig.last.command[0] == pytest.approx(0.8, abs=1e-3)


def test_a_twist_jogs_the_tool_and_keeps_the_gripper():
    rig = Rig(cartesian())
    rig.drive_policy([0.0, 0.0, 0.0, 0.7])
    rig.core.set_intervention(True, rig.mono_s)
    rig.operator(deadman=True)
    assert rig.core.human_twist(rig.tick_ns, (0.2, 0.1, 0.0), rig.mono_s) == ""
    np.testing.assert_allclose(rig.step().command, [0.2, 0.1, 0.0, 0.7])
    assert rig.last.label == "human:operator"


def test_a_twist_on_a_cell_of_set_points_is_refused(rig):
    assert "needs an action with displacements" in rig.core.human_twist(0, (0, 0, 0), 0.0)


@pytest.mark.parametrize(
    "end", ["deadman", "service", "silence", "link", "nan", "names", "silent target"]
)
def test_every_end_of_teleoperation_leads_to_hold_never_to_the_policy(rig, end):
    rig.drive_policy(0.3)
    rig.drive_human()
    for _ in range(5):
        rig.operator(deadman=True, target=[0.1, 0.1])
        rig.step()
    if end == "deadman":
        rig.operator(deadman=False)
    elif end == "service":
        rig.core.set_intervention(False, rig.mono_s)
    elif end == "link":
        rig.attached = False
    elif end == "nan":
        rig.operator(deadman=True, target=[np.nan, 0.0])
    elif end == "names":
        rig.core.human_target(rig.tick_ns, ["a", "x"], [0.0, 0.0], rig.mono_s)
    for _ in range(15):
        if end == "silent target":
            rig.operator(deadman=True)
        rig.chunk(0.3)
        rig.step()
    assert rig.core.mode is Mode.HOLD
    assert rig.last.label == "hold"
    assert rig.core.reason


def test_no_chunk_from_before_the_hand_back_is_ever_run(rig):
    rig.drive_policy(0.5)
    old = rig.tick_ns
    rig.drive_human()
    rig.core.set_intervention(False, rig.mono_s)
    rig.step(2)
    rig.core.resume(rig.tick_ns, rig.mono_s)
    assert "older than the hand-back" in rig.chunk(0.9, stamp_ns=old)
    assert rig.step(3).label == "hold"
    assert rig.chunk(-0.2) == ""
    assert rig.step().label == f"policy:3#{rig.chunk_id}"


def test_reordered_chunks_never_go_back(rig):
    rig.drive_policy(0.1)
    newest = rig.tick_ns
    assert rig.chunk(0.1, stamp_ns=newest) == ""
    assert "older" in rig.chunk(0.9, stamp_ns=newest - rig.contract.dt_ns)
    assert rig.core.late_chunks == 1
    rig.step()
    assert rig.last.command[0] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        ({"points": np.nan}, "NaN or infinity"),
        ({"names": ["a", "c"]}, "missing b"),
        ({"names": ["a", "b", "c"]}, "unknown c"),
        ({"frame": "latest"}, "expected VERSION#CHUNK"),
        ({"stamp_ns": 10**12}, "in the future"),
        ({"frame": POLICY_ERROR + "the policy failed: boom"}, "the policy failed: boom"),
    ],
)
def test_a_malformed_chunk_means_hold_with_the_reason(rig, mistake, reason):
    rig.drive_policy(0.2)
    arguments = {"points": 0.2} | mistake
    points = arguments.pop("points")
    if len(arguments.get("names") or ()) == 3:
        rig.names = [*rig.names, "c"]
    assert reason in rig.chunk(points, **arguments)
    assert rig.step().mode is Mode.HOLD
    assert reason in rig.core.reason


def test_a_chunk_of_the_wrong_length_means_hold(rig):
    rig.drive_policy(0.2)
    problem = rig.core.offer_chunk(rig.tick_ns, rig.names, [[0, 0]] * 3, "3#99", rig.tick_ns)
    assert "3 points; the contract's chunk_horizon is 8" in problem
    assert rig.step().mode is Mode.HOLD


def test_joint_names_may_come_in_any_order(rig):
    rig.drive_policy(0.0)
    points = np.tile([0.2, -0.1], (8, 1))
    for _ in range(40):
        assert rig.chunk(points, names=["b", "a"]) == ""
        rig.step()
    np.testing.assert_allclose(rig.last.command, [-0.1, 0.2], atol=1e-6)


@pytest.mark.parametrize(("stale", "mode"), [("hold", Mode.HOLD), ("stop", Mode.FAULT)])
def test_silent_joint_states_do_what_the_contract_says(stale, mode):
    rig = Rig(arm(safety={"stale": stale}))
    rig.drive_policy(0.3)
    rig.robot_speaks = False
    for _ in range(8):
        rig.chunk(0.3)
        rig.step()
    assert rig.core.mode is mode
    assert "joint states are 120 ms old, the limit is 100 ms" in rig.core.reason


def test_joint_states_with_nan_mean_hold(rig):
    rig.drive_policy(0.3)
    rig.position = np.array([np.nan, 0.0])
    rig.chunk(0.3)
    assert rig.step().mode is Mode.HOLD
    assert rig.core.reason == "joint states are not finite"
    assert np.isfinite(rig.last.command).all()


@pytest.mark.parametrize("mode", ["hold", "policy", "handback", "takeover", "human", "fault"])
def test_an_emergency_stop_acts_at_the_next_tick_from_every_state(rig, mode):
    rig.step()
    if mode == "policy":
        rig.drive_policy(0.8)
    elif mode == "human":
        rig.drive_human()
    elif mode == "handback":
        rig.core.resume(rig.tick_ns, rig.mono_s)
    elif mode == "takeover":
        rig.drive_policy(0.8)
        rig.core.set_intervention(True, rig.mono_s)
    elif mode == "fault":
        rig.core.fault("something else")
    rig.core.estop("the console")
    rig.chunk(0.9)
    rig.operator(deadman=True, target=[0.9, 0.9])
    decision = rig.step()
    assert decision.mode is Mode.FAULT
    assert decision.label == "hold"
    assert not rig.core.resume(rig.tick_ns, rig.mono_s).success
    assert not rig.core.set_intervention(True, rig.mono_s).success
    rig.step(60)
    assert rig.core.mode is Mode.FAULT
    np.testing.assert_array_equal(rig.sent[-1].command, rig.sent[-2].command)
    assert rig.core.reset_estop().success
    assert rig.step().mode is Mode.HOLD


def test_missed_ticks_latch_a_fault_and_one_late_tick_does_not(rig):
    rig.drive_policy(0.1)
    rig.tick_ns += 2 * rig.contract.dt_ns
    rig.chunk(0.1)
    assert rig.step().mode is Mode.POLICY
    rig.chunk(0.1)
    assert rig.step().mode is Mode.POLICY
    rig.tick_ns += 4 * rig.contract.dt_ns
    rig.chunk(0.1)
    assert rig.step().mode is Mode.FAULT
    assert "missed 4 ticks" in rig.core.reason


def test_a_clock_that_jumps_back_means_hold(rig):
    rig.drive_policy(0.1)
    mono = rig.mono_s
    decision = rig.core.tick(rig.tick_ns - 5_000_000_000, mono + 0.02)
    assert decision is not None
    assert decision.mode is Mode.HOLD
    assert rig.core.reason == "the clock jumped back"


def test_a_runner_that_never_answers_is_noticed_after_resume(rig):
    rig.step()
    rig.core.resume(rig.tick_ns, rig.mono_s)
    rig.step(200)
    assert rig.core.mode is Mode.POLICY
    rig.step(60)
    assert rig.core.mode is Mode.HOLD
    assert "does the policy runner live?" in rig.core.reason


def test_a_policy_that_fell_silent_may_still_say_why(rig):
    rig.drive_policy(0.1)
    rig.step(12)
    assert rig.core.reason == "the chunk has run out"
    rig.chunk(0.1, frame=POLICY_ERROR + "the policy hangs")
    assert (rig.core.mode, rig.core.reason) == (Mode.HOLD, "chunk refused: the policy hangs")
    rig.drive_policy(0.1)
    rig.drive_human()
    rig.core.set_intervention(False, rig.mono_s)
    rig.chunk(0.1, frame=POLICY_ERROR + "the policy hangs")
    assert rig.core.reason == "operator handed back"


class TestLockstep:
    @pytest.fixture
    def rig(self) -> Rig:
        return Rig(cartesian(), lockstep=True)

    def waits_for(self, rig: Rig) -> str:
        return rig.core.waits_for(rig.tick_ns + rig.contract.dt_ns, rig.mono_s, rig.attached)

    def test_the_policy_waits_for_a_chunk_within_execute_steps(self, rig):
        rig.attached = False
        rig.step()
        rig.core.resume(rig.tick_ns + 1, rig.mono_s)
        assert self.waits_for(rig) == "a chunk"
        rig.chunk(0.1, stamp_ns=rig.tick_ns + rig.contract.dt_ns)
        for _ in range(4):
            assert self.waits_for(rig) == ""
            rig.step()
        assert self.waits_for(rig) == "a chunk"

    def test_what_does_not_come_means_hold_with_the_reason(self, rig):
        rig.attached = False
        rig.step()
        rig.core.resume(rig.tick_ns + 1, rig.mono_s)
        decision = rig.step(gave_up_on="a chunk")
        assert decision.mode is Mode.HOLD
        assert rig.core.reason == "a chunk did not come in time"

    def test_an_operator_is_never_more_than_four_ticks_behind(self, rig):
        rig.step()
        rig.operator(deadman=False)
        for _ in range(4):
            assert self.waits_for(rig) == ""
            rig.step()
        assert self.waits_for(rig) == "the operator's joy message"

    def test_an_operator_who_stays_silent_is_not_waited_for_at_every_tick(self, rig):
        rig.step(gave_up_on=self.waits_for(rig))
        assert self.waits_for(rig) == ""
        rig.step(6)
        rig.core.joy(rig.tick_ns - 5 * rig.contract.dt_ns, False, rig.mono_s)
        assert self.waits_for(rig) == "the operator's joy message"

    def test_a_human_command_counts_for_its_own_tick_only(self, rig):
        rig.step()
        rig.core.set_intervention(True, rig.mono_s)
        rig.operator(deadman=True)
        assert self.waits_for(rig) == "the operator's command"
        next_tick = rig.tick_ns + rig.contract.dt_ns
        rig.core.human_target(next_tick, rig.names, [0.5, 0, 0, 1], rig.mono_s)
        assert self.waits_for(rig) == ""
        np.testing.assert_array_equal(rig.step().command, [0.5, 0, 0, 1])
        assert self.waits_for(rig) == "the operator's command"
        rig.operator(deadman=False)
        assert self.waits_for(rig) == ""
        np.testing.assert_array_equal(rig.step().command, [0, 0, 0, 1])

    def test_a_tick_said_again_is_answered_with_the_same_command(self, rig):
        first = rig.step()
        again = rig.core.tick(rig.tick_ns, rig.mono_s + 2.0)
        assert again is first

    def test_a_new_episode_forgets_the_gripper_of_the_last_one(self, rig):
        rig.attached = False
        rig.step()
        rig.core.resume(rig.tick_ns, rig.mono_s)
        rig.chunk([0.0, 0.0, 0.0, 1.0])
        rig.step()
        rig.core.episode_ended()
        assert rig.step().command[3] == 1.0
        rig.core.episode_started("ann", rig.tick_ns)
        assert rig.step().command[3] == 0.0
        assert rig.core.operator == "ann"


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_thousand_takeovers_with_faults_never_leave_the_limits(seed):
    """Ten examples of at least a hundred takeovers each, with loss, delay, reordering and NaN."""
    rng = np.random.default_rng(seed)
    rig = Rig(arm())
    rig.step()
    takeovers = 0
    last_resume_ns, run_of = 0, {}
    delayed: list[tuple[int, int, np.ndarray]] = []
    before = Mode.HOLD
    while takeovers < 100:
        if rig.core.mode is Mode.HOLD and rng.random() < 0.3:
            if rng.random() < 0.5:
                if rig.core.resume(rig.tick_ns, rig.mono_s).success:
                    last_resume_ns = rig.tick_ns
            else:
                rig.core.set_intervention(True, rig.mono_s)
        if rig.core.mode is Mode.POLICY and rng.random() < 0.1:
            rig.core.set_intervention(True, rig.mono_s)
        if rig.core.mode is Mode.HUMAN and rng.random() < 0.1:
            rig.core.set_intervention(False, rig.mono_s)
        if rig.core.mode is Mode.FAULT and rng.random() < 0.2:
            rig.core.reset_estop()
        if rng.random() < 0.003:
            rig.core.estop()
            assert rig.step().label == "hold"
        if rng.random() < 0.8:
            target = rng.uniform(-3, 3, 2)
            if rng.random() < 0.01:
                target[rng.integers(2)] = rng.choice([np.nan, np.inf])
            rig.operator(deadman=rng.random() < 0.97, target=target)
        if rng.random() < 0.5:
            points = rng.uniform(-3, 3, (8, 2))
            if rng.random() < 0.01:
                points[rng.integers(8), rng.integers(2)] = np.nan
            delay = int(rng.choice([0, 0, 0, 1, 3, 12])) * rig.contract.dt_ns
            delayed.append((rig.tick_ns + delay, rig.tick_ns, points))
        for item in [d for d in delayed if d[0] <= rig.tick_ns]:
            delayed.remove(item)
            rig.chunk(item[2], stamp_ns=item[1])
            run_of[f"policy:3#{rig.chunk_id}"] = item[1]
        rig.robot_speaks = rng.random() < 0.9
        if rng.random() < 0.02:
            rig.core.joint_state_unreadable("missing b; found a", rig.mono_s)
        if rng.random() < 0.05:  # late, out of order, or broken
            value = rng.choice([0.0, np.nan], 2)
            rig.core.joint_state(rig.tick_ns - 10**8, value, None, rig.mono_s)
        rig.step()
        if rig.last.label.startswith("policy"):
            assert run_of[rig.last.label] >= last_resume_ns
        takeovers += rig.last.mode is Mode.HUMAN and before is not Mode.HUMAN
        before = rig.last.mode
    assert_inside(rig.contract, np.array([d.command for d in rig.sent]))
    labels = {d.label.partition(":")[0] for d in rig.sent}
    assert labels == {"policy", "human", "hold"}
