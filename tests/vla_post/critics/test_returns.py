"""Targets of chunks: ALOE-1, 2, 3 and 7 of the specification, sparse rewards, returns of data."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import sim
from trajectory_store import Episode, Outcome, Source, Store, StoreWriter, Tick
from trajectory_store.contract import load_contract
from vla_post.critics.returns import (
    RewardConfig,
    Unrewarded,
    chunk_return,
    monte_carlo_return,
    require_outcomes,
    require_rewards,
    sparse_rewards,
    td_target,
)


def test_aloe1_a_chunk_of_one_step_is_the_one_step_target():
    torch.manual_seed(0)
    reward, value = torch.randn(64, 1), torch.randn(64)
    ended, n = torch.rand(64) < 0.3, torch.ones(64, dtype=torch.int64)
    expected = reward[:, 0] + 0.97 * (1.0 - ended.float()) * value
    torch.testing.assert_close(td_target(reward, n, ended, value, 0.97), expected)


@pytest.mark.parametrize("h", [1, 4, 8, 50])
def test_aloe2_the_bootstrap_is_discounted_once_per_step(h: int):
    nothing = torch.zeros(1, h)
    got = td_target(nothing, torch.tensor([h]), torch.tensor([False]), torch.ones(1), 0.99)
    assert got.item() == pytest.approx(0.99**h)
    if h == 50:
        assert got.item() == pytest.approx(0.605, abs=5e-4)


def test_aloe3_a_real_end_cuts_the_future_even_if_that_is_nan():
    reward = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    value = torch.tensor([torch.nan, 10.0])
    got = td_target(reward, torch.tensor([2, 2]), torch.tensor([True, False]), value, 0.5)
    torch.testing.assert_close(got, torch.tensor([2.0, 2.0 + 0.25 * 10.0]))


def test_a_chunk_that_the_clock_cut_bootstraps_by_the_steps_it_had():
    reward = torch.tensor([[1.0, 1.0, 99.0, torch.nan]])
    got = td_target(reward, torch.tensor([2]), torch.tensor([False]), torch.tensor([8.0]), 0.5)
    assert got.item() == 1.0 + 0.5 + 0.25 * 8.0


@pytest.mark.parametrize("h", [1, 4, 8, 50])
def test_aloe7_constant_reward_has_the_same_fixed_point_for_every_chunk(h: int):
    value = torch.zeros(1, dtype=torch.float64)
    reward = torch.full((1, h), 0.3, dtype=torch.float64)
    for _ in range(3000 // h):
        value = td_target(reward, torch.tensor([h]), torch.tensor([False]), value, 0.99)
    assert value.item() == pytest.approx(0.3 / (1 - 0.99), rel=1e-6)


def rewards(left: list[int], outcome: list[int], n: list[int], **config: float | str):
    steps = torch.arange(4)
    ended = torch.zeros(len(left), dtype=torch.bool)
    settings = RewardConfig(**config)  # pyright: ignore[reportArgumentType]
    return sparse_rewards(
        steps, torch.tensor(n), torch.tensor(left), torch.tensor(outcome), ended, settings
    )


def test_the_last_step_of_a_success_is_paid_wherever_it_lies_in_the_chunk():
    reward, end = rewards([1, 3, 4, 5], [1, 1, 1, 1], [1, 3, 4, 4], success=2.0)
    expected = torch.tensor([[2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2], [0, 0, 0, 0]])
    torch.testing.assert_close(reward, expected.float())
    assert end.tolist() == [True, True, True, False]


def test_a_reward_past_the_backup_belongs_to_another_chunk():
    reward, end = rewards([4], [1], [2], time_cost=1.0, typical_steps=10.0)
    torch.testing.assert_close(reward, torch.tensor([[-0.1, -0.1, 0.0, 0.0]]))
    assert not end.item()


def test_a_failure_by_the_clock_goes_on_unless_it_is_called_an_end():
    reward, end = rewards([2], [-1], [2], failure=-1.0)
    assert not end.item()
    assert (reward == 0).all()
    reward, end = rewards([2], [-1], [2], failure=-1.0, timeout="failure")
    assert end.item()
    assert reward.tolist() == [[0.0, -1.0, 0.0, 0.0]]


def test_an_aborted_episode_is_neither_good_nor_an_end():
    reward, end = rewards([2], [0], [2])
    assert (reward == 0).all()
    assert not end.item()


def test_returns_of_data_are_the_sum_of_their_rewards():
    config = RewardConfig(success=1.0, failure=-0.5, time_cost=1.0, typical_steps=20.0)
    left, outcome = torch.tensor([1, 3, 7]), torch.tensor([1, -1, 1])
    steps = torch.arange(8)
    for settings in (config, RewardConfig(discount=1.0, time_cost=1.0, typical_steps=20.0)):
        # A failure's end counts in what the data got, so its rewards are those of a real end.
        reward, _ = sparse_rewards(
            steps, left, left, outcome, torch.ones(3, dtype=torch.bool), settings
        )
        got = monte_carlo_return(left, outcome, settings)
        torch.testing.assert_close(got, chunk_return(reward, left, settings.discount))


def test_bounds_hold_every_return():
    config = RewardConfig(failure=-1.0, time_cost=0.5, typical_steps=50.0, discount=0.98)
    low, high = config.bounds(200.0)
    left = torch.arange(1, 201)
    for outcome in (1, -1, 0):
        got = monte_carlo_return(left, torch.full_like(left, outcome), config)
        assert low <= got.min()
        assert got.max() <= high
    assert config.bounds(math.inf)[0] == pytest.approx(-0.01 / 0.02 - 1.0)


@pytest.mark.parametrize("wrong", [{"discount": 0.0}, {"time_cost": -1.0}, {"failure": 2.0}])
def test_rewards_that_make_no_sense_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=r"discount|time_cost|failure"):
        RewardConfig(**wrong)  # pyright: ignore[reportArgumentType]


def recorded(path: Path, *, rewarded: bool) -> Store:
    """Four episodes of 6 steps: a success, a failure and two that nobody labelled. The reward is 0,
    but for the very last step if `rewarded`."""
    contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    with StoreWriter.create_or_open(path, contract) as writer:
        ends = (Outcome.SUCCESS, Outcome.FAILURE, Outcome.ABORTED, Outcome.INTERRUPTED)
        for number, outcome in enumerate(ends):
            writer.begin_episode("reach")
            for k in range(6):
                writer.append(
                    Tick(
                        observation={
                            key: np.zeros(f.shape, np.float32)
                            for key, f in contract.vectors.items()
                        },
                        action=np.zeros(4, np.float32),
                        source=Source.POLICY,
                        reward=float(rewarded and (number, k) == (3, 5)),
                        stamp_ns=k * contract.dt_ns,
                    )
                )
            writer.end_episode(outcome)
    return Store(path)


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return recorded(tmp_path_factory.mktemp("buffer") / "store", rewarded=True)


@pytest.mark.parametrize(
    ("which", "chunk", "message"),
    [
        ([2, 3], 4, "0 successes and 0 failures: nothing says what was good"),
        ([0, 2], 4, "1 successes and 0 failures. .* end in failure"),
        ([1, 2], 4, "0 successes and 1 failures. .* end in success"),
        ([], 4, "0 episodes hold 0 successes"),
        ([0, 1], 8, "longest of 6 steps, and the critic judges chunks of 8"),
    ],
)
def test_a_buffer_that_says_nothing_of_value_is_refused(
    buffer: Store, which: list[int], chunk: int, message: str
):
    episodes: list[Episode] = [buffer.episodes[k] for k in which]
    with pytest.raises(Unrewarded, match=message):
        require_outcomes(episodes, chunk)
    require_outcomes(buffer.episodes, 6)


def test_recorded_rewards_must_differ_somewhere(buffer: Store, tmp_path: Path):
    with pytest.raises(Unrewarded, match="4 episodes are 0 at every step"):
        require_rewards([recorded(tmp_path / "store", rewarded=False)])
    require_rewards([buffer])
    with pytest.raises(Unrewarded, match="0 episodes are not there"):
        require_rewards([])
