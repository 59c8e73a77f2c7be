"""Conversions killed by SIGKILL: the same command again ends as if nothing had happened."""

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import zarr

from trajectory_store import Store, StoreWriter
from trajectory_store.contract import parse_contract

_spec = importlib.util.spec_from_file_location(
    "killed_child", Path(__file__).with_name("killed_child.py")
)
assert _spec
assert _spec.loader
child = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(child)

CELL = """
schema: vla_post/cell/1
cell: bench
robot: arm
control_hz: 20
observations:
  observation.state: {topic: s, type: sensor_msgs/JointState, names: [a, b], shape: [2], unit: m}
  observation.images.front:
    {topic: c, type: sensor_msgs/CompressedImage, shape: [64, 96, 3], unit: rgb8}
  observation.images.wrist:
    {topic: w, type: sensor_msgs/CompressedImage, shape: [32, 32, 3], unit: rgb8}
actions:
  action: {names: [x, y], unit: m, mode: absolute, limits: {position: [[-9, 9], [-9, 9]]}}
tasks:
  pick: {instruction: Pick it, time_limit_s: 10}
  place: {instruction: Place it, time_limit_s: 10}
"""
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
SECOND_SEGMENT = "open", "episode-000003/frame-000001.png"
"""In the middle of it: its files have no end yet."""


def picture(height: int, width: int, i: int) -> bytes:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 2 + i, y * 3, (x + y) + 7 * i], -1).astype(np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=95)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("source") / "store"
    rng = np.random.default_rng(0)
    with StoreWriter.create_or_open(path, parse_contract(CELL)) as writer:
        for k, n in enumerate([6, 9, 5, 8, 7]):
            writer.write_episode(
                "place" if k in (1, 4) else "pick",
                {
                    "observation.state": rng.normal(size=(n, 2)),
                    FRONT: [picture(64, 96, i + k) for i in range(n)],
                    WRIST: [picture(32, 32, i * k) for i in range(n)],
                },
                rng.normal(size=(n, 2)),
                outcome="failure" if k == 2 else "success",
                reward=rng.normal(size=n),
                policy_version=k,
            )
    return Store(path)


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("lerobot", reason="the learn extra is not installed")
    made = child.Conversions(
        tmp_path_factory.mktemp("child") / "errors",
        "lerobot.datasets.lerobot_dataset",
        "imagecodecs.zarr",
        "simplejpeg",
        "tyro",
        "rich.progress",
    )
    yield made
    made.close()


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes, a parquet file's table, a video's stamps and frames."""
    return {str(p.relative_to(folder)): content(p) for p in folder.rglob("*") if p.is_file()}


def content(path: Path) -> Any:
    if path.suffix == ".parquet":
        return pq.read_table(path)  # its head holds a random name
    if path.suffix == ".mp4":
        file = av.open(str(path))
        frames = [(f.pts, f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]
        file.close()
        return [pts for pts, _ in frames], np.stack([frame for _, frame in frames])
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["video", "images"])
@pytest.mark.filterwarnings("ignore")
def test_to_lerobot_goes_on_after_kills(
    store: Store, conversions: Any, tmp_path: Path, kind: str
) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    target, partial = tmp_path / "dataset", tmp_path / ".dataset.partial"
    command = ["to-lerobot", store.location, target, *(["--images"] if kind == "images" else [])]

    def safe() -> int:
        try:
            return len(json.loads((partial / "checkpoint.json").read_text())["episodes"])
        except FileNotFoundError:
            return 0

    assert conversions.run(*command, kill_before=SECOND_SEGMENT) == -9
    assert (safe(), target.exists()) == (2, False)
    # A table that every segment rewrites is cut.
    info = partial / "dataset/meta/info.json"
    info.write_text(info.read_text()[:20])
    if kind == "video":
        # The second segment is whole, its checkpoint is written and not yet in place.
        unfinished = ("os.rename", "checkpoint.part")
        assert conversions.run(*command, kill_before=unfinished) == -9
        assert (safe(), target.exists()) == (2, False)
    # All is written, and the dataset not yet at its place.
    assert conversions.run(*command, kill_before=("os.rename", f"{target}")) == -9
    assert (safe(), target.exists()) == (5, False)
    assert conversions.run(*command) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dataset"]

    calm = tmp_path / "calm"
    assert conversions.run(command[0], command[1], calm, *command[3:]) == 0
    wanted, got = contents(calm), contents(target)
    assert got.keys() == wanted.keys()
    for name, whole in wanted.items():
        if name.endswith(".mp4"):
            # Undisturbed runs differ here too: the encoder may quantise a few pictures otherwise.
            assert got[name][0] == whole[0], name
            assert np.abs(got[name][1].astype(float) - whole[1]).mean() < 1, name
        else:
            assert got[name] == whole, name
    dataset: Any = LeRobotDataset("local/x", root=target)
    assert (len(dataset), dataset.meta.total_episodes) == (35, 5)
    assert sorted(dataset.meta.tasks.index) == ["Pick it", "Place it"]
    for row, task in ((0, "Pick it"), (14, "Place it"), (20, "Pick it"), (34, "Place it")):
        item = dataset[row]
        np.testing.assert_array_equal(item["action"], store.read("action", [row])[0])
        assert item["task"] == task
        for key in (FRONT, WRIST):
            pixels = np.moveaxis(np.asarray(item[key]) * 255, 0, -1)
            off = np.abs(pixels - store.read(key, [row])[0]).mean()
            assert off <= (0.01 if kind == "images" else 8), key


def test_a_checkpoint_of_other_episodes_is_thrown_away(
    store: Store, conversions: Any, tmp_path: Path
) -> None:
    target, partial = tmp_path / "dataset", tmp_path / ".dataset.partial"
    command = ("to-lerobot", store.location, target, "--images")
    assert conversions.run(*command, kill_before=SECOND_SEGMENT) == -9
    checkpoint = partial / "checkpoint.json"
    told = json.loads(checkpoint.read_text())
    told["episodes"][1]["outcome"] = "failure"  # it was relabelled since
    checkpoint.write_text(json.dumps(told))
    assert conversions.run(*command) == 0
    sidecar = json.loads((target / "meta/vla_post.json").read_text())
    assert [e["outcome"] for e in sidecar["episodes"]] == [
        "success",
        "success",
        "failure",
        "success",
        "success",
    ]


def test_from_zarr_writes_anew_what_a_kill_cut_short(conversions: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "dp.zarr", tmp_path / "store"
    root: Any = zarr.open_group(str(source), mode="w", zarr_format=2)
    ends = np.array([5, 105])
    action = np.random.default_rng(0).normal(size=(105, 2)).astype(np.float32)
    root.create_array("data/action", data=action)
    root.create_array("data/state", data=action[:, ::-1].copy())
    root.create_array("meta/episode_ends", data=ends)

    command = ("from-zarr", source, target, "--task", "push")
    assert conversions.run(*command, kill_before=("commit", "40")) == -9
    assert len(Store(target).table[1]) == 40
    assert conversions.run(*command) == 0
    got = Store(target)
    assert [(len(e), e.outcome) for e in got.episodes] == [(5, "success"), (100, "success")]
    np.testing.assert_array_equal(
        np.concatenate([got.read("action", e) for e in got.episodes]), action
    )
    assert conversions.run(*command) == 0
    assert Store(target).snapshot_id == got.snapshot_id


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of its own needs root")
def test_a_full_disk_is_said_and_gone_on_from(
    store: Store, conversions: Any, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        target = disk / "dataset"
        command = ("to-lerobot", store.location, target, "--images")
        assert conversions.run(*command, kill_before=SECOND_SEGMENT) == -9
        # Room for the start of what is left, and then no more.
        stuffing = disk / "stuffing"
        with stuffing.open("wb") as file:
            file.write(bytes(max(shutil.disk_usage(disk).free - 40_000, 0)))
        before = len(conversions.errors)
        assert conversions.run(*command) == 1
        said = conversions.errors[before:].splitlines()[-1]  # after what lerobot logs
        assert said.startswith("vla-post: ")
        assert "the disk is full; 2 of 5 episodes are safe there. Make room" in said
        stuffing.unlink()
        assert conversions.run(*command) == 0
        assert json.loads((target / "meta/info.json").read_text())["total_episodes"] == 5
    finally:
        subprocess.run(["umount", "-l", disk], capture_output=True)
