"""RECAP: checks RECAP-1 to RECAP-8 of the specification. RECAP-7 on whole policies is in
tests/vla_post/policies/test_indicator.py; RECAP-9 is about discrete tokens, which no policy here
has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trajectory_store import FleetView, Source, StoreWriter, load_contract
from vla_post.batch import Batch
from vla_post.critics.bins import Bins
from vla_post.critics.saved import CriticMissing
from vla_post.export.registry import Registry
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.learners.recap import (
    Recap,
    RecapConfig,
    RunningThresholds,
    recap_advantage,
    recap_return,
    step_indicators,
    threshold,
)
from vla_post.policies.build import build_policy
from vla_post.policies.indicator import Indicator, split_indicator, with_indicator
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.training.data import mixture, statistics
from vla_post.training.learner import LearnerConfig, LearnerProcess
from vla_post.training.trainer import TrainConfig, Trainer

CONTRACT = Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml"
P, H, S, HOLD = (int(s) for s in (Source.POLICY, Source.HUMAN, Source.SCRIPTED, Source.HOLD))
NONE, POSITIVE, NEGATIVE = (int(i) for i in Indicator)


def returns(length: int, outcome: int, longest: float = 100.0, cost: float = 1.0) -> Tensor:
    """R of every step of an episode, first to last."""
    left = torch.arange(length, 0, -1)
    ended = torch.full((length,), outcome)
    return recap_return(left, ended, torch.full((length,), longest), cost)


def test_recap1_returns_rise_evenly_and_a_failure_is_below_a_success():
    good, bad = returns(40, 1), returns(40, -1)
    torch.testing.assert_close(good.diff(), torch.full((39,), 1 / 200), atol=1e-6, rtol=0)
    torch.testing.assert_close(bad.diff(), torch.full((39,), 1 / 200), atol=1e-6, rtol=0)
    assert good[-1] == 0
    assert (bad < good).all()
    assert float(bad[-1]) == pytest.approx(-0.5), "the last step of a failure costs C_fail"
    assert float(returns(100, -1)[0]) == pytest.approx(-199 / 200), "the worst fits without a clip"
    # Without a cost of failure, the unit is the longest episode, as in the paper.
    torch.testing.assert_close(
        returns(40, 1, cost=0.0).diff(), torch.full((39,), 0.01), atol=1e-6, rtol=0
    )


def test_recap2_bins():
    bins = Bins(low=-1.0, high=0.0, count=201, labels="one_hot")
    centres = bins.centres(torch.zeros(1))
    assert bins.index(centres).tolist() == list(range(201))
    value = torch.linspace(-1.0, 0.0, 1000)
    mean = bins.mean(1e4 * bins.label(value))
    assert float((mean - value).abs().max()) <= bins.width / 2 + 1e-6
    assert bins.index(torch.tensor([-3.0, 0.7])).tolist() == [0, 200]


def advantages(value: Tensor, realised: Tensor, n: int, cost: float = 1.0) -> Tensor:
    """A of every step of one episode with N = n."""
    length = len(value)
    later = torch.cat([value, torch.full((n,), torch.nan)])[n : n + length]
    has_later = torch.arange(length) + n < length
    waited = torch.full((length,), n / (100.0 * (1 + cost)))
    return recap_advantage(realised, value, later, has_later, waited)


@pytest.mark.parametrize("outcome", [1, -1])
@pytest.mark.parametrize("n", [1, 7, 50, 500])
def test_recap3_a_true_value_leaves_nothing_to_gain(outcome: int, n: int):
    """Failures too: rewards and values share one scale, and nothing was clipped."""
    realised = returns(40, outcome)
    torch.testing.assert_close(
        advantages(realised, realised, n), torch.zeros(40), atol=1e-6, rtol=0
    )


def test_recap4_one_step_and_whole_episodes():
    realised = returns(30, -1)
    value = -torch.rand(30, generator=torch.Generator().manual_seed(0))
    one = advantages(value, realised, 1)
    step = 1 / 200
    td = torch.cat([-step + value[1:], realised[-1:]]) - value
    torch.testing.assert_close(one, td)
    torch.testing.assert_close(advantages(value, realised, 30), realised - value)


@pytest.mark.parametrize("n", [1, 7, 100, 1001])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.4])
def test_recap5_the_positive_share_is_the_target(n: int, share: float):
    advantage = torch.randn(n, generator=torch.Generator().manual_seed(n))
    positive = (advantage > threshold(advantage, share)).float().mean()
    assert abs(float(positive) - share) <= 1 / n


def test_recap5_ties_are_not_positive():
    assert not (torch.zeros(10) > threshold(torch.zeros(10), 0.4)).any()
    few = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])
    assert (few > threshold(few, 0.4)).sum() == 1


def test_recap5_each_task_has_its_own_threshold():
    found = RunningThresholds(["easy", "hard"], 0.5, window=100)
    advantage = torch.cat([torch.arange(10.0), 100 + torch.arange(10.0)])
    task = torch.tensor([0] * 10 + [1] * 10)
    eps = found.update(task, advantage, torch.ones(20, dtype=torch.bool))
    assert (advantage > eps).tolist() == ([False] * 5 + [True] * 5) * 2
    # Forced steps do not move it, and only the last `window` count.
    found.update(task[:1], torch.tensor([1e9]), torch.tensor([False]))
    assert len(found.kept["easy"]) == 10
    found.update(task[:1].repeat(200), torch.zeros(200), torch.ones(200, dtype=torch.bool))
    assert found.kept["easy"].tolist() == [0.0] * 100


def test_recap6_a_persons_steps_are_positive_and_their_neighbours_are_not():
    source = torch.tensor(
        [[P, P, H, H], [H, H, P, P], [P, P, P, P], [S, S, S, S], [P, P, H, H]], dtype=torch.uint8
    )
    better = torch.tensor([NEGATIVE, NEGATIVE, POSITIVE, NEGATIVE, POSITIVE])
    demonstration = torch.zeros(5, dtype=torch.bool)
    indicator, steps = step_indicators(better, source, demonstration)
    assert indicator.tolist() == [NEGATIVE, POSITIVE, POSITIVE, POSITIVE, POSITIVE]
    yes, no = True, False
    assert steps.tolist() == [
        [yes, yes, no, no],  # the robot's part is negative, the person's is not
        [yes, yes, no, no],  # after the hand-back it is the robot's again
        [yes] * 4,
        [yes] * 4,
        [yes] * 4,
    ]
    indicator, steps = step_indicators(better, source, ~demonstration)
    assert (indicator == POSITIVE).all()
    assert steps.all()


def test_recap8_the_indicator_is_dropped_three_times_in_ten(monkeypatch: pytest.MonkeyPatch):
    learner, policy = build(value_warmup=0)
    seen: list[str] = []

    def chunk_loss(batch: Batch, **_: Any) -> Tensor:
        seen.extend(batch.instruction)
        return sum(p.sum() for p in policy.parameters()) * torch.zeros(len(batch))

    monkeypatch.setattr(policy, "chunk_loss", chunk_loss)
    torch.manual_seed(0)
    n = 4000
    learner.improve(batch(n, source=H))
    dropped = sum(split_indicator(text)[1] is Indicator.NONE for text in seen)
    assert abs(dropped / n - 0.3) < 3 * (0.3 * 0.7 / n) ** 0.5
    plain = policy.contract.task("reach").instruction
    assert {t for t in seen if split_indicator(t)[1] is Indicator.NONE} == {plain}
    assert with_indicator(plain, Indicator.NONE) == plain


# The learner --------------------------------------------------------------------------------------


def build(**changes: Any) -> tuple[Recap, LeRobotPolicy]:
    contract = load_contract(CONTRACT)
    numbers = {
        key: {
            name: np.full(n, v)
            for name, v in (("mean", 0.0), ("std", 1.0), ("min", -1.0), ("max", 1.0))
        }
        for key, n in {k: f.shape[0] for k, f in contract.vectors.items()}.items()
    }
    numbers["action"] = {
        name: np.full(contract.action.size, v)
        for name, v in (("mean", 0.0), ("std", 1.0), ("min", -1.0), ("max", 1.0))
    }
    torch.manual_seed(0)
    policy = build_policy("chunk_flow", contract, numbers)
    settings: dict[str, Any] = {"learning_rate": 1e-3, "warmup_updates": 0} | changes
    config = RecapConfig(**settings)
    return config.build(policy, list(policy.parameters()), contract), policy


def batch(size: int, *, source: int = P, left: int = 100, **changes: Any) -> Batch:
    contract = load_contract(CONTRACT)
    horizon, random = contract.chunk_horizon, torch.Generator().manual_seed(0)

    def observation() -> dict[str, Tensor]:
        return {
            k: torch.randn(size, *f.shape, generator=random) for k, f in contract.vectors.items()
        }

    made = Batch(
        observation=observation(),
        action=torch.randn(size, horizon, contract.action.size, generator=random),
        valid=torch.ones(size, horizon, dtype=torch.bool),
        reward=torch.zeros(size, horizon),
        source=torch.full((size, horizon), source, dtype=torch.uint8),
        next_observation={},
        n=torch.full((size,), horizon),
        terminated=torch.zeros(size, dtype=torch.bool),
        task=torch.zeros(size, dtype=torch.int64),
        instruction=[contract.task("reach").instruction] * size,
        weight=torch.ones(size),
        left=torch.full((size,), left),
        outcome=torch.ones(size, dtype=torch.int8),
        part=torch.ones(size, dtype=torch.int64),
        future_observation=observation(),
        has_future=torch.full((size,), left > 20),
    )
    return made.replace(**changes)


def test_another_algorithm_goes_on_without_asking(tmp_path: Path):
    """It teaches plain prompts, so a plain prompt is what its versions act on."""
    _, policy = build(guidance=1.5)
    torch.nn.init.normal_(policy.module.get_parameter("indicator.weight"))
    policy.save(tmp_path / "recap")
    seen: dict[str, float] = {}
    for name, algorithm in (("dagger", HgDaggerConfig()), ("recap", RecapConfig(guidance=2.0))):
        goes_on = LeRobotPolicy.load(tmp_path / "recap")
        trainer = Trainer(goes_on, TrainConfig(algorithm=algorithm))
        saved = LeRobotPolicy.load(trainer.save_policy(tmp_path / name))
        assert saved.guidance is not None
        seen[name] = saved.guidance.beta
    assert seen == {"dagger": 0.0, "recap": 2.0}
    some = batch(2)
    noise = torch.randn(2, 1, policy.horizon, policy.action_size)
    acts = {
        name: LeRobotPolicy.load(tmp_path / name).act(
            some.observation, some.instruction, noise=noise
        )
        for name in ("dagger", "recap")
    }
    policy.guidance = None
    plain = policy.act(some.observation, some.instruction, noise=noise)
    torch.testing.assert_close(acts["dagger"], plain)
    assert not torch.allclose(acts["recap"], plain, atol=1e-3)


def test_the_value_learns_returns_and_the_policy_what_was_good():
    """The state says how an episode ends; good chunks go up, bad ones down. Asked for positive
    chunks, the policy goes up; told negative, down; and unasked, to the middle."""
    learner, policy = build(value_warmup=60, positive_share=0.5, learning_rate=3e-3)
    size = 32
    good = torch.arange(size) % 2 == 0
    one = batch(size, left=1)
    up = torch.where(good, 0.8, -0.8)[:, None, None].expand_as(one.action).contiguous()
    nowhere = {key: torch.zeros_like(v) for key, v in one.observation.items()}
    one = one.replace(
        action=up, outcome=torch.where(good, 1, -1).to(torch.int8), observation=nowhere
    )
    metrics: dict[str, float] = {}
    for _ in range(240):
        metrics = learner.update(one)
    value = learner.value(learner.encoder(one.observation, one.instruction)).detach()
    assert float(value.mean()) == pytest.approx(-0.25, abs=0.03), "half of them fail, at -0.5"
    assert metrics["recap/judged_positive_share"] == pytest.approx(0.5)
    place = {key: v[:32] for key, v in one.observation.items()}
    plain = one.instruction[0]
    noise = torch.randn(32, 1, policy.horizon, 4, generator=torch.Generator().manual_seed(1))
    policy.module.eval()
    mean = {
        which: float(policy.act(place, [with_indicator(plain, which)] * 32, noise=noise).mean())
        for which in (Indicator.POSITIVE, Indicator.NEGATIVE)
    }
    assert mean[Indicator.POSITIVE] > 0.5
    assert mean[Indicator.NEGATIVE] < -0.5
    assert float(policy.act(place, [plain] * 32, noise=noise).mean()) > 0.5, "it asks for good"


def test_an_episode_that_nobody_labelled_teaches_no_value_and_is_shown_without_indicator():
    learner, _ = build(value_warmup=0)
    unknown = batch(8, left=5, outcome=torch.zeros(8, dtype=torch.int8))
    indicator, _, told = learner.label(unknown)
    assert (indicator == Indicator.NONE).all()
    assert told["recap/judged_share"] == 0
    before = learner.value.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    assert learner.evaluate(unknown)["value/loss"] == 0
    # Weight decay aside, nothing moved; a look-ahead inside the episode can still be judged.
    indicator, _, told = learner.label(batch(8, outcome=torch.zeros(8, dtype=torch.int8)))
    assert told["recap/judged_share"] == 1
    person = batch(8, left=5, source=H, outcome=torch.zeros(8, dtype=torch.int8))
    assert (learner.label(person)[0] == Indicator.POSITIVE).all()


def test_a_frozen_value_stays_as_the_warm_up_left_it():
    learner, _ = build(value_warmup=3, value="frozen")
    one = batch(8)
    for _ in range(3):
        assert "grad_norm" not in learner.update(one)
    before = {k: v.clone() for k, v in learner.value.state_dict().items()}
    learner.update(one)
    assert all(torch.equal(v, before[k]) for k, v in learner.value.state_dict().items())
    assert learner.updates == 4


def test_state_continues_the_same_optimisation():
    one = batch(8)

    def run(learner: Recap, count: int) -> float:
        loss = 0.0
        for _ in range(count):
            torch.manual_seed(learner.updates)
            loss = learner.update(one)["loss"]
        return loss

    whole, _ = build(value_warmup=2)
    expected = run(whole, 6)
    first, policy = build(value_warmup=2)
    run(first, 3)
    again, other = build(value_warmup=2)
    other.module.load_state_dict(policy.module.state_dict())
    again.value.load_state_dict(first.value.state_dict())
    again.load_state_dict(first.state_dict())
    assert run(again, 3) == expected


@pytest.mark.parametrize(
    "wrong", [{"positive_share": 1.0}, {"guidance": -1.0}, {"lookahead_s": 0.0}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match="expected"):
        RecapConfig(**wrong)


def record(folder: Path, outcome: str, source: Source, *, episodes: int = 2) -> None:
    contract = load_contract(CONTRACT)
    random = np.random.default_rng(0)
    with StoreWriter.create_or_open(folder, contract, writer=folder.name) as writer:
        for _ in range(episodes):
            writer.write_episode(
                "reach",
                {
                    key: random.normal(size=(40, *f.shape)).astype(np.float32)
                    for key, f in contract.vectors.items()
                },
                np.zeros((40, 4), np.float32),
                outcome=outcome,
                source=source,
            )


def test_offline_iterations_begin_with_the_last_value(tmp_path: Path):
    """`vla-post train recap` on a store that no robot adds to, twice; a version carries value and
    guidance, and the second iteration takes the value from the first."""
    contract = load_contract(CONTRACT)
    record(tmp_path / "demos", "success", Source.SCRIPTED)
    record(tmp_path / "online" / "robot", "failure", Source.POLICY)
    numbers = statistics(FleetView(tmp_path / "demos"), contract)
    build_policy("chunk_flow", contract, numbers).save(tmp_path / "start")
    algorithm = RecapConfig(value_warmup=3, guidance=2.0, lookahead_s=0.2)

    def config(name: str, **changes: Any) -> LearnerConfig:
        return LearnerConfig(
            start=tmp_path / "start",
            demonstrations=tmp_path / "demos",
            online=tmp_path / "online",
            registry=tmp_path / name / "registry",
            run=tmp_path / name,
            train=TrainConfig(algorithm=replace(algorithm, **changes), batch_size=8),
            mirror=False,
            max_updates=5,
        )

    first = LearnerProcess(config("one"))
    assert first.run() == 5
    registry = Registry(tmp_path / "one" / "registry")
    newest = registry.path(registry.versions()[-1].number)
    published = LeRobotPolicy.load(newest)
    assert published.guidance is not None
    assert published.guidance.beta == 2.0
    second = LearnerProcess(config("two", value_from=str(newest), value_warmup=0))
    learner = second.trainer.learner
    assert isinstance(learner, Recap)
    for name, value in learner.value.state_dict().items():
        assert torch.equal(value, first.trainer.learner.modules["value"].state_dict()[name])
    with pytest.raises(CriticMissing, match="differs in bins"):
        LearnerProcess(config("three", value_from=str(newest), bins=51))
    with pytest.raises(CriticMissing, match="publishes one"):
        LearnerProcess(config("four", value_from=str(tmp_path / "start")))


def test_what_it_asks_of_the_data(tmp_path: Path):
    contract = load_contract(CONTRACT)
    record(tmp_path / "demos", "success", Source.SCRIPTED)
    record(tmp_path / "online" / "robot", "failure", Source.POLICY)
    needs = RecapConfig(lookahead_s=1.0).data(contract)
    assert needs.future_steps == round(contract.control_hz)
    sampler = mixture(
        FleetView(tmp_path / "demos"),
        FleetView(tmp_path / "online"),
        contract,
        batch_size=64,
        online_share=0.5,
        needs=needs,
    )
    chunk = next(sampler)
    assert chunk.has_future is not None
    np.testing.assert_array_equal(chunk.has_future, chunk.left > needs.future_steps)
