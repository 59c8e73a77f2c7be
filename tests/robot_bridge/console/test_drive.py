"""A hold on a clock of our own: what becomes of presses, silence, late and malformed commands."""

import numpy as np
import pytest

from robot_bridge.console.drive import CommandRefused, Drive, Hold, Order, max_age_ms, silence_ms

from ..cells import arm, cartesian

MAX_AGE_MS, SILENCE_MS = max_age_ms(arm()), silence_ms(arm())


def drive(hold=1, axes=None, speed=1.0, seq=0):
    return Drive(seq=seq, sent_ms=0.0, hold=hold, axes=axes or {}, speed=speed)


def test_both_patiences_follow_the_contract_and_come_before_the_arbiters():
    assert (MAX_AGE_MS, SILENCE_MS) == (300.0, 200.0)
    assert silence_ms(arm(safety={"teleop_timeout_ms": 1000})) == 800.0


def test_late_early_and_reordered_commands_are_dropped():
    order = Order()
    order.check(1, 1000.0, 1000.0 + MAX_AGE_MS, MAX_AGE_MS)
    for seq, sent, code in ((1, 1000.0, "order"), (0, 1000.0, "order"), (2, 0.0, "late"),
                            (3, 2000.0, "clock"), (4, float("nan"), "late")):  # fmt: skip
        with pytest.raises(CommandRefused) as refused:
            order.check(seq, sent, 1000.0 + MAX_AGE_MS, MAX_AGE_MS)
        assert refused.value.code == code
    assert order.dropped == 5
    order.check(5, 1300.0, 1300.0, MAX_AGE_MS)


def test_a_set_point_moves_from_where_the_robot_is_at_a_share_of_its_limit():
    hold, where = Hold(arm()), np.array([0.2, -0.3])
    assert hold.hear(drive(axes={"a": 1.0, "b": -0.5}, speed=0.5), 0.0) == "begin"
    np.testing.assert_allclose(hold.target(20.0, where), [0.2 + 0.02 * 0.5, -0.3 - 0.02 * 0.375])
    # Where the robot is matters at the press only; the arbiter keeps the rest within limits.
    np.testing.assert_allclose(hold.target(40.0, where * 0), [0.2 + 0.02, -0.3 - 0.015])


def test_a_set_point_never_leaves_the_contracts_limits_and_never_leaps():
    hold = Hold(arm())
    hold.hear(drive(axes={"a": 1.0}), 0.0)
    hold.target(0.0, np.array([0.99, 0.0]))
    for now in range(100, 2000, 100):
        hold.hear(drive(axes={"a": 1.0}), float(now))
        assert hold.target(float(now), None)[0] <= 1.0
    assert hold.target(2000.0, None)[0] == 1.0
    paused = Hold(arm())
    paused.hear(drive(axes={"a": 1.0}), 0.0)
    paused.target(0.0, np.zeros(2))
    paused.hear(drive(axes={"a": 1.0}), 5000.0)
    assert paused.target(5000.0, None)[0] <= 0.1 + 1e-9


def test_displacements_follow_the_axes_and_the_gripper_keeps_its_value():
    hold = Hold(cartesian())
    hold.hear(drive(axes={"ee_dx": 0.5, "gripper": 1.0}, speed=1.0), 0.0)
    last = np.array([0.7, 0.7, 0.7, -1.0])
    first = hold.target(0.0, last, 1 / 80)
    np.testing.assert_allclose(first, [0.5, 0.0, 0.0, -1.0 + 4.0 / 80])
    hold.hear(drive(axes={}), 10.0)
    np.testing.assert_allclose(hold.target(10.0, None, 1 / 80), [0, 0, 0, first[3]])


def test_silence_ends_a_hold_and_only_a_fresh_press_begins_another():
    hold = Hold(arm())
    hold.hear(drive(hold=7, axes={"a": 1.0}), 0.0)
    assert not hold.silent(SILENCE_MS)
    assert hold.silent(SILENCE_MS + 1)
    assert hold.target(SILENCE_MS + 1, np.zeros(2)) is None
    assert hold.end()
    assert hold.hear(drive(hold=7), 300.0) == "over"
    assert hold.number == 0
    assert hold.hear(drive(hold=8), 400.0) == "begin"
    assert hold.hear(drive(hold=0), 410.0) == "end"
    assert hold.hear(drive(hold=0), 420.0) == ""


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (drive(axes={"c": 0.1}), "axis"),
        (drive(axes={"a": 1.01}), "axis"),
        (drive(axes={"a": float("nan")}), "axis"),
        (drive(speed=0.0), "speed"),
        (drive(speed=float("nan")), "speed"),
        (drive(speed=2.0), "speed"),
    ],
)
def test_what_is_no_command_is_refused_and_holds_nothing(message, code):
    hold = Hold(arm())
    with pytest.raises(CommandRefused) as refused:
        hold.hear(message, 0.0)
    assert refused.value.code == code
    assert hold.number == 0


def test_a_set_point_cell_without_joint_states_is_not_driven():
    hold = Hold(arm())
    hold.hear(drive(axes={"a": 1.0}), 0.0)
    assert hold.target(10.0, None) is None
