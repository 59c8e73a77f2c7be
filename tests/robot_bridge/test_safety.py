from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_bridge.core.kinematics import Kinematics
from robot_bridge.core.safety import Gate, UnsafeCommand
from trajectory_store.contract import Contract, ContractError, load_contract

from .cells import arm, cartesian

CONTRACTS = Path(__file__).parents[2] / "sim" / "contracts"
MODEL = CONTRACTS.parent / "franka_arm.xml"
HOME = np.array([0.0, 0.0, 0.0, -np.pi / 2, 0.0, np.pi / 2, np.pi / 4, 0.08])


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


class TestWorkspaceBoxByForwardKinematics:
    """The Franka-like arm: the tool stays in the contract's box, whatever the joints are told."""

    @pytest.fixture(scope="class")
    def contract(self) -> Contract:
        pytest.importorskip("mujoco")
        return load_contract(CONTRACTS / "franka_joint.yaml")

    def tool(self, contract: Contract, commands: np.ndarray) -> np.ndarray:
        kinematics = Kinematics(MODEL, "tool", contract.action.names)
        return np.array([kinematics.position(command) for command in commands])

    def drive(self, contract: Contract, targets: np.ndarray) -> np.ndarray:
        gate = Gate(contract, CONTRACTS)
        gate.reset(HOME)
        return np.array([HOME, *(gate.pass_through(t).command for t in targets)])

    def test_the_tool_is_where_the_simulated_cell_measures_it(self, contract):
        from sim.franka_cell import Kinematics as CellKinematics

        rng = np.random.default_rng(0)
        for joints in rng.uniform(-1, 1, (5, 8)) + HOME:
            want, _ = CellKinematics().pose(joints[:7])
            np.testing.assert_allclose(self.tool(contract, joints[None])[0], want, atol=1e-12)

    def test_the_jacobian_is_the_derivative(self, contract):
        kinematics = Kinematics(MODEL, "tool", contract.action.names)
        _, jacobian = kinematics.jacobian(HOME)
        for i in range(8):
            step = 1e-6 * np.eye(8)[i]
            slope = (kinematics.position(HOME + step) - kinematics.position(HOME - step)) / 2e-6
            np.testing.assert_allclose(jacobian[:, i], slope, atol=1e-8)

    def test_a_command_through_the_table_stops_above_it_within_all_limits(self, contract):
        down = HOME.copy()
        down[1] += 1.2  # the shoulder leans forward, far through the table
        sent = self.drive(contract, np.tile(down, (200, 1)))
        height = self.tool(contract, sent)[:, 2]
        assert self.tool(contract, down[None])[0, 2] < -0.1
        assert height.min() >= 0.005 - 1e-5
        assert height[-1] < 0.05, "it went down to the wall"
        np.testing.assert_allclose(sent[-1], sent[-20], atol=1e-4)
        assert_inside(contract, sent)

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_no_stream_of_commands_takes_the_tool_out_of_the_box(self, contract, seed):
        rng = np.random.default_rng(seed)
        gate = Gate(contract, CONTRACTS)
        gate.reset(HOME)
        sent, target = [HOME], HOME
        low, high = np.array(contract.action.limits.position).T
        for _ in range(150):
            kind = rng.integers(0, 12)
            if kind == 0:
                target = rng.uniform(low, high)
            elif kind < 7:
                target = target + rng.normal(0, 0.03, 8)
            sent.append((gate.hold() if kind == 11 else gate.pass_through(target)).command)
        commands = np.array(sent)
        assert_inside(contract, commands)
        box = contract.safety.workspace
        assert box is not None
        tool = self.tool(contract, commands)
        assert (tool >= np.array(box.low) - 1e-4).all()
        assert (tool <= np.array(box.high) + 1e-4).all()

    def test_from_outside_the_box_the_tool_may_only_come_back(self, contract):
        outside = HOME.copy()
        outside[0] = 1.4  # turned to the side
        gate = Gate(contract, CONTRACTS)
        gate.reset(outside)
        np.testing.assert_allclose(gate.hold().command, outside)
        start = self.tool(contract, outside[None])[0, 1]
        assert start > 0.5
        further, back = outside.copy(), HOME
        further[0] = 2.0
        away = [gate.pass_through(further).command for _ in range(30)]
        home = [gate.pass_through(back).command for _ in range(150)]
        sent = np.array([outside, *away, *home])
        assert self.tool(contract, sent)[:, 1].max() <= start + 1e-4
        assert abs(self.tool(contract, sent)[-1, 1]) < 0.01
        assert_inside(contract, sent)

    def test_without_rate_limits_the_box_holds_too(self, contract):
        limits = {"position": contract.action.limits.model_dump()["position"]}
        data = contract.to_dict()
        data["actions"]["action"]["limits"] = limits
        free = Contract.model_validate(data)
        down = HOME.copy()
        down[1] += 1.2
        sent = self.drive(free, np.tile(down, (5, 1)))
        assert self.tool(free, sent)[:, 2].min() >= 0.005 - 1e-5

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"model": "nowhere.xml"}, r"nowhere\.xml: no such file"),
            ({"site": "elbow"}, "'elbow', which is neither a site nor a link.*tool"),
            ({"model": "franka_joint.yaml"}, "not a model that MuJoCo reads"),
            ({"model": "", "site": ""}, "neither `model` and `site` nor `names`"),
        ],
    )
    def test_a_box_without_a_usable_model_is_refused(self, contract, change, problem):
        data = contract.to_dict()
        data["safety"]["workspace"] |= change
        with pytest.raises(ContractError, match=problem):
            Gate(Contract.model_validate(data), CONTRACTS)

    def test_a_urdf_whose_meshes_are_elsewhere_is_read(self, contract, tmp_path):
        (tmp_path / "arm.urdf").write_text(URDF)
        kinematics = Kinematics(tmp_path / "arm.urdf", "tool0", ["elbow", "shoulder", "gripper"])
        # shoulder turns the upper arm (0.4 m along x) about z, the elbow the lower arm (0.3 m).
        np.testing.assert_allclose(kinematics.position(np.zeros(3)), [0.7, 0, 0.2], atol=1e-12)
        bent = kinematics.position(np.array([np.pi / 2, 0.0, 0.5]))
        np.testing.assert_allclose(bent, [0.4, 0.3, 0.2], atol=1e-12)


URDF = """<?xml version="1.0"?>
<robot name="two_links">
  <link name="base"/>
  <link name="upper"><visual><geometry>
    <mesh filename="package://nowhere/upper.stl"/></geometry></visual></link>
  <link name="lower"><collision><geometry>
    <mesh filename="package://nowhere/lower.stl"/></geometry></collision></link>
  <link name="tool0"/>
  <joint name="shoulder" type="revolute"><parent link="base"/><child link="upper"/>
    <origin xyz="0 0 0.2"/><axis xyz="0 0 1"/>
    <limit lower="-3" upper="3" effort="1" velocity="1"/></joint>
  <joint name="elbow" type="revolute"><parent link="upper"/><child link="lower"/>
    <origin xyz="0.4 0 0"/><axis xyz="0 0 1"/>
    <limit lower="-3" upper="3" effort="1" velocity="1"/></joint>
  <joint name="flange" type="fixed"><parent link="lower"/><child link="tool0"/>
    <origin xyz="0.3 0 0"/></joint>
</robot>
"""
