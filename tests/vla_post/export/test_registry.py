"""Versions are whole, unchanged and checked, or refused with a reason."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from trajectory_store.contract import Contract, ContractMismatch, load_contract
from vla_post.export.registry import (
    GateRefused,
    Registry,
    RegistryError,
    VersionDamaged,
    parse_version,
)
from vla_post.policies.checkpoint import CheckpointError, write_card

SHIPPED = Path(__file__).parents[3] / "sim" / "contracts"


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract(SHIPPED / "metaworld_state.yaml")


def checkpoint(folder: Path, contract: Contract, value: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": np.full((3, 2), value, np.float32)}, folder / "model.safetensors")
    write_card(folder, kind="test", contract=contract, statistics={})
    return folder


def test_publish_promote_rollback(tmp_path: Path, contract: Contract):
    registry = Registry(tmp_path / "registry")
    assert registry.versions() == []
    assert registry.active() is None
    first = registry.publish(checkpoint(tmp_path / "a", contract), contract=contract)
    second = registry.publish(
        checkpoint(tmp_path / "b", contract, 2.0),
        contract=contract,
        parent=first.number,
        learner_step=40,
        snapshots={"robot": "ABC"},
        metrics={"loss": 0.5},
    )
    assert [v.name for v in registry.versions()] == ["v000001", "v000002"]
    assert registry.active() == second
    assert registry.version(2).snapshots == {"robot": "ABC"}

    assert registry.rollback(reason="dropped the peg") == first
    assert registry.active() == first
    # A person went back, so the learner's next version waits for a person.
    third = registry.publish(checkpoint(tmp_path / "c", contract, 3.0), contract=contract)
    assert registry.active() == first
    registry.promote(third.number, reason="looks good")
    assert registry.active() == third
    assert not registry.pinned
    actions = [(e["action"], e["version"]) for e in registry.history()]
    assert actions[-3:] == [("rollback", 1), ("publish", 3), ("promote", 3)]


def test_a_rollback_passes_over_what_is_damaged(tmp_path: Path, contract: Contract):
    registry = Registry(tmp_path / "registry")
    for name in "abc":
        registry.publish(checkpoint(tmp_path / name, contract), contract=contract)
    (registry.path(2) / "model.safetensors").write_bytes(b"lost")
    assert registry.previous() == 1
    assert registry.rollback().number == 1
    assert registry.rejected == [3]


def test_what_is_not_there_is_named(tmp_path: Path, contract: Contract):
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError, match="no version at all"):
        registry.version(7)
    with pytest.raises(RegistryError, match="nothing is active"):
        registry.rollback()
    registry.publish(checkpoint(tmp_path / "a", contract), contract=contract)
    with pytest.raises(RegistryError, match="there is v000001"):
        registry.promote(7)
    with pytest.raises(RegistryError, match="first version"):
        registry.rollback()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        registry.publish(tmp_path, contract=contract)
    assert parse_version("v000012") == parse_version("12") == parse_version(12) == 12
    with pytest.raises(RegistryError, match="write it as"):
        parse_version("latest")


def test_a_changed_missing_or_added_file_is_found(tmp_path: Path, contract: Contract):
    registry = Registry(tmp_path / "registry")
    for name in "abc":
        registry.publish(checkpoint(tmp_path / name, contract), contract=contract)
    weights = registry.path(1) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (registry.path(2) / "vla_post.json").unlink()
    (registry.path(3) / "extra.bin").write_bytes(b"x")
    for number, what in [(1, "SHA-256"), (2, "missing"), (3, "not in the manifest")]:
        with pytest.raises(VersionDamaged, match=what):
            registry.verify(number)
        with pytest.raises(VersionDamaged):
            registry.promote(number)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poisoned_weights_are_never_published(tmp_path: Path, contract: Contract, poison: float):
    registry = Registry(tmp_path / "registry")
    bad = checkpoint(tmp_path / "bad", contract, poison)
    with pytest.raises(VersionDamaged, match="tensor 'w' holds NaN or infinity"):
        registry.publish(bad, contract=contract)
    assert registry.versions() == []
    assert list(registry.root.iterdir()) == []


def test_another_cell_is_refused_with_the_fields_that_differ(tmp_path: Path, contract: Contract):
    registry = Registry(tmp_path / "registry")
    other = load_contract(SHIPPED / "metaworld_pixels.yaml")
    with pytest.raises(ContractMismatch, match="chunk_horizon"):
        registry.publish(checkpoint(tmp_path / "a", other), contract=contract)
    version = registry.publish(checkpoint(tmp_path / "b", contract), contract=contract)
    with pytest.raises(ContractMismatch, match="chunk_horizon"):
        registry.verify(version.number, contract=other)


PUBLISH = """
import sys
from pathlib import Path
from trajectory_store.contract import load_contract
from vla_post.export.registry import Registry
for _ in range(8):
    Registry(sys.argv[1]).publish(sys.argv[2], contract=load_contract(sys.argv[3]))
"""


def test_publishers_at_the_same_time_take_different_numbers(tmp_path: Path, contract: Contract):
    folder = checkpoint(tmp_path / "a", contract)
    root, cell = tmp_path / "registry", SHIPPED / "metaworld_state.yaml"
    publishers = [
        subprocess.Popen([sys.executable, "-c", PUBLISH, str(root), str(folder), str(cell)])
        for _ in range(2)
    ]
    for publisher in publishers:
        assert publisher.wait(60) == 0
    registry = Registry(root)
    assert [v.number for v in registry.versions()] == list(range(1, 17))
    for version in registry.versions():
        registry.verify(version.number)


def test_the_gate_holds_what_was_not_shown_to_be_better(tmp_path: Path, contract: Contract):
    registry = Registry(tmp_path / "registry")
    registry.publish(checkpoint(tmp_path / "a", contract), contract=contract)
    assert registry.gate is None
    registry.set_gate(0.05)
    assert registry.gate == 0.05
    shown = {"gate/candidate": 1.04, "gate/running": 1.0, "gate/against": 1.0}

    def publish(**metrics: float) -> int:
        folder = checkpoint(tmp_path / f"c{len(registry.versions())}", contract)
        return registry.publish(folder, contract=contract, metrics=metrics).number

    def active() -> int:
        version = registry.active()
        assert version is not None
        return version.number

    unknown = publish()
    close = publish(**shown)
    nan = publish(**shown | {"gate/candidate": float("nan")})
    assert active() == 1
    assert [e["version"] for e in registry.history() if e["action"] == "hold"] == [2, 3, 4]
    assert "1.04 against 1" in (registry.held(registry.version(close)) or "")
    assert "nobody compared" in (registry.held(registry.version(unknown)) or "")
    assert registry.held(registry.version(nan)) is not None
    better = publish(**shown | {"gate/candidate": 1.06})
    assert active() == better
    # It was compared with what ran before.
    late = publish(**shown | {"gate/candidate": 2.0})
    assert "compared with v000001" in (registry.held(registry.version(late)) or "")
    with pytest.raises(GateRefused, match="--shadow v000006"):
        registry.promote(late)
    assert active() == better
    registry.promote(late, force=True)
    assert active() == late
    assert registry.rollback().number == better  # the way back is never barred
    registry.set_gate(None)
    registry.promote(close)
    assert active() == close
    with pytest.raises(RegistryError, match="margin is -1"):
        registry.set_gate(-1.0)
