"""Uni-O4 on a cell's flow policy: likelihoods, a step, the gate, resuming, the registry."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trajectory_store.contract import Contract, load_contract
from vla_post.batch import Batch
from vla_post.critics import CriticConfig
from vla_post.learners.uni_o4.chunk import (
    Flow,
    NoFlow,
    UniO4Chunk,
    UniO4ChunkConfig,
    chain_log_prob,
    sample_chain,
)
from vla_post.learners.uni_o4.ppo import ppo_terms
from vla_post.policies.build import build_policy
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.training.gate import NoJudge, compare, require_judge

from ...policies.cells import build, sample

CONTRACT = Path(__file__).parents[4] / "sim" / "contracts" / "metaworld_state.yaml"


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract(CONTRACT)


@pytest.fixture(scope="module")
def policy(contract: Contract) -> LeRobotPolicy:
    torch.manual_seed(0)
    shapes = {key: f.shape for key, f in contract.vectors.items()} | {"action": (4,)}
    names = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
    known = {
        key: {name: np.full(shape, value) for name, value in names.items()}
        for key, shape in shapes.items()
    }
    return build_policy("chunk_flow", contract, known)


def batch_of(contract: Contract, size: int = 32) -> Batch:
    """Random observations; half of the episodes succeed at their next step."""
    torch.manual_seed(1)
    seen: dict[str, Any] = {k: torch.randn(size, *f.shape) for k, f in contract.vectors.items()}
    good = torch.arange(size) % 2 == 0
    steps = torch.full((size,), contract.chunk_horizon)
    return Batch(
        observation=seen,
        action=torch.rand(size, contract.chunk_horizon, 4) * 2 - 1,
        valid=torch.ones(size, contract.chunk_horizon, dtype=torch.bool),
        reward=torch.zeros(size, contract.chunk_horizon),
        source=torch.zeros(size, contract.chunk_horizon, dtype=torch.uint8),
        next_observation={k: v + 0.1 for k, v in seen.items()},
        n=steps,
        terminated=good,
        task=torch.zeros(size, dtype=torch.long),
        instruction=[next(iter(contract.tasks.values())).instruction] * size,
        weight=torch.ones(size),
        left=steps,
        outcome=torch.where(good, 1, -1),
    )


def learner(policy: LeRobotPolicy, contract: Contract, **changes: Any) -> UniO4Chunk:
    settings: dict[str, Any] = {
        "critic": CriticConfig(heads=2, width=32, layers=1),
        "critic_warmup": 2,
        "gate_every": 2,
        "warmup_updates": 0,
        "learning_rate": 1e-3,
    }
    mine = copy.deepcopy(policy)
    torch.manual_seed(2)
    return UniO4ChunkConfig(**settings | changes).build(mine, list(mine.parameters()), contract)


def test_a_chain_without_noise_ends_where_the_policy_acts(
    policy: LeRobotPolicy, contract: Contract
):
    batch = batch_of(contract, 4)
    start = torch.randn(4, policy.horizon, policy.noise_size)
    context, head = policy.encode(batch.observation, batch.instruction), policy.head
    assert isinstance(head, Flow)
    with torch.no_grad():
        chain = sample_chain(head, context, start, 0.0)
    acted = policy.act(batch.observation, batch.instruction, 1, noise=start[:, None])
    torch.testing.assert_close(policy.unnormalise(chain[:, -1]), acted[:, 0])
    # On the grid that sampled it, each step's density is that of its noise alone.
    with torch.no_grad():
        noisy = sample_chain(head, context, start, 0.1)
        got = chain_log_prob(head, context, noisy, 0.1)
    size = policy.horizon * policy.noise_size
    expected = size * (np.log(1 / 0.1) - 0.5 * np.log(2 * np.pi) - 0.5)
    assert got.shape == (4, policy.config.num_steps)
    assert float(got.mean()) == pytest.approx(expected, rel=0.1)


def test_the_first_step_has_ratio_one_and_the_critic_goes_first(
    policy: LeRobotPolicy, contract: Contract
):
    uni = learner(policy, contract)
    batch = batch_of(contract)
    before = [p.clone() for p in uni.policy.module.parameters()]
    for _ in range(2):
        assert "uni_o4/kl" not in uni.update(batch)
    for a, b in zip(before, uni.policy.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    metrics = uni.update(batch)
    assert metrics["uni_o4/kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["uni_o4/clip_fraction"] == 0.0
    metrics = uni.update(batch)
    assert metrics["uni_o4/kl"] > 0
    assert {"gate/score", "gate/old", "gate/accepted"} <= metrics.keys()


def test_steps_raise_the_critics_value_and_a_resumed_learner_goes_on(
    policy: LeRobotPolicy, contract: Contract
):
    uni = learner(policy, contract, critic_warmup=20)
    batch = batch_of(contract)
    for _ in range(20):
        uni.update(batch)
    noise = torch.randn(len(batch), 4, uni.policy.horizon, uni.policy.noise_size)
    before = float(uni.judge(uni.policy, batch, noise).mean())
    for _ in range(30):
        uni.improve(batch)
    assert float(uni.judge(uni.policy, batch, noise).mean()) > before
    assert uni.takes > 0
    again = learner(policy, contract)
    again.policy.module.load_state_dict(uni.policy.module.state_dict())
    for name, module in again.modules.items():
        module.load_state_dict(uni.modules[name].state_dict())
    again.load_state_dict(copy.deepcopy(uni.state_dict()))
    torch.manual_seed(5)
    one = uni.update(batch)
    torch.manual_seed(5)
    assert again.update(batch) == one


def test_the_registrys_gate_compares_two_policies_with_equal_noise(
    policy: LeRobotPolicy, contract: Contract
):
    uni = learner(policy, contract)
    batch = batch_of(contract)
    found = compare(require_judge(uni), uni.policy, uni.old, [batch, batch], against=3)
    assert found["gate/candidate"] == pytest.approx(found["gate/running"], abs=1e-6)
    assert found["gate/against"] == 3.0
    with pytest.raises(NoJudge, match="has no critic"):
        require_judge(object())


def test_a_policy_without_a_flow_is_refused(policy: LeRobotPolicy, contract: Contract):
    class Plain:
        kind = "act"
        head = object()

    uni = learner(policy, contract)
    with pytest.raises(NoFlow, match="act denoises no flow"):
        UniO4Chunk(Plain(), [], uni.critic, uni.encoder, uni.config)
    with pytest.raises(ValueError, match=r"noise 0\.0"):
        UniO4ChunkConfig(noise=0.0)


@pytest.mark.long
def test_a_smolvlas_head_takes_the_plain_policy_gradient_and_learns_good_chunks():
    """U-2 for lerobot's own flow head: the likelihood is that of the denoising chain (U11)."""
    vla = build("smolvla_tiny")
    batch = sample(vla.contract, 4)
    steps = torch.full((4,), vla.contract.chunk_horizon)
    batch = replace(
        batch, next_observation=batch.observation, n=steps, left=steps,
        outcome=torch.tensor([1, -1, 1, -1]),
    )  # fmt: skip
    config = UniO4ChunkConfig(
        critic=CriticConfig(heads=2, width=32, layers=1), critic_warmup=0, gate_every=1000,
        warmup_updates=0, learning_rate=1e-3,
    )  # fmt: skip
    uni = config.build(vla, list(vla.parameters()), vla.contract)
    shape = (4, vla.horizon, vla.noise_size)
    with torch.no_grad():
        context = uni.old.encode(batch.observation, batch.instruction)
        chain = sample_chain(uni.old.head, context, torch.randn(shape), config.noise)
        before = chain_log_prob(uni.old.head, context, chain, config.noise)

    def log_prob() -> torch.Tensor:
        context = vla.encode(batch.observation, batch.instruction)
        return chain_log_prob(vla.head, context, chain, config.noise)

    now = log_prob()
    assert now.isfinite().all()
    assert now.shape == (4, vla.head.denoising_steps)
    torch.testing.assert_close(now.detach(), before, rtol=1e-4, atol=1e-2)
    good = torch.tensor([1.0, -1.0, 1.0, -1.0])

    def loss(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return ppo_terms(now[None], before[None], good[None], clip=config.clip).loss.sum()

    def gradient(of: torch.Tensor) -> list[torch.Tensor | None]:
        parameters = list(vla.parameters())
        return list(torch.autograd.grad(of, parameters, retain_graph=True, allow_unused=True))

    # Old = new: ratio 1, and the gradient of -E[A log pi].
    wanted = gradient(-(now.sum(dim=1) * good).mean())
    for a, b in zip(gradient(loss(now, now.detach())), wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for _ in range(3):
        uni.optimizer.step(loss(log_prob(), before))
    change = (log_prob() - before).sum(dim=1).detach()
    assert float((change * good).sum()) > 0.1
    # And the learner's own step, critic and all.
    metrics = uni.update(batch)
    assert np.isfinite(list(metrics.values())).all()
    assert {"uni_o4/kl", "critic/loss"} <= metrics.keys()
