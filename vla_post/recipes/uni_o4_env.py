"""Environments for Uni-O4: gymnasium's by name, and this project's cells as chunk environments."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from sim.cell import Cell, make_cell
from trajectory_store import Contract
from vla_post.learners.uni_o4.offline import TrueReturns
from vla_post.learners.uni_o4.policies import Policies
from vla_post.learners.uni_o4.rollouts import true_returns
from vla_post.learners.uni_o4.samples import Scales

MakeEnv = Callable[[], gymnasium.Env[Any, Any]]


class ChunkCell(gymnasium.Env[np.ndarray, np.ndarray]):
    """A cell whose observation is its vectors joined in the order of their keys, as
    `convert.d4rl` writes them, and whose action is a chunk (H, A) that runs open loop.

    The reward is the discounted sum over the chunk's steps, 1 at a success (U8 of the chunk form).
    """

    def __init__(self, contract: Contract, task: str, *, horizon: int, discount: float) -> None:
        self.cell: Cell = make_cell(contract, task)
        self.keys = sorted(contract.vectors)
        self.horizon, self.discount = horizon, discount
        size = sum(contract.vectors[key].shape[0] for key in self.keys)
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        low, high = np.array(contract.action.limits.position, np.float32).T
        shape = (horizon, len(low)) if horizon > 1 else (len(low),)
        self.action_space = spaces.Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape))

    def _joined(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([observation[key] for key in self.keys], dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        scene = int(self.np_random.integers(2**31)) if seed is None else seed
        observation, _ = self.cell.reset(seed=scene, options=options)
        return self._joined(observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        total, weight = 0.0, 1.0
        observation, terminated, truncated = None, False, False
        for command in np.asarray(action).reshape(self.horizon, -1):
            observation, reward, terminated, truncated, _ = self.cell.step(command)
            total += weight * float(reward)
            weight *= self.discount
            if terminated or truncated:
                break
        assert observation is not None
        return self._joined(observation), total, terminated, truncated, {}

    def close(self) -> None:
        self.cell.close()


def env_maker(
    env: str, *, contract: Contract | None = None, scales: Scales | None = None
) -> MakeEnv:
    """Makes environments: gymnasium's `env`, or task `env` of the contract's cell.

    Args:
        scales: of the agent, for the chunk of a cell.
    """
    if contract is None:
        return lambda: gymnasium.make(env)
    horizon = scales.horizon if scales is not None else 1
    discount = scales.discount if scales is not None else 1.0
    return lambda: ChunkCell(contract, env, horizon=horizon, discount=discount)


def vector_env(make: MakeEnv, count: int) -> SyncVectorEnv:
    """`count` of them in this process, resetting in the step that ends an episode."""
    return SyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.SAME_STEP)


class Judge:
    """True mean returns of an ensemble on the same seeds at every call; owns its environments."""

    def __init__(self, make: MakeEnv, *, members: int, episodes: int, seed: int) -> None:
        self.episodes, self.seed, self.members = episodes, seed, members
        self.env = vector_env(make, members * episodes)

    def __call__(self, scales: Scales) -> TrueReturns:
        def returns(policies: Policies) -> Tensor:
            found = true_returns(policies, scales, self.env, seed=self.seed)
            return found.mean(dim=1)

        return returns

    def close(self) -> None:
        self.env.close()
