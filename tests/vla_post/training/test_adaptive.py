"""SOP's sampler and its figures: checks SOP-1 to SOP-8 of the specification that are not
transport. Redelivery and half-uploaded episodes on the way there are in
tests/trajectory_store/test_uplink.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trajectory_store import (
    Contract,
    FleetView,
    Outcome,
    Source,
    StoreWriter,
    Tick,
    load_contract,
)
from vla_post.batch import DataNeeds
from vla_post.export.registry import Registry
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.policies.build import build_policy
from vla_post.training.adaptive import AdaptiveConfig, AdaptiveSampler, LossWindows, fresh_share
from vla_post.training.data import statistics
from vla_post.training.learner import LearnerConfig, LearnerProcess
from vla_post.training.metrics import read_metrics
from vla_post.training.trainer import TrainConfig

CONTRACT = Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml"
PLAIN, RAW = AdaptiveConfig(boost=1.0), AdaptiveConfig(boost=1.0, scale="raw")


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract(CONTRACT)


def record(
    folder: Path,
    contract: Contract,
    task: str,
    lengths: Sequence[int],
    source: Source = Source.POLICY,
    version: int = 1,
) -> None:
    random = np.random.default_rng(len(task))
    with StoreWriter.create_or_open(folder, contract, writer=folder.name) as writer:
        for length in lengths:
            writer.write_episode(
                task,
                {
                    key: random.normal(size=(length, *f.shape)).astype(np.float32)
                    for key, f in contract.vectors.items()
                },
                np.zeros((length, contract.action.size), np.float32),
                outcome="success",
                source=source,
                policy_version=version,
            )


def test_sop1_equal_losses_are_drawn_alike():
    for loss in (1e-3, 0.02, 1.0, 1e4):
        assert fresh_share(loss, loss, PLAIN) == 0.5
        assert fresh_share(loss, loss, RAW) == 0.5
    assert fresh_share(0.0, 0.0, PLAIN) == 0.5


def test_sop2_very_unequal_losses_reach_the_bounds_exactly():
    assert fresh_share(1.0, 1e-3, PLAIN) == fresh_share(9.0, 0.0, RAW) == 0.8
    assert fresh_share(1e-3, 1.0, PLAIN) == fresh_share(0.0, 9.0, RAW) == 0.2


@pytest.mark.parametrize("config", [PLAIN, RAW, AdaptiveConfig()])
def test_sop3_the_share_follows_the_losses(config: AdaptiveConfig):
    losses = np.geomspace(1e-3, 1e3, 60)
    rising = [fresh_share(float(a), 0.7, config) for a in losses]
    falling = [fresh_share(0.7, float(a), config) for a in losses]
    assert np.all(np.diff(rising) >= 0)
    assert np.all(np.diff(falling) <= 0)


def test_sop7_huge_losses_do_not_overflow():
    for config in (PLAIN, RAW):
        assert fresh_share(1e4, 2e4, config) >= 0.2
        assert fresh_share(2e4, 1e4, config) <= 0.8
        assert fresh_share(1e300, 1e299, config) == 0.8


def test_the_scale_of_the_loss_decides_only_in_the_papers_form():
    """A flow loss near 0.02 leaves the paper's form a half-and-half mixer: the trap."""
    raw, ours = AdaptiveConfig(scale="raw"), AdaptiveConfig()
    assert fresh_share(0.02, 0.02, raw) == pytest.approx(0.5025, abs=1e-4)
    assert fresh_share(0.04, 0.01, raw) == pytest.approx(0.5125, abs=1e-4)
    assert fresh_share(1.0, 1.0, raw) == pytest.approx(0.622, abs=1e-3)
    for scale in (1e-4, 0.02, 1.0, 50.0):
        assert fresh_share(scale, scale, ours) == pytest.approx(0.622, abs=1e-3)
        assert fresh_share(1.2 * scale, scale, ours) == pytest.approx(
            fresh_share(1.2, 1.0, ours), abs=1e-9
        )
    assert fresh_share(0.03, 0.02, PLAIN) > 0.55


def test_sop8_the_window_keeps_the_last_200_of_each_task_and_source():
    windows = LossWindows(AdaptiveConfig())
    windows.push("a", True, np.arange(150.0))
    windows.push("a", True, np.arange(150.0, 450.0))
    windows.push("a", False, np.ones(3))
    windows.push("b", True, np.zeros(0))
    assert windows.losses("a", True) == list(range(250, 450))
    assert windows.losses("a", False) == [1.0] * 3
    assert windows.losses("b", True) == []
    again = LossWindows(AdaptiveConfig())
    again.load_state_dict(windows.state_dict())
    assert again.share("a") == windows.share("a") == 0.8
    assert again.share("b") == 0.5, "nothing seen yet"


@pytest.fixture
def fleet(tmp_path: Path, contract: Contract) -> Path:
    """Three tasks: many demonstrations of one, few of another, none of the third."""
    record(tmp_path / "demos", contract, "reach", [60] * 5, Source.SCRIPTED)
    record(tmp_path / "demos", contract, "push", [10], Source.SCRIPTED)
    record(tmp_path / "online" / "cell1", contract, "push", [30], Source.HUMAN)
    record(tmp_path / "online" / "cell1", contract, "pick-place", [12], Source.POLICY)
    record(tmp_path / "online" / "cell2", contract, "push", [7], Source.POLICY)
    return tmp_path


def sampler(fleet: Path, contract: Contract, **changes: Any) -> AdaptiveSampler:
    settings: dict[str, Any] = {"batch_size": 10_000, "seed": 3} | changes
    return AdaptiveSampler(
        FleetView(fleet / "demos"),
        FleetView(fleet / "online"),
        contract,
        settings.pop("windows", LossWindows(AdaptiveConfig())),
        **settings,
    )


def test_sop4_tasks_are_drawn_alike_whatever_they_have(fleet: Path, contract: Contract):
    drawn = sampler(fleet, contract)
    counts: dict[tuple[str, int], int] = {}
    names = sorted(["reach", "push", "pick-place"])
    for _ in range(10):
        chunk = next(drawn)
        for task in range(3):
            for part in (0, 1):
                key = names[task], part
                found = int(((chunk.task == task) & (chunk.part == part)).sum())
                counts[key] = counts.get(key, 0) + found
    total = sum(counts.values())
    assert total == 100_000
    error = 3 * (1 / 3 * 2 / 3 / total) ** 0.5
    for name in names:
        share = (counts[name, 0] + counts[name, 1]) / total
        assert abs(share - 1 / 3) < error
    # Without frames of one kind, all come from the other; both kinds begin half and half.
    assert counts["reach", 1] == counts["pick-place", 0] == 0
    assert counts["push", 1] / (counts["push", 0] + counts["push", 1]) == pytest.approx(
        0.5, abs=0.01
    )


def test_what_is_learned_badly_is_drawn_more(fleet: Path, contract: Contract):
    drawn = sampler(fleet, contract, batch_size=500)
    chunk = next(drawn)
    loss = np.where(chunk.part == 1, 1.0, 1e-3).astype(np.float32)
    drawn.learned(chunk, loss, np.ones(len(loss), bool))
    assert drawn.shares()["push/online"] == pytest.approx(0.8 / 3)
    assert drawn.shares()["reach/offline"] == pytest.approx(1 / 3)
    drawn.learned(chunk, 1.001 - loss, np.zeros(len(loss), bool))
    assert drawn.shares()["push/online"] == pytest.approx(0.8 / 3), "these items did not count"
    chunk = next(drawn)
    push = chunk.task == sorted(["reach", "push", "pick-place"]).index("push")
    assert chunk.part[push].mean() == pytest.approx(0.8, abs=0.1)


def test_hg_dagger_draws_only_where_a_person_drove(fleet: Path, contract: Contract):
    needs = HgDaggerConfig().data(contract)
    drawn = sampler(fleet, contract, needs=needs, batch_size=300)
    chunk = next(drawn)
    assert (chunk.source[chunk.part == 1][:, 0] == Source.HUMAN).all()
    assert "pick-place/online" not in drawn.shares(), "nobody corrected anything there"
    with pytest.raises(ValueError, match="rule of its own"):
        sampler(fleet, contract, needs=DataNeeds(double_buffer=True))


def test_sop5_only_finished_episodes_count_and_each_once(tmp_path: Path, contract: Contract):
    record(tmp_path / "demos", contract, "push", [10], Source.SCRIPTED)
    writer = StoreWriter.create_or_open(tmp_path / "online" / "cell", contract, writer="cell")
    with writer:
        uuid = writer.begin_episode("push", "", "", 1)
        for k in range(20):
            writer.append(
                Tick(
                    observation={
                        key: np.zeros(f.shape, np.float32) for key, f in contract.vectors.items()
                    },
                    action=np.zeros(4, np.float32),
                    source=Source.HUMAN,
                    stamp_ns=k * contract.dt_ns,
                )
            )
        writer.flush(30)
        view = FleetView(tmp_path / "online")

        def anchors() -> int:
            return AdaptiveSampler(
                FleetView(tmp_path / "demos"),
                view,
                contract,
                LossWindows(AdaptiveConfig()),
                batch_size=4,
            ).n_anchors

        assert anchors() == 10, "an episode on its way is not drawn"
        writer.end_episode(Outcome.SUCCESS)
        writer.flush(30)
    view.refresh()
    assert anchors() == 30
    # Announced again, or twice: the table stays the same.
    assert not view.refresh()
    assert [e.uuid for e in view.episodes] == [uuid]
    assert anchors() == 30


def test_the_learner_mixes_reports_and_resumes(fleet: Path, contract: Contract):
    """Publishes every 5 updates; SOP-6: versions behind follow from one version per episode."""
    numbers = statistics(FleetView(fleet / "demos"), contract)
    torch.manual_seed(0)
    build_policy("chunk_flow", contract, numbers).save(fleet / "start")

    def config(**changes: Any) -> LearnerConfig:
        settings: dict[str, Any] = {
            "start": fleet / "start",
            "demonstrations": fleet / "demos",
            "online": fleet / "online",
            "registry": fleet / "registry",
            "run": fleet / "run",
            "train": TrainConfig(algorithm=HgDaggerConfig(), batch_size=32),
            "mixing": "adaptive",
            "publish_s": 0.0,
            "publish_updates": 5,
            "max_updates": 10,
            "mirror": False,
        }
        return LearnerConfig(**(settings | changes))

    assert LearnerProcess(config()).run() == 10
    assert [v.learner_step for v in Registry(fleet / "registry").versions()] == [0, 5, 10]
    rows = read_metrics(fleet / "run" / "metrics.jsonl")
    mixes = [r["mix/push/online"] for r in rows if "mix/push/online" in r]
    assert mixes[0] == 0.25, "half of one of two tasks"
    assert len(set(mixes)) > 1, "it follows the losses"
    arrived = {r["episode"]: r for r in rows if "episode" in r}
    assert len(arrived) == 3
    assert {r["versions_behind"] for r in arrived.values()} == {0}
    drawn = [r for r in rows if "first_batch_of" in r]
    assert len(drawn) == 1, "the only episode in which a person drove"
    assert arrived[drawn[0]["first_batch_of"]]["task"] == "push"
    assert all(r["start_to_batch_s"] >= 0 for r in drawn)

    # A robot that still runs version 1, and one that runs the newest.
    record(fleet / "online" / "cell2", contract, "push", [15], Source.HUMAN, version=1)
    record(fleet / "online" / "cell3", contract, "push", [15], Source.HUMAN, version=3)
    process = LearnerProcess(config(resume=True, max_updates=15))
    process.run()
    rows = read_metrics(fleet / "run" / "metrics.jsonl")
    new = [r for r in rows if "episode" in r][3:]
    assert sorted(r["versions_behind"] for r in new) == [0, 2]
    running = [r for r in rows if r.get("running") == 3]
    assert len(running) == 1
    assert running[0]["update_to_robot_s"] >= 0
    assert len({r["first_batch_of"] for r in rows if "first_batch_of" in r}) == 3
