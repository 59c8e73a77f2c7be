"""Returns of policies on gymnasium environments: equal seeds, intervals, paired differences.

Each episode has its own seed, whatever runs beside it, so two policies that are evaluated on the
same seeds start from the same states and their returns can be compared pair by pair.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from jaxtyping import Bool, Float, Float32, Int

Act = Callable[[Float32[np.ndarray, "B D"]], Float[np.ndarray, "B A"]]
"""Observations as the environment gives them -> actions; those outside the limits are clipped."""


@dataclass(frozen=True)
class Returns:
    """Of whole episodes, in the order of their seeds."""

    seeds: Int[np.ndarray, " N"]
    returns: Float[np.ndarray, " N"]
    """Undiscounted sums of the reward."""
    lengths: Int[np.ndarray, " N"]
    terminated: Bool[np.ndarray, " N"]
    """Ended by itself (a fall), not by the clock."""

    @property
    def mean(self) -> float:
        return float(self.returns.mean())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Of the mean, see `mean_interval`."""
        return mean_interval(self.returns, confidence)


def episode_returns(act: Act, env_id: str, seeds: Sequence[int], *, slots: int = 16) -> Returns:
    """Plays one episode per seed, `slots` of them at a time in this process.

    `act` always sees min(slots, len(seeds)) observations; towards the end some of them belong to
    episodes that nobody counts.

    Raises:
        ValueError: no seeds, a seed twice, or actions that are not finite or of a wrong shape.
    """
    if len(seeds) == 0 or len(set(seeds)) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds, {len(set(seeds))} different; expected at least one")
    slots = min(slots, len(seeds))
    envs = SyncVectorEnv(
        [lambda: gymnasium.make(env_id)] * slots, autoreset_mode=AutoresetMode.DISABLED
    )
    try:
        return _play(act, envs, np.asarray(seeds, np.int64))
    finally:
        envs.close()


def _play(act: Act, envs: SyncVectorEnv, seeds: Int[np.ndarray, " N"]) -> Returns:
    slots, count = envs.num_envs, len(seeds)
    space = envs.single_action_space
    assert isinstance(space, gymnasium.spaces.Box)
    found = Returns(
        seeds=seeds,
        returns=np.zeros(count),
        lengths=np.zeros(count, np.int64),
        terminated=np.zeros(count, np.bool_),
    )
    plays = np.arange(slots)  # number of the episode that each slot plays; count: none
    started = slots
    first: list[int | None] = [int(seed) for seed in seeds[:slots]]
    observation, _ = envs.reset(seed=first)
    while (plays < count).any():
        action = np.asarray(act(observation.astype(np.float32)))
        if action.shape != (slots, *space.shape) or not np.isfinite(action).all():
            raise ValueError(
                f"the policy gave shape {action.shape}, finite: {np.isfinite(action).all()}; "
                f"expected finite actions of shape {(slots, *space.shape)}"
            )
        action = np.clip(action, space.low, space.high).astype(np.float32)
        observation, reward, terminated, truncated, _ = envs.step(action)
        counted = plays < count
        episodes = plays[counted]
        found.returns[episodes] += np.asarray(reward)[counted]
        found.lengths[episodes] += 1
        over = terminated | truncated
        if not over.any():
            continue
        ended = over & counted
        found.terminated[plays[ended]] = terminated[ended]
        fresh = started + np.arange(over.sum())
        plays[over] = np.where(counted[over], np.minimum(fresh, count), count)
        started = min(started + int(over.sum()), count)
        # A slot without an episode left must be reset all the same; its seed means nothing.
        wanted: list[int | None] = [int(seeds[min(k, count - 1)]) for k in plays]
        observation, _ = envs.reset(seed=wanted, options={"reset_mask": over})
    return found


def mean_interval(values: Float[np.ndarray, " N"], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean; (-inf, inf) for fewer than two values.

    Raises:
        ValueError: `confidence` outside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; expected a share such as 0.95")
    if len(values) < 2:
        return -math.inf, math.inf
    from scipy.stats import t

    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    width = float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * error
    return mean - width, mean + width


@dataclass(frozen=True)
class PairedReturns:
    """How much more `last` returned than `first`, on the same seeds."""

    difference: float
    interval: tuple[float, float]
    """Student's, of the mean of the differences."""
    p_value: float
    """Two-sided Wilcoxon signed-rank test of "no difference"; 1 where all pairs are equal."""
    share_better: float
    """Of the seeds; ties count half."""


def compare(first: Returns, last: Returns, confidence: float = 0.95) -> PairedReturns:
    """Pair by pair.

    Raises:
        ValueError: the seeds differ, so these are no pairs.
    """
    if not np.array_equal(first.seeds, last.seeds):
        raise ValueError(
            "the two were evaluated on different seeds; a paired comparison needs the same ones"
        )
    from scipy.stats import wilcoxon

    gained = last.returns - first.returns
    test: Any = wilcoxon(gained) if gained.any() else None
    return PairedReturns(
        difference=float(gained.mean()),
        interval=mean_interval(gained, confidence),
        p_value=float(test.pvalue) if test is not None else 1.0,
        share_better=float(((gained > 0) + 0.5 * (gained == 0)).mean()),
    )
