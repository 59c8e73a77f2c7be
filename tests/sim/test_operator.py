"""When the scripted operator steps in, how it drives, when it lets go."""

import dataclasses

import numpy as np
import pytest

import sim
from sim.cell import make_cell
from sim.expert import make_expert
from sim.operator import Mode, OperatorAction, OperatorConfig, Request, ScriptedOperator
from trajectory_store import load_contract

STATE = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
TASK = "reach"
EAGER = OperatorConfig(motor_noise=0.0, patience=5, window=5, reaction_delay=3, stall=1000)


class Session:
    """A cell and an operator; `drive` says what the robot does while the policy drives."""

    def __init__(self, config: OperatorConfig, task: str = TASK, seed: int = 3) -> None:
        self.cell = make_cell(STATE, task)
        self.expert = make_expert(STATE, task)
        self.operator = ScriptedOperator(STATE, self.cell.scene_names, config)
        self.operator.begin(task, seed)
        _, self.info = self.cell.reset(seed=seed)
        self.sent: np.ndarray | None = None
        self.mode = Mode.POLICY
        self.said: list[OperatorAction] = []
        self.attended = True

    def tick(self, policy: str) -> OperatorAction:
        said = self.operator.step(self.info["scene"], self.sent, self.mode, attended=self.attended)
        self.said.append(said)
        if said.command is not None:
            self.mode, self.sent = Mode.HUMAN, said.command
        elif self.mode is Mode.HUMAN:
            self.mode, self.sent = Mode.HOLD, np.zeros(4)
        elif Request.RESUME in said.requests:
            self.mode = Mode.POLICY
        if self.mode is Mode.POLICY:
            wanted = self.expert.act(self.info["scene"])
            self.sent = {
                "good": wanted,
                "away": -np.ones(4) * np.sign(wanted),
                "idle": 0 * wanted,
                "closed": np.array([*wanted[:3], 1.0]),
            }[policy]
        if not self.cell.success:
            self.info = self.cell.step(self.sent)[4]
        return said

    def requests(self) -> list[tuple[int, Request]]:
        return [(k, r) for k, said in enumerate(self.said) for r in said.requests]


def test_a_good_policy_is_left_alone_and_its_success_is_labelled_once():
    session = Session(OperatorConfig())
    for _ in range(120):
        session.tick("good")
    assert [r for _, r in session.requests()] == [Request.SUCCESS]
    assert not any(said.deadman for said in session.said)
    assert session.operator.takeovers == 0


def test_in_a_fleet_the_takeover_waits_until_somebody_is_there():
    session = Session(EAGER)
    session.attended = False
    for _ in range(25):
        assert not session.tick("away").deadman
    assert session.operator.wants_attention
    assert session.requests() == []
    session.attended = True
    assert session.tick("away").requests == (Request.INTERVENE,)
    assert session.operator.wants_attention  # for as long as it drives
    while Request.RELEASE not in session.tick("good").requests:
        assert session.operator.wants_attention
        assert len(session.said) < 200
    assert not session.operator.wants_attention


def test_drift_is_answered_after_patience_window_and_reaction():
    session = Session(EAGER)
    for _ in range(20):
        if session.tick("away").deadman:
            break
    # The window (5 gaps) is full at tick 5, patience ends at 6 policy ticks, 3 ticks to react.
    assert session.requests() == [(8, Request.INTERVENE)]
    assert session.said[-1].command is not None
    assert session.operator.takeovers == 1


def test_a_stalled_policy_is_answered_though_it_does_not_drift():
    lenient = dataclasses.replace(EAGER, disagreement=10.0, stall=20)
    session = Session(lenient)
    best, last_progress = -np.inf, 0
    for k in range(60):
        reward = session.info["task_reward"] if k else 0.0
        if reward > best + lenient.progress_epsilon:
            best, last_progress = reward, k
        if session.tick("idle").deadman:
            break
    ((when, request),) = session.requests()
    assert request is Request.INTERVENE
    assert when == last_progress + 20 + 3


def test_slow_hands_take_over_later():
    slow = dataclasses.replace(EAGER, reaction_delay=9)
    session = Session(slow)
    for _ in range(30):
        if session.tick("away").deadman:
            break
    assert session.requests() == [(14, Request.INTERVENE)]


def test_hand_back_comes_after_the_minimum_drive_and_goes_through_hold():
    config = dataclasses.replace(EAGER, min_drive=10, recovered=4)
    session = Session(config)
    while not any(r is Request.RELEASE for _, r in session.requests()):
        session.tick("away")
        assert len(session.said) < 60
    start = session.requests()[0][0]
    release = session.requests()[1][0]
    assert release - start >= 10
    assert all(said.deadman for said in session.said[start:release])
    assert not session.said[release].deadman
    assert session.mode is Mode.HOLD
    session.tick("away")
    assert session.requests()[2] == (release + 1, Request.RESUME)
    assert session.mode is Mode.POLICY


def test_the_last_takeover_is_driven_to_the_end():
    config = dataclasses.replace(EAGER, max_takeovers=2, min_drive=5, recovered=2)
    session = Session(config, task="button-press")
    while Request.SUCCESS not in [r for _, r in session.requests()]:
        session.tick("away")
        assert len(session.said) < 250, "never reached the goal"
    assert session.operator.takeovers == 2
    asked = [r for _, r in session.requests()]
    assert asked.count(Request.RELEASE) == 1
    assert asked.count(Request.INTERVENE) == 2


def test_drive_to_end_never_hands_back():
    session = Session(dataclasses.replace(EAGER, drive_to_end=True, motor_noise=0.1))
    while Request.SUCCESS not in [r for _, r in session.requests()]:
        session.tick("away")
        assert len(session.said) < 200
    assert [r for _, r in session.requests()] == [Request.INTERVENE, Request.SUCCESS]


def test_policy_only_watches_and_still_labels():
    session = Session(dataclasses.replace(EAGER, policy_only=True))
    for k in range(120):
        session.tick("away" if k < 20 else "good")
    assert [r for _, r in session.requests()] == [Request.SUCCESS]
    assert not any(said.deadman for said in session.said)


def test_motor_noise_follows_the_seed_and_stays_within_limits():
    noisy = dataclasses.replace(EAGER, motor_noise=0.5, drive_to_end=True)
    runs = []
    for seed in (3, 3, 4):
        session = Session(noisy, seed=3)
        session.operator.begin(TASK, seed)
        for _ in range(30):
            session.tick("away")
        runs.append(np.array([s.command for s in session.said if s.command is not None]))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0][:10], runs[2][:10])
    assert np.abs(np.concatenate(runs)).max() <= 1.0
    assert len(np.unique(runs[0][:, 1])) >= 10


@pytest.mark.parametrize("wrong", [{"window": 0}, {"reaction_delay": -1}, {"motor_noise": -0.1}])
def test_wrong_configurations_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OperatorConfig(**wrong)


def test_a_gripper_that_was_closed_too_early_is_opened_and_the_task_done():
    """Meta-World's script alone pushes on the puck with a closed hand until the time is up."""
    hurry = dataclasses.replace(EAGER, drive_to_end=True, stall=20)
    for task in ("pick-place", "push"):
        session = Session(hurry, task=task, seed=5)
        while not session.cell.success and session.cell.tick < 200:
            session.tick("closed")
        assert session.cell.success, task
        assert session.operator.takeovers == 1


def test_an_operator_that_gets_stuck_backs_off_and_tries_again():
    config = dataclasses.replace(EAGER, drive_from_start=True, retry_after=10, retreat=6)
    session = Session(config)
    scene = session.info["scene"]
    session.mode = Mode.HUMAN
    # The same scene over and over: nothing that the operator does helps.
    commands = [session.operator.step(scene, None, Mode.HUMAN).command for _ in range(40)]
    up = [k for k, c in enumerate(commands) if np.array_equal(c, [0, 0, 1, -1])]
    assert up == [*range(12, 18), *range(29, 35)]
