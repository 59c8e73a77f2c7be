"""How much each version needed people: counts and times, worked out by hand."""

import numpy as np
import pytest

import sim
from trajectory_store import FleetView, Source, StoreWriter, load_contract
from vla_post.training.operation import Operation, operation


def test_operation_by_version(tmp_path):
    contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    p, h, hold = Source.POLICY, Source.HUMAN, Source.HOLD
    played = [
        (1, "failure", [p] * 80 + [h] * 40 + [hold] * 8 + [p] * 80 + [h] * 40),
        (1, "success", [p] * 160),
        (2, "success", [p] * 240),
    ]
    with StoreWriter.create_or_open(tmp_path / "robot", contract, writer="robot") as writer:
        for version, outcome, sources in played:
            length = len(sources)
            writer.write_episode(
                "reach",
                {
                    key: np.zeros((length, *f.shape), np.float32)
                    for key, f in contract.vectors.items()
                },
                np.zeros((length, 4), np.float32),
                outcome=outcome,
                source=np.array(sources),
                policy_version=version,
            )
    found = operation(FleetView(tmp_path).episodes, contract.control_hz)
    assert list(found) == [1, 2]
    first = found[1]
    assert (first.episodes, first.successes, first.takeovers) == (2, 1, 2)
    assert first.human_s == pytest.approx(1.0)
    assert first.robot_s == pytest.approx(4.0)
    told = first.to_json()
    assert told["takeover_free_s"] == pytest.approx(2.0)
    assert told["takeovers_per_episode"] == 1.0
    assert told["human_share"] == pytest.approx(0.2)
    assert told["human_minutes"] == pytest.approx(1 / 60, abs=1e-4)
    assert found[2].takeover_free_s == pytest.approx(3.0)
    assert Operation().to_json()["human_share"] == 0.0
