"""Small contracts and episodes for the store's tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from trajectory_store import Contract, Source, StoreWriter, Tick
from trajectory_store.contract import parse_contract

STATE_ONLY = """
schema: vla_post/cell/1
cell: bench
robot: arm
control_hz: 50
observations:
  observation.state:
    {topic: joint_states, type: sensor_msgs/JointState, names: [a, b, c], shape: [3], unit: rad}
actions:
  action:
    names: [a, b]
    unit: rad
    mode: absolute
    limits: {position: [[-9, 9], [-9, 9]]}
tasks:
  pick: {instruction: Pick it, time_limit_s: 10}
  place: {instruction: Place it, time_limit_s: 10}
"""

CAMERAS = STATE_ONLY.replace(
    "actions:",
    """\
  observation.images.wrist:
    {topic: cameras/wrist, type: sensor_msgs/CompressedImage, shape: [48, 64, 3], unit: rgb8,
     rate_hz: 20}
  observation.images.depth:
    {topic: cameras/depth, type: sensor_msgs/Image, shape: [24, 32, 1], unit: depth16_mm,
     codec: png, rate_hz: 10}
actions:""",
)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spool and cache of a test stay with the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home-state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))


@pytest.fixture(scope="session")
def contract() -> Contract:
    return parse_contract(STATE_ONLY)


@pytest.fixture(scope="session")
def cameras() -> Contract:
    return parse_contract(CAMERAS)


def picture(i: int) -> np.ndarray:
    """(48, 64, 3) u1, different for each i."""
    y, x = np.mgrid[:48, :64]
    return np.stack([x * 3 + i * 7, y * 5 + i, (x + y) * 2 + i * 3], -1).astype(np.uint8)


@pytest.fixture(scope="session")
def jpegs() -> list[bytes]:
    return [simplejpeg.encode_jpeg(picture(i), quality=90) for i in range(40)]


@pytest.fixture(scope="session")
def depths() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 65536, (24, 32, 1), dtype=np.uint16) for _ in range(20)]


def make_tick(i: int, seed: int = 0, **changes: Any) -> Tick:
    """A tick whose values follow from its number: row i of episode `seed`."""
    rng = np.random.default_rng([seed, i])
    human = i % 10 >= 7
    values: dict[str, Any] = {
        "observation": {"observation.state": rng.normal(size=3).astype(np.float32)},
        "action": rng.normal(size=2).astype(np.float32),
        "action_policy": None if human else rng.normal(size=2).astype(np.float32),
        "action_human": rng.normal(size=2).astype(np.float32) if human else None,
        "source": Source.HUMAN if human else Source.POLICY,
        "stamp_ns": 1_000_000 + i * 20_000_000,
        "chunk_id": i // 4,
        "chunk_step": i % 4,
        "policy_version": 3,
        "reward": float(rng.normal()),
    }
    return Tick(**(values | changes))


@pytest.fixture(scope="session")
def tick() -> Callable[..., Tick]:
    return make_tick


@pytest.fixture(scope="session")
def record() -> Callable[..., str]:
    """record(writer, n, seed=, task=, outcome=) writes an episode of n ticks; returns its uuid."""

    def go(
        writer: StoreWriter,
        n: int,
        *,
        seed: int = 0,
        task: str = "pick",
        outcome: str = "success",
        frames: Callable[[int], dict[str, Any]] = lambda i: {},
        **options: Any,
    ) -> str:
        uuid = writer.begin_episode(task, **options)
        for i in range(n):
            one = make_tick(i, seed, terminated=i == n - 1 and outcome in ("success", "failure"))
            one.observation = {**one.observation, **frames(i)}
            writer.append(one)
        writer.end_episode(outcome)
        return uuid

    return go


@pytest.fixture
def open_writer(tmp_path: Path) -> Iterator[Callable[..., StoreWriter]]:
    """Opens writers that the test's end closes."""
    writers: list[StoreWriter] = []

    def go(contract: Contract, path: Path | None = None, **options: Any) -> StoreWriter:
        options.setdefault("commit_interval_s", 0.05)
        writers.append(StoreWriter.create_or_open(path or tmp_path / "store", contract, **options))
        return writers[-1]

    yield go
    for writer in writers:
        writer.close()
