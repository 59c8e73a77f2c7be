"""How chunks join, on arrays: no ROS, no network."""

import numpy as np
import pytest

from robot_bridge.core.chunking import Question, Seam, ask, blend
from robot_bridge.core.latency import Latency
from robot_bridge.core.shadow import Record, compare

from .cells import arm

DT = 20_000_000


def ramp(start: float, rows: int = 8) -> np.ndarray:
    return (start + np.arange(rows, dtype=np.float64))[:, None] * np.ones(2)


def test_the_rest_of_the_running_chunk_is_found_by_the_ticks_that_passed():
    seam = Seam(DT)
    assert seam.previous(0, 0) is None
    seam.sent(10 * DT, ramp(0.0), 11 * DT)
    rest = seam.previous(13 * DT, 0)
    assert rest is not None
    np.testing.assert_array_equal(rest[:, 0], [3, 4, 5, 6, 7])
    # Stamps are not exact multiples of the period on a real robot.
    near = seam.previous(13 * DT + DT // 3, 0)
    assert near is not None
    assert len(near) == 5
    assert seam.previous(18 * DT, 0) is None, "all of it has run"
    assert seam.previous(9 * DT, 0) is None, "the clock went back"


def test_a_chunk_of_before_the_hand_back_is_not_continued():
    seam = Seam(DT)
    seam.sent(10 * DT, ramp(0.0), 11 * DT)
    assert seam.previous(12 * DT, 11 * DT) is None
    seam.forget()
    assert seam.previous(12 * DT, 0) is None


def test_the_delay_is_the_slow_end_of_the_measured_ticks_without_the_warm_up():
    seam = Seam(DT)
    assert seam.delay == 1
    for _ in range(2):
        seam.sent(0, ramp(0.0), 400 * DT)  # compiling and allocating
    assert seam.delay == 1
    for late in (0, 1, 2, 2, 2, 2):
        seam.sent(0, ramp(0.0), late * DT + DT // 2)
    assert seam.delay == 3
    seam.restart_latency()
    assert seam.delay == 1
    assert Seam(DT, lockstep=True).delay == 0


def test_a_blend_keeps_what_runs_anyway_and_ends_in_the_new_chunk():
    old, new = ramp(10.0)[3:], ramp(100.0)
    out = blend(old, new, 2)
    np.testing.assert_array_equal(out[:2], old[:2])
    np.testing.assert_array_equal(out[5:], new[5:])
    weight = np.array([0.75, 0.5, 0.25])[:, None]
    np.testing.assert_allclose(out[2:5], weight * old[2:] + (1 - weight) * new[2:5])
    np.testing.assert_array_equal(new, ramp(100.0))
    np.testing.assert_array_equal(blend(old, new, 9)[:5], old)


class Answers:
    takes_previous = True

    def __init__(self, answer) -> None:
        self.answer, self.given = answer, {}

    def act(self, observation, instruction, seed=0, **given):
        self.given = given
        return self.answer


def test_a_policy_that_can_continues_the_chunk_itself_and_any_other_is_blended():
    contract = arm()
    old, new = ramp(10.0)[3:], ramp(100.0).astype(np.float32)
    question = Question(0, {}, "", 0, old, 2)
    policy = Answers(new)
    np.testing.assert_array_equal(ask(policy, question, contract, guide=True), new)
    assert policy.given["delay"] == 2
    assert policy.given["previous"] is old
    np.testing.assert_array_equal(ask(policy, question, contract, guide=False), blend(old, new, 2))
    policy.takes_previous = False
    np.testing.assert_array_equal(ask(policy, question, contract, guide=True), blend(old, new, 2))
    assert policy.given == {}
    fresh = Question(0, {}, "", 0)
    np.testing.assert_array_equal(ask(policy, fresh, contract, guide=True), new)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (np.zeros((3, 2)), r"shape \(3, 2\); expected \(8, 2\)"),
        (np.full((8, 2), np.nan), "NaN or infinity"),
        (None, r"shape \(\)"),
    ],
)
def test_an_answer_that_is_no_chunk_is_refused(answer, problem):
    with pytest.raises(ValueError, match=problem):
        ask(Answers(answer), Question(0, {}, "", 0), arm(), guide=True)


def test_latency_leaves_the_warm_up_out():
    latency = Latency()
    for value in (9.0, 9.0, 0.1, 0.3):
        latency.add(value)
    assert latency.quantile(0.5) == pytest.approx(0.2)
    assert latency.summary_ms()["latency_p50_ms"] == "200.0"


def test_a_shadow_is_compared_in_shares_of_each_joints_range():
    action = arm().action  # ranges of 2 and 4
    active, shadow = np.zeros((8, 2)), np.zeros((8, 2))
    shadow[0, 0], shadow[4, 1] = 0.5, 3.0
    got = compare(active, shadow, action)
    assert (got.first, got.worst, got.joint) == (0.25, 0.75, "b")
    assert got.mean == pytest.approx((0.25 + 0.75) / 16)
    assert got.outside == 0.25
    record = Record()
    record.add(got)
    record.add(compare(active, active, action))
    assert record.summary()["first"] == 0.125
    assert record.summary()["worst"] == 0.75
