import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_bridge.core.safety import Gate, UnsafeCommand
from trajectory_store.contract import Contract, ContractError

from .cells import arm, cartesian


def assert_inside(contract: Contract, sent: np.ndarray) -> None:
    """The declared limits, on what was sent: (T, A), from rest at its first row."""
    limits, dt = contract.action.limits, 1.0 / contract.control_hz
    low, high = np.array(limits.position).T
    assert (sent >= low - 1e-9).all()
    assert (sent <= high + 1e-9).all()
    rest = np.concatenate([sent[:1]] * 3)
    motion = np.concatenate([rest, sent])
    for order, bound in ((1, limits.velocity), (2, limits.acceleration), (3, limits.jerk)):
        if bound:
            rate = np.abs(np.diff(motion, n=order, axis=0)).max(axis=0) / dt**order
            assert (rate <= np.array(bound) * (1 + 1e-6)).all(), (order, rate, bound)
    if limits.step:
        assert (np.abs(np.diff(motion, axis=0)).max(axis=0) <= np.array(limits.step) + 1e-9).all()


LIMITS = {
    "jerk": {},
    "acceleration": {"jerk": []},
    "velocity": {"jerk": [], "acceleration": []},
    "step": {"jerk": [], "acceleration": [], "velocity": [], "step": [0.02, 0.03]},
    "step and jerk": {"step": [0.01, 0.01]},
}


@pytest.mark.parametrize("name", LIMITS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_stream_of_commands_leaves_the_limits(name, seed):
    base = arm().action.limits.model_dump()
    contract = arm(action={"limits": base | LIMITS[name]})
    gate = Gate(contract)
    rng = np.random.default_rng(seed)
    start = rng.uniform([-1, -2], [1, 2])
    gate.reset(start)
    sent = [start]
    target = start
    for _ in range(120):
        kind = rng.integers(0, 10)
        if kind == 0:
            target = rng.uniform(-4, 4, 2)
        elif kind < 6:
            target = target + rng.normal(0, 0.05, 2)
        sent.append((gate.hold() if kind == 9 else gate.pass_through(target)).command)
    assert_inside(contract, np.array(sent))


def test_a_reachable_motion_passes_unchanged():
    gate = Gate(arm(action={"limits": arm().action.limits.model_dump() | {"jerk": []}}))
    gate.reset(np.zeros(2))
    time_s = np.arange(400) / 50
    wanted = np.stack([0.5 * np.sin(1.2 * time_s), np.sin(time_s)], axis=1)
    sent = np.array([gate.pass_through(w).command for w in wanted])
    np.testing.assert_allclose(sent[50:], wanted[50:], atol=1e-9)


def test_with_a_jerk_limit_a_reachable_motion_is_followed_closely():
    gate = Gate(arm())
    gate.reset(np.zeros(2))
    time_s = np.arange(400) / 50
    wanted = np.stack([0.3 * np.sin(time_s), 0.5 * np.sin(0.8 * time_s)], axis=1)
    sent = np.array([gate.pass_through(w).command for w in wanted])
    assert np.abs(sent[100:] - wanted[100:]).max() < 1e-3


def test_holding_comes_to_rest_and_stays():
    gate = Gate(arm())
    gate.reset(np.zeros(2))
    for _ in range(20):
        gate.pass_through(np.array([1.0, 2.0]))
    sent = np.array([gate.hold().command for _ in range(60)])
    np.testing.assert_array_equal(sent[-1], sent[-10])
    assert_inside(arm(), sent[30:])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_command_that_is_not_finite_is_refused_with_its_joint(value):
    gate = Gate(arm())
    with pytest.raises(UnsafeCommand, match="not finite: b"):
        gate.pass_through(np.array([0.0, value]))


def test_a_command_of_the_wrong_length_is_refused():
    with pytest.raises(UnsafeCommand, match="shape"):
        Gate(arm()).pass_through(np.zeros(3))


def test_clips_are_counted_by_joint():
    gate = Gate(cartesian())
    gated = gate.pass_through(np.array([2.0, 0.0, 0.0, 0.5]))
    assert gated.clipped == ("ee_dx",)
    np.testing.assert_array_equal(gated.command, [1.0, 0.0, 0.0, 0.5])
    gate.pass_through(np.array([2.0, -3.0, 0.0, 0.5]))
    assert gate.counts == {"ee_dx": 2, "ee_dy": 1, "ee_dz": 0, "gripper": 0}


def test_a_displacement_out_of_the_box_stops_and_one_back_inside_passes():
    gate = Gate(cartesian())
    tool = np.array([0.5, 0.5, 0.0])
    out = gate.pass_through(np.array([0.3, 0.2, -0.4, 0.0]), tool)
    np.testing.assert_array_equal(out.command, [0.0, 0.2, 0.0, 0.0])
    back = gate.pass_through(np.array([-0.3, 0.2, 0.4, 0.0]), tool)
    np.testing.assert_array_equal(back.command, [-0.3, 0.2, 0.4, 0.0])


def test_holding_a_delta_cell_stops_the_tool_and_keeps_the_gripper():
    gate = Gate(cartesian())
    gate.pass_through(np.array([1.0, 1.0, 1.0, -0.8]))
    np.testing.assert_array_equal(gate.hold().command, [0.0, 0.0, 0.0, -0.8])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_delta_cells_keep_velocity_acceleration_and_step(seed):
    limits = {"velocity": [40.0] * 4, "acceleration": [2000.0] * 4, "step": [0.2] * 4}
    contract = cartesian(limits=limits)
    gate = Gate(contract)
    rng = np.random.default_rng(seed)
    sent = [np.zeros(4)]
    for _ in range(80):
        command = rng.uniform(-2, 2, 4)
        sent.append((gate.hold() if rng.random() < 0.2 else gate.pass_through(command)).command)
    tool = np.array(sent)[:, :3]
    assert np.abs(tool).max() <= 40.0 / 80 + 1e-9
    assert np.abs(np.diff(tool, axis=0)).max() <= min(0.2, 2000.0 / 80**2) + 1e-9


def test_a_box_of_states_that_no_action_moves_is_refused():
    with pytest.raises(ContractError, match="no action is called 'elbow_dx'"):
        Gate(
            cartesian(
                safety={
                    "workspace": {
                        "low": [0, 0, 0],
                        "high": [1, 1, 1],
                        "names": ["elbow_x", "ee_y", "ee_z"],
                    }
                }
            )
        )


def test_jerk_without_acceleration_is_refused():
    limits = {"position": [[-1, 1], [-2, 2]], "velocity": [1, 1], "jerk": [10, 10]}
    with pytest.raises(ContractError, match=r"limits\.jerk"):
        Gate(arm(action={"limits": limits}))
