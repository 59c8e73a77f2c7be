"""Round trips through real files, read by the formats' own libraries."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import zarr

from trajectory_store import Source, Store, StoreWriter
from trajectory_store.contract import parse_contract
from vla_post.convert.common import ConversionError
from vla_post.convert.diffusion_policy import from_zarr, to_zarr

CELL = """
schema: vla_post/cell/1
cell: bench
robot: arm
control_hz: 20
observations:
  observation.state: {topic: s, type: sensor_msgs/JointState, names: [a, b], shape: [2], unit: m}
  observation.images.front:
    {topic: c, type: sensor_msgs/CompressedImage, shape: [64, 96, 3], unit: rgb8}
actions:
  action: {names: [x, y], unit: m, mode: absolute, limits: {position: [[-9, 9], [-9, 9]]}}
tasks:
  pick: {instruction: Pick it, time_limit_s: 10}
  place: {instruction: Place it, time_limit_s: 10}
"""
FRONT = "observation.images.front"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("source") / "store"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :96]
    with StoreWriter.create_or_open(path, parse_contract(CELL)) as writer:
        for k, (n, task, outcome) in enumerate([(12, "pick", "success"), (20, "place", "failure")]):
            frames = [
                simplejpeg.encode_jpeg(
                    np.stack([x * 2 + i, y * 3, (x + y) + 10 * k], -1).astype(np.uint8), quality=95
                )
                for i in range(n)
            ]
            writer.write_episode(
                task,
                {"observation.state": rng.normal(size=(n, 2)), FRONT: frames},
                rng.normal(size=(n, 2)),
                outcome=outcome,
                source=np.where(np.arange(n) < 5, Source.POLICY, Source.HUMAN),
                stamp_ns=10**18 + np.cumsum(rng.integers(4 * 10**7, 6 * 10**7, n)),
                reward=rng.normal(size=n),
                action_policy=np.where(np.arange(n)[:, None] % 3, rng.normal(size=(n, 2)), np.nan),
                action_human=np.where(np.arange(n)[:, None] < 5, np.nan, rng.normal(size=(n, 2))),
                operator="ann",
                policy_version=k + 3,
            )
    return Store(path)


def same(ours: Store, theirs: Store, *, pixels: float) -> None:
    assert [e.uuid for e in ours.episodes] == [e.uuid for e in theirs.episodes]
    for a, b in zip(ours.episodes, theirs.episodes, strict=True):
        assert a.outcome == b.outcome
        for key in ("observation.state", "action", "source", "stamp_ns", "reward", "terminated"):
            np.testing.assert_array_equal(ours.read(key, a), theirs.read(key, b), err_msg=key)
        off = ours.read(FRONT, a).astype(float) - theirs.read(FRONT, b)
        assert np.abs(off).mean() <= pixels


def test_diffusion_policy_and_back(store: Store, tmp_path: Path) -> None:
    to_zarr(store, tmp_path / "dp.zarr")
    root: Any = zarr.open_group(str(tmp_path / "dp.zarr"), mode="r")
    assert root["meta/episode_ends"][:].tolist() == [12, 32]
    np.testing.assert_array_equal(root["data/images_front"][:], store.read(FRONT, slice(None)))
    np.testing.assert_array_equal(root["data/action"][:], store.read("action", slice(None)))
    with pytest.raises(ConversionError, match="--force"):
        to_zarr(store, tmp_path / "dp.zarr")
    to_zarr(store, tmp_path / "dp.zarr", force=True)
    written = from_zarr(tmp_path / "dp.zarr", tmp_path / "back", control_hz=20, codec="raw")
    assert len(written) == 2
    same(store, Store(tmp_path / "back"), pixels=0)
    assert from_zarr(tmp_path / "dp.zarr", tmp_path / "back", control_hz=20, codec="raw") == []


def test_a_killed_conversion_to_zarr_goes_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla_post.convert.diffusion_policy.ROWS", 8)
    target, partial = tmp_path / "dp.zarr", tmp_path / ".dp.zarr.partial"
    began: list[int] = []

    def stop(_what: str, done: int, _of: int) -> None:
        began.append(done)
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_zarr(store, target, progress=stop)
    assert not target.exists()
    # As a kill in the middle of a write leaves it: the next chunk is there, and cut.
    whole = (partial / "data/action/1.0").read_bytes()
    (partial / "data/action/2.0").write_bytes(whole[: len(whole) // 2])
    began.clear()
    to_zarr(store, target, progress=lambda _w, done, _of: began.append(done))
    assert began == [16, 24, 32]
    root: Any = zarr.open_group(str(target), mode="r")
    for key, name in {FRONT: "images_front", "action": "action", "stamp_ns": "stamp_ns"}.items():
        np.testing.assert_array_equal(root[f"data/{name}"][:], store.read(key, slice(None)))
    # Other episodes, or a folder that cannot say what it holds: from the beginning.
    for attributes in ('{"rows_written": 16}', '{"rows_wri'):
        target.rename(partial)
        (partial / ".zattrs").write_text(attributes)
        began.clear()
        to_zarr(store, target, progress=lambda _w, done, _of: began.append(done))
        assert began[0] == 0


def test_a_foreign_zarr_with_float_images(tmp_path: Path) -> None:
    root: Any = zarr.open_group(str(tmp_path / "pusht.zarr"), mode="w", zarr_format=2)
    image = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3)).astype(np.float32)
    for name, data in {
        "img": image,
        "state": np.arange(18, dtype=np.float32).reshape(9, 2),
        "action": np.ones((9, 2), np.float32),
    }.items():
        root.create_array(f"data/{name}", data=data)
    root.create_array("meta/episode_ends", data=np.array([4, 9]))
    from_zarr(tmp_path / "pusht.zarr", tmp_path / "store", codec="png", task="push")
    got = Store(tmp_path / "store")
    assert [len(e) for e in got.episodes] == [4, 5]
    np.testing.assert_array_equal(got.read("observation.images.img", slice(None)), image)


def test_zarr_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="expected a zarr folder"):
        from_zarr(tmp_path / "nothing", tmp_path / "store")
    root: Any = zarr.open_group(str(tmp_path / "odd.zarr"), mode="w", zarr_format=2)
    root.create_array("data/action", data=np.ones((5, 2)))
    root.create_array("meta/episode_ends", data=np.array([4]))
    with pytest.raises(ConversionError, match=r"other lengths: \{'action': 5\}"):
        from_zarr(tmp_path / "odd.zarr", tmp_path / "store")


@pytest.mark.parametrize("use_videos", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_lerobot_and_back(
    store: Store, tmp_path: Path, use_videos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lerobot", reason="the learn extra is not installed")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from vla_post.convert.lerobot_dataset import from_lerobot, to_lerobot

    monkeypatch.setattr("vla_post.convert.lerobot_dataset.SEGMENT_EPISODES", 1)
    target = tmp_path / "dataset"

    def stop(_what: str, done: int, _of: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_lerobot(store, target, use_videos=use_videos, progress=stop)
    assert not target.exists()
    steps: list[int] = []
    # It goes on with the second episode.
    to_lerobot(
        store, target, use_videos=use_videos, progress=lambda _what, done, _of: steps.append(done)
    )
    assert steps == [1, 2]
    # Some video encoders make a root process real-time, which starves a robot beside it.
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    dataset: Any = LeRobotDataset("local/x", root=target)
    assert (len(dataset), dataset.meta.total_episodes, dataset.fps) == (32, 2, 20)
    item = dataset[13]
    np.testing.assert_array_equal(item["action"], store.read("action", [13])[0])
    assert int(item["vla_post.stamp_ns"]) == store.read("stamp_ns", [13])[0]
    assert item["task"] == "Place it"
    with pytest.raises(ConversionError, match="--force"):
        to_lerobot(store, target)
    written = from_lerobot(target, tmp_path / "back")
    assert len(written) == 2
    back = Store(tmp_path / "back")
    same(store, back, pixels=8 if use_videos else 2)
    assert back.contract.sha256 == store.contract.sha256
    assert [e.policy_version for e in back.episodes] == [3, 4]
    for key in ("action.policy", "action.human", "truncated"):
        np.testing.assert_array_equal(
            back.read(key, slice(None)), store.read(key, slice(None)), err_msg=key
        )
    assert from_lerobot(target, tmp_path / "back") == []
    # Without our notes it is a dataset like any other.
    (target / "meta" / "vla_post.json").unlink()
    from_lerobot(target, tmp_path / "foreign", codec="png")
    foreign = Store(tmp_path / "foreign")
    assert sorted(foreign.contract.tasks) == ["pick_it", "place_it"]
    assert foreign.contract.vectors["observation.state"].names == ("a", "b")
    np.testing.assert_array_equal(
        foreign.read("action", slice(None)), store.read("action", slice(None))
    )
    info = target / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"codebase_version": "v2.1"}))
    with pytest.raises(ConversionError, match=r"version v2.1, expected v3"):
        from_lerobot(target, tmp_path / "old")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_lerobot_trains_on_it(store: Store, tmp_path: Path) -> None:
    """The real command, offline, with a tiny policy."""
    pytest.importorskip("lerobot", reason="the learn extra is not installed")
    from vla_post.convert.lerobot_dataset import to_lerobot

    to_lerobot(store, tmp_path / "dataset")
    options = {
        "dataset.repo_id": "local/x",
        "dataset.root": tmp_path / "dataset",
        "policy.type": "act",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "policy.chunk_size": 4,
        "policy.n_action_steps": 4,
        "policy.dim_model": 32,
        "policy.n_heads": 2,
        "policy.dim_feedforward": 32,
        "policy.n_encoder_layers": 1,
        "policy.use_vae": "false",
        "policy.pretrained_backbone_weights": "null",
        "batch_size": 4,
        "steps": 4,
        "log_freq": 1,
        "num_workers": 0,
        "save_freq": 4,
        "wandb.enable": "false",
        "output_dir": tmp_path / "run",
    }
    command = [Path(sys.executable).with_name("lerobot-train")]
    done = subprocess.run(
        command + [f"--{name}={value}" for name, value in options.items()],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    saved = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    features = json.loads((saved / "config.json").read_text())
    assert set(features["input_features"]) == {"observation.state", FRONT}
    assert set(features["output_features"]) == {"action"}
    losses = [float(x) for x in re.findall(r"loss:([0-9.]+)", done.stdout + done.stderr)]
    assert len(losses) >= 4
    assert np.isfinite(losses).all()
