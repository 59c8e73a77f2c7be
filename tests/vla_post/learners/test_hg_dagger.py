"""HG-DAgger: what is imitated, and checks HG-1, HG-3, HG-7 and HG-8 of the specification."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trajectory_store import Source
from vla_post.batch import Batch, NonFiniteLoss
from vla_post.learners.hg_dagger import (
    HgDagger,
    HgDaggerConfig,
    hg_dagger_loss,
    imitated_steps,
)

P, H, S, HOLD = (int(s) for s in (Source.POLICY, Source.HUMAN, Source.SCRIPTED, Source.HOLD))


def steps(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


class Mean(nn.Module):
    """A policy that is one chunk; its chunk loss is the masked squared error."""

    horizon, action_size = 4, 2

    def __init__(self) -> None:
        super().__init__()
        self.chunk = nn.Parameter(torch.zeros(4, 2))

    def chunk_loss(self, batch: Batch, **_: Any) -> Tensor:
        error = (self.chunk - batch.action).square().mean(dim=2)
        count = batch.valid.sum(dim=1).clamp(min=1)
        return torch.where(batch.valid, error, 0.0).sum(dim=1) / count

    def act(self, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError

    def features(self, *_: Any) -> Tensor:
        raise NotImplementedError


def batch(action: Tensor, source: Tensor) -> Batch:
    size, horizon, _ = action.shape
    return Batch(
        observation={},
        action=action,
        valid=torch.ones(size, horizon, dtype=torch.bool),
        reward=torch.zeros(size, horizon),
        source=source,
        next_observation={},
        n=torch.full((size,), horizon),
        terminated=torch.zeros(size, dtype=torch.bool),
        task=torch.zeros(size, dtype=torch.int64),
        instruction=["go"] * size,
        weight=torch.ones(size),
    )


def learner(**config: Any) -> tuple[Mean, HgDagger]:
    policy = Mean()
    settings = {"learning_rate": 0.05, "warmup_updates": 0, "weight_decay": 0.0} | config
    return policy, HgDagger(policy, list(policy.parameters()), HgDaggerConfig(**settings))


def test_only_people_and_demonstrators_are_imitated_and_only_inside_the_episode():
    source = steps([P, H, HOLD, S], [H, H, H, H])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    expected = torch.tensor([[False, True, False, True], [True, True, False, False]])
    assert torch.equal(imitated_steps(source, valid), expected)


def test_hg1_without_the_human_nothing_is_learned():
    policy, hg = learner()
    metrics = hg.update(batch(torch.randn(3, 4, 2), steps(*[[P] * 4] * 3)))
    assert metrics["loss"] == 0
    assert (policy.chunk == 0).all()


def test_hg1_with_the_human_throughout_it_is_plain_cloning():
    action = torch.randn(3, 4, 2)
    chunk_loss = action.square().mean(dim=(1, 2))
    source = steps(*[[H] * 4] * 3)
    imitated = imitated_steps(source, torch.ones(3, 4, dtype=torch.bool))
    loss, metrics = hg_dagger_loss(chunk_loss, imitated, torch.ones(3))
    torch.testing.assert_close(loss, chunk_loss.mean())
    assert metrics["imitated_share"] == 1


def test_hg3_balanced_class_weights_give_interventions_half_of_the_loss():
    # n / (2 n_i) and n / (2 (n - n_i)) with 2 interventions of 8, every item of equal loss.
    weight = torch.tensor([2.0] * 2 + [8 / 12] * 6)
    imitated = torch.ones(8, 4, dtype=torch.bool)
    only = torch.tensor([1.0] * 2 + [0.0] * 6)
    loss, _ = hg_dagger_loss(only, imitated, weight)
    torch.testing.assert_close(loss, torch.tensor(0.5))


def test_hg7_the_target_is_the_command_that_was_sent():
    policy, hg = learner()
    sent = torch.full((2, 4, 2), 0.7)
    for _ in range(200):
        hg.update(batch(sent, steps(*[[H] * 4] * 2)))
    torch.testing.assert_close(policy.chunk.detach(), sent[0], atol=1e-2, rtol=0)


def test_hg8_a_chunk_learns_up_to_the_border_and_not_beyond():
    policy, hg = learner()
    hg.update(batch(torch.ones(1, 4, 2), steps([H, H, H, P])))
    assert (policy.chunk[:3] > 0).all()
    assert (policy.chunk[3] == 0).all()


def test_fifty_updates_on_one_batch_end_far_below_where_they_began():
    _, hg = learner()
    one = batch(torch.randn(1, 4, 2).repeat(4, 1, 1), steps(*[[S] * 4] * 4))
    losses = [hg.update(one)["loss"] for _ in range(50)]
    assert losses[-1] < 0.1 * losses[0]


def test_a_loss_that_is_not_finite_changes_nothing():
    policy, hg = learner()
    bad = torch.ones(1, 4, 2)
    bad[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match="update 0"):
        hg.update(batch(bad, steps([H] * 4)))
    assert (policy.chunk == 0).all()
    assert hg.updates == 0


def test_state_continues_the_same_optimisation():
    one = batch(torch.ones(2, 4, 2), steps(*[[H] * 4] * 2))
    whole, first = learner()
    half, second = learner()
    for _ in range(6):
        first.update(one)
    for _ in range(3):
        second.update(one)
    again = HgDagger(half, list(half.parameters()), second.config)
    again.load_state_dict(second.state_dict())
    for _ in range(3):
        again.update(one)
    torch.testing.assert_close(half.chunk, whole.chunk, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"max_grad_norm": 0.0}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="must be above 0"):
        HgDaggerConfig(**wrong)
