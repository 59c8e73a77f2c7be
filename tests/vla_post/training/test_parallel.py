"""One learner of two processes: the loss curve of one process with the same whole batch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trajectory_store import ChunkSampler, FleetView, Source, StoreWriter, load_contract
from trajectory_store.errors import StoreError
from vla_post import parallel
from vla_post.export.registry import Registry
from vla_post.policies.build import build_policy
from vla_post.training.data import statistics
from vla_post.training.metrics import read_metrics

CONTRACT = Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml"


def record(folder: Path, outcome: str, source: Source) -> None:
    contract = load_contract(CONTRACT)
    random = np.random.default_rng(0)
    with StoreWriter.create_or_open(folder, contract, writer=folder.name) as writer:
        for task in ("reach", "push"):
            writer.write_episode(
                task,
                {
                    key: random.normal(size=(40, *f.shape)).astype(np.float32)
                    for key, f in contract.vectors.items()
                },
                random.uniform(-1, 1, (40, contract.action.size)).astype(np.float32),
                outcome=outcome,
                source=source,
                instruction=contract.task(task).instruction,
            )


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    record(folder / "demos", "success", Source.SCRIPTED)
    record(folder / "online" / "cell1", "failure", Source.POLICY)
    record(folder / "online" / "cell2", "success", Source.HUMAN)
    contract = load_contract(CONTRACT)
    torch.manual_seed(0)
    numbers = statistics(FleetView(folder / "demos"), contract)
    build_policy("chunk_flow", contract, numbers).save(folder / "start")
    return folder


def command(stores: Path, name: str, algorithm: str, processes: int, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "vla_post.cli.main", "train", algorithm),
        *("--start", str(stores / "start"), "--demonstrations", str(stores / "demos")),
        *("--online", str(stores / "online"), "--registry", str(stores / name / "registry")),
        *("--run", str(stores / name), "--mixing", "adaptive", "--max-reuse", "1e9"),
        *("--train.batch-size", "16", "--no-mirror", "--processes", str(processes), *more),
    ]


def curve(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("recap", ("--train.algorithm.value-warmup", "4", "--train.image-shift", "1")),
        pytest.param("hg-dagger", (), marks=pytest.mark.long),
        pytest.param("hg-dagger", ("--train.algorithm.weighting", "iwr"), marks=pytest.mark.long),
        pytest.param("awr", ("--train.algorithm.value-warmup", "4"), marks=pytest.mark.long),
    ],
)
def test_two_processes_follow_the_loss_curve_of_one(
    stores: Path, algorithm: str, more: tuple[str, ...]
):
    runs: dict[int, list[dict[str, Any]]] = {}
    for processes in (1, 2):
        name = f"{algorithm}_{len(more)}_{processes}"
        words = command(stores, name, algorithm, processes, "--max-updates", "14", *more)
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        runs[processes] = curve(stores / name)
    losses = [[row["loss"] for row in rows] for rows in runs.values()]
    assert len(losses[0]) == len(losses[1]) == 14
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for key in ("grad_norm", "mix/push/online"):
        pair = [[row[key] for row in rows if key in row] for rows in runs.values()]
        np.testing.assert_allclose(pair[1], pair[0], rtol=1e-3)
    published = [
        Registry(stores / f"{algorithm}_{len(more)}_{n}" / "registry").versions()[-1]
        for n in (1, 2)
    ]
    assert published[0].snapshots == published[1].snapshots


@pytest.mark.long
def test_a_learner_of_two_processes_ends_in_order(stores: Path):
    """SIGTERM to the leader: it publishes, the other one ends with it, the status is 0."""
    words = command(stores, "stopped", "hg-dagger", 2)
    leader = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    metrics = stores / "stopped" / "metrics.jsonl"
    try:
        begun = time.monotonic()
        while not (metrics.exists() and len(curve(stores / "stopped")) > 3):
            assert leader.poll() is None, leader.stderr.read() if leader.stderr else ""
            assert time.monotonic() - begun < 240
            time.sleep(0.1)
        children = Path(f"/proc/{leader.pid}/task/{leader.pid}/children").read_text().split()
        leader.send_signal(signal.SIGTERM)
        _, said = leader.communicate(timeout=120)
        assert leader.returncode == 0, said
        assert "Traceback" not in said
    finally:
        leader.kill()
        leader.wait()
    assert children
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    state = json.loads((stores / "stopped" / "learner" / "state.json").read_text())
    assert state
    assert Registry(stores / "stopped" / "registry").versions()[-1].learner_step > 3


def test_shards_of_a_batch_are_the_batch(stores: Path):
    view = FleetView(stores / "online")
    settings: dict[str, Any] = {"horizon": 4, "batch_size": 12, "seed": 1}
    whole = ChunkSampler(view, **settings)
    shards = [ChunkSampler(view, shard=(k, 3), **settings) for k in range(3)]
    for _ in range(3):
        rows = next(whole).provenance.row
        parts = [next(shard).provenance.row for shard in shards]
        np.testing.assert_array_equal(np.concatenate(parts), rows)
    with pytest.raises(StoreError, match="n divides"):
        ChunkSampler(view, shard=(0, 5), **settings)


def test_alone_nothing_is_shared():
    assert (parallel.rank(), parallel.world()) == (0, 1)
    value = torch.tensor([1.0, 2.0])
    for same in (parallel.total(value), parallel.mean(value), parallel.gather(value)):
        assert torch.equal(same, value)
    assert parallel.tell({"do": "stop"}) == {"do": "stop"}
    with pytest.raises(ValueError, match="at least 1"), parallel.together(0):
        pass
    assert "RANK" not in os.environ
