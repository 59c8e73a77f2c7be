"""`vla-post ptr`: the chunks that a scorer trusts most and least, and the user's mistakes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sim
from sim.demonstrations import write_demonstrations
from trajectory_store import FleetView, load_contract
from vla_post.batch import Batch
from vla_post.cli.errors import UserError
from vla_post.cli.ptr import Show, Weights
from vla_post.cli.store import Convert
from vla_post.learners.ptr import PtrConfig
from vla_post.learners.transition import TransitionScorer
from vla_post.learners.transition_math import TransitionConfig
from vla_post.policies.build import build_policy
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.training.data import mixture, statistics
from vla_post.training.trainer import TrainConfig, Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of demonstrations, and a version with its scorer."""
    folder = tmp_path_factory.mktemp("ptr")
    contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    write_demonstrations(folder / "store", contract, tasks=["reach"], episodes_per_task=2)
    train(folder / "store", folder / "version")
    return folder


def train(store: Path, version: Path, **transition: Any) -> LeRobotPolicy:
    """Five updates of PTR on a store, by its own contract."""
    view = FleetView(store)
    contract = view.stores[0].contract
    policy = build_policy("chunk_flow", contract, statistics(view, contract))
    algorithm = PtrConfig(transition=TransitionConfig(warmup_updates=2, **transition))
    trainer = Trainer(policy, TrainConfig(algorithm=algorithm, batch_size=32))
    sampler = batches(view, algorithm, policy)
    for _ in range(5):
        trainer.step(next(sampler))
    trainer.save_policy(version)
    return policy


def batches(view: FleetView, algorithm: PtrConfig, policy: LeRobotPolicy) -> Iterator[Any]:
    contract = view.stores[0].contract
    return mixture(
        view,
        None,
        contract,
        batch_size=32,
        online_share=0.5,
        needs=algorithm.data(contract),
        keys=policy.observation_keys,
    )


def test_show_writes_a_page_with_the_highest_and_the_lowest(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    Show(checkpoint=trained / "version", store=trained / "store", out=tmp_path, count=2).run()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    scores = [float(line.split()[2]) for line in lines[:4]]
    assert min(scores[:2]) >= max(scores[2:])
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") == 4
    assert all((tmp_path / f"0{k}.png").stat().st_size > 1000 for k in range(4))


def test_weights_are_bounded_and_sorted(trained: Path, capsys: pytest.CaptureFixture[str]):
    Weights(checkpoint=trained / "version", store=trained / "store", chunks=40).run()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 20 < len(rows) <= 40
    assert [r["score"] for r in rows] == sorted(r["score"] for r in rows)
    assert all(0.25 <= r["weight"] <= 4.0 and r["score"] <= r["best"] + 1e-3 for r in rows)


def test_a_lerobot_dataset_of_unknown_limits_is_scored_by_its_actions(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Imported data declares no limits; neither policy nor scorer may take its actions for 0."""
    dataset, store = tmp_path / "dataset", tmp_path / "store"
    Convert("to-lerobot", str(trained / "store"), str(dataset)).run()
    (dataset / "meta" / "vla_post.json").unlink()
    Convert("from-lerobot", str(dataset), str(store)).run()
    # Two episodes may well belong to the same half.
    config = TransitionConfig(held_out=False)
    policy = train(store, tmp_path / "version", held_out=False)
    assert float(np.max(policy.statistics["action"]["std"])) < 2.0
    capsys.readouterr()
    Weights(checkpoint=tmp_path / "version", store=store, chunks=40, transition=config).run()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({round(row["score"], 3) for row in rows}) > 10
    scorer = TransitionScorer(policy, policy.contract, config)
    scorer.load_state_dict(load_file(tmp_path / "version" / "transition.safetensors"))
    batch = Batch.from_numpy(next(batches(FleetView(store), PtrConfig(), policy)))
    scores: list[Any] = []
    for one in (batch, batch.replace(action=-batch.action)):
        torch.manual_seed(0)
        scores.append(scorer.scores(one).score)
    assert float((scores[0] - scores[1]).abs().mean()) > 1e-3


def test_mistakes_are_named(trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no transition\.safetensors"):
        Show(checkpoint=tmp_path, store=trained / "store").run()
    other = TransitionConfig(width=32)
    with pytest.raises(UserError, match="other sizes"):
        Show(checkpoint=trained / "version", store=trained / "store", transition=other).run()
    far = TransitionConfig(future_s=60.0)
    with pytest.raises(UserError, match="no episode reaches the future"):
        Show(checkpoint=trained / "version", store=trained / "store", transition=far).run()
