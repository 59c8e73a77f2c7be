"""`--ray local`: evaluation and fleets on a real Ray cluster of this machine.

In processes of their own, as users run them: Ray leaves threads and sockets behind in a driver.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sim
from sim.demonstrations import write_demonstrations
from trajectory_store import FleetView, load_contract
from vla_post.cli.errors import UserError
from vla_post.cli.evaluate import Evaluate
from vla_post.cli.fleet import Fleet
from vla_post.cli.main import main
from vla_post.policies.build import build_policy
from vla_post.training.data import statistics

pytest.importorskip("ray")
CONTRACT = sim.CONTRACTS / "metaworld_state.yaml"


def vla_post(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vla_post.cli.main", *words]
    # Nothing of pytest's own settings for warnings reaches the workers.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_sharded_evaluation_has_the_outcomes_of_a_whole_one(tmp_path: Path):
    contract = load_contract(CONTRACT)
    write_demonstrations(
        tmp_path / "demos", contract, tasks=("reach",), episodes_per_task=1, seed=0
    )
    torch.manual_seed(0)
    numbers = statistics(FleetView(tmp_path / "demos"), contract)
    build_policy("chunk_flow", contract, numbers).save(tmp_path / "a")
    words = ["eval", "--checkpoints", str(tmp_path / "a"), "--tasks", "reach", "push"]
    words += ["--episodes", "2"]
    main([*words, "--out", str(tmp_path / "whole.json")])
    done = vla_post(*words, "--out", str(tmp_path / "ray.json"), "--ray", "local", "--shards", "2")
    assert done.returncode == 0, done.stderr
    whole, sharded = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "ray"))
    assert whole == sharded
    assert "95 % interval" in done.stdout


@pytest.mark.ros
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_fleet_on_a_cluster(tmp_path: Path):
    pytest.importorskip("rclpy")
    done = vla_post(
        *("fleet", "--contract", str(CONTRACT), "--cells", "2", "--drive", "--episodes", "1"),
        *("--folder", str(tmp_path), "--ray", "local", "--shards", "2", "--seed", "7"),
    )
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "fleet.json").read_text())
    assert set(card["cells"]) == {"shard_0/sawyer_state_0", "shard_1/sawyer_state_0"}
    view = FleetView(tmp_path)
    assert len(view.episodes) == 2
    starts = [s.read("observation.environment_state", [0])[0] for s in view.stores]
    assert (starts[0] != starts[1]).any(), "every cell has scenes of its own"


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="splits what --ray plays"):
        Evaluate(checkpoints=(Path("a"),), shards=2)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"cells": 1, "shards": 2}, "2 shards of 1 cells"),
        ({"cells": 4, "shards": 3, "operators": 2}, "2 operators for 3 shards"),
        ({"cells": 4, "shards": 2, "first_domain": 3}, "drop --first-domain"),
    ]
    for changes, problem in cases:
        with pytest.raises(UserError, match=problem):
            Fleet(contract=CONTRACT, drive=True, ray="local", **changes).run()
    assert capsys.readouterr().out == ""


def test_cells_operators_and_seeds_are_divided():
    fleet = Fleet(contract=CONTRACT, cells=5, operators=3, drive=True, ray="local", shards=2)
    parts = [fleet._part(k)[0] for k in range(2)]  # pyright: ignore[reportPrivateUsage]

    def of(words: list[str], name: str) -> str:
        return words[words.index(name) + 1]

    assert [of(p, "--cells") for p in parts] == ["2", "3"]
    assert [of(p, "--operators") for p in parts] == ["1", "2"]
    assert [of(p, "--seed") for p in parts] == ["0", "20000"]
    domains = [fleet._part(k)[2] for k in range(2)]  # pyright: ignore[reportPrivateUsage]
    assert domains[0] != domains[1]
