"""Episodes by seed, whatever runs beside them; intervals and paired differences."""

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import register

from vla_post.evaluation.returns import Returns, compare, episode_returns, mean_interval

NAME = "vla_post_tests/Seeded-v0"


class Seeded(gymnasium.Env[np.ndarray, np.ndarray]):
    """An episode lasts 1 to 6 steps, as its seed says; the reward is the action plus that number.

    Seeds whose length is even end by themselves, the others by the clock.
    """

    observation_space = gymnasium.spaces.Box(0, 10, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.length, self.count = int(self.np_random.integers(1, 7)), 0
        return np.array([self.length], np.float64), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.count < self.length
        self.count += 1
        over, even = self.count == self.length, self.length % 2 == 0
        reward = float(action[0]) + self.length
        return np.array([self.length], np.float64), reward, over and even, over and not even, {}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(NAME, entry_point=lambda **_: Seeded())
    yield
    del gymnasium.registry[NAME]


def act(observation: np.ndarray) -> np.ndarray:
    assert observation.dtype == np.float32
    return np.full((len(observation), 1), 7.0)  # outside the limits: clipped to 1


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_each_seed_has_its_episode_whatever_runs_beside_it(slots: int):
    seeds = [5, 3, 11, 2, 9, 7, 40]
    lengths = [int(np.random.default_rng(s).integers(1, 7)) for s in seeds]
    assert len(set(lengths)) > 3
    found = episode_returns(act, NAME, seeds, slots=slots)
    np.testing.assert_array_equal(found.lengths, lengths)
    np.testing.assert_allclose(found.returns, [n * (n + 1) for n in lengths])
    np.testing.assert_array_equal(found.terminated, [n % 2 == 0 for n in lengths])


def test_a_policy_that_is_no_policy_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*\(2, 1\)"):
        episode_returns(lambda o: np.zeros((len(o), 3)), NAME, [1, 2])
    with pytest.raises(ValueError, match="finite: False"):
        episode_returns(lambda o: np.full((len(o), 1), np.nan), NAME, [1, 2])
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="seeds"):
            episode_returns(act, NAME, seeds)


def test_the_interval_is_students():
    # Mean 3, deviation sqrt(2.5), t(4) at 97.5 % = 2.776445: half width 1.963243.
    low, high = mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (low, high) == pytest.approx((3 - 1.963243, 3 + 1.963243), abs=1e-5)
    assert mean_interval(np.array([1.0])) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="confidence"):
        mean_interval(np.zeros(3), 95.0)


def made(seeds: list[int], values: list[float]) -> Returns:
    n = len(seeds)
    return Returns(
        seeds=np.array(seeds),
        returns=np.array(values),
        lengths=np.ones(n, np.int64),
        terminated=np.zeros(n, np.bool_),
    )


def test_pairs_see_a_difference_that_the_spread_of_the_seeds_hides():
    random = np.random.default_rng(0)
    seeds = list(range(20))
    base = random.normal(1000.0, 300.0, 20)
    gain = random.normal(30.0, 10.0, 20)
    first, last = made(seeds, list(base)), made(seeds, list(base + gain))
    paired = compare(first, last)
    assert paired.difference == pytest.approx(gain.mean())
    assert 0 < paired.interval[0] < gain.mean() < paired.interval[1] < 40
    assert paired.p_value < 1e-4
    assert paired.share_better == 1.0
    assert first.interval()[1] > last.mean  # unpaired, nothing could be said
    same = compare(first, first)
    assert (same.difference, same.p_value, same.share_better) == (0.0, 1.0, 0.5)
    with pytest.raises(ValueError, match="different seeds"):
        compare(first, made([*seeds[1:], 99], list(base)))
