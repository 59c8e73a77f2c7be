"""HG-DAgger and its weightings: checks HG-1 to HG-8 of the specification.

HG-6 on real stores is in tests/vla_post/training/test_algorithms.py, HG-9 in test_doubt.py.
"""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from trajectory_store import Source, load_contract
from vla_post.batch import Batch, NonFiniteLoss
from vla_post.learners.class_weights import (
    Segment,
    class_weights,
    iwr_target,
    segments,
    sirius_target,
)
from vla_post.learners.hg_dagger import (
    HgDagger,
    HgDaggerConfig,
    Weighting,
    hg_dagger_loss,
    imitated_steps,
)

CONTRACT = Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml"
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

    def act(self, observation: Any, instruction: list[str], n_samples: int = 1, **_: Any) -> Tensor:
        return self.chunk.expand(len(instruction), n_samples, -1, -1)

    def features(self, observation: Any, instruction: list[str]) -> Tensor:
        return self.chunk.flatten().expand(len(instruction), -1)


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
    parameters = list(policy.parameters())
    return policy, HgDagger(policy, parameters, HgDaggerConfig(**settings), control_hz=20.0)


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


def test_hg2_class_weights_sum_to_one_and_both_forms_of_iwr_agree():
    share = torch.tensor([0.3, 0.45, 0.15, 0.1])
    for target in (iwr_target(share), sirius_target(share)):
        weight = class_weights(share, target)
        assert float((share * weight).sum()) == pytest.approx(1.0)
    # n / (2 n_i), n / (2 (n - n_i)) against (n - n_i) / n_i, 1: equal up to a constant.
    weight = class_weights(share, iwr_target(share))
    ours = weight[Segment.INTERVENTION] / weight[Segment.ROBOT]
    assert float(ours) == pytest.approx((1 - 0.15) / 0.15)
    assert float(weight[Segment.ROBOT]) == pytest.approx(float(weight[Segment.DEMONSTRATION]))


def test_sirius_keeps_demonstrations_as_they_are_drawn():
    share = torch.tensor([0.3, 0.5, 0.1, 0.1])
    weight = class_weights(share, sirius_target(share))
    expected = [1.0, (0.5 - 0.3 - 0.002) / 0.5, 5.0, 0.02]
    torch.testing.assert_close(weight, torch.tensor(expected))
    # More demonstrations than the paper allows: they keep 0.498, the robot's steps carry nothing.
    crowded = torch.tensor([0.6, 0.2, 0.2, 0.0])
    weight = class_weights(crowded, sirius_target(crowded))
    assert float(weight[Segment.ROBOT]) == 0
    assert float((crowded * weight).sum()) == pytest.approx(1.0)


def test_hg3_with_iwr_interventions_get_half_of_the_loss_whatever_is_drawn():
    random = torch.Generator().manual_seed(0)
    _, hg = learner(weighting="iwr")
    got, total = 0.0, 0.0
    for k in range(400):
        human = torch.rand(64, generator=random) < 0.1
        source = torch.where(human, H, P)[:, None].repeat(1, 4).to(torch.uint8)
        one = batch(torch.zeros(64, 4, 2), source)
        _, weight, _ = hg.choose(one.replace(part=torch.ones(64, dtype=torch.int64)))
        if k >= 100:
            got, total = got + float(weight[human].sum()), total + float(weight.sum())
    assert got / total == pytest.approx(0.5, abs=0.02)


def test_hg3_balanced_class_weights_give_interventions_half_of_the_loss():
    # n / (2 n_i) and n / (2 (n - n_i)) with 2 interventions of 8, every item of equal loss.
    weight = torch.tensor([2.0] * 2 + [8 / 12] * 6)
    imitated = torch.ones(8, 4, dtype=torch.bool)
    only = torch.tensor([1.0] * 2 + [0.0] * 6)
    loss, _ = hg_dagger_loss(only, imitated, weight)
    torch.testing.assert_close(loss, torch.tensor(0.5))


def test_hg4_the_moments_before_a_takeover():
    """Two takeovers five steps apart give a window of five, and it overwrites nobody else."""
    source = steps([P] * 8 + [H] * 2 + [P] * 5 + [H] * 2 + [S])
    far = 2**31 - 1
    to_takeover = torch.tensor([[8, 7, 6, 5, 4, 3, 2, 1, far, far, 5, 4, 3, 2, 1, far, far, far]])
    segment = segments(source, torch.tensor([False]), to_takeover.int(), window=6)
    robot, human, before = Segment.ROBOT, Segment.INTERVENTION, Segment.PRE_INTERVENTION
    expected = [robot] * 2 + [before] * 6 + [human] * 2 + [before] * 5 + [human] * 2
    assert segment[0].tolist() == [*expected, Segment.DEMONSTRATION]
    whole = segments(source, torch.tensor([True]), to_takeover.int(), window=6)
    assert (whole == Segment.DEMONSTRATION).all()


def test_hg5_an_absent_class_leaves_its_part_to_the_others():
    for share in ([0.3, 0.5, 0.2, 0.0], [0.0, 1.0, 0.0, 0.0], [0.4, 0.0, 0.6, 0.0]):
        given = torch.tensor(share)
        for target in (iwr_target(given), sirius_target(given)):
            weight = class_weights(given, target)
            assert weight.isfinite().all()
            assert (weight[given == 0] == 0).all()
            assert float((given * weight).sum()) == pytest.approx(1.0)


def test_hg8_a_chunk_learns_up_to_the_moments_before_a_takeover():
    """h = 10, six steps before the window: exactly the first six elements carry loss."""
    _, hg = learner(weighting="sirius", pre_intervention_s=0.75)
    assert hg.window == 15
    one = batch(torch.zeros(1, 10, 2), steps([P] * 10))
    to_takeover = torch.arange(21, 11, -1, dtype=torch.int32)[None]
    one = one.replace(to_takeover=to_takeover, part=torch.ones(1, dtype=torch.int64))
    imitated, weight, _ = hg.choose(one)
    assert imitated[0].tolist() == [True] * 6 + [False] * 4
    assert float(weight[0]) == 1.0, "the only class that is there has all of the loss"


def test_a_chunk_that_starts_before_a_takeover_counts_as_the_intervention_that_it_reaches():
    _, hg = learner(weighting="sirius")
    far = 2**31 - 1
    one = batch(torch.zeros(2, 4, 2), steps([P, P, H, H], [P, P, P, P]))
    one = one.replace(
        to_takeover=torch.tensor([[2, 1, far, far], [4, 3, 2, 1]], dtype=torch.int32),
        part=torch.ones(2, dtype=torch.int64),
    )
    imitated, _, told = hg.choose(one)
    assert imitated.tolist() == [[False, False, True, True], [False] * 4]
    assert told["share_intervention"] == 1.0


@pytest.mark.parametrize("weighting", ["iwr", "sirius", "double-buffer"])
def test_every_weighting_learns_from_the_robots_own_steps_or_says_why_not(weighting: Any):
    policy, hg = learner(weighting=weighting)
    one = batch(torch.ones(4, 4, 2), steps(*[[P] * 4] * 2, *[[H] * 4] * 2))
    far = torch.full((4, 4), 2**31 - 1, dtype=torch.int32)
    part = torch.ones(4, dtype=torch.int64)
    metrics = hg.update(one.replace(to_takeover=far, part=part))
    assert metrics["loss"] == pytest.approx(1.0)
    assert (policy.chunk > 0).all()


def test_what_each_weighting_asks_of_the_data():
    contract = load_contract(CONTRACT)
    asked = {w: HgDaggerConfig(weighting=w).data(contract) for w in get_args(Weighting)}
    assert asked["human-only"].sources == (Source.HUMAN, Source.SCRIPTED)
    assert asked["iwr"].sources is None
    assert asked["sirius"].takeovers
    assert asked["double-buffer"].double_buffer


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
    again = HgDagger(half, list(half.parameters()), second.config, control_hz=20.0)
    again.load_state_dict(second.state_dict())
    for _ in range(3):
        again.update(one)
    torch.testing.assert_close(half.chunk, whole.chunk, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"max_grad_norm": 0.0}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="must be above 0"):
        HgDaggerConfig(**wrong)
