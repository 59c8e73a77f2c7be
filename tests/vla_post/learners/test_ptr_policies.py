"""PTR's weights on real lerobot policies, and multiplied into HG-DAgger's and ALOE's."""

from typing import Any

import pytest
import torch

from trajectory_store import Source
from vla_post.batch import Batch
from vla_post.learners.aloe import Aloe, AloeConfig
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.learners.ptr import Ptr, PtrConfig, PtrHgDaggerConfig
from vla_post.learners.transition_math import TransitionConfig
from vla_post.learners.weighting import RunningScale, advantage_weight, effective_sample_size

from ..policies.cells import build, sample

STATE = "metaworld_state.yaml"
SCORER = TransitionConfig(width=16, queue=32, warmup_updates=2, lesson_every=1)


def batch_of(policy: Any, size: int = 6) -> Batch:
    """Random chunks of three episodes, whose futures are known but for the last."""
    one, after = (sample(policy.contract, size, seed=seed) for seed in (0, 1))
    return one.replace(
        valid=torch.ones_like(one.valid),
        n=torch.full((size,), policy.contract.chunk_horizon),
        source=torch.full_like(one.source, int(Source.SCRIPTED)),
        episode=torch.arange(size) % 3,
        future_observation=after.observation,
        has_future=torch.arange(size) < size - 1,
        next_observation=after.observation,
        left=torch.full((size,), policy.contract.chunk_horizon + 5),
        outcome=torch.where(torch.arange(size) % 2 == 0, 1, -1),
    )


def learner(policy: Any, config: PtrConfig) -> Ptr:
    """PTR whose scorer has had its lessons."""
    torch.manual_seed(0)
    ptr = config.build(policy, list(policy.parameters()), policy.contract)
    for _ in range(SCORER.warmup_updates):
        ptr.scorer.weigh(batch_of(policy))
    return ptr


@pytest.mark.parametrize(
    ("kind", "cell"), [("act_tiny", STATE), ("diffusion_tiny", STATE), ("smolvla_tiny", None)]
)
def test_the_step_is_the_weighted_mean_of_the_policys_own_loss(kind: str, cell: str | None):
    """Eq. P10 on lerobot's ACT, diffusion and SmolVLA."""
    policy = build(kind, cell)
    ptr = learner(policy, PtrConfig(transition=SCORER))
    batch = batch_of(policy)
    weight = ptr.scorer.scores(batch).weight.clone()
    assert float(weight[-1]) == 1.0, "its future is not known"
    assert float(weight[:-1].max() - weight[:-1].min()) > 0.01
    torch.manual_seed(5)
    expected = policy.chunk_loss(batch).detach()
    torch.manual_seed(5)
    told = ptr.base.update(batch.replace(weight=weight))
    assert told["loss"] == pytest.approx(float((weight * expected).sum() / weight.sum()), rel=1e-4)
    before = [p.detach().clone() for p in policy.parameters()]
    assert ptr.update(batch)["transition/effective_share"] < 1.0
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    if kind == "smolvla_tiny":
        vision = policy.module.model.vlm_with_expert.get_vlm_model().vision_model  # type: ignore[union-attr]
        assert len(ptr.scorer.target.tower.encoder.layers) == len(vision.encoder.layers) // 2  # type: ignore[union-attr, arg-type]


def people_and_robot(policy: Any) -> Batch:
    """A person drove the first two chunks, the robot the other four."""
    batch = batch_of(policy)
    who = torch.tensor([int(Source.HUMAN)] * 2 + [int(Source.POLICY)] * 4, dtype=torch.uint8)
    return batch.replace(
        source=who[:, None].expand_as(batch.source).clone(),
        part=torch.ones(6, dtype=torch.int64),
    )


def test_inside_hg_dagger_class_weights_are_multiplied():
    policy = build("chunk_flow")
    iwr = HgDaggerConfig(weighting="iwr")
    ptr = learner(policy, PtrHgDaggerConfig(transition=SCORER, base=iwr))
    batch = people_and_robot(policy)
    transition = ptr.scorer.scores(batch).weight.clone()
    # n / (2 n_i) and n / (2 (n - n_i)) of 2 interventions in 6.
    weight = transition * torch.tensor([1.5] * 2 + [0.75] * 4)
    torch.manual_seed(5)
    chunk_loss = policy.chunk_loss(batch).detach()
    torch.manual_seed(5)
    told = ptr.base.update(batch.replace(weight=transition))
    assert told["loss"] == pytest.approx(
        float((weight * chunk_loss).sum() / weight.sum()), rel=1e-4
    )
    assert told["effective_share"] == pytest.approx(effective_sample_size(weight), rel=1e-4)


def test_inside_aloe_advantages_are_multiplied():
    policy = build("chunk_flow")
    config = AloeConfig(critic_warmup=0)
    ptr = learner(policy, PtrConfig(transition=SCORER, base=config))
    assert ptr.modules.keys() == {"critic", "critic_target", "transition"}
    aloe = ptr.base
    assert isinstance(aloe, Aloe)
    batch = people_and_robot(policy)
    transition = ptr.scorer.scores(batch).weight.clone()
    torch.manual_seed(5)
    advantage = aloe.advantage(batch)
    scale = RunningScale().update(advantage)
    weight = transition * advantage_weight(advantage, config.weights, scale=scale)
    expected = (weight * policy.chunk_loss(batch).detach()).mean()
    torch.manual_seed(5)
    told = aloe.update(batch.replace(weight=transition))
    assert told["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert told["weight/effective_share"] == pytest.approx(effective_sample_size(weight), rel=1e-4)
    assert ptr.update(batch)["transition/product_effective_share"] < 1.0
