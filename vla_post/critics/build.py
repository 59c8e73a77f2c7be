"""A fresh critic for a cell: sizes from its contract, scales from the policy's statistics."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from trajectory_store import Contract
from vla_post.batch import Policy
from vla_post.critics.bins import Bins
from vla_post.critics.encoders import Encoder, PolicyEncoder, StateEncoder
from vla_post.critics.networks import ChunkCritic, CriticConfig


@runtime_checkable
class Normalised(Protocol):
    """A policy that knows the statistics of its training data, as `LeRobotPolicy` does."""

    statistics: Mapping[str, Mapping[str, Any]]
    device: torch.device


def build_encoder(
    kind: Literal["auto", "state", "policy"], policy: Policy, contract: Contract
) -> Encoder:
    """What a critic of this policy and cell looks through.

    Args:
        kind: `auto` takes the policy's features where the cell has cameras, else the vectors.
    """
    if kind == "policy" or (kind == "auto" and contract.images):
        return PolicyEncoder(policy, contract)
    known = _statistics(policy)
    instructions = [task.instruction for task in contract.tasks.values()]
    vectors = {key: known.statistics[key] for key in contract.vectors if key in known.statistics}
    return StateEncoder(vectors, instructions, device=known.device)


def build_critic(
    config: CriticConfig,
    encoder: Encoder,
    contract: Contract,
    policy: Policy,
    *,
    chunk: int,
    returns: tuple[float, float],
) -> ChunkCritic:
    """A critic with random weights.

    Args:
        chunk: h, control steps that it values at a time.
        returns: smallest and largest return, for a categorical output.
    """
    known = _statistics(policy)
    action = known.statistics["action"]
    mean, std = (torch.from_numpy(np.asarray(action[name], np.float32)) for name in ("mean", "std"))
    low, high = returns
    bins = None
    if config.output != "scalar":
        bins = Bins(low=low, high=high, count=config.bins, labels=config.output)
    critic = ChunkCritic(
        config, encoder.size, chunk=chunk, action_mean=mean, action_std=std, bins=bins
    )
    return critic.to(known.device)


def longest_steps(contract: Contract) -> float:
    """Control steps of the task with the longest time limit."""
    return contract.control_hz * max(task.time_limit_s for task in contract.tasks.values())


def _statistics(policy: Policy) -> Normalised:
    if not isinstance(policy, Normalised):
        raise ValueError(
            f"{type(policy).__name__} has no `statistics`; a critic needs the mean and deviation "
            "of what it sees and of the actions, as a checkpoint's card keeps them"
        )
    return policy
