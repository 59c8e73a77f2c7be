"""A policy sharded over two processes learns, stops, resumes and publishes as a replicated one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from trajectory_store import FleetView, Source, StoreWriter, load_contract
from vla_post import parallel, sharding
from vla_post.export.registry import Registry
from vla_post.policies.build import build_policy
from vla_post.training.data import statistics
from vla_post.training.metrics import read_metrics

from .sharding_child import learn

CONTRACTS = Path(__file__).parents[3] / "sim" / "contracts"
CELLS = {"chunk_flow": "metaworld_state.yaml", "smolvla_tiny": "metaworld_pixels.yaml"}
CHILD = Path(__file__).with_name("sharding_child.py")


def record(folder: Path, contract: Any, outcome: str, source: Source) -> None:
    random = np.random.default_rng(0)
    steps = 24
    with StoreWriter.create_or_open(folder, contract, writer=folder.name) as writer:
        for name, task in contract.tasks.items():
            seen: dict[str, Any] = {
                key: random.normal(size=(steps, *f.shape)).astype(np.float32)
                for key, f in contract.vectors.items()
            }
            for key, feature in contract.images.items():
                seen[key] = random.integers(0, 255, (steps, *feature.shape), dtype=np.uint8)
            action = random.uniform(-1, 1, (steps, contract.action.size)).astype(np.float32)
            writer.write_episode(
                name, seen, action, outcome=outcome, source=source, instruction=task.instruction
            )


def cell(folder: Path, kind: str) -> Path:
    """Stores and a checkpoint to start from."""
    contract = load_contract(CONTRACTS / CELLS[kind])
    record(folder / "demos", contract, "success", Source.SCRIPTED)
    record(folder / "online" / "failed", contract, "failure", Source.POLICY)
    record(folder / "online" / "helped", contract, "success", Source.HUMAN)
    torch.manual_seed(0)
    numbers = statistics(FleetView(folder / "demos"), contract)
    build_policy(kind, contract, numbers).save(folder / "start")
    return folder


def two_processes(folder: Path, *runs: dict[str, Any]) -> None:
    """Runs of `sharding_child.learn`, one after the other, each by the same two processes."""
    words = [sys.executable, str(CHILD), str(folder), json.dumps(runs)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(parallel.free_port())}
    both = [
        subprocess.Popen(
            words,
            env=os.environ | place | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        for process in both:
            _, said = process.communicate(timeout=600)
            assert process.returncode == 0, said
    finally:
        for process in both:
            process.kill()
            process.wait()


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row]


def published(folder: Path) -> dict[str, np.ndarray]:
    registry = Registry(folder / "registry")
    return load_file(registry.path(registry.versions()[-1].number) / "model.safetensors")


def require_alike(one: Path, other: Path) -> None:
    """Loss and gradient curves, and the published weights."""
    for key, bound in (("loss", 1e-4), ("grad_norm", 1e-3)):
        np.testing.assert_allclose(curve(other, key), curve(one, key), rtol=bound)
    mine, its = published(one), published(other)
    assert mine.keys() == its.keys()
    for name, weights in mine.items():
        np.testing.assert_allclose(its[name], weights, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kind", ["chunk_flow", pytest.param("smolvla_tiny", marks=pytest.mark.long)]
)
def test_a_sharded_learner_learns_stops_and_resumes_as_a_replicated_one(tmp_path: Path, kind: str):
    folder = cell(tmp_path, kind)
    to_4: dict[str, Any] = {"algorithm": "hg-dagger", "updates": 4}
    to_8: dict[str, Any] = {"algorithm": "hg-dagger", "updates": 8}
    two_processes(
        folder,
        to_4 | {"name": "replicated"},
        to_4 | {"name": "sharded", "shard": True},
        to_8 | {"name": "replicated_8", "resume": "replicated"},
        to_8 | {"name": "sharded_8", "resume": "sharded", "shard": True},
        # What two replicas saved serves a sharded learner, and the other way round.
        to_8 | {"name": "sharded_later", "resume": "replicated", "shard": True},
        to_8 | {"name": "replicated_later", "resume": "sharded"},
    )
    require_alike(folder / "replicated", folder / "sharded")
    for name in ("sharded_8", "sharded_later", "replicated_later"):
        require_alike(folder / "replicated_8", folder / name)
    learn(folder, name="alone", resume="sharded", **to_8)
    require_alike(folder / "replicated_8", folder / "alone")
    assert len(curve(folder / "alone")) == 8
    before, after = load_file(folder / "start" / "model.safetensors"), published(folder / "sharded")
    assert max(np.abs(after[name] - before[name]).max() for name in before) > 5e-4

    # The process with the most holds about half. Buffers, among the average weights, stay whole.
    for what in ("weights", "gradients", "learner", "average"):
        (all_of_it,) = curve(folder / "replicated", f"held/{what}")
        (part,) = curve(folder / "sharded", f"held/{what}")
        assert 0.5 * all_of_it <= part < 0.55 * all_of_it, what


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [("recap", "chunk_flow"), ("ptr", "chunk_flow"), ("ptr-hg-dagger", "smolvla_tiny")],
)
def test_other_learners_shard_too(tmp_path: Path, algorithm: str, kind: str):
    folder = cell(tmp_path, kind)
    run = {"algorithm": algorithm, "updates": 8}
    two_processes(folder, run | {"name": "replicated"}, run | {"name": "sharded", "shard": True})
    require_alike(folder / "replicated", folder / "sharded")
    (all_of_it,) = curve(folder / "replicated", "held/weights")
    (part,) = curve(folder / "sharded", "held/weights")
    assert part < 0.55 * all_of_it


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("algorithm", "status"), [("hg-dagger", 0), ("aloe", 2)])
def test_the_command_shards_or_says_why_not(tmp_path: Path, algorithm: str, status: int):
    folder = cell(tmp_path, "chunk_flow")
    words = [
        *(sys.executable, "-m", "vla_post.cli.main", "train", algorithm),
        *("--start", str(folder / "start"), "--demonstrations", str(folder / "demos")),
        *("--registry", str(folder / "registry"), "--run", str(folder / "run"), "--no-mirror"),
        *("--max-updates", "2", "--processes", "2", "--shard"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    if status:
        assert "Aloe does not train a sharded policy" in done.stderr
    else:
        assert Registry(folder / "registry").versions()[-1].learner_step == 2


def test_what_cannot_be_sharded_is_refused(monkeypatch: pytest.MonkeyPatch):
    class Takes:
        def adopt(self, shards: sharding.Shards) -> None: ...

    with pytest.raises(ValueError, match="--processes N"):
        sharding.require_shardable("smolvla", Takes())
    monkeypatch.setattr(parallel, "world", lambda: 2)
    assert sharding.require_shardable("smolvla", Takes())
    with pytest.raises(ValueError, match="object does not train a sharded policy"):
        sharding.require_shardable("smolvla", object())
    with pytest.raises(ValueError, match="this is 'act'"):
        sharding.require_shardable("act", Takes())


def test_alone_gradients_are_shortened_as_torch_does():
    layer = nn.Linear(3, 2)
    (100.0 * layer(torch.ones(1, 3)).sum()).backward()
    expected = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    norm = sharding.shorten(layer.parameters(), 1.5)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in expected]).norm())
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 1.5 * grad / norm)
