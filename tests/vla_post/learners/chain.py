"""A chain of states where the exact value of any policy is known, as observations and batches."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_post.batch import Batch, Observation

STATES, GAMMA = 6, 0.9
KEY = "observation.environment_state"


class Walker(nn.Module):
    """Walks a chain: each step of a chunk is +1 (right) with a probability, else -1."""

    action_size = 1

    def __init__(self, horizon: int, right: float) -> None:
        super().__init__()
        self.horizon = horizon
        self.logit = nn.Parameter(torch.tensor(right / (1 - right)).log())

    def act(
        self, observation: Observation, instruction: list[str], n_samples: int = 1, **_: Any
    ) -> Tensor:
        shape = (len(instruction), n_samples, self.horizon, 1)
        right = torch.rand(shape) < torch.sigmoid(self.logit)
        # Gradients reach the parameter, so that a learner which let them through would be caught.
        return torch.where(right, 1.0, -1.0) + 0.0 * self.logit

    def chunk_loss(self, batch: Batch, **_: Any) -> Tensor:
        error = (torch.tanh(self.logit) - batch.action).square().mean(dim=2)
        steps = batch.valid.sum(dim=1).clamp(min=1)
        return torch.where(batch.valid, error, 0.0).sum(dim=1) / steps

    def features(self, observation: Observation, instruction: list[str]) -> Tensor:
        return observation[KEY]


def one_hot(state: Tensor) -> Observation:
    return {KEY: nn.functional.one_hot(state, STATES).float()}


def walk(state: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chain with a wall on the left; stepping right of the last state is success, reward 1.

    Returns:
        reward (B, H), steps until the end or H, success, state reached.
    """
    size, horizon = chunk.shape
    reward, done = torch.zeros(size, horizon), torch.zeros(size, dtype=torch.bool)
    n = torch.full((size,), horizon)
    for k in range(horizon):
        arrives = ~done & (state == STATES - 1) & (chunk[:, k] > 0)
        reward[:, k] = arrives.float()
        n = torch.where(arrives, k + 1, n)
        done |= arrives
        moved = (state + chunk[:, k].long()).clamp(0, STATES - 1)
        state = torch.where(done, state, moved)
    return reward, n, done, state


def exact_value(right: float) -> Tensor:
    """V of the policy that goes right with this probability, from the linear system."""
    matrix, gain = np.eye(STATES), np.zeros(STATES)
    for s in range(STATES):
        matrix[s, max(s - 1, 0)] -= GAMMA * (1 - right)
        if s == STATES - 1:
            gain[s] = right
        else:
            matrix[s, s + 1] -= GAMMA * right
    return torch.tensor(np.linalg.solve(matrix, gain), dtype=torch.float32)


def exact_q(state: Tensor, chunk: Tensor, right: float) -> Tensor:
    """Q of a chunk: what it earns by itself, then the policy's value where it leads."""
    reward, n, done, after = walk(state, chunk)
    powers = GAMMA ** torch.arange(chunk.shape[1])
    later = torch.where(done, 0.0, GAMMA ** n.float() * exact_value(right)[after])
    return (reward * powers).sum(dim=1) + later


def chain_batch(size: int, horizon: int, right: float) -> Batch:
    """Chunks of a behaviour policy from uniform states."""
    state = torch.randint(0, STATES, (size,))
    chunk = torch.where(torch.rand(size, horizon) < right, 1.0, -1.0)
    _, n, done, after = walk(state, chunk)
    return Batch(
        observation=one_hot(state),
        action=chunk[..., None],
        valid=torch.arange(horizon) < n[:, None],
        reward=torch.zeros(size, horizon),
        source=torch.zeros(size, horizon, dtype=torch.uint8),
        next_observation=one_hot(after),
        n=n,
        terminated=done,
        task=torch.zeros(size, dtype=torch.int64),
        instruction=["walk"] * size,
        weight=torch.ones(size),
        left=torch.where(done, n, 1000),
        outcome=done.long(),
    )
