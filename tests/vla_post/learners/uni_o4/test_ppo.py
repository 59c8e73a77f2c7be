"""The objective: hand-computed cases, limits, schedules (U-2, U-3, U-7, U-8)."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from vla_post.learners.uni_o4.data import Transitions
from vla_post.learners.uni_o4.policies import (
    FlowPolicies,
    GaussianPolicies,
    PolicyConfig,
    build_policies,
    normal_log_density,
)
from vla_post.learners.uni_o4.ppo import clip_at, gae, ppo_terms, shaped_advantage
from vla_post.learners.uni_o4.samples import prepare, scales_of
from vla_post.learners.uni_o4.stage import MemberAdamW

SMALL: dict[str, Any] = {"width": 16, "layers": 1}


def test_an_update_of_two_samples_is_the_hand_computed_one():
    # One Gaussian of deviation 1 whose mean is the only parameter; it was 0 when it acted, and is
    # 0.1 now. Actions 0.6 and 3.1, advantages 1 and 2, clip 0.2.
    mean = nn.Parameter(torch.full((1, 1), 0.1))
    action = torch.tensor([[0.6, 3.1]])
    now = normal_log_density(action, mean, torch.zeros(1))[..., None]
    before = normal_log_density(action, torch.zeros(1, 1), torch.zeros(1))[..., None]
    first = math.exp((0.6**2 - 0.5**2) / 2)  # 1.0565, inside the clip
    second = math.exp((3.1**2 - 3.0**2) / 2)  # 1.357, beyond it, and gaining: cut to 1.2
    terms = ppo_terms(now, before, torch.tensor([[1.0, 2.0]]), clip=0.2)
    assert float(terms.loss.detach()) == pytest.approx(-(first * 1 + 1.2 * 2) / 2, rel=1e-5)
    assert float(terms.clipped) == 0.5
    log_1, log_2 = math.log(first), math.log(second)
    kl = (first - 1 - log_1 + second - 1 - log_2) / 2
    assert float(terms.kl) == pytest.approx(kl, rel=1e-4)
    optimizer = MemberAdamW([mean], rate=0.01, max_grad_norm=100.0)
    step = optimizer.step(terms.loss.sum())
    # Only the first sample has a gradient: -(1/2) rho A (a - mean); Adam's first step is the rate.
    assert step["grad_norm"] == pytest.approx(0.5 * first * 0.5, rel=1e-5)
    assert float(mean.detach()) == pytest.approx(0.1 + 0.01, rel=1e-5)


def test_a_loss_beyond_the_clip_still_pulls_back():
    now, before = torch.tensor([[[math.log(1.5)]]]), torch.zeros(1, 1, 1)
    terms = ppo_terms(now, before, torch.tensor([[-1.0]]), clip=0.2)
    assert float(terms.loss) == pytest.approx(1.5)
    assert float(terms.clipped) == 0.0
    terms = ppo_terms(-now, before, torch.tensor([[-1.0]]), clip=0.2)
    assert float(terms.loss) == pytest.approx(0.8)
    assert float(terms.clipped) == 1.0


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_with_old_equal_to_new_the_gradient_is_the_plain_policy_gradient(
    kind: Literal["gaussian", "flow"],
):
    """U-2."""
    torch.manual_seed(0)
    config = PolicyConfig(kind=kind, members=3, steps=3, **SMALL)
    policies = build_policies(config, 2, 2)
    generator = torch.Generator().manual_seed(1)
    state, advantage = torch.randn(8, 2), torch.randn(3, 8)
    with torch.no_grad():
        chain, scored = policies.sample_scored(state, generator)
    log_prob = policies.log_prob(state, chain)
    torch.testing.assert_close(scored, log_prob.detach())
    terms = ppo_terms(log_prob, log_prob.detach(), advantage, clip=0.2)
    assert float(terms.kl.abs().max()) == 0.0
    assert float(terms.clipped.max()) == 0.0
    parameters = list(policies.parameters())
    got = torch.autograd.grad(terms.loss.sum(), parameters, retain_graph=True)
    plain = -(policies.log_prob(state, chain).sum(dim=-1) * advantage).mean(dim=1).sum()
    wanted = torch.autograd.grad(plain, parameters)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_clip_schedule():
    """U-3."""
    got = [clip_at(step, 0.25) for step in (0, 100, 200, 201, 9999)]
    assert got == pytest.approx([0.25, 0.2475, 0.245, 0.245, 0.245])


def test_omega_weighs_gains_and_losses_and_a_half_leaves_them_alone():
    """U-7."""
    raw = torch.tensor([[1.0, -1.0, 3.0, -3.0]])
    torch.testing.assert_close(shaped_advantage(raw, 0.5), shaped_advantage(raw, None))
    standard = raw / raw.std(dim=1, keepdim=True)
    torch.testing.assert_close(shaped_advantage(raw, None), standard)
    weight = torch.tensor([0.7, 0.3, 0.7, 0.3])
    torch.testing.assert_close(shaped_advantage(raw, 0.7), standard * weight)


def test_one_inner_step_is_gaussian_ppo_and_the_chain_sums_over_steps():
    """U-8, of the inner steps."""
    torch.manual_seed(0)
    flow = FlowPolicies(PolicyConfig(kind="flow", members=1, steps=1, **SMALL), 2, 2)
    state = torch.randn(5, 2)
    chain = flow.sample(state, torch.Generator().manual_seed(0))
    start, action = chain[:, :, 0], chain[:, :, 1]
    mean = start + flow.velocity(state, start, torch.zeros(()))
    noise = flow.log_noise(state, start, torch.zeros(()))
    expected = normal_log_density(action, mean, noise).sum(dim=-1)
    torch.testing.assert_close(flow.log_prob(state, chain)[..., 0], expected)
    new, old, gain = torch.randn(1, 5, 4) * 0.3, torch.randn(1, 5, 4) * 0.3, torch.randn(1, 5)
    whole = ppo_terms(new, old, gain, clip=0.2).loss
    apart = [
        ppo_terms(n, o, gain, clip=0.2).loss
        for n, o in zip(new.split(1, 2), old.split(1, 2), strict=True)
    ]
    torch.testing.assert_close(whole, torch.stack(apart).sum(dim=0))
    # gamma_den of DPPO: the last step counts fully.
    weighed = ppo_terms(new[..., :2], old[..., :2], gain, clip=0.2, inner_discount=0.5).loss
    first, last = (
        ppo_terms(new[..., k : k + 1], old[..., k : k + 1], gain, clip=0.2).loss for k in (0, 1)
    )
    torch.testing.assert_close(weighed, 0.5 * first + last)


def test_noise_of_a_flow_stays_in_its_bounds():
    flow = FlowPolicies(PolicyConfig(kind="flow", members=2, noise=(0.1, 0.2), **SMALL), 3, 2)
    noise = flow.log_noise(10 * torch.randn(50, 3), torch.randn(2, 50, 2), torch.zeros(())).exp()
    assert float(noise.min().detach()) >= 0.1
    assert float(noise.max().detach()) <= 0.2


def test_gae_is_the_sum_of_its_terms_and_ends_cut_what_they_should():
    reward = torch.tensor([[1.0], [2.0], [4.0]])
    value = torch.tensor([[10.0], [20.0], [30.0]])
    following = torch.tensor([[20.0], [50.0], [40.0]])
    no = torch.zeros(3, 1, dtype=torch.bool)
    cut = torch.tensor([[False], [True], [False]])
    # Row 1 ends by the clock: its bootstrap of 50 stays, but row 2 is another episode.
    got = gae(reward, value, following, no, cut, discount=0.5, trace=0.5)
    deltas = [1 + 10 - 10, 2 + 25 - 20, 4 + 20 - 30]
    expected = [deltas[0] + 0.25 * deltas[1], deltas[1], deltas[2]]
    torch.testing.assert_close(got[:, 0], torch.tensor(expected).float())
    got = gae(reward, value, following, cut, cut, discount=0.5, trace=0.5)
    assert float(got[1]) == 2 - 20
    # lambda = 1 is the discounted return and the last bootstrap, less the value.
    following = torch.tensor([[20.0], [30.0], [40.0]])
    got = gae(reward, value, following, no, no, discount=0.5, trace=1.0)
    assert float(got[0]) == pytest.approx(1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 40 - 10)


def chain_data() -> Transitions:
    """Two episodes of five steps: one ends for real, one by the clock."""
    state = np.tile(np.arange(5, dtype=np.float32), 2)[:, None]
    last = np.arange(10) % 5 == 4
    return Transitions(
        observations=state,
        actions=np.linspace(-1, 1, 10, dtype=np.float32)[:, None],
        rewards=np.arange(10, dtype=np.float32),
        terminals=last & (np.arange(10) < 5),
        timeouts=last & (np.arange(10) >= 5),
        next_observations=state + 1,
    )


def test_chunks_of_one_step_are_the_papers_transitions():
    """U-8, of the chunk's discount."""
    data = chain_data()
    scales = scales_of(data, discount=0.9)
    rows = prepare(data, scales)
    torch.testing.assert_close(rows.reward * scales.reward, torch.from_numpy(data.rewards))
    torch.testing.assert_close(rows.discount, torch.full((10,), 0.9))
    assert rows.following.tolist() == [1, 2, 3, 4, -1, 6, 7, 8, 9, -1]
    assert rows.terminated.tolist() == data.terminals.tolist()
    assert rows.tail_discount[:5].tolist() == [0.0] * 5
    torch.testing.assert_close(rows.tail_discount[5:], 0.9 ** torch.arange(5.0, 0.0, -1.0))
    reached = scales.raw_state(rows.next_state)
    torch.testing.assert_close(reached, torch.from_numpy(data.next_observations))


def test_chunks_discount_by_the_steps_that_were_there():
    data = chain_data()
    scales = scales_of(data, discount=0.5, horizon=3)
    rows = prepare(data, scales)
    got = rows.reward * scales.reward
    assert got[1].item() == pytest.approx(1 + 0.5 * 2 + 0.25 * 3)
    assert got[3].item() == pytest.approx(3 + 0.5 * 4)  # two steps to the end
    torch.testing.assert_close(rows.discount[:5], torch.tensor([0.125, 0.125, 0.125, 0.25, 0.5]))
    assert rows.following.tolist() == [3, 4, -1, -1, -1, 8, 9, -1, -1, -1]
    assert rows.terminated.tolist() == [False, False, True, True, True] + [False] * 5
    assert rows.valid[3].tolist() == [True, True, False]
    assert scales.raw_state(rows.next_state)[:5, 0].tolist() == pytest.approx([3, 4, 5, 5, 5])
    # Commands go back to robot units, cut at the limits.
    command = scales.command(torch.tensor([[0.0, 1.0, 3.0]]))
    np.testing.assert_allclose(command, [[[0.0], [1.0], [1.0]]])


def test_a_member_taken_out_acts_as_it_did_in_the_stack():
    torch.manual_seed(0)
    policies = GaussianPolicies(PolicyConfig(members=3, **SMALL), 2, 2)
    state = torch.randn(4, 2)
    alone = policies.member(1)
    assert alone.members == 1
    torch.testing.assert_close(alone.act(state, None)[0], policies.act(state, None)[1])
    assert policies.members == 3
