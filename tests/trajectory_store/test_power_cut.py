"""Power cuts: a real file system loses everything that was not synced, at random instants.

`FS_IOC_SHUTDOWN` without a flush of the journal is how file systems test this themselves: what had
not reached the block device by then never does.
"""

import fcntl
import importlib.util
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trajectory_store import (
    Contract,
    DamagedChunk,
    NotAStore,
    Store,
    StoreError,
    StoreWriter,
    durability,
    verification,
)

CHILD = Path(__file__).with_name("crash_child.py")
_spec = importlib.util.spec_from_file_location("crash_child_cut", CHILD)
assert _spec
assert _spec.loader
child = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(child)

SHUTDOWN = (2 << 30) | (4 << 16) | (ord("X") << 8) | 125
NO_LOG_FLUSH = 2


class Disk:
    """An ext4 file system in a file, whose power can be cut."""

    def __init__(self, image: Path, folder: Path, options: str) -> None:
        self._image, self.folder = image, folder
        self._options = f"loop,{options}" if options else "loop"
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(96 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)

    def mount(self) -> str:
        done = subprocess.run(
            ["mount", "-o", self._options, self._image, self.folder], capture_output=True, text=True
        )
        return done.stderr.strip() if done.returncode else ""

    def cut(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(handle)

    def unmount(self) -> None:
        subprocess.run(["umount", self.folder], check=True)


# The second option is the worst that ext4 offers: a rename may come before the file's data.
@pytest.fixture(params=["", "noauto_da_alloc"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mkfs.ext4") is None or os.geteuid() != 0:
        pytest.skip("a file system of its own needs root and mkfs.ext4")
    made = Disk(tmp_path / "image", tmp_path / "mnt", request.param)
    if problem := made.mount():
        pytest.skip(f"mounting is not permitted here: {problem}")
    yield made
    # Also when a failed test left its recorder behind: pytest could not remove the folder.
    subprocess.run(["umount", "-l", made.folder], capture_output=True)


def cut_often(disk: Disk, contract: Contract, folder: Path, times: int, seed: int) -> int:
    """Records, cuts the power, checks every committed value, records on. Returns rows."""
    chance = random.Random(seed)
    path = disk.folder / "store"
    recorder = child.Recorder(
        path, contract.to_json(), folder, XDG_STATE_HOME=str(disk.folder / "state")
    )
    rows = 0
    for _ in range(times):
        recorder.start()
        recorder.wait_for_commit()
        time.sleep(chance.random() * 0.4)  # not a wait: the random instant itself
        safe = recorder.safe()
        disk.cut()
        recorder.kill()
        disk.unmount()
        assert not disk.mount()
        with StoreWriter.create_or_open(path, contract, spool=folder / "spool"):
            pass
        store = Store(path)
        # What the writer had called committed is there; every episode is closed.
        assert store.rows >= rows + safe
        rows = store.rows
        assert not any(e.is_open for e in store.table)
        child.check(store, newest=4)
    recorder.close()
    report = verification.verify(path, decode=True)
    assert report.ok, report.damage
    return rows


@pytest.fixture(scope="module")
def with_camera(cameras: Contract) -> Contract:
    data = cameras.to_dict()
    del data["observations"]["observation.images.depth"]
    return Contract.model_validate(data)


def test_power_cuts(disk, with_camera, tmp_path):
    assert cut_often(disk, with_camera, tmp_path / "run", times=4, seed=1) > 0


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_many_power_cuts(disk, with_camera, tmp_path):
    print(cut_often(disk, with_camera, tmp_path / "run", times=50, seed=2), "rows")


def test_a_commit_syncs_before_and_after_the_branch_moves(
    open_writer, contract, record, tmp_path, monkeypatch
):
    """The order that a power cut may not change."""
    path = tmp_path / "store"
    seen: list[tuple[bool, int]] = []
    writer = open_writer(contract)
    record(writer, 5)
    before = writer.flush()
    snapshots = len(list((path / "snapshots").iterdir()))

    def sync(_folder: str) -> None:
        head = Store(path).snapshot_id
        seen.append((head != before, len(list((path / "snapshots").iterdir())) - snapshots))

    monkeypatch.setattr(durability, "sync", sync)
    record(writer, 5, seed=1)
    writer.flush()
    # (the branch has moved, new snapshot files); more than one commit may have been made.
    assert seen[:2] == [(False, 1), (True, 1)]
    assert len(seen) % 2 == 0
    writer.close()
    seen.clear()
    with StoreWriter.create_or_open(path, contract, durability="process") as careless:
        record(careless, 5, seed=2)
        careless.flush()
    assert seen == []
    with pytest.raises(StoreError, match="durability is 'maybe'"):
        StoreWriter.create_or_open(path, contract, durability="maybe")


@pytest.mark.parametrize("left", [0, 60])
def test_a_lost_repo_file_comes_back(open_writer, contract, record, tmp_path, left):
    """What XFS may leave of a rename that was not synced: a file without its data."""
    path = tmp_path / "store"
    writer = open_writer(contract)
    uuids = [record(writer, 5)]
    writer.flush()
    uuids.append(record(writer, 7, seed=1))
    writer.close()
    with (path / "repo").open("r+b") as file:
        file.truncate(left)
    with pytest.raises(DamagedChunk, match="vla-post store repair"):
        Store(path)
    if left:
        verification.repair(path)
    with StoreWriter.create_or_open(path, contract) as again:
        uuids = [e.uuid for e in Store(path).table]
        uuids.append(record(again, 3, seed=2))
    assert [e.uuid for e in Store(path).table] == uuids
    assert verification.verify(path).ok
    shutil.rmtree(path / "overwritten")
    (path / "repo").write_bytes(b"")
    with pytest.raises((DamagedChunk, NotAStore)):
        StoreWriter.create_or_open(path, contract)


def test_predecessors_of_the_repo_file_are_bounded(open_writer, contract, record, tmp_path):
    writer = open_writer(contract)
    for seed in range(70):
        record(writer, 1, seed=seed)
        writer.flush()
    writer.close()
    kept = list((tmp_path / "store" / "overwritten").iterdir())
    assert len(kept) <= 3 * durability.BACKUPS_KEPT
    assert all(durability.is_whole(k) for k in kept)
    assert durability.prune_backups(str(tmp_path / "store")) > 0
    assert len(list((tmp_path / "store" / "overwritten").iterdir())) == durability.BACKUPS_KEPT
    assert len(Store(tmp_path / "store").episodes) == 70
