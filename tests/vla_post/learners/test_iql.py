"""IQL on a chain whose values are known: the data's average at tau .5, the best of it towards 1."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vla_post.batch import Learner
from vla_post.critics import ChunkCritic, CriticConfig, RewardConfig, StateEncoder, ValueNet
from vla_post.learners.iql import Iql, IqlConfig
from vla_post.learners.weighting import WeightConfig

from .chain import GAMMA, KEY, STATES, Walker, chain_batch, exact_value, one_hot


def learner(policy: Walker, **changes: Any) -> Iql:
    settings: dict[str, Any] = {
        "rewards": RewardConfig(discount=GAMMA),
        "critic": CriticConfig(heads=1, width=64, layers=2),
        "target_rate": 0.05,
        "critic_learning_rate": 2e-3,
        "warmup_updates": 1,
        "weight_decay": 0.0,
        "critic_warmup": 0,
    }
    config = IqlConfig(**settings | changes)
    encoder = StateEncoder({KEY: {"mean": np.zeros(STATES), "std": np.ones(STATES)}}, ["walk"])
    critic = ChunkCritic(
        config.critic,
        encoder.size,
        chunk=policy.horizon,
        action_mean=torch.zeros(1),
        action_std=torch.ones(1),
    )
    value = ValueNet(encoder.size, None, width=64)
    return Iql(policy, list(policy.parameters()), critic, value, encoder, config)


@pytest.mark.parametrize(("expectile", "right"), [(0.5, 0.5), (0.98, 0.98)])
def test_v_is_the_datas_value_in_the_middle_and_the_best_of_it_at_the_top(
    expectile: float, right: float
):
    """The behaviour goes right half of the time; the best that it does is to go right always."""
    torch.manual_seed(0)
    iql = learner(Walker(1, 0.5), expectile=expectile)
    for number in range(900):
        iql.critic_optimizer.config = replace(
            iql.critic_optimizer.config, learning_rate=2e-3 * (1 - 0.95 * number / 900)
        )
        iql.evaluate(chain_batch(128, 1, 0.5))
    v = iql.value(one_hot(torch.arange(STATES)), ["walk"] * STATES)
    error = (v - exact_value(right)).abs().mean()
    assert error < 0.06, f"mean error {error:.3f}"


def test_improvement_moves_the_policy_towards_what_was_better():
    torch.manual_seed(0)
    policy = Walker(2, 0.5)
    iql = learner(policy, learning_rate=5e-2, weights=WeightConfig(beta=0.5))
    assert isinstance(iql, Learner)
    for _ in range(300):
        iql.evaluate(chain_batch(128, 2, 0.5))
    for _ in range(100):
        iql.improve(chain_batch(128, 2, 0.5))
    assert policy.logit.item() > 0.3  # plain cloning of this behaviour stays at 0


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="expectile"):
        IqlConfig(expectile=1.0)
