"""A robot's episodes reach the fleet exactly once, whatever is killed, cut or said twice."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from trajectory_store import (
    ChunkSampler,
    FleetView,
    Outcome,
    Store,
    StoreBusy,
    StoreError,
    StoreUnavailable,
    maintenance,
)
from trajectory_store.copying import Target
from trajectory_store.repository import set_many
from trajectory_store.uplink import Bandwidth, Uplink, UplinkConfig, read_health

DEST = "s3://fleet/cells"


def wait(condition: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def require_same(here: Store, there: Store) -> None:
    """Every whole episode is there once, with the same labels, ticks and frames, bit for bit."""
    whole = [e for e in here.table if not (e.is_open or e.deleted)]
    assert sorted(e.uuid for e in there.table if not e.deleted) == sorted(e.uuid for e in whole)
    for a in whole:
        b = there.episode(a.uuid)
        assert b == a.replace(first_row=b.first_row, end_row=b.end_row)
        for name in here.columns:
            values = here.read(name, a), there.read(name, b)
            if name.endswith(".frame"):  # where the bytes lie differs, not whether they are there
                values = tuple(v[:, 0] >= 0 for v in values)
            np.testing.assert_array_equal(*values, err_msg=name)
        for key in here.frames:
            seen = here.read(f"{key}.frame", a)[:, 0] >= 0
            rows = [np.arange(e.first_row, e.end_row)[seen] for e in (a, b)]
            assert here.read_encoded(key, rows[0]) == there.read_encoded(key, rows[1])


@pytest.fixture
def once(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """once(dest): a new uplink process in all but name delivers what is closed, and ends."""

    def go(dest: str | Path = tmp_path / "fleet", **options) -> int:
        uplink = Uplink(UplinkConfig(store=tmp_path / "robot", dest=dest, **options))
        try:
            return uplink.round()
        finally:
            uplink.close()
            errors = [h.error for h in uplink.health if h.error]
            assert not errors, errors

    return go


def test_episodes_pictures_and_later_labels_arrive(
    tmp_path, cameras, record, open_writer, jpegs, depths, once
):
    writer = open_writer(cameras, tmp_path / "robot")

    def frames(i: int) -> dict:
        wrist = {"observation.images.wrist": jpegs[i % 40]} if i > 2 else {}
        return wrist | {"observation.images.depth": depths[i // 3 % 20]}

    uuids = [record(writer, 45, seed=s, frames=frames, outcome="failure") for s in range(3)]
    running = writer.begin_episode("pick")
    writer.flush()
    assert once() == 3
    here, there = Store(tmp_path / "robot"), Store(tmp_path / "fleet" / "robot")
    require_same(here, there)
    assert running not in {e.uuid for e in there.table}
    assert once() == 0
    snapshot = there.snapshot_id
    assert not there.refresh(), snapshot  # delivered again, nothing changed
    # Whoever looks at the fleet sees a store like any other.
    assert [e.uuid for e in FleetView(tmp_path / "fleet").episodes] == uuids

    writer.end_episode("aborted")
    writer.change_episode(uuids[0], lambda e: e.replace(outcome=Outcome.SUCCESS, notes="seen"))
    writer.change_episode(uuids[1], lambda e: e.replace(deleted=True))
    writer.flush()
    # A label that somebody changes at the fleet stays, as this robot did not change it.
    maintenance.relabel(tmp_path / "fleet" / "robot", [uuids[2]], notes="by the lead")
    assert once() == 1
    assert there.refresh()
    assert there.episode(uuids[0]).outcome is Outcome.SUCCESS
    assert there.episode(uuids[1]).deleted
    assert there.episode(uuids[2]).notes == "by the lead"


def test_announcements_may_come_twice_or_late_or_never(tmp_path, contract, record, open_writer):
    writer = open_writer(contract, tmp_path / "robot")
    chance = random.Random(5)
    uplink = Uplink(UplinkConfig(store=tmp_path / "robot", dest=tmp_path / "fleet", poll_s=0.02))
    thread = threading.Thread(target=uplink.run)
    thread.start()
    uuids: list[str] = []
    for seed in range(8):
        uuids.append(record(writer, 5 + seed, seed=seed))
        said = [*uuids, *uuids, "no such episode"]
        chance.shuffle(said)
        for uuid in said[: chance.randrange(len(said))]:
            uplink.announce(uuid)
    writer.flush()
    wait(lambda: uplink.health and uplink.health[0].delivered == 8, "they did not arrive")
    uplink.end()
    thread.join()
    there = Store(tmp_path / "fleet" / "robot")
    assert [e.uuid for e in there.table] == uuids
    require_same(Store(tmp_path / "robot"), there)


def test_two_copiers_at_once_never_make_two_copies(tmp_path, contract, record, open_writer):
    """The lock is taken away from the first in the middle; the commit itself refuses."""
    writer = open_writer(contract, tmp_path / "robot")
    uuids = [record(writer, 20, seed=seed) for seed in range(3)]
    writer.flush()
    here = Store(tmp_path / "robot")
    first, second = Target(str(tmp_path / "t"), "first"), Target(str(tmp_path / "t"), "second")
    with first.held(here.contract):
        assert first.add(here, here.episode(uuids[0]))
        first._lock.release()
        with second.held(here.contract):
            assert not second.add(here, here.episode(uuids[0]))
            assert second.add(here, here.episode(uuids[1]))
        with pytest.raises(StoreBusy, match="somebody else committed"):
            first.add(here, here.episode(uuids[1]))
    with first.held(here.contract):
        assert [first.add(here, here.episode(u)) for u in uuids] == [False, False, True]
    assert [e.uuid for e in Store(tmp_path / "t").table] == uuids


def test_what_waited_goes_together_also_under_two_contracts(
    tmp_path, contract, cameras, record, open_writer, jpegs, once, monkeypatch
):
    writer = open_writer(contract, tmp_path / "robot")
    for seed in range(34):
        record(writer, 2, seed=seed)
    writer.close()
    writer = open_writer(cameras, tmp_path / "robot")
    for seed in range(34, 38):
        record(writer, 8, seed=seed, frames=lambda i: {"observation.images.wrist": jpegs[i]})
    writer.flush()
    commits: list[int] = []
    add_all = Target.add_all

    def counted(self: Target, store: Store, episodes: list) -> list[str]:
        commits.append(len(episodes))
        return add_all(self, store, episodes)

    monkeypatch.setattr(Target, "add_all", counted)
    assert once() == 38
    assert commits == [32, 6]
    here, there = Store(tmp_path / "robot"), Store(tmp_path / "fleet" / "robot")
    require_same(here, there)
    assert [e.uuid for e in there.table] == [e.uuid for e in here.table]


def test_a_half_uploaded_episode_is_never_seen(tmp_path, cameras, record, open_writer, jpegs):
    writer = open_writer(cameras, tmp_path / "robot")
    frames = [{"observation.images.wrist": j} for j in jpegs]
    whole = record(writer, 40, frames=lambda i: frames[i])
    writer.flush()
    here, sent = Store(tmp_path / "robot"), []

    def put(session_store, values) -> None:
        sent.append(len(values))
        set_many(session_store, values)
        if target.episodes:
            assert [e.uuid for e in FleetView(tmp_path / "t").episodes] == [whole]
        if len(sent) == 7:
            raise OSError("the line broke")

    target = Target(str(tmp_path / "t"), "test", put=put)
    with target.held(here.contract):
        assert target.add(here, here.episode(whole))
    assert len(sent) == 4  # room for the frames, two shards, the rest
    second = record(writer, 40, seed=1, frames=lambda i: frames[i])
    writer.flush()
    here.refresh()
    with pytest.raises(StoreUnavailable, match="the line broke"), target.held(here.contract):
        target.add(here, here.episode(second))
    there = Store(tmp_path / "t")
    assert [e.uuid for e in there.table] == [whole]
    sampler = ChunkSampler(there, horizon=4, batch_size=64, keys=["observation.state"])
    assert set(next(sampler).provenance.row.tolist()) <= set(range(40))
    sent.clear()
    with target.held(here.contract):
        assert target.add(here, here.episode(second))
    require_same(here, Store(tmp_path / "t"))


def test_an_uplink_in_use_and_nonsense_are_refused(tmp_path, contract, record, open_writer):
    with pytest.raises(ValueError, match="bandwidth_mbit_s is -1"):
        UplinkConfig(store="a", dest="b", bandwidth_mbit_s=-1)
    with pytest.raises(ValueError, match="one folder name"):
        UplinkConfig(store="a", dest="b", name="x/y")
    with pytest.raises(ValueError, match="reads a local store"):
        UplinkConfig(store="s3://a/b", dest="b")
    writer = open_writer(contract, tmp_path / "robot")
    record(writer, 5)
    writer.flush()
    config = UplinkConfig(store=tmp_path / "robot", dest=tmp_path / "fleet")
    first, second = Uplink(config), Uplink(config)
    first.round()
    with pytest.raises(StoreBusy, match="another uplink delivers it"):
        second.round()
    first.close()
    with pytest.raises(StoreError, match="delivered to itself"):
        Uplink(UplinkConfig(store=tmp_path / "robot", dest=tmp_path)).round()


def test_bandwidth_is_spent_no_faster_than_it_comes(monkeypatch):
    now = [100.0]
    stop = threading.Event()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop, "wait", lambda s: now.__setitem__(0, now[0] + s))
    line = Bandwidth(8.0, stop)  # a megabyte a second
    for _ in range(20):
        line.spend(500_000)
    assert now[0] == pytest.approx(109.5)  # the first of them goes at once
    now[0] += 50.0  # silence does not save up for a flood
    for _ in range(4):
        line.spend(500_000)
    assert now[0] == pytest.approx(161.0)
    Bandwidth(0.0, stop).spend(10**12)
    assert now[0] == pytest.approx(161.0)
    # In any time T: at most the rate times T, and the largest spending beyond.
    slow, chance = Bandwidth(0.8, stop), random.Random(0)
    assert slow.burst_bytes == 25_000
    spent: list[tuple[float, int]] = []
    for _ in range(200):
        now[0] += chance.choice([0.0, 0.0, 0.3])
        size = chance.randrange(1, slow.burst_bytes)
        slow.spend(size)
        spent.append((now[0], size))
    for i, (begun, _) in enumerate(spent):
        total = 0
        for stamp, size in spent[i:]:
            total += size
            assert total <= 100_000 * (stamp - begun) + slow.burst_bytes + 1e-3


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_two_robots_of_one_name_never_share_a_place(
    tmp_path, request, contract, record, open_writer, where
):
    """Also while the first is away: no lock is held then."""
    if where == "s3":
        request.getfixturevalue("s3")
    dest = DEST if where == "s3" else str(tmp_path / "fleet")
    for robot, count in (("a", 2), ("b", 1)):
        with open_writer(contract, tmp_path / robot / "cell_1") as writer:
            for _ in range(count):
                record(writer, 5)

    def deliver(robot: str, **options) -> str:
        """What was wrong."""
        uplink = Uplink(UplinkConfig(store=tmp_path / robot / "cell_1", dest=dest, **options))
        try:
            uplink.round()
        finally:
            uplink.close()
        (health,) = uplink.health
        assert health.backlog_episodes == (0 if health.ok else 1)
        return health.error

    def there(name: str = "cell_1") -> set[str]:
        return {e.uuid for e in Store(f"{dest}/{name}").table}

    a, b = ({e.uuid for e in Store(tmp_path / r / "cell_1").table} for r in ("a", "b"))
    assert deliver("a") == ""
    told = deliver("b")
    assert f"belongs to the store {tmp_path / 'a' / 'cell_1'} on {socket.gethostname()}" in told
    assert "--name" in told
    assert there() == a
    shutil.move(tmp_path / "a", tmp_path / "moved")  # it is still the same store
    assert deliver("moved") == ""
    assert deliver("b", name="cell_2") == ""
    assert there("cell_2") == b
    assert deliver("b", take_over=True) == ""
    assert there() == a | b
    with open_writer(contract, tmp_path / "moved" / "cell_1") as writer:
        record(writer, 5)
    assert "belongs to" in deliver("moved")


def test_a_cut_network_shows_as_backlog_and_heals(
    s3, s3_server, tmp_path, contract, record, open_writer
):
    writer = open_writer(contract, tmp_path / "robot")
    uplink = Uplink(UplinkConfig(store=tmp_path / "robot", dest=DEST, poll_s=0.02))
    thread = threading.Thread(target=uplink.run)
    record(writer, 30, seed=0)
    writer.flush()
    thread.start()
    wait(lambda: uplink.health and uplink.health[0].delivered == 1, "nothing arrived")

    def told(episodes: int, ok: bool) -> Callable[[], bool]:
        def look() -> bool:
            health = uplink.health[0]
            return health.backlog_episodes == episodes and health.ok == ok

        return look

    s3.mode = "cut"
    for seed in (1, 2):  # the robot records as before
        record(writer, 30, seed=seed)
    writer.flush()
    wait(told(2, False), "the outage does not show")
    health = next(read_health(tmp_path / "robot"))
    assert "object storage did not answer" in health.error
    assert health.oldest_s > 0.0
    assert health.backlog_bytes > 60 * 40
    s3.mode = "open"
    wait(told(0, True), "it did not resume")
    # Answers that get lost after the server has done its work, then the server itself goes away.
    s3.mode = "swallow"
    record(writer, 30, seed=3)
    writer.flush()
    wait(lambda: s3.swallowed > 0, "no answer was lost")
    s3_server.stop()
    s3.mode = "open"
    record(writer, 30, seed=4)
    writer.flush()
    wait(told(2, False), "the second outage does not show")
    s3_server.start()
    wait(told(0, True), "it did not resume after the restart")
    uplink.end()
    thread.join()
    require_same(Store(tmp_path / "robot"), Store(f"{DEST}/robot"))


def kill_often(folder: Path, s3, cameras, record, open_writer, jpegs, *, times: int) -> None:
    """SIGKILL at random instants of an upload; each new process goes on."""
    writer = open_writer(cameras, folder / "robot")
    frames = [{"observation.images.wrist": j} for j in jpegs]
    chance = random.Random(11)
    uuids: list[str] = []

    def arrived() -> int:
        time.sleep(0.1)  # looking costs the server more than delivering
        try:
            return len(Store(f"{DEST}/robot").table)
        except StoreError:
            return 0

    for kill in range(times):
        for _ in range(3):
            uuids.append(record(writer, 30, seed=len(uuids), frames=lambda i: frames[i]))
        writer.flush()
        before, sent = arrived(), s3.sent
        process = uplink_process(folder)
        # After its first words on the wire, and at times after its first episode.
        wait(lambda sent=sent: s3.sent > sent, "it sent nothing")
        if kill % 2:
            wait(lambda before=before: arrived() > before, "nothing arrived")
        time.sleep(chance.random() * 0.3)  # not a wait: the random instant itself
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    # One more, so that the last process has work, and is beyond its start when it is told to end.
    uuids.append(record(writer, 30, seed=len(uuids), frames=lambda i: frames[i]))
    writer.flush()
    process = uplink_process(folder)
    wait(lambda: arrived() >= len(uuids), "the last process did not finish")
    # One that is told to end between the commit and its own note of it leaves that to the next.
    wait(lambda: next(read_health(folder / "robot")).backlog_episodes == 0, "it took no note")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    require_same(Store(folder / "robot"), Store(f"{DEST}/robot"))


def test_killed_again_and_again_while_the_robot_records(
    s3, tmp_path, cameras, record, open_writer, jpegs
):
    kill_often(tmp_path, s3, cameras, record, open_writer, jpegs, times=2)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_forty_times(s3, tmp_path, cameras, record, open_writer, jpegs):
    kill_often(tmp_path, s3, cameras, record, open_writer, jpegs, times=40)


def uplink_process(folder: Path) -> subprocess.Popen:
    words = ["uplink", str(folder / "robot"), DEST, "--poll-s", "0.05"]
    return subprocess.Popen(
        [sys.executable, "-m", "vla_post.cli.main", *words], stderr=subprocess.DEVNULL
    )
