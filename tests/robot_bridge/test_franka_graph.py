"""The simulated joint-space cell end to end: graph in simulated real time, store, training.

Seven position-controlled joints, a gripper and three rendered cameras; a policy drives, the
scripted operator takes over with its leader arm and finishes, and the policy learns from what was
recorded. Slower than real time, so that a busy test machine keeps up.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

import sim
from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
from trajectory_store import FleetView, Outcome, Source
from trajectory_store.contract import Contract, load_contract

pytestmark = [pytest.mark.ros, pytest.mark.pixels]
CAMERAS = ("front", "side", "wrist")


def patient(folder: Path) -> Path:
    """The shipped contract, with ages for a machine that pauses processes for seconds."""
    contract = load_contract(sim.CONTRACTS / "franka_joint.yaml")
    data = contract.to_dict()
    data["safety"] |= {
        "joint_state_max_age_ms": 3000,
        "chunk_max_age_ms": 10_000,
        "teleop_timeout_ms": 3000,
        "overrun_ticks": 100_000,
    }
    data["safety"]["workspace"]["model"] = str(Path(sim.__file__).parent / "franka_arm.xml")
    data["tasks"]["lift-cube"]["time_limit_s"] = 60.0
    path = folder / "cell.yaml"
    path.write_text(json.dumps(data, indent=1))
    return path


def checkpoint(kind: str, contract: Contract, folder: Path) -> Path:
    """An untrained policy of the right shapes, normalised around the arm's home."""
    from sim.franka_cell import HOME
    from vla_post.policies.build import build_policy

    home = np.append(HOME, 0.08)
    low, high = np.array(contract.action.limits.position).T
    wide = {
        "observation.state": (home, low, high),
        "observation.velocity": (np.zeros(8), -np.ones(8), np.ones(8)),
        "action": (home, low, high),
    }
    statistics = {
        key: {
            "mean": mean.astype(np.float32),
            "std": np.full(8, 0.05, np.float32),
            "min": least.astype(np.float32),
            "max": most.astype(np.float32),
        }
        for key, (mean, least, most) in wide.items()
    }
    return build_policy(kind, contract, statistics).save(folder)


def play(folder: Path, path: Path, timeout_s: float, **config: Any) -> list[dict[str, Any]]:
    """One episode of lift-cube on the real graph; the cell's events."""
    events = folder / "events.jsonl"
    operator = {"episodes": 1, "tasks": ["lift-cube"], "seed": 5} | config.pop("operator")
    nodes = cell_nodes(
        CellConfig(
            contract=path,
            store=folder / "store",
            events_log=events,
            operator=operator,
            **config,
        )
    )
    with ProcessGroup(nodes, log_dir=folder / "logs") as group:
        assert group.wait("operator", timeout_s) == 0, group.last_words("operator", 20)
    return [json.loads(line) for line in events.read_text().splitlines()]


def check_recording(view: FleetView, contract: Contract) -> np.ndarray:
    """The one episode is whole, inside the limits and seen by three cameras; its sources."""
    (episode,) = view.episodes
    assert episode.outcome is Outcome.SUCCESS
    (store,) = view.stores
    rows = np.arange(episode.first_row, episode.end_row)
    action = store.read("action", rows)
    low, high = np.array(contract.action.limits.position, np.float32).T
    assert (action >= low - 1e-5).all()
    assert (action <= high + 1e-5).all()
    stamps = store.read("stamp_ns", rows)
    assert (np.diff(stamps) > 0).all()
    state = store.read("observation.state", rows)
    assert np.abs(state - action)[:, :7].max() < 0.5  # the arm follows what was sent
    for camera in CAMERAS:
        frames = store.read(f"observation.images.{camera}", rows[[0, -1]])
        assert frames.shape == (2, 128, 128, 3)
        assert frames.std() > 5  # a picture, not a blank
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 1  # the wrist has moved
    return store.read("source", rows)


@pytest.mark.parametrize("speed", [1.0, 0.4])
def test_the_operator_drives_the_arm_and_three_cameras_are_recorded(speed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    path = patient(tmp_path)
    said = play(tmp_path, path, 200.0, real_time_factor=speed, operator={"drive_from_start": True})
    assert "takeover" in [event["type"] for event in said]
    contract = load_contract(path)
    source = check_recording(FleetView(tmp_path / "store"), contract)
    assert (source == Source.HUMAN).mean() > 0.5


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("kind", "speed"), [("chunk_flow", 0.5), ("smolvla_tiny", 0.25)])
def test_a_policy_is_taken_over_recorded_and_learns_from_it(kind, speed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    path = patient(tmp_path)
    contract = load_contract(path)
    policy = checkpoint(kind, contract, tmp_path / "policy")
    said = play(
        tmp_path,
        path,
        2400.0,
        policy=policy,
        real_time_factor=speed,
        operator={"stall": 15, "max_takeovers": 1},
    )
    assert "takeover" in [event["type"] for event in said]
    view = FleetView(tmp_path / "store")
    source = check_recording(view, contract)
    assert (source == Source.POLICY).sum() > 10
    assert (source == Source.HUMAN).sum() > 20

    from vla_post.learners.hg_dagger import HgDaggerConfig
    from vla_post.policies.lerobot_adapter import LeRobotPolicy
    from vla_post.training.data import mixture
    from vla_post.training.trainer import TrainConfig, Trainer

    trainer = Trainer(
        LeRobotPolicy.load(policy), TrainConfig(algorithm=HgDaggerConfig(), batch_size=8)
    )
    sampler = mixture(view, None, contract, batch_size=8, online_share=0.5)
    try:
        metrics = [trainer.step(next(sampler)) for _ in range(2)]
    finally:
        sampler.close()
    assert trainer.updates == 2
    assert all(np.isfinite(float(value)) for m in metrics for value in m.values())
