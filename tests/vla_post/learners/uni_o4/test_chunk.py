"""Uni-O4 on a cell's flow policy: likelihoods, a step, the gate, resuming, the registry."""

import copy
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
from vla_post.policies.build import build_policy
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.training.gate import NoJudge, compare, require_judge

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
