"""The joint-space arm: kinematics, drive limits, experts, and the operator's leader arm."""

import numpy as np
import pytest

import sim
from sim.cell import make_cell
from sim.expert import make_expert
from sim.franka_cell import HOME, JOINT_NAMES, Kinematics
from sim.operator import Mode, OperatorConfig, Request, ScriptedOperator
from sim.rollout import Case, rollout
from trajectory_store import Contract, load_contract

FRANKA = load_contract(sim.CONTRACTS / "franka_joint.yaml")
BLIND = FRANKA.model_copy(update={"observations": FRANKA.vectors})
VELOCITY = np.array(FRANKA.action.limits.velocity)
STATE = "observation.state"


def test_the_tool_is_where_frankas_documentation_puts_it():
    ready = np.array([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4])
    position, rotation = Kinematics().pose(ready)
    np.testing.assert_allclose(position, [0.3069, 0.0, 0.4869], atol=1e-3)
    np.testing.assert_allclose(rotation, np.diag([1.0, -1.0, -1.0]), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_steps_converge_to_a_pose(seed: int):
    random = np.random.default_rng(seed)
    kinematics, arm = Kinematics(), HOME.copy()
    target, yaw = random.uniform((0.35, -0.3, 0.05), (0.65, 0.3, 0.4)), random.uniform(-0.7, 0.7)
    for _ in range(80):
        arm = kinematics.towards(arm, target, yaw, lead_m=0.05)
    position, rotation = kinematics.pose(arm)
    np.testing.assert_allclose(position, target, atol=2e-3)
    np.testing.assert_allclose(rotation[:2, 0], [np.cos(yaw), np.sin(yaw)], atol=2e-2)
    np.testing.assert_allclose(rotation[2, 2], -1, atol=1e-3)


def test_the_drive_is_never_faster_than_its_velocity_limit():
    cell = make_cell(BLIND)
    cell.reset(seed=0)
    high = np.array(FRANKA.action.limits.position)[:, 1]
    for _ in range(40):
        cell.step(high)
        moved = np.abs(cell.vector("observation.velocity")[:7])
        assert np.all(moved <= VELOCITY[:7] * 1.1)
    assert moved.max() > 1.0


def test_holding_stays_and_reports_what_it_holds():
    cell = make_cell(BLIND)
    cell.reset(seed=0)
    before = cell.vector(STATE)
    hold = cell.hold_command(None)
    for _ in range(50):
        cell.step(hold)
    np.testing.assert_allclose(cell.vector(STATE), before, atol=2e-3)
    assert cell.streams["joint_states"].names == JOINT_NAMES
    np.testing.assert_array_equal(cell.hold_command(hold + 0.1), hold + 0.1)


def test_a_contract_with_other_joints_is_refused():
    data = FRANKA.to_dict()
    data["actions"]["action"]["mode"] = "delta"
    with pytest.raises(ValueError, match="takes absolute commands of joint1"):
        make_cell(Contract.model_validate(data))


def test_the_operator_finishes_both_tasks_with_smooth_commands():
    def still(observation: dict[str, np.ndarray], instruction: list[str]) -> np.ndarray:
        return np.repeat(observation[STATE][:, None].astype(float), FRANKA.chunk_horizon, axis=1)

    cases = [Case(task, seed) for task in FRANKA.tasks for seed in range(3)]
    results = rollout(still, BLIND, cases, operator=OperatorConfig(), record=True)
    assert [r.success for r in results] == [True] * 6
    for result in results:
        assert result.episode is not None
        steps = np.abs(np.diff(result.episode.action[:, :7], axis=0)) * FRANKA.control_hz
        # The motor noise of a hand included, which the arbiter's gate would smooth.
        assert np.all(steps <= 1.5 * VELOCITY[:7])


def test_the_leader_rests_on_the_last_command_until_control_is_given():
    """So that the arbiter's clutch has nothing to bridge when the human takes over."""
    cell = make_cell(BLIND, "lift-cube")
    config = OperatorConfig(drive_from_start=True, motor_noise=0.0)
    operator = ScriptedOperator(BLIND, cell.scene_names, config)
    operator.begin("lift-cube", 0)
    _, info = cell.reset(seed=0)
    sent = cell.hold_command(None) + np.append(np.full(7, 0.05), 0.0)
    asked = []
    for _ in range(60):
        said = operator.step(info["scene"], sent, Mode.HOLD)
        np.testing.assert_array_equal(said.command, sent)
        asked.append(Request.INTERVENE in said.requests)
    assert [k for k, a in enumerate(asked) if a] == [0, 25, 50]  # asks again
    driving = operator.step(info["scene"], sent, Mode.HUMAN)
    assert driving.command is not None
    assert 0 < np.abs(driving.command - sent).max() < 0.05


@pytest.mark.pixels
def test_three_cameras_see_the_scene():
    cell = make_cell(FRANKA, "place-cube", images=True)
    observation, _ = cell.reset(seed=1)
    expert = make_expert(FRANKA, "place-cube")
    for key in FRANKA.images:
        image = observation[key].astype(int)
        red = (image[..., 0] > 120) & (image[..., 1] < 80) & (image[..., 2] < 80)
        green = (image[..., 1] > 130) & (image[..., 0] < 110) & (image[..., 2] < 140)
        assert red.sum() > 10, f"{key} does not see the cube"
        assert green.sum() > 10, f"{key} does not see the goal"
    info = {"scene": cell.scene}
    for _ in range(10):
        observation_later, _, _, _, info = cell.step(expert.act(info["scene"]))
    for key in FRANKA.images:
        assert np.abs(observation_later[key].astype(int) - observation[key]).max() > 50
