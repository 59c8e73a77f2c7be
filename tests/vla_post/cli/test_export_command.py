"""`vla-post export` with its closed loop: the exported file plays beside PyTorch, seed by seed."""

import json
from pathlib import Path

import numpy as np
import pytest

import sim
from sim.demonstrations import write_demonstrations
from trajectory_store.contract import load_contract
from vla_post.cli.export import nearest
from vla_post.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.long
def test_the_export_plays_the_same_episodes_as_pytorch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from trajectory_store import FleetView
    from vla_post.policies.build import build_policy
    from vla_post.training.data import statistics

    whole = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    contract = whole.model_copy(update={"tasks": {"reach": whole.tasks["reach"]}})
    store = tmp_path / "store"
    write_demonstrations(store, contract, episodes_per_task=2, seed=1)
    view = FleetView(store)
    checkpoint = build_policy("chunk_flow", contract, statistics(view, contract))
    folder = checkpoint.save(tmp_path / "checkpoint")
    words = ["export", str(folder), "--store", str(store), "--observations", "8"]
    main([*words, "--out", str(tmp_path / "out"), "--precision", "int8", "--episodes", "2"])
    said = capsys.readouterr().out
    assert "parity on 8 recorded observations" in said
    card = json.loads((tmp_path / "out" / "policy.json").read_text())
    assert card["precision"] == "int8"
    assert card["closed_loop"]["episodes"] == 2
    assert np.isfinite(card["closed_loop"]["difference"])
    with pytest.raises(SystemExit):
        main([*words, "--out", str(tmp_path / "x"), "--bound", "0"])
    assert "do not deploy this file" in capsys.readouterr().err
    assert not (tmp_path / "x" / "policy.json").exists()


def test_a_refusal_names_the_fields_in_which_the_nearest_recorded_contract_differs():
    wanted = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    near = wanted.model_copy(update={"control_hz": 40.0})
    far = load_contract(sim.CONTRACTS / "franka_joint.yaml")
    assert nearest(wanted, [far, near, wanted]) == (
        f". What was recorded of {wanted.cell!r} differs in:\n"
        f"  control_hz: {wanted.control_hz} -> 40.0"
    )
    assert nearest(wanted, [wanted]) == ""
