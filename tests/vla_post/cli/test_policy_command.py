"""`vla-post policy new`: from a store to a trained policy without a line of Python."""

from pathlib import Path

import pytest

import sim
from sim.demonstrations import write_demonstrations
from trajectory_store import StoreWriter, load_contract
from vla_post.cli.main import main
from vla_post.export.registry import Registry
from vla_post.policies.checkpoint import read_card
from vla_post.policies.lerobot_adapter import LeRobotPolicy

CONTRACT = sim.CONTRACTS / "metaworld_state.yaml"


def new(kind: str, store: Path, out: Path) -> None:
    main(["policy", "new", kind, "--store", str(store), "--out", str(out)])


def mistake(kind: str, store: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        new(kind, store, out)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_new_policy_for_a_store_trains_from_scratch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    store, fresh = tmp_path / "store", tmp_path / "fresh"
    write_demonstrations(store, load_contract(CONTRACT), tasks=["reach"], episodes_per_task=2)
    new("chunk_flow", store, fresh)
    assert read_card(fresh)["contract_sha256"] == load_contract(CONTRACT).sha256
    words = ["--start", fresh, "--demonstrations", store, "--registry", tmp_path / "registry"]
    words += ["--run", tmp_path / "run", "--max-updates", 3, "--train.batch-size", 8]
    main(["train", "hg-dagger", *map(str, words)])
    registry = Registry(tmp_path / "registry")
    numbers = [version.number for version in registry.versions()]
    assert len(numbers) > 1
    first, last = (LeRobotPolicy.load(registry.path(n)) for n in (min(numbers), max(numbers)))
    before, after = (next(iter(p.module.parameters())) for p in (first, last))
    assert not before.equal(after)
    # A second one elsewhere has the same weights; the folder of the first is never written over.
    again = tmp_path / "again"
    new("chunk_flow", store, again)
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (fresh / weights).read_bytes()
    assert "not empty" in mistake("chunk_flow", store, again, capsys)


@pytest.mark.parametrize(
    ("kind", "why"), [("gpt", "no policy kind 'gpt'"), ("smolvla_tiny", "smolvla_tiny: ")]
)
def test_what_cannot_be_made_is_one_line(
    kind: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    store = tmp_path / "store"
    write_demonstrations(store, load_contract(CONTRACT), tasks=["reach"], episodes_per_task=1)
    assert why in mistake(kind, store, tmp_path / "out", capsys)
    assert not (tmp_path / "out").exists()


def test_an_empty_store_has_nothing_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    StoreWriter(tmp_path / "store", load_contract(CONTRACT)).close()
    said = mistake("chunk_flow", tmp_path / "store", tmp_path / "out", capsys)
    assert "no finished episodes" in said
