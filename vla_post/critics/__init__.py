"""Values of action chunks and of observations: networks, targets, and what they say about data."""

from vla_post.critics.bins import Bins
from vla_post.critics.encoders import Encoder, PolicyEncoder, StateEncoder
from vla_post.critics.ensemble import aggregate, polyak_
from vla_post.critics.networks import ChunkCritic, CriticConfig, CriticInput, ValueNet
from vla_post.critics.returns import (
    RewardConfig,
    Unrewarded,
    monte_carlo_return,
    require_outcomes,
    require_rewards,
    rewards_of,
)

__all__ = [
    "Bins",
    "ChunkCritic",
    "CriticConfig",
    "CriticInput",
    "Encoder",
    "PolicyEncoder",
    "RewardConfig",
    "StateEncoder",
    "Unrewarded",
    "ValueNet",
    "aggregate",
    "monte_carlo_return",
    "polyak_",
    "require_outcomes",
    "require_rewards",
    "rewards_of",
]
