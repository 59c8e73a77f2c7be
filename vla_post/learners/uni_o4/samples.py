"""Transitions as the stages use them: normalised tensors, one row per start of a chunk.

N rows, S state size, H chunk length, A action size, D = H * A numbers of a chunk.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from vla_post.learners.uni_o4.data import Transitions, discounted_returns, rows_left


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Units of the networks against those of the data; kept, unchanged, through the online phase.

    States have mean 0 and deviation 1 over the data, actions lie in [-1, 1], and rewards are
    divided by the deviation of the data's returns.
    """

    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    action_low: tuple[float, ...]
    """Of one control step, in robot units."""
    action_high: tuple[float, ...]
    reward: float
    """A return of 1 in the networks' unit is this much in the data's."""
    discount: float
    """gamma per control step."""
    horizon: int
    """H; 1 is the paper's setting."""

    @property
    def chunk_size(self) -> int:
        """D."""
        return self.horizon * len(self.action_low)

    def state(self, raw: Float[Tensor, "*b S"]) -> Float[Tensor, "*b S"]:
        """Into the networks' unit."""
        return (raw - torch.tensor(self.state_mean)) / torch.tensor(self.state_std)

    def raw_state(self, state: Float[Tensor, "*b S"]) -> Float[Tensor, "*b S"]:
        """Back into the data's unit."""
        return state * torch.tensor(self.state_std) + torch.tensor(self.state_mean)

    def command(self, action: Float[Tensor, "*b D"]) -> Float[np.ndarray, "*b H A"]:
        """Chunks in robot units, inside the limits."""
        low, high = (np.asarray(v, np.float32) for v in (self.action_low, self.action_high))
        unit = action.clamp(-1.0, 1.0).unflatten(-1, (self.horizon, len(low))).numpy()
        return low + (unit + 1.0) * 0.5 * (high - low)

    def as_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Scales":
        typed: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return cls(**typed)


def scales_of(data: Transitions, *, discount: float, horizon: int = 1) -> Scales:
    """The units of a data set."""
    if not 0.0 < discount < 1.0 or horizon < 1:
        raise ValueError(
            f"discount is {discount} and horizon {horizon}; expected a factor per control step "
            "inside (0, 1) and a chunk of at least one step"
        )
    states = data.observations
    returns = discounted_returns(data.rewards, data.ends, discount)
    return Scales(
        state_mean=tuple(states.mean(axis=0).tolist()),
        # A constant feature stays 0 whatever it is divided by.
        state_std=tuple(np.maximum(states.std(axis=0), 1e-3).tolist()),
        action_low=tuple(data.action_low.tolist()),
        action_high=tuple(data.action_high.tolist()),
        reward=max(float(returns.std()), 1e-6),
        discount=discount,
        horizon=horizon,
    )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Row i is the chunk that starts at transition i."""

    state: Float[Tensor, "*N S"]
    action: Float[Tensor, "*N D"]
    """In [-1, 1]; past the end of its episode a chunk repeats the last action."""
    valid: Bool[Tensor, "*N D"]
    reward: Float[Tensor, "*N"]
    """Sum of gamma**k r over the n <= H steps of the chunk that the episode still had."""
    discount: Float[Tensor, "*N"]
    """gamma**n."""
    terminated: Bool[Tensor, "*N"]
    """A real end lies within the n steps."""
    next_state: Float[Tensor, "*N S"]
    following: Integer[Tensor, "*N"]
    """The row that starts where this chunk ends; -1 if the episode has none."""
    returns: Float[Tensor, "*N"]
    """Discounted, to the end of the episode."""
    last: Integer[Tensor, "*N"]
    """Last row of the episode."""
    tail_discount: Float[Tensor, "*N"]
    """gamma**(steps to the end) where the clock ended the episode, else 0."""

    def __len__(self) -> int:
        return len(self.state)

    def rows(self, index: Integer[Tensor, "*B"]) -> "Samples":
        return Samples(**{name: value[index] for name, value in vars(self).items()})


def prepare(data: Transitions, scales: Scales) -> Samples:
    """All chunks of a data set, in the networks' units."""
    horizon, gamma = scales.horizon, scales.discount
    left = rows_left(data.ends)
    places = np.arange(len(data))
    n = np.minimum(left, horizon)
    last = places + left - 1
    steps = np.arange(horizon)
    index = np.minimum(places[:, None] + steps, last[:, None])
    inside = steps < n[:, None]
    low, high = data.action_low, data.action_high
    unit = np.clip(2.0 * (data.actions - low) / (high - low) - 1.0, -1.0, 1.0)
    reward = (data.rewards[index] * inside * gamma**steps).sum(axis=1) / scales.reward
    stop = places + n - 1
    terminated = data.terminals[stop]
    following = np.where(places + n <= last, places + n, -1)
    returns = discounted_returns(data.rewards / np.float32(scales.reward), data.ends, gamma)
    tail = np.where(data.terminals[last], 0.0, gamma**left)

    def put(value: np.ndarray) -> Tensor:
        kind = np.float32 if value.dtype.kind == "f" else value.dtype
        return torch.from_numpy(np.ascontiguousarray(value, dtype=kind))

    return Samples(
        state=scales.state(put(data.observations)),
        action=put(unit[index].reshape(len(data), -1)),
        valid=put(np.repeat(inside, data.action_size, axis=1)),
        reward=put(reward),
        discount=put(gamma ** n.astype(np.float64)),
        terminated=put(terminated),
        next_state=scales.state(put(data.next_observations[stop])),
        following=put(following),
        returns=put(returns),
        last=put(last),
        tail_discount=put(tail),
    )


def draw(size: int, batch_size: int, seed: int, update: int) -> tuple[Tensor, torch.Generator]:
    """Rows of one update, and its source of noise: a function of seed and update alone, so that a
    run that was cut short and resumed does what an uninterrupted one does."""
    generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + update)
    return torch.randint(size, (batch_size,), generator=generator), generator
