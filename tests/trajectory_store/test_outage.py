"""The store is away (disk full, read-only, cut off): nothing is lost, nothing comes twice."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import trajectory_store as ts
from trajectory_store import Store, StoreWriter, copying
from trajectory_store.spool import default_folder


def wait(condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 3 MB; `mount -o remount,...` changes it."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def check_once(store: Store, uuids: list[str], seeds: list[int], tick) -> None:
    assert [e.uuid for e in store.table] == uuids
    for e, seed in zip(store.table, seeds, strict=True):
        wanted = [tick(i, seed).action for i in range(len(e))]
        np.testing.assert_array_equal(store.read("action", e), wanted)


def test_disk_full(small_disk, contract, cameras, record, tick, jpegs, tmp_path):
    writer = StoreWriter.create_or_open(small_disk / "store", cameras, commit_interval_s=0.02)
    noise = np.random.default_rng(0)

    def frames(i):
        return {
            "observation.images.depth": noise.integers(0, 65536, (24, 32, 1), dtype=np.uint16),
            "observation.images.wrist": jpegs[i % 40],
        }

    uuids, lengths = [], []
    while writer.health.ok:
        assert len(uuids) < 300, "the disk never filled"
        uuids.append(record(writer, 40, seed=len(uuids), frames=frames))
        lengths.append(40)
        wait(lambda: writer.health.pending_ticks == 0 or not writer.health.ok, "no progress")
    assert "disk is full" in writer.health.error
    for _ in range(3):  # recording goes on
        uuids.append(record(writer, 40, seed=len(uuids), frames=frames))
        wait(lambda: writer.health.spooled_segments > 0, "nothing was spooled")
    with pytest.raises(ts.StoreUnavailable, match="not committed after"):
        writer.flush(timeout_s=0.1)
    remount(small_disk, "size=64m")
    wait(lambda: writer.health.ok and writer.health.pending_ticks == 0, "it did not resume")
    assert writer.health.spooled_segments == 0
    assert list(default_folder(writer.location).glob("*.segment")) == []
    writer.close()
    check_once(Store(small_disk / "store"), uuids, list(range(len(uuids))), tick)


def test_read_only_then_killed_then_back(small_disk, contract, tmp_path, record, tick):
    """The next process delivers what the dead one had spooled."""
    remount(small_disk, "size=64m")
    first = StoreWriter.create_or_open(small_disk / "store", contract, commit_interval_s=0.02)
    uuids = [record(first, 30, seed=0)]
    first.flush()
    remount(small_disk, "ro")
    uuids.append(record(first, 30, seed=1))
    wait(lambda: not first.health.ok, "the writer did not notice")
    assert "cannot write" in first.health.error
    wait(lambda: first.health.spooled_segments >= 1, "nothing was spooled")
    with pytest.raises(ts.StoreUnavailable, match="not committed"):
        first.close(timeout_s=0.1)
    with pytest.raises(ts.StoreUnavailable, match="cannot write"):
        StoreWriter.create_or_open(small_disk / "new", contract)
    remount(small_disk, "rw")
    with StoreWriter.create_or_open(small_disk / "store", contract) as second:
        uuids.append(record(second, 30, seed=2))
    check_once(Store(small_disk / "store"), uuids, [0, 1, 2], tick)


def test_the_spool_is_bounded(small_disk, contract, record):
    remount(small_disk, "size=64m")
    writer = StoreWriter.create_or_open(
        small_disk / "store",
        contract,
        commit_interval_s=0.02,
        spool_limit_bytes=50_000,
        memory_limit_bytes=100_000,
    )
    remount(small_disk, "ro")

    def go_on() -> None:
        for seed in range(200):
            record(writer, 50, seed=seed)
            wait(lambda: not writer.health.ok, "the writer did not notice")

    with pytest.raises(ts.SpoolFull, match="wait for the store"):
        go_on()
    assert writer._spool.n_bytes <= 60_000
    remount(small_disk, "rw")
    wait(lambda: writer.health.ok and not writer.health.pending_ticks, "it did not resume")
    writer.close()


# S3: a real server behind a proxy that can be cut (`s3` in tests/conftest.py)


def test_a_store_on_s3(s3, cameras, record, jpegs, depths, tick):
    frames = {"observation.images.wrist": jpegs[1], "observation.images.depth": depths[1]}
    with StoreWriter.create_or_open("s3://fleet/cells/a", cameras, writer="robot-1") as writer:
        with pytest.raises(ts.StoreBusy, match="robot-1"):
            StoreWriter.create_or_open("s3://fleet/cells/a", cameras)
        uuid = record(writer, 20, frames=lambda i: frames)
    store = Store("s3://fleet/cells/a")
    assert store.read_encoded("observation.images.wrist", store.episode(uuid)) == [jpegs[1]] * 20
    pytest.importorskip("obstore", reason="listing needs the s3 extra")
    view = ts.FleetView("s3://fleet/cells")
    assert [s.location for s in view.stores] == ["s3://fleet/cells/a"]
    batch = next(ts.ChunkSampler(view, horizon=4, batch_size=8))
    np.testing.assert_array_equal(
        batch.observation["observation.images.wrist"][0],
        store.read("observation.images.wrist", [0])[0],
    )
    with pytest.raises(ts.NotAStore, match="no trajectory store"):
        Store("s3://fleet/cells/b")


def test_looking_at_a_fleet_on_s3_again_costs_two_requests_a_store(s3, contract, record):
    pytest.importorskip("obstore", reason="listing needs the s3 extra")

    def store(name: str) -> str:
        place = f"s3://fleet/cells/{name}"
        with StoreWriter.create_or_open(place, contract) as writer:
            record(writer, 5)
        return place

    places = [store("a"), store("b")]
    view = ts.FleetView("s3://fleet/cells")
    assert [s.location for s in view.stores] == places
    before = s3.requests.total()
    assert not view.refresh()
    assert s3.requests.total() - before <= 2 * len(places) + 1
    places.append(store("c"))
    assert view.refresh()
    assert [s.location for s in view.stores] == places
    assert len(view.episodes) == 3


@pytest.mark.parametrize("mode", ["cut", "swallow"])
def test_a_lost_connection(s3, contract, record, tick, mode):
    writer = StoreWriter.create_or_open("s3://fleet/robot", contract, commit_interval_s=0.05)
    uuids = [record(writer, 20, seed=0)]
    writer.flush()
    s3.mode = mode
    uuids += [record(writer, 20, seed=1), record(writer, 20, seed=2)]
    wait(lambda: not writer.health.ok, "the writer did not notice")
    assert "object storage" in writer.health.error
    wait(lambda: writer.health.spooled_segments > 0, "nothing was spooled")
    s3.mode = "open"
    wait(lambda: writer.health.ok and not writer.health.pending_ticks, "it did not resume")
    uuids.append(record(writer, 20, seed=3))
    writer.close()
    if mode == "swallow":
        assert s3.swallowed
    check_once(Store("s3://fleet/robot"), uuids, [0, 1, 2, 3], tick)


def test_delivery_to_the_fleet_is_exactly_once(
    s3, contract, record, tick, open_writer, tmp_path, monkeypatch
):
    monkeypatch.setattr("trajectory_store.lock.LEASE_S", 1.0)
    writer = open_writer(contract)
    uuids = [record(writer, 25, seed=seed) for seed in range(6)]
    writer.flush()
    local, remote = Store(tmp_path / "store"), "s3://fleet/from-robot"

    def lose_answers(_what: str, done: int, _of: int) -> None:
        s3.mode = "swallow" if done >= 3 else "open"

    with pytest.raises(ts.StoreUnavailable):
        copying.merge([local], remote, progress=lose_answers)
    s3.mode = "open"
    copied: list[str] = []

    def delivered() -> bool:
        try:  # the dead delivery holds the store until its lease runs out
            copied.extend(copying.merge([local], remote))
        except ts.StoreBusy:
            return False
        return True

    wait(delivered, "the lease never ran out")
    assert copied == uuids[-len(copied) :]
    assert 2 <= len(copied) <= 3
    assert copying.merge([local], remote) == []
    check_once(Store(remote), uuids, list(range(6)), tick)
