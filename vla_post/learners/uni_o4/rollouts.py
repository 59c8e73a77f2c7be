"""Policies in vectorised environments (gymnasium's interface), a whole ensemble at a time.

K members, E environments, S state size, A action size, H chunk length. An environment takes actions
(A,), or chunks (H, A) where the policy has H > 1 (`recipes.cell_env`), in robot units.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vla_post.learners.uni_o4.policies import Policies
from vla_post.learners.uni_o4.samples import Scales


@runtime_checkable
class VectorEnvironment(Protocol):
    """The part of `gymnasium.vector.VectorEnv` that is used here, with `AutoresetMode.SAME_STEP`:
    the observation after an end is that of the next episode, `info["final_obs"]` the last one."""

    num_envs: int
    metadata: dict[str, Any]

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]: ...

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]: ...


def require_same_step(env: VectorEnvironment) -> None:
    """Raises ValueError unless resets happen in the step that ends an episode."""
    mode = env.metadata.get("autoreset_mode")
    if getattr(mode, "name", mode) != "SAME_STEP":
        raise ValueError(
            f"the vector environment resets in mode {mode}; make it with "
            "autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP"
        )


def commands(scales: Scales, action: Float[Tensor, "E D"]) -> np.ndarray:
    """What the environments take: (E, A) for single steps, (E, H, A) for chunks."""
    command = scales.command(action)
    return command[:, 0] if scales.horizon == 1 else command


def states(scales: Scales, observation: Any) -> Float[Tensor, "E S"]:
    """Observations as the policy's states."""
    return scales.state(torch.from_numpy(np.asarray(observation, np.float32)))


def final_observation(following: Any, ended: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """What each step led to: the last observation of an episode and not the first of the next."""
    reached = np.array(following, np.float32)
    if ended.any():
        reached[ended] = np.stack([np.asarray(o, np.float32) for o in info["final_obs"][ended]])
    return reached


@torch.no_grad()
def true_returns(
    policies: Policies,
    scales: Scales,
    env: VectorEnvironment,
    *,
    seed: int,
    max_steps: int = 1000,
    noise: bool = False,
) -> Float[Tensor, "K n"]:
    """Undiscounted return of one episode in each environment, mu(s) as the action.

    Args:
        env: a multiple n of K environments, the first n for the first member. Every member starts
            from the same n seeds.
        noise: act with the noise of the inner steps, as PPO collects.
    """
    require_same_step(env)
    members = policies.members
    each, rest = divmod(env.num_envs, members)
    if rest or not each:
        raise ValueError(f"{env.num_envs} environments for {members} members; give a multiple")
    generator = torch.Generator().manual_seed(seed)
    observation, _ = env.reset(seed=[seed + k for k in range(each)] * members)
    total = np.zeros(env.num_envs)
    running = np.ones(env.num_envs, np.bool_)
    for _ in range(max_steps):
        state = states(scales, observation).unflatten(0, (members, each))
        if noise:
            action = policies.sample(state, generator)[:, :, -1]
        else:
            action = policies.act(state, generator)
        observation, reward, terminated, truncated, _ = env.step(
            commands(scales, action.flatten(0, 1))
        )
        total += np.where(running, reward, 0.0)
        running &= ~(np.asarray(terminated) | np.asarray(truncated))
        if not running.any():
            break
    return torch.from_numpy(total.astype(np.float32)).view(members, each)
