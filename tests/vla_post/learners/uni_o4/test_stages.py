"""Values, cloning, dynamics, AM-Q and offline steps: U-1, U-4 to U-6 and U-9, BPPO, resuming."""

import copy
import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_post.learners.uni_o4.amq import GateConfig, Range, accepted, amq, rank_correlation
from vla_post.learners.uni_o4.cloning import Cloning, CloningConfig, cloning_loss, disagreement
from vla_post.learners.uni_o4.data import Transitions
from vla_post.learners.uni_o4.dynamics import (
    Dynamics,
    DynamicsConfig,
    DynamicsDiverged,
    DynamicsFit,
    termination_of,
)
from vla_post.learners.uni_o4.offline import OfflineConfig, OfflinePpo
from vla_post.learners.uni_o4.policies import GaussianPolicies, PolicyConfig, build_policies
from vla_post.learners.uni_o4.samples import Samples, Scales, draw, prepare, scales_of
from vla_post.learners.uni_o4.stage import Stage
from vla_post.learners.uni_o4.values import ValueConfig, ValueFit, Values

SMALL: dict[str, Any] = {"width": 16, "layers": 1}


def gliding(n: int = 400, seed: int = 0) -> Transitions:
    """(position, velocity) with constant velocity; the reward is the action's closeness to 0.5."""
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(n, 2)).astype(np.float32)
    action = rng.uniform(-1, 1, (n, 1)).astype(np.float32)
    last = np.arange(n) % 20 == 19
    moved = state.copy()
    moved[:, 0] += 0.1 * state[:, 1]
    return Transitions(
        observations=state,
        actions=action,
        rewards=-np.abs(action[:, 0] - 0.5),
        terminals=last,
        timeouts=np.zeros(n, np.bool_),
        next_observations=moved,
    )


def ready(members: int = 2) -> tuple[GaussianPolicies, Values, Samples, Scales]:
    torch.manual_seed(0)
    data = gliding()
    scales = scales_of(data, discount=0.9)
    policies = GaussianPolicies(PolicyConfig(members=members, **SMALL), 2, 1)
    return policies, Values(2, 1, ValueConfig(**SMALL)), prepare(data, scales), scales


class Still:
    """A model in which nothing moves and nothing ends."""

    def step(
        self, state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        return state, torch.zeros(len(state)), torch.zeros(len(state))


# Cloning ------------------------------------------------------------------------------------------


def gradient(alpha: float, form: Literal["kl", "log_prob"]) -> Tensor:
    policies, _, samples, _ = ready(members=3)
    index, generator = draw(len(samples), 64, 0, 0)
    rows = samples.rows(index)
    terms = policies.clone(rows.state, rows.action, rows.valid, generator)
    loss = cloning_loss(
        terms.loss,
        terms.divergence,
        alpha=alpha,
        disagreement=form,
        ceiling=math.inf,
    )
    grads = torch.autograd.grad(loss.sum(), list(policies.parameters()))
    return torch.cat([g.flatten() for g in grads])


def test_only_the_kl_form_pushes_members_apart():
    """U-1, of the gradients."""
    plain = gradient(0.0, "kl")
    torch.testing.assert_close(gradient(0.0, "log_prob"), plain)
    torch.testing.assert_close(gradient(0.1, "log_prob"), 1.1 * plain, rtol=1e-4, atol=1e-7)
    pushed = gradient(0.1, "kl")
    cosine = torch.nn.functional.cosine_similarity(pushed, plain, dim=0)
    assert float(cosine) < 0.9999
    assert not torch.allclose(pushed, plain * (pushed.norm() / plain.norm()), rtol=1e-2)


def test_members_trained_with_the_kl_form_end_further_apart():
    """U-1, of the trained members."""
    apart: list[float] = []
    losses: list[float] = []
    for alpha in (0.0, 0.6):
        policies, _, samples, _ = ready(members=3)
        config = CloningConfig(updates=200, alpha=alpha, batch_size=64, learning_rate=3e-3)
        stage = Cloning(policies, samples, config)
        metrics = [stage.update() for _ in range(200)]
        apart.append(disagreement(policies, samples.state, torch.Generator()))
        losses.append(float(np.mean([m["cloning/loss"] for m in metrics[-20:]])))
    assert apart[1] > 5 * apart[0]
    assert losses[1] < losses[0] + 0.3  # and they still clone


def test_a_stack_trains_as_its_members_would_alone():
    policies, _, samples, _ = ready(members=2)
    alone = policies.member(1)
    config = CloningConfig(alpha=0.0, batch_size=32, max_grad_norm=0.1)
    together, single = Cloning(policies, samples, config), Cloning(alone, samples, config)
    for _ in range(5):
        together.update()
        single.update()
    state = samples.state[:8]
    torch.testing.assert_close(policies.act(state)[1], alone.act(state, None)[0])


# Values -------------------------------------------------------------------------------------------


def test_sarsa_on_a_deterministic_chain_sees_no_advantage_in_its_own_actions():
    """U-6."""
    n = 80
    place = np.arange(n) % 4
    state = np.eye(4, dtype=np.float32)
    data = Transitions(
        observations=state[place],
        actions=np.linspace(-0.6, 0.6, 4, dtype=np.float32)[place][:, None],
        rewards=(place == 3).astype(np.float32),
        terminals=place == 3,
        timeouts=np.zeros(n, np.bool_),
        next_observations=state[(place + 1) % 4],
    )
    scales = scales_of(data, discount=0.8)
    samples = prepare(data, scales)
    torch.manual_seed(0)
    config = ValueConfig(width=32, layers=1, learning_rate=3e-3, target_rate=0.1, batch_size=32)
    values = Values(4, 1, config)
    stage = ValueFit(values, samples)
    for _ in range(400):
        stage.update()
    rows = samples.rows(torch.arange(4))
    wanted = torch.tensor([0.8**3, 0.8**2, 0.8, 1.0]) / scales.reward
    torch.testing.assert_close(rows.returns, wanted)
    torch.testing.assert_close(values.v(rows.state).detach(), wanted, rtol=0, atol=0.1)
    advantage = values.advantage(rows.state, rows.action[:, None])
    assert float(advantage.abs().max()) < 0.1


def test_targets_cut_at_real_ends_and_bootstrap_at_the_clock():
    _, values, samples, _ = ready()
    stage = ValueFit(values, samples)
    real = samples.rows(torch.arange(19, 20))
    torch.testing.assert_close(stage.sarsa_target(real), real.reward)
    torch.testing.assert_close(stage.iql_target(real), real.reward)
    cut = replace(real, terminated=torch.tensor([False]))
    later = values.v(cut.next_state).detach()
    torch.testing.assert_close(stage.sarsa_target(cut), cut.reward + cut.discount * later)


def test_expectiles_of_a_half_are_half_the_squared_error():
    _, _, samples, _ = ready()
    values = Values(2, 1, ValueConfig(kind="iql", expectile=0.5, **SMALL))
    rows = samples.rows(torch.arange(8))
    q = values.q(rows.state, rows.action[:, None])[:, 0]
    stage = ValueFit(values, samples)
    got = stage.expectile_loss(rows)
    torch.testing.assert_close(got, 0.5 * (q - values.v(rows.state)).square())


# Dynamics -----------------------------------------------------------------------------------------


def fitted() -> tuple[Dynamics, Samples]:
    torch.manual_seed(0)
    data = gliding()
    samples = prepare(data, scales_of(data, discount=0.9))
    config = DynamicsConfig(
        members=3, elites=2, width=48, layers=2, max_updates=500, check_every=50, batch_size=64,
        learning_rate=3e-3,
    )  # fmt: skip
    dynamics = Dynamics(2, 1, config)
    stage = DynamicsFit(dynamics, samples)
    while not stage.done:
        stage.update()
    return dynamics, samples


def test_constant_velocity_is_learned_and_only_elites_are_asked():
    """U-9."""
    dynamics, samples = fitted()
    rows = samples.rows(torch.arange(100))
    dynamics.config = replace(dynamics.config, noise=False)
    state, _, _ = dynamics.step(rows.state, rows.action, torch.Generator().manual_seed(0))
    moved = (rows.next_state - rows.state).square().mean()
    assert float((state - rows.next_state).square().mean()) < 0.02 * float(moved)
    assert (state[:, 1] - rows.state[:, 1]).abs().max() < 0.02
    outsider = ({0, 1, 2} - set(dynamics.get_buffer("elites").tolist())).pop()
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter[outsider] = math.nan
    again, _, _ = dynamics.step(rows.state, rows.action, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, state)


def test_a_model_that_cannot_predict_is_named():
    data = gliding()
    rng = np.random.default_rng(1)
    noise = rng.normal(size=data.observations.shape).astype(np.float32)
    data = replace(data, next_observations=noise, rewards=rng.normal(size=400).astype(np.float32))
    samples = prepare(data, scales_of(data, discount=0.9))
    samples = replace(samples, state=torch.zeros_like(samples.state))
    config = DynamicsConfig(members=2, elites=1, max_updates=60, check_every=60, learning_rate=0.3)
    stage = DynamicsFit(Dynamics(2, 1, config), samples)
    for _ in range(59):
        stage.update()
    with pytest.raises(DynamicsDiverged, match="worse than a constant"):
        stage.update()


def test_known_rules_of_when_a_task_ends():
    hopper, walker = termination_of("Hopper-v5"), termination_of("Walker2d-v5")
    assert hopper is not None
    assert walker is not None
    state = torch.zeros(3, 11)
    state[:, 0] = torch.tensor([1.2, 0.6, 1.2])
    state[2, 1] = 0.3
    assert hopper(state).tolist() == [False, True, True]
    assert walker(state).tolist() == [False, True, False]
    assert termination_of("Reach-v3") is None


# AM-Q and the gate --------------------------------------------------------------------------------


class Chain:
    """States 0, 1, 2, ... on a line; each step goes one further; Q is ten times the state."""

    def __init__(self, ends_at: float = math.inf) -> None:
        self.ends_at = ends_at

    def step(
        self, state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        return state + 1.0, torch.zeros(len(state)), (state[:, 0] + 1.0 >= self.ends_at).float()

    def q(self, state: Tensor, action: Tensor) -> Tensor:
        return 10.0 * state


def test_amq_of_a_chain_is_the_hand_computed_mean():
    """U-5."""
    policies = GaussianPolicies(PolicyConfig(members=2, **SMALL), 1, 1)
    starts = torch.tensor([[0.0], [2.0]])
    score = GateConfig(horizon=3)
    got = amq(policies, Chain(), Chain(), starts, score, torch.Generator())
    # Visited: 0 1 2 and 2 3 4.
    torch.testing.assert_close(got.score, torch.full((2,), 10 * 12 / 6.0))
    got = amq(policies, Chain(), Chain(), starts, replace(score, form="sum"), torch.Generator())
    torch.testing.assert_close(got.score, torch.full((2,), 10 * 12 / 2.0))
    # An end at 3: 0 1 2 and 2.
    got = amq(policies, Chain(), Chain(3.0), starts, score, torch.Generator())
    torch.testing.assert_close(got.score, torch.full((2,), 10 * 5 / 4.0))
    torch.testing.assert_close(got.visited, torch.full((2,), 2.0))
    # Immediate ends: Q of the starts alone.
    got = amq(policies, Chain(), Chain(-1.0), starts, score, torch.Generator())
    torch.testing.assert_close(got.score, torch.full((2,), 10.0))


def test_leaving_the_datas_range_ends_a_rollout_and_too_many_are_an_error():
    policies = GaussianPolicies(PolicyConfig(members=1, **SMALL), 1, 1)
    starts = torch.tensor([[0.0], [4.0]])
    inside = Range.of(torch.tensor([[0.0], [5.0]]), margin=0.0)
    score = GateConfig(horizon=3, max_left=0.5)
    got = amq(policies, Chain(), Chain(), starts, score, torch.Generator(), inside=inside)
    # 0 1 2, and 4 5 before it leaves.
    torch.testing.assert_close(got.score, torch.tensor([10 * 12 / 5.0]))
    torch.testing.assert_close(got.left, torch.tensor([0.5]))
    with pytest.raises(DynamicsDiverged, match=r"100% of the model's roll-outs.*state number 0"):
        amq(
            policies, Chain(), Chain(), starts + 4, score, torch.Generator(), inside=inside
        )  # fmt: skip


def test_the_gate_is_strict():
    """U-4, of the comparison."""
    best = torch.tensor([1.0, 1.0, -2.0, 1.0])
    score = torch.tensor([1.0, 1.01, -1.95, math.nan])
    assert accepted(score, best).tolist() == [False, True, True, False]
    assert accepted(score, best, margin=0.05).tolist() == [False, False, False, False]
    assert accepted(torch.tensor([1.05, 1.06]), torch.ones(2), margin=0.0501).tolist() == [
        False,
        True,
    ]
    up, down = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([2.0, 9.0, 4.0])
    assert rank_correlation(up, down) == pytest.approx(1.0)
    assert rank_correlation(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])) == pytest.approx(-1)
    assert rank_correlation(torch.ones(3), up) == rank_correlation(up[:1], up[:1]) == 0.0


def test_a_refused_member_keeps_changing_while_its_old_policy_does_not():
    """U-4, of the parameters."""
    policies, values, samples, scales = ready()
    config = OfflineConfig(updates=10, batch_size=32, gate=GateConfig(every=5, horizon=1, starts=8))
    stage = OfflinePpo(policies, values, Still(), samples, scales, config)
    stage.update()
    assert stage.best is not None
    stage.best = torch.tensor([math.inf, -math.inf])
    before = copy.deepcopy(stage.old)
    start = copy.deepcopy(policies)
    for _ in range(4):
        stage.update()
    state = samples.state[:16]
    assert stage.looks[-1]["accepted"] == [False, True]
    torch.testing.assert_close(stage.old.act(state, None)[0], before.act(state, None)[0])
    torch.testing.assert_close(stage.old.act(state, None)[1], policies.act(state)[1])
    assert not torch.equal(policies.act(state)[0], start.act(state)[0])
    assert stage.select() == 0


# Offline steps ------------------------------------------------------------------------------------


def test_with_one_member_and_no_disagreement_it_is_bppo():
    # BPPO (arXiv:2302.11312) written down plainly, with torch's own distribution and Adam.
    policies, values, samples, scales = ready(members=1)
    reference = copy.deepcopy(policies)
    config = OfflineConfig(
        updates=6, batch_size=32, learning_rate=1e-3, clip=0.1, clip_total=10, clip_until=2,
        gate=GateConfig(every=1000),
    )  # fmt: skip
    stage = OfflinePpo(policies, values, Still(), samples, scales, config)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    old = copy.deepcopy(reference)

    def normal(of: GaussianPolicies, state: Tensor) -> torch.distributions.Normal:
        mean, log_std = of.distribution(state)
        return torch.distributions.Normal(mean[0], log_std[0].exp())

    for step in range(6):
        stage.update()
        index, generator = draw(len(samples), 32, 0, step)
        state = samples.state[index]
        with torch.no_grad():
            behaviour = normal(old, state)
            noise = torch.randn((1, 32, 1), generator=generator)[0]
            action = behaviour.mean + behaviour.stddev * noise
            advantage = values.advantage(state, action[:, None])[:, 0]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-10)
            advantage = torch.where(advantage > 0, 0.7, 0.3) * advantage
            old_log_prob = behaviour.log_prob(action).sum(dim=-1)
        ratio = (normal(reference, state).log_prob(action).sum(dim=-1) - old_log_prob).exp()
        clip = 0.1 * (1 - min(step, 2) / 10)
        loss = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 6)
        optimizer.step()
    state = samples.state[:16]
    torch.testing.assert_close(policies.act(state), reference.act(state), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_offline_steps_raise_what_the_critics_value(kind: Literal["gaussian", "flow"]):
    torch.manual_seed(0)
    data = gliding()
    scales = scales_of(data, discount=0.9)
    samples = prepare(data, scales)
    config = PolicyConfig(kind=kind, members=2, steps=2, **SMALL)
    policies = build_policies(config, 2, 1)

    class Close(Values):
        """Q is the closeness of the action to 0.5, V is 0."""

        def q(self, state: Tensor, action: Tensor) -> Tensor:
            return -(action[..., 0] - 0.5).abs()

        def v(self, state: Tensor) -> Tensor:
            return torch.zeros(len(state))

    values = Close(2, 1, ValueConfig(**SMALL))
    looks = GateConfig(every=20, horizon=2, starts=64)
    stage = OfflinePpo(
        policies, values, Still(), samples, scales,
        OfflineConfig(updates=200, batch_size=64, learning_rate=3e-3, gate=looks),
    )  # fmt: skip
    while not stage.done:
        metrics = stage.update()
        assert 0.0 <= metrics["offline/clip_fraction"] <= 1.0
    assert stage.best is not None
    first = torch.tensor(stage.looks[0]["score"])
    assert bool((stage.best > first + 0.1).all())
    assert sum(map(sum, (row["accepted"] for row in stage.looks))) >= 4


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["values", "cloning", "dynamics", "offline"])
def test_a_resumed_stage_goes_on_as_if_nothing_had_happened(name: str):
    def make() -> Stage:
        policies, values, samples, scales = ready()
        dynamics = Dynamics(
            2, 1, DynamicsConfig(members=2, elites=1, width=8, layers=1, check_every=3)
        )
        return {
            "values": lambda: ValueFit(values, samples),
            "cloning": lambda: Cloning(policies, samples, CloningConfig(batch_size=16)),
            "dynamics": lambda: DynamicsFit(dynamics, samples),
            "offline": lambda: OfflinePpo(
                policies, values, Still(), samples, scales,
                OfflineConfig(batch_size=16, gate=GateConfig(every=2, horizon=2, starts=8)),
            ),
        }[name]()  # fmt: skip

    whole, cut = make(), make()
    for _ in range(4):
        whole.update()
        cut.update()
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(cut.state_dict()))
    assert resumed.updates == 4
    for _ in range(3):
        assert resumed.update() == whole.update()
