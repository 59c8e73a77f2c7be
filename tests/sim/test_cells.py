"""One contract for every shipped cell and task: spaces, seeds, experts, cameras."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import sim
from sim.cell import Cell, ResetNeeded, UnknownTask, make_cell
from sim.demonstrations import ExpertFailed, collect, demonstrate
from sim.expert import make_expert
from trajectory_store import Contract, ContractError, Source, load_contract
from trajectory_store.contract import parse_contract

STATE = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
PIXELS = load_contract(sim.CONTRACTS / "metaworld_pixels.yaml")
CORNER = "observation.images.corner"


def every_task() -> list[tuple[Path, str]]:
    paths = sorted(sim.CONTRACTS.glob("*.yaml"))
    contracts = [(path, load_contract(path)) for path in paths]
    return [(p, t) for p, c in contracts if "env_id" in c.sim for t in c.tasks]


def play(cell: Cell, actions: np.ndarray, task: str, seed: int) -> list[np.ndarray]:
    """Scene values along fixed actions."""
    _, info = cell.reset(seed=seed, options={"task": task})
    scenes = [info["scene"]]
    for action in actions:
        _, _, terminated, truncated, info = cell.step(action)
        scenes.append(info["scene"])
        if terminated or truncated:
            break
    return scenes


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.pixels] if load_contract(path).images else [])
        for path in sorted(sim.CONTRACTS.glob("*.yaml"))
    ],
    ids=lambda path: path.stem,
)
# The checker wishes for bounded observations and normalised actions; a robot's are what they are.
@pytest.mark.filterwarnings("ignore:.*(minimum value is -infinity|maximum value is infinity):")
@pytest.mark.filterwarnings("ignore:.*For Box action spaces, we recommend")
def test_gymnasium_checker_accepts_the_cell(path: Path):
    contract = load_contract(path)
    env = gymnasium.make(contract.sim["env_id"], contract=path, render_mode="rgb_array")
    try:
        check_env(env.unwrapped, skip_render_check=False)
        observation, _ = env.reset(seed=1)
        assert set(observation) == set(contract.observations)
        for key, feature in contract.observations.items():
            assert observation[key].shape == feature.shape
    finally:
        env.close()


@pytest.mark.parametrize(("path", "task"), every_task(), ids=lambda v: getattr(v, "stem", v))
def test_same_seed_same_trajectory(path: Path, task: str):
    """Bit for bit: on a used cell, on a fresh one, and after another seed was played."""
    contract = load_contract(path)
    actions = np.random.default_rng(0).uniform(*_bounds(contract), (40, contract.action.size))
    used, fresh = make_cell(contract), make_cell(contract)
    first = play(used, actions, task, 7)
    other = play(used, actions, task, 8)
    again = play(used, actions, task, 7)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, play(fresh, actions, task, 7))
    assert not np.array_equal(first[0], other[0]), "another seed gave the same scene"


@pytest.mark.parametrize(("path", "task"), every_task(), ids=lambda v: getattr(v, "stem", v))
def test_the_expert_succeeds_within_the_time_limit(path: Path, task: str):
    contract = load_contract(path)
    blind = contract.model_copy(update={"observations": contract.vectors})  # draws nothing
    cell, expert = make_cell(blind), make_expert(contract, task)
    episodes = [demonstrate(cell, expert, task, seed) for seed in range(100, 104)]
    # peg-insert-side is the hardest: its script solves about two thirds of the scenes.
    assert sum(e.success for e in episodes) >= (2 if task == "peg-insert-side" else 3)
    for episode in episodes:
        limit = contract.task(task).time_limit_s * contract.control_hz
        assert len(episode) == limit or episode.success
        assert np.all(episode.source == Source.SCRIPTED)
        assert episode.reward.sum() == episode.success == episode.terminated[-1]


def test_one_cell_serves_every_task_and_remembers_the_last():
    cell = make_cell(STATE, "reach")
    _, info = cell.reset(seed=1)
    assert info["task"] == "reach"
    _, info = cell.reset(seed=1, options={"task": "hammer"})
    hammer = info["scene"]
    _, info = cell.reset(seed=1)
    assert info["task"] == "hammer"
    np.testing.assert_array_equal(info["scene"], hammer)


def test_streams_hold_what_observations_hold():
    cell = make_cell(STATE, "pick-place")
    observation, info = cell.reset(seed=3)
    observation, _, _, _, info = cell.step(np.array([0.5, -0.5, 0.2, 1.0]))
    scene = dict(zip(cell.scene_names, info["scene"], strict=True))
    joints = cell.streams["joint_states"]
    assert joints.names == ("ee_x", "ee_y", "ee_z", "gripper")
    np.testing.assert_array_equal(observation["observation.state"], np.float32(joints.position))
    names = STATE.observations["observation.environment_state"].names
    expected = np.float32([scene[name] for name in names])
    np.testing.assert_array_equal(observation["observation.environment_state"], expected)
    assert scene["hand_x"] == joints.position[0]
    assert np.any(expected[-3:] != 0), "the goal is hidden"


def test_moving_along_x_moves_the_hand_along_x():
    cell = make_cell(STATE, "reach")
    before = cell.reset(seed=0)[1]["scene"][:3]
    for _ in range(20):
        after = cell.step(np.array([1.0, 0, 0, 0]))[4]["scene"][:3]
    moved = after - before
    assert moved[0] > 0.05
    assert np.all(np.abs(moved[1:]) < 0.02)


def test_time_limit_truncates_and_success_terminates():
    cell = make_cell(STATE, "reach")
    cell.reset(seed=0)
    steps, truncated = 0, False
    while not truncated:
        _, reward, terminated, truncated, info = cell.step(np.zeros(4))
        steps += 1
        assert not terminated
        assert reward == 0
    assert steps == 200  # 2.5 s at 80 Hz
    with pytest.raises(ResetNeeded):
        cell.step(np.zeros(4))

    expert, terminated = make_expert(STATE, "reach"), False
    _, info = cell.reset(seed=0)
    while not terminated:
        _, reward, terminated, truncated, info = cell.step(expert.act(info["scene"]))
        assert not truncated
    assert reward == 1
    assert info["success"] is True


def test_hold_command_keeps_the_gripper():
    cell = make_cell(STATE, "reach")
    np.testing.assert_array_equal(cell.hold_command(None), [0, 0, 0, 0])
    np.testing.assert_array_equal(cell.hold_command(np.array([1, 1, 1, -0.7])), [0, 0, 0, -0.7])


@pytest.mark.parametrize("action", [[np.nan, 0, 0, 0], [0, 0, 0], [[0, 0, 0, 0]]])
def test_bad_actions_are_refused(action: list[float]):
    cell = make_cell(STATE, "reach")
    cell.reset(seed=0)
    with pytest.raises(ValueError, match="expected 4 finite numbers in the order ee_dx"):
        cell.step(np.array(action))


def test_unknown_tasks_are_named_with_the_known_ones():
    cell = make_cell(STATE)
    with pytest.raises(UnknownTask, match=r"no task 'fold-laundry'.*pick-place"):
        cell.reset(seed=0, options={"task": "fold-laundry"})
    with pytest.raises(UnknownTask, match="fold-laundry"):
        make_cell(STATE, "fold-laundry")
    # In the contract, but not in the simulator.
    text = (sim.CONTRACTS / "metaworld_state.yaml").read_text()
    strange = parse_contract(text.replace("  reach:", "  fold-laundry:"))
    with pytest.raises(UnknownTask):
        make_cell(strange, "fold-laundry")
    with pytest.raises(UnknownTask, match="no scripted expert"):
        make_expert(strange, "fold-laundry")


def test_a_contract_that_asks_for_unknown_values_is_refused():
    text = (sim.CONTRACTS / "metaworld_state.yaml").read_text()
    wrong = parse_contract(
        text.replace(
            "names: [ee_x, ee_y, ee_z, gripper]\n    shape: [4]",
            "names: [ee_x, elbow, ee_z, gripper]\n    shape: [4]",
        )
    )
    with pytest.raises(ContractError, match=r"observation.state: .*\['elbow'\]"):
        make_cell(wrong)


def test_demonstrations_skip_what_the_expert_fails():
    episodes = collect(STATE, "peg-insert-side", 3, seed=1000)
    assert [e.success for e in episodes] == [True] * 3
    seeds = [e.seed for e in episodes]
    assert seeds == sorted(set(seeds))
    assert seeds[0] >= 1000
    hurried = STATE.model_dump(by_alias=True)
    hurried["tasks"]["reach"]["time_limit_s"] = 0.1
    with pytest.raises(ExpertFailed, match="time limit"):
        collect(Contract.model_validate(hurried), "reach", 1)


@pytest.mark.pixels
def test_frames_come_at_the_cameras_rate_and_carry_the_contracts_jpeg():
    cell = make_cell(PIXELS, "drawer-open", images=True)
    expert = make_expert(PIXELS, "drawer-open")
    observation, info = cell.reset(seed=2)
    changed, last = [], observation[CORNER]
    for _ in range(40):
        observation, _, _, _, info = cell.step(expert.act(info["scene"]))
        if not np.array_equal(observation[CORNER], last):
            changed.append(cell.tick)
        last = observation[CORNER]
    assert changed
    assert all(tick % 4 == 0 for tick in changed)  # 20 Hz at 80 Hz
    exact = cell.camera(CORNER).picture().astype(int)
    error = np.abs(exact - cell.image(CORNER))
    assert 0 < error.mean() < 4
    assert exact.std() > 20, "the picture is empty"


@pytest.mark.pixels
def test_late_drawing_shows_the_moment_of_exposure():
    """A picture drawn after the scene moved on equals one drawn at once."""
    eager, lazy = make_cell(PIXELS, "window-open"), make_cell(PIXELS, "window-open")
    for cell in (eager, lazy):
        cell.reset(seed=4)
    at_once = eager.image(CORNER)
    for cell in (eager, lazy):
        for _ in range(3):
            cell.step(np.ones(4))
    np.testing.assert_array_equal(lazy.image(CORNER), at_once)
    np.testing.assert_array_equal(eager.image(CORNER), at_once)


def _bounds(contract: Contract) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.array(contract.action.limits.position).T
    return low, high
