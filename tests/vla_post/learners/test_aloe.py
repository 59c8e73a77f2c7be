"""ALOE: checks 5, 6 and 8 to 10 of the specification, and exact values of a chain.

Checks 1 to 4 and 7 are those of its parts, in tests/vla_post/critics.
"""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_post.batch import Batch, Metrics, NonFiniteLoss
from vla_post.critics import ChunkCritic, CriticConfig, RewardConfig, StateEncoder
from vla_post.critics.returns import fill_past_end
from vla_post.learners.aloe import Aloe, AloeConfig, aloe_advantage, aloe_target
from vla_post.learners.weighting import (
    RunningScale,
    WeightConfig,
    advantage_weight,
    clipped_share,
    effective_sample_size,
    weighted_flow_loss,
)

from .chain import GAMMA, KEY, STATES, Walker, chain_batch, exact_q, one_hot

RIGHT_NOW = 0.8
PLAIN = WeightConfig(scale="none", beta=1.0, clip=5.0)


def learner(policy: Any, horizon: int, **changes: Any) -> Aloe:
    settings: dict[str, Any] = {
        "rewards": RewardConfig(discount=GAMMA),
        "critic": CriticConfig(heads=2, width=64, layers=2),
        "target": "mean",
        "pessimism": "mean",
        "target_rate": 0.05,
        "target_samples": 4,
        "critic_learning_rate": 2e-3,
        "weights": PLAIN,
        "warmup_updates": 1,
        "weight_decay": 0.0,
        "critic_warmup": 0,
    }
    config = AloeConfig(**settings | changes)
    encoder = StateEncoder({KEY: {"mean": np.zeros(STATES), "std": np.ones(STATES)}}, ["walk"])
    critic = ChunkCritic(
        config.critic,
        encoder.size,
        chunk=horizon,
        action_mean=torch.zeros(1),
        action_std=torch.ones(1),
    )
    return Aloe(policy, list(policy.parameters()), critic, encoder, config)


@pytest.mark.parametrize(("horizon", "updates"), [(1, 700), (4, 500), (8, 500)])
def test_the_learned_q_is_the_exact_one_of_the_current_policy(horizon: int, updates: int):
    """Behaviour goes right half of the time, the current policy eight times in ten: .05 at most in
    the mean, on values that reach from .27 to 1; the behaviour's own values lie .2 lower."""
    torch.manual_seed(0)
    aloe = learner(Walker(horizon, RIGHT_NOW), horizon)
    for number in range(updates):
        aloe.critic_optimizer.config = replace(
            aloe.critic_optimizer.config, learning_rate=2e-3 * (1 - 0.95 * number / updates)
        )
        aloe.evaluate(chain_batch(128, horizon, 0.5))
    test = chain_batch(500, horizon, 0.5)
    state = test.observation[KEY].argmax(dim=1)
    exact = exact_q(state, test.action[..., 0], RIGHT_NOW)
    behaviour = exact_q(state, test.action[..., 0], 0.5)
    with torch.no_grad():
        seen = aloe.encoder(test.observation, test.instruction)
        q = aloe.critic(seen, test.action[:, None])[:, 0].mean(dim=1)
    error = (q - exact).abs().mean()
    assert error < 0.05, f"mean error {error:.3f}"
    if horizon < 8:
        assert (q - behaviour).abs().mean() > 2 * error


def test_aloe1_the_whole_target_of_one_step_with_the_minimum_over_heads():
    torch.manual_seed(0)
    reward, q = torch.randn(32, 1), torch.randn(32, 1, 5)
    ended = torch.rand(32) < 0.5
    got = aloe_target(reward, torch.ones(32, dtype=torch.int64), ended, q, discount=0.9)
    expected = reward[:, 0] + 0.9 * (1 - ended.float()) * q[:, 0].amin(dim=1)
    torch.testing.assert_close(got, expected)


def test_aloe5_the_policys_own_chunk_has_no_advantage_and_weights_stay_in_their_range():
    torch.manual_seed(0)
    q = torch.randn(16, 4)
    advantage = aloe_advantage(q, q[:, None])
    assert (advantage == 0).all()
    assert (advantage_weight(advantage, PLAIN) == 1).all()
    wild = torch.randn(1000) * 100
    weight = advantage_weight(wild, replace(PLAIN, clip=2.0))
    assert weight.min() == pytest.approx(np.exp(-2.0), rel=1e-5)
    assert weight.max() == pytest.approx(np.exp(2.0), rel=1e-5)


def test_aloe6_neither_loss_moves_the_other_network():
    torch.manual_seed(0)
    policy = Walker(4, 0.5)
    aloe = learner(policy, 4)
    aloe.evaluate(chain_batch(32, 4, 0.5))
    assert policy.logit.grad is None
    for parameter in aloe.critic.parameters():
        parameter.grad = None
    before = [p.detach().clone() for p in aloe.critic.parameters()]
    aloe.improve(chain_batch(32, 4, 0.5))
    assert policy.logit.grad is not None
    assert all(p.grad is None for p in aloe.critic.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, aloe.critic.parameters(), strict=True))


def test_aloe8_a_policy_that_got_better_is_worth_more_than_its_buffer():
    """Two states in a row: the buffer goes wrong nine times in ten, the policy of today never."""
    torch.manual_seed(0)
    policy = Walker(1, 0.999)
    aloe = learner(policy, 1)

    def buffer(size: int) -> Batch:
        second = torch.rand(size) < 0.5
        good = torch.rand(size) < 0.1
        action = torch.where(good, 1.0, -1.0)
        ends = second | ~good
        batch = chain_batch(size, 1, 0.5)
        return batch.replace(
            observation=one_hot(second.long()),
            next_observation=one_hot(torch.ones(size, dtype=torch.int64)),
            action=action[:, None, None],
            n=torch.ones(size, dtype=torch.int64),
            terminated=ends,
            left=torch.where(ends, 1, 2),
            outcome=torch.where(ends & second & good, 1, torch.where(ends, -1, 0)),
        )

    for _ in range(500):
        aloe.evaluate(buffer(128))
    with torch.no_grad():
        seen = aloe.encoder(one_hot(torch.tensor([0])), ["walk"])
        q = aloe.critic(seen, torch.ones(1, 1, 1, 1)).mean().item()
    in_buffer = GAMMA * 0.1
    assert q == pytest.approx(GAMMA, abs=0.1)
    assert q > in_buffer + 0.5


def test_aloe9_clipping_keeps_the_fit_away_from_the_exponential_tilt():
    q = torch.tensor([0.0, 4.0, 6.0])
    clipped = advantage_weight(q, replace(PLAIN, clip=1.0))
    torch.testing.assert_close(
        clipped / clipped.sum(), torch.tensor([0.155, 0.422, 0.422]), atol=1e-3, rtol=0
    )
    free = advantage_weight(q, replace(PLAIN, clip=100.0))
    torch.testing.assert_close(
        free / free.sum(), torch.tensor([0.002, 0.119, 0.879]), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("shift", [0.5, -2.0])
def test_aloe10_a_constant_on_every_reward_of_an_endless_chain_changes_no_advantage(shift: float):
    """Three states in a ring, two actions of two steps each, uniform policy: exact by iteration."""

    def advantages(extra: float) -> Tensor:
        reward = torch.tensor([[0.0, 1.0], [0.2, 0.0], [0.0, 0.0]], dtype=torch.float64) + extra
        state, action = torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3)
        after = (state + 1 + action) % 3
        # Each chunk earns the reward of its state and action twice, two steps long.
        earned = reward[state, action][:, None].expand(6, 2)
        q = torch.zeros(6, dtype=torch.float64)
        for _ in range(400):
            sampled = q.view(3, 2)[after][..., None]
            n, ended = torch.full((6,), 2), torch.zeros(6, dtype=torch.bool)
            q = aloe_target(earned, n, ended, sampled, discount=0.9)
        return aloe_advantage(q[:, None], q.view(3, 2)[state][..., None])

    torch.testing.assert_close(advantages(shift), advantages(0.0))


def test_the_rest_of_a_chunk_past_an_end_is_somebody_elses():
    action = torch.arange(6.0).view(2, 3, 1)
    got = fill_past_end(action, torch.tensor([1, 3]))
    assert got[..., 0].tolist() == [[0.0, 4.0, 5.0], [3.0, 4.0, 5.0]]


def test_equal_weights_are_plain_cloning_and_padding_weighs_nothing():
    loss = torch.tensor([1.0, 2.0, torch.nan])
    real = torch.tensor([True, True, False])
    assert weighted_flow_loss(loss, torch.ones(3), real).item() == 1.5


def test_both_clip_forms_agree_inside_and_count_what_they_clip():
    advantage = torch.tensor([-1.0, 0.5, 4.0])
    by_weight = replace(PLAIN, form="clip_weight", max_weight=20.0)
    by_advantage = replace(PLAIN, clip=3.0)
    a, b = (advantage_weight(advantage, c) for c in (by_weight, by_advantage))
    torch.testing.assert_close(a[:2], b[:2])
    assert (a[2].item(), b[2].item()) == (20.0, pytest.approx(np.exp(3.0), rel=1e-5))
    assert clipped_share(advantage, by_weight) == pytest.approx(1 / 3)
    assert clipped_share(advantage, by_advantage) == pytest.approx(1 / 3)


def test_effective_sample_size_and_running_scale():
    assert effective_sample_size(torch.ones(8)) == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([1.0] + [0.0] * 7)) == pytest.approx(1 / 8)
    scale, numbers = RunningScale(), torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        assert scale.update(3.0 * numbers) == pytest.approx(3.0, rel=0.1)


def test_weights_in_units_of_the_spread_do_not_depend_on_the_rewards_scale():
    advantage = torch.randn(64, generator=torch.Generator().manual_seed(0))
    config = WeightConfig(scale="std")
    weights = [
        advantage_weight(k * advantage, config, scale=RunningScale().update(k * advantage))
        for k in (1e-3, 1.0, 50.0)
    ]
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[2], weights[1])


def test_improvement_moves_the_policy_towards_what_is_better():
    torch.manual_seed(0)
    policy = Walker(2, 0.5)
    aloe = learner(policy, 2, learning_rate=5e-2, weights=WeightConfig(beta=0.5))
    for _ in range(300):
        aloe.evaluate(chain_batch(128, 2, 0.5))
    aloe.begin_improvement()
    metrics: Metrics = {}
    for _ in range(100):
        metrics = aloe.improve(chain_batch(128, 2, 0.5))
    assert policy.logit.item() > 0.3  # plain cloning of this behaviour stays at 0
    assert 0.0 < metrics["weight/effective_share"] < 1.0
    assert sum(v for k, v in metrics.items() if "/bin_" in k) == pytest.approx(1.0)


def test_continuous_mode_begins_with_the_critic_alone_and_resumes_where_it_was():
    torch.manual_seed(0)
    aloe = learner(Walker(4, 0.5), 4, critic_warmup=3)
    batches = [chain_batch(16, 4, 0.5) for _ in range(6)]
    logits: list[float] = []
    metrics: Metrics = {}
    for batch in batches:
        metrics = aloe.update(batch)
        logits.append(aloe.policy.logit.item())  # pyright: ignore
    assert logits[0] == logits[1] == logits[2] != logits[3]
    assert aloe.updates == 6
    assert {"critic/loss", "critic/disagreement", "critic/loss_policy", "weight/mean"} <= set(
        metrics
    )

    again = learner(Walker(4, 0.5), 4, critic_warmup=3)
    again.load_state_dict(copy.deepcopy(aloe.state_dict()))
    for name, module in again.modules.items():
        module.load_state_dict(aloe.modules[name].state_dict())
    again.policy.load_state_dict(aloe.policy.state_dict())  # pyright: ignore
    for one in (aloe, again):
        torch.manual_seed(1)
        one.update(batches[0])
    for a, b in zip(aloe.critic.parameters(), again.critic.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_changes_neither_network():
    torch.manual_seed(0)
    aloe = learner(Walker(4, 0.5), 4)
    batch = chain_batch(8, 4, 0.5)
    batch.action[0, 0, 0] = float("nan")
    before = [p.detach().clone() for m in (aloe.critic, aloe.policy) for p in m.parameters()]  # pyright: ignore
    with pytest.raises(NonFiniteLoss):
        aloe.update(batch)
    after = [p for m in (aloe.critic, aloe.policy) for p in m.parameters()]  # pyright: ignore
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
