"""PTR: checks PTR-1 to PTR-10 of the specification, bad input, and what it can tell apart."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trajectory_store import Source, load_contract
from vla_post.batch import Batch, NonFiniteLoss
from vla_post.learners.hg_dagger import HgDaggerConfig, hg_dagger_loss
from vla_post.learners.ptr import PtrConfig
from vla_post.learners.transition import TransitionScorer
from vla_post.learners.transition_math import (
    TransitionConfig,
    belief_assignment,
    candidate_logits,
    controlled,
    gathered,
    rank_loss,
    transition_score,
    transition_weight,
)

CONTRACT = load_contract(Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml")
STATE = "observation.state"


class Encoder(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, observation: dict[str, Tensor], instruction: list[str]) -> Tensor:
        return self.layer(observation[STATE])

    def clone(self) -> "Encoder":
        twin = nn.Linear(4, 4, bias=False)
        twin.load_state_dict(self.layer.state_dict())
        return Encoder(twin).requires_grad_(False)


class Toy:
    """A policy that is one chunk, and sees the state through a linear layer."""

    horizon, action_size = 3, 4
    observation_keys = (STATE,)

    def __init__(self) -> None:
        self.chunk = nn.Parameter(torch.zeros(3, 4))
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.layer.weight)

    def parameters(self) -> list[nn.Parameter]:
        return [self.chunk, *self.layer.parameters()]

    def act(self, *_: Any, **__: Any) -> Tensor:
        return self.chunk[None, None]

    def chunk_loss(self, batch: Batch, **_: Any) -> Tensor:
        error = (self.chunk - batch.action).square().mean(dim=2)
        return (error * batch.valid).sum(dim=1) / batch.valid.sum(dim=1).clamp(min=1)

    def features(self, observation: dict[str, Tensor], instruction: list[str]) -> Tensor:
        return self.layer(observation[STATE])

    def observation_encoder(self) -> Encoder:
        return Encoder(self.layer)


def world(size: int, *, seed: int = 0, noise: float = 0.0, known: float = 1.0) -> Batch:
    """The future is the present plus three times the mean action; of some items the recorded
    action is another one, drawn at random: the last `noise` of the batch."""
    random = torch.Generator().manual_seed(seed)
    state = torch.randn(size, 4, generator=random)
    action = torch.rand(size, 1, 4, generator=random) * 2 - 1
    future = state + 3.0 * action[:, 0]
    wrong = torch.rand(size, 1, 4, generator=random) * 2 - 1
    bad = torch.arange(size) >= size * (1.0 - noise)
    told = torch.where(bad[:, None, None], wrong, action).expand(-1, 3, -1)
    return Batch(
        observation={STATE: state},
        action=told.contiguous(),
        valid=torch.ones(size, 3, dtype=torch.bool),
        reward=torch.zeros(size, 3),
        source=torch.full((size, 3), int(Source.SCRIPTED), dtype=torch.uint8),
        next_observation={},
        n=torch.full((size,), 3),
        terminated=torch.zeros(size, dtype=torch.bool),
        task=torch.zeros(size, dtype=torch.int64),
        instruction=["go"] * size,
        weight=torch.ones(size),
        future_observation={STATE: future},
        has_future=torch.rand(size, generator=random) < known,
    )


def scorer(policy: Any = None, **config: Any) -> TransitionScorer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"width": 32, "queue": 64, "queue_draws": 16, "warmup_updates": 0}
    settings |= {"lesson_every": 1}
    return TransitionScorer(policy or Toy(), CONTRACT, TransitionConfig(**(settings | config)))


def weights(score: list[float], **config: Any) -> Tensor:
    settings = TransitionConfig(**config)
    known = torch.ones(len(score), dtype=torch.bool)
    return transition_weight(torch.tensor(score), known, beta=settings.beta, config=settings)


def test_ptr1_uniform_logits_are_chance_and_weigh_one():
    score, _ = transition_score(torch.zeros(5, 9))
    torch.testing.assert_close(score, torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights(score.tolist()), torch.ones(5))


def test_ptr2_no_score_is_above_log_of_the_pool_and_a_perfect_scorer_reaches_it():
    random = torch.Generator().manual_seed(0)
    score, _ = transition_score(20 * torch.randn(500, 9, generator=random).clamp(-1, 1))
    assert float(score.max()) <= math.log(9) + 1e-5
    perfect = torch.full((2, 9), -20.0)
    perfect[:, 0] = 20.0
    torch.testing.assert_close(transition_score(perfect)[0], torch.full((2,), math.log(9)))


def test_ptr3_without_alpha_it_is_plain_cloning():
    weight = weights([-3.0, 0.0, 5.0], alpha=0.0)
    assert (weight == 1).all()
    loss = torch.tensor([1.0, 2.0, 6.0])
    total, _ = hg_dagger_loss(loss, torch.ones(3, 2, dtype=torch.bool), weight)
    assert float(total) == float(loss.mean())


def test_ptr4_the_regression_ignores_the_weights_scale_and_weights_carry_no_gradient():
    loss = torch.tensor([1.0, 2.0, 6.0])
    imitated = torch.ones(3, 2, dtype=torch.bool)
    weight = torch.tensor([0.5, 1.0, 4.0])
    first, _ = hg_dagger_loss(loss, imitated, weight)
    second, _ = hg_dagger_loss(loss, imitated, 7.0 * weight)
    torch.testing.assert_close(first, second)
    score = torch.zeros(3, requires_grad=True)
    got = transition_weight(
        score, torch.ones(3, dtype=torch.bool), beta=1.0, config=TransitionConfig()
    )
    assert not got.requires_grad


def test_ptr5_bounds_of_the_weights_and_of_what_they_do_to_the_data():
    random = torch.Generator().manual_seed(1)
    weight = weights((10 * torch.randn(4000, generator=random)).tolist())
    assert 0.25 <= float(weight.min()) < float(weight.max()) <= 4.0
    q = weight / weight.sum()
    divergence = float((q * (q * len(q)).log()).sum())
    assert divergence <= math.log(16.0)
    # Over two-valued weights the largest divergence is 0.87 nats.
    share = torch.linspace(0.001, 0.999, 2000)
    mean = share * 4.0 + (1 - share) * 0.25
    two = share * (4 / mean) * (4 / mean).log() + (1 - share) * (0.25 / mean) * (0.25 / mean).log()
    assert float(two.max()) == pytest.approx(0.87, abs=0.01)
    free = weights([6.0], clip=False, beta=0.5)
    assert float(free) == pytest.approx(math.exp(12.0), rel=1e-4)


def test_ptr6_a_copy_of_the_own_target_is_no_alternative():
    own, others = torch.eye(6)[:2], torch.eye(6)[2:]
    present = torch.ones(2, 4, dtype=torch.bool)
    alone, _ = transition_score(candidate_logits(own, own, others, present, 0.03))
    both = torch.cat([others, own[:1]])
    present = torch.ones(2, 5, dtype=torch.bool)
    logits = candidate_logits(own, own, both, present, 0.03)
    assert logits.isfinite().sum(dim=1).tolist() == [5, 6]
    filtered, _ = transition_score(logits)
    torch.testing.assert_close(filtered[0], alone[0])
    torch.testing.assert_close(alone[0], torch.tensor(math.log(5)))
    # Without the filter the copy takes half of the probability: T falls by log 2, less the
    # candidate that the pool has more.
    copied, _ = transition_score(torch.where(logits[:1].isfinite(), logits[:1], logits[0, 0]))
    assert float(alone[0] - copied[0]) == pytest.approx(math.log(2) - math.log(6 / 5), abs=1e-5)


def test_ptr7_the_target_encoder_follows_at_its_rate_and_without_gradient():
    toy = Toy()
    one = scorer(toy, ema_decay=0.999)
    with torch.no_grad():
        toy.layer.weight += 1.0
    batch = world(8)
    for _ in range(20):
        one.weigh(batch)
    gap = toy.layer.weight.detach() - one.target.get_parameter("layer.weight")
    torch.testing.assert_close(gap, torch.full((4, 4), 0.999**20), rtol=1e-4, atol=0)
    assert toy.layer.weight.grad is None
    assert not any(p.requires_grad for p in one.target.parameters())
    frozen = scorer(Toy(), ema_decay=1.0)
    frozen.weigh(batch)
    torch.testing.assert_close(frozen.target.get_parameter("layer.weight"), torch.eye(4))


def test_ptr8_an_item_without_a_future_weighs_one_and_changes_nobody_else():
    batch = world(16)
    one = scorer()
    for step in range(5):
        one.weigh(world(16, seed=20 + step))
    torch.manual_seed(3)
    whole = one.scores(batch)
    known = torch.tensor([True] * 12 + [False] * 4)
    spoiled = {STATE: batch.future_observation[STATE].clone()}
    spoiled[STATE][12:] = 1e6
    torch.manual_seed(3)
    less = one.scores(batch.replace(has_future=known, future_observation=spoiled))
    fewer = batch.replace(has_future=known)
    torch.manual_seed(3)
    same = one.scores(fewer)
    assert (less.weight[:12] != 1).all()
    assert (less.weight[12:] == 1).all()
    torch.testing.assert_close(less.weight, same.weight)
    assert less.pool[0] == whole.pool[0] - 4


def test_ptr9_equal_chunks_cannot_be_ranked():
    torch.testing.assert_close(
        rank_loss(torch.tensor([3.0]), torch.tensor([3.0])), torch.tensor([math.log(2)])
    )
    batch = world(8)
    batch = batch.replace(action=batch.action[:1].repeat(8, 1, 1))
    _, told = scorer().weigh(batch)
    assert told["transition/margin"] == pytest.approx(0.0, abs=1e-5)


def test_ptr10_belief_tokens():
    random = torch.Generator().manual_seed(0)
    assignment, entropy, _ = belief_assignment(torch.randn(2, 6, 3, generator=random), 1.0)
    torch.testing.assert_close(assignment.sum(dim=1), torch.ones(2, 3))
    assert 0.0 < float(entropy) < math.log(6)
    # Each slot on a position of its own: orthonormal columns.
    apart = torch.full((1, 6, 3), -1e4)
    apart[0, [0, 2, 5], [0, 1, 2]] = 1e4
    _, sharp, crowding = belief_assignment(apart, 1.0)
    assert float(sharp) == pytest.approx(0.0, abs=1e-6)
    assert float(crowding) == pytest.approx(0.0, abs=1e-6)
    with_tokens = scorer(belief_tokens=3)
    weight, _ = with_tokens.weigh(world(8))
    assert weight.isfinite().all()


def test_the_controller_of_the_temperatures():
    assert controlled(0.1, 1.5, score=0.0, margin=0.0) == pytest.approx((0.101, 1.515, 0.0))
    assert controlled(0.1, 1.5, score=0.5, margin=0.2) == pytest.approx((0.0995, 1.4925, 0.5))
    assert controlled(0.1, 1.5, score=0.5, margin=0.05) == pytest.approx((0.1, 1.5, 0.5))
    assert controlled(0.1, 1.5, score=0.3, margin=0.2) == pytest.approx((0.1, 1.5, 0.25))
    assert controlled(0.03, 0.5, score=9.0, margin=9.0)[:2] == (0.03, 0.5)
    assert controlled(0.2, 3.0, score=-1.0, margin=0.0)[:2] == (0.2, 3.0)


@pytest.mark.parametrize("target", ["future", "change"])
def test_it_learns_to_tell_chunks_that_explain_their_future_from_others(target: str):
    one = scorer(target=target, queue=512, queue_draws=64, learning_rate=3e-3)
    for step in range(250):
        one.weigh(world(64, seed=step, noise=0.25))
    scores = one.scores(world(400, seed=10_000, noise=0.25))
    clean, wrong = scores.score[:300], scores.score[300:]
    auroc = float((clean[:, None] > wrong[None]).float().mean())
    assert auroc > 0.8
    assert float(scores.weight[:300].mean()) > 1.5 * float(scores.weight[300:].mean())
    # Measured from their level, weights use both ends of the clip; as printed, one end alone.
    assert float(scores.weight.mean()) == pytest.approx(1.0, abs=0.4)
    one.config = replace(one.config, relative=False)
    assert float((one.scores(world(400, seed=1)).weight == 4).float().mean()) > 0.5
    assert float(scores.recognised[:300].float().mean()) > 0.05  # chance: 1 / 464


def test_a_scorer_judges_only_episodes_that_have_not_taught_it():
    """Few chunks, seen many times: each is known by heart from its state, whatever its action."""
    batch = world(128, noise=0.25).replace(episode=torch.arange(128) % 16)
    found: dict[bool, float] = {}
    for held_out in (True, False):
        one = scorer(held_out=held_out, learning_rate=3e-3, adaptive=False)
        for _ in range(250):
            one.weigh(batch)
        score = one.scores(batch).score
        found[held_out] = float((score[:96, None] > score[None, 96:]).float().mean())
    assert found[True] > max(found[False] + 0.05, 0.8), found


def test_a_store_of_one_episode_weighs_one():
    one = scorer()
    for step in range(3):
        batch = world(16, seed=step).replace(episode=torch.zeros(16, dtype=torch.int64))
        weight, told = one.weigh(batch)
        assert (weight == 1).all()
        assert math.isfinite(told["transition/loss"])


def test_after_the_warm_up_it_learns_from_every_so_many_batches_and_judges_all():
    one = scorer(warmup_updates=2, lesson_every=3)
    told = [one.weigh(world(16, seed=step))[1] for step in range(8)]
    lessons = [number for number, t in enumerate(told) if "transition/loss" in t]
    assert lessons == [0, 1, 3, 6]
    assert all(t["transition/effective_share"] < 1.0 for t in told[2:])


def test_the_queue_keeps_the_last_targets_in_turn_and_hard_negatives_are_of_the_same_task():
    one = scorer(queue=10, queue_draws=8)
    for step in range(3):
        one.weigh(world(4, seed=step).replace(task=torch.full((4,), step % 2)))
    assert int(one.get_buffer("queue_next")) == 2
    assert sorted(one.get_buffer("queue_task").tolist()) == [0] * 6 + [1] * 4
    one.get_buffer("control")[2] = 0.5
    scores = one.scores(world(4, seed=9).replace(task=torch.zeros(4, dtype=torch.int64)))
    assert scores.score.isfinite().all()
    assert int(scores.pool.max()) <= 1 + 3 + 8
    one.weigh(world(4, seed=10))


@pytest.mark.parametrize("case", ["alike", "one item", "no future", "still", "copies"])
def test_senseless_batches_weigh_one_and_never_nan(case: str):
    batch = world(1 if case == "one item" else 8)
    now, later = batch.observation[STATE], batch.future_observation[STATE]
    target = "change" if case == "still" else "future"
    if case == "alike":
        batch = batch.replace(future_observation={STATE: torch.ones_like(later)})
    elif case == "no future":
        batch = batch.replace(has_future=torch.zeros(8, dtype=torch.bool))
    elif case == "still":
        batch = batch.replace(future_observation={STATE: now})
    elif case == "copies":
        batch = batch.replace(
            observation={STATE: now[:1].repeat(8, 1)},
            future_observation={STATE: later[:1].repeat(8, 1)},
            action=batch.action[:1].repeat(8, 1, 1),
        )
    one = scorer(target=target)
    for _ in range(3):
        weight, told = one.weigh(batch)
        torch.testing.assert_close(weight, torch.ones(len(batch)))
        assert all(math.isfinite(value) for value in told.values())


def test_a_batch_that_is_not_finite_changes_nothing():
    one = scorer()
    before = {k: v.clone() for k, v in one.state_dict().items()}
    batch = world(8)
    batch.future_observation[STATE][0, 0] = torch.nan
    with pytest.raises(NonFiniteLoss, match="scorer"):
        one.weigh(batch)
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_learner_weighs_only_after_its_warm_up_and_multiplies_into_what_is_there():
    toy = Toy()
    base = HgDaggerConfig(weighting="everything", learning_rate=0.05, warmup_updates=0)
    config = PtrConfig(transition=TransitionConfig(width=32, queue=64, warmup_updates=3), base=base)
    assert config.data(CONTRACT).future_steps == CONTRACT.chunk_horizon
    assert PtrConfig(transition=TransitionConfig(future_s=0.25)).data(CONTRACT).future_steps == 20
    ptr = config.build(toy, toy.parameters(), CONTRACT)
    batch = world(16).replace(weight=torch.linspace(0.5, 2.0, 16))
    told = [ptr.update(batch) for _ in range(4)]
    assert [m["transition/effective_share"] for m in told[:3]] == [1.0] * 3
    assert told[3]["transition/effective_share"] < 1.0
    assert told[0]["transition/product_effective_share"] < 1.0
    assert ptr.updates == 4


def test_state_continues_where_it_stopped():
    toy = Toy()
    config = PtrConfig(transition=TransitionConfig(width=32, queue=64))
    first = config.build(toy, toy.parameters(), CONTRACT)
    for step in range(5):
        first.update(world(8, seed=step))
    again = config.build(toy, toy.parameters(), CONTRACT)
    again.load_state_dict(first.state_dict())
    again.modules["transition"].load_state_dict(first.modules["transition"].state_dict())
    torch.manual_seed(7)
    expected = first.scorer.weigh(world(8, seed=9))[1]
    torch.manual_seed(7)
    assert again.scorer.weigh(world(8, seed=9))[1] == expected


def test_without_other_ranks_nothing_is_gathered():
    target, known = gathered(torch.ones(3, 2), torch.ones(3, dtype=torch.bool))
    assert target.shape == (0, 2)
    assert known.shape == (0,)


@pytest.mark.parametrize(
    "wrong", [{"min_weight": 0.0}, {"max_weight": 0.5}, {"alpha": 2.0}, {"queue": 0}, {"beta": 0.0}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"expected|must"):
        TransitionConfig(**wrong)
