"""Rewards, returns and temporal-difference targets of action chunks.

B batch, H chunk length of the data, S sampled chunks, K critics. Rules: `n` steps lie between an
observation and the next one, so the bootstrap is discounted by gamma**n; only a real end cuts it;
a reward beyond step n belongs to somebody else's chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from trajectory_store import Episode, Outcome, Store
from vla_post.batch import Batch


class Unrewarded(ValueError):
    """The buffer cannot say what was good: no outcomes, or no rewards where those were asked for.

    The message says which, and what to do.
    """


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What an episode is worth. Sparse by default: the outcome that the operator labelled."""

    source: Literal["outcome", "stored"] = "outcome"
    """`outcome` derives rewards from how the episode ended, so that a store needs none; `stored`
    takes the recorded `reward` of each step."""
    success: float = 1.0
    """At the last step of a success."""
    failure: float = 0.0
    """At the last step of a failure that really ended."""
    time_cost: float = 0.0
    """What an episode of typical length loses to the clock, spread evenly over its steps."""
    typical_steps: float = 100.0
    """Control steps of a typical success."""
    timeout: Literal["bootstrap", "failure"] = "bootstrap"
    """A failure whose clock ran out: its last state still has a value, or it counts as an end."""
    discount: float = 0.99
    """gamma, per control step."""

    def __post_init__(self) -> None:
        if not 0.0 < self.discount <= 1.0:
            raise ValueError(
                f"discount is {self.discount}; expected a factor per control step in (0, 1]. For a "
                "time constant of tau seconds at f Hz, use 1 - 1 / (tau * f)."
            )
        if self.time_cost < 0 or not self.typical_steps > 0:
            raise ValueError(
                f"time_cost is {self.time_cost} and typical_steps {self.typical_steps}; the first "
                "must not be negative, the second must be above 0"
            )
        if not self.failure <= self.success:
            raise ValueError(f"failure ({self.failure}) is worth more than success {self.success}")

    @property
    def step(self) -> float:
        """Reward of every control step."""
        return -self.time_cost / self.typical_steps

    def bounds(self, longest: float) -> tuple[float, float]:
        """Smallest and largest return of an episode of at most `longest` steps."""
        waited = self.step * _geometric(self.discount, longest)
        return waited + min(self.failure, 0.0), max(self.success, 0.0)


def rewards_of(
    batch: Batch, config: RewardConfig
) -> tuple[Float[Tensor, "B H"], Bool[Tensor, " B"]]:
    """Reward of each step of each chunk, and whether a real end lies within its `n` steps.

    Raises:
        Unrewarded: the batch lacks what `config.source` asks for.
    """
    steps = torch.arange(batch.reward.shape[1], device=batch.reward.device)
    if config.source == "stored":
        inside = steps < batch.n[:, None]
        return torch.where(inside, batch.reward, 0.0), batch.terminated
    left, outcome = outcomes_of(batch)
    return sparse_rewards(steps, batch.n, left, outcome, batch.terminated, config)


def sparse_rewards(
    steps: Integer[Tensor, " H"],
    n: Integer[Tensor, " B"],
    left: Integer[Tensor, " B"],
    outcome: Integer[Tensor, " B"],
    terminated: Bool[Tensor, " B"],
    config: RewardConfig,
) -> tuple[Float[Tensor, "B H"], Bool[Tensor, " B"]]:
    """`rewards_of` for rewards that are derived from outcomes.

    Args:
        left: steps until the episode's end.
        outcome: 1 success, -1 failure, 0 neither (aborted, interrupted).
    """
    reaches = left <= n
    end = terminated | (reaches & (outcome > 0))
    if config.timeout == "failure":
        end = end | (reaches & (outcome < 0))
    value = torch.where(outcome > 0, config.success, 0.0)
    value = torch.where(outcome < 0, config.failure, value)
    inside = steps < n[:, None]
    last = (steps == left[:, None] - 1) & end[:, None]
    return torch.where(inside, config.step + torch.where(last, value[:, None], 0.0), 0.0), end


def chunk_return(
    reward: Float[Tensor, "B H"], n: Integer[Tensor, " B"], discount: float
) -> Float[Tensor, " B"]:
    """Sum of the first n rewards, the k-th discounted by gamma**k: the R of Eq. A1."""
    steps = torch.arange(reward.shape[1], device=reward.device)
    weight = torch.where(steps < n[:, None], discount**steps, 0.0)
    return torch.where(weight > 0, reward * weight, 0.0).sum(dim=1)


def td_target(
    reward: Float[Tensor, "B H"],
    n: Integer[Tensor, " B"],
    ended: Bool[Tensor, " B"],
    next_value: Float[Tensor, " B"],
    discount: float,
) -> Float[Tensor, " B"]:
    """Chunk target y = R + gamma**n V(s_{t+n}), or R where the episode really ended (Eq. A1).

    The cut is a `where` and no product: an ended chunk's next value may be anything, NaN included.
    """
    later = discount ** n.to(next_value) * next_value
    return chunk_return(reward, n, discount) + torch.where(ended, 0.0, later)


def fill_past_end(
    action: Float[Tensor, "B H A"], left: Integer[Tensor, " B"]
) -> Float[Tensor, "B H A"]:
    """Chunks whose steps past the end of their episode are another item's, at the same places."""
    past = torch.arange(action.shape[1], device=action.device) >= left[:, None]
    return torch.where(past[..., None], action.roll(1, dims=0), action)


def monte_carlo_return(
    left: Integer[Tensor, " B"],
    outcome: Integer[Tensor, " B"],
    config: RewardConfig,
) -> Float[Tensor, " B"]:
    """Discounted return that the data went on to get, to the end of its episode.

    With sparse rewards it follows from the steps left and the outcome alone. A failure by the clock
    gets the failure's value here: the data has no later.
    """
    steps = left.to(torch.float32)
    value = torch.where(outcome > 0, config.success, 0.0)
    value = torch.where(outcome < 0, config.failure, value)
    if config.discount < 1.0:
        waited = (1.0 - config.discount**steps) / (1.0 - config.discount)
    else:
        waited = steps
    return config.step * waited + config.discount ** (steps - 1.0) * value


def require_outcomes(episodes: Sequence[Episode], chunk: int) -> None:
    """Refuses a buffer from which no value can be learned, before the first update.

    Raises:
        Unrewarded: no outcome at all, only successes, only failures, or only episodes shorter than
            a chunk; the message says which and what to do.
    """
    found = {o: sum(e.outcome == o for e in episodes) for o in (Outcome.SUCCESS, Outcome.FAILURE)}
    good, bad = found.values()
    what = f"the buffer's {len(episodes)} episodes hold {good} successes and {bad} failures"
    if good + bad == 0:
        raise Unrewarded(
            f"{what}: nothing says what was good. Label outcomes (the console's buttons, or "
            "`outcome=` when writing a store), or clone with hg-dagger"
        )
    if good == 0 or bad == 0:
        lacking = "success" if good == 0 else "failure"
        raise Unrewarded(
            f"{what}. A critic needs both, else every action looks alike: record episodes that end "
            f"in {lacking}, such as the policy's own without help, or clone with hg-dagger"
        )
    longest = max(len(e) for e in episodes)
    if longest < chunk:
        raise Unrewarded(
            f"{what}, the longest of {longest} steps, and the critic judges chunks of {chunk}. "
            f"Give the critic a chunk of at most {longest} steps, or check that the store was "
            "recorded at the contract's rate"
        )


def require_rewards(stores: Sequence[Store]) -> None:
    """Refuses a buffer whose recorded rewards are all the same, before the first update.

    Raises:
        Unrewarded: they are; the message says which and what to do.
    """
    seen: set[float] = set()
    episodes = [(store, e) for store in stores for e in store.episodes if len(e)]
    for store, episode in episodes:
        seen.update(np.unique(store.read("reward", episode)).tolist())
        if len(seen) > 1:
            return
    same = f"are {seen.pop():g} at every step" if seen else "are not there"
    raise Unrewarded(
        f"the rewards recorded in the buffer's {len(episodes)} episodes {same}: nothing says what "
        "was good. Take rewards of source `outcome`, or write `reward` when recording"
    )


def outcomes_of(batch: Batch) -> tuple[Integer[Tensor, " B"], Integer[Tensor, " B"]]:
    """(steps left, outcome) of a batch.

    Raises:
        Unrewarded: the batch was made without them.
    """
    if batch.left is None or batch.outcome is None:
        raise Unrewarded(
            "the batch says neither how its episodes ended nor how long they went on; draw it with "
            "ChunkSampler, or use rewards of source `stored`"
        )
    return batch.left, batch.outcome


def _geometric(discount: float, steps: float) -> float:
    if discount == 1.0:
        return steps
    if math.isinf(steps):
        return 1.0 / (1.0 - discount)
    return (1.0 - discount**steps) / (1.0 - discount)
