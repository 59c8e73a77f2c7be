"""SIGKILL at random instants: what was committed is there, bit for bit; the rest is absent."""

import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import pytest

from trajectory_store import Contract, NotAStore, Store, StoreWriter, verification

CHILD = Path(__file__).with_name("crash_child.py")
_spec = importlib.util.spec_from_file_location("crash_child", CHILD)
assert _spec
assert _spec.loader
child = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(child)


def kill_often(path: Path, contract: Contract, times: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    rows = 0
    seen = {"kills": 0, "before the first commit": 0, "interrupted": 0}
    recorder = child.Recorder(path, contract.to_json(), path.with_name("progress"))
    for life in range(times):
        recorder.start()
        if life % 4:  # the others die early, while they create, open or repair
            recorder.wait_for_commit()
        time.sleep(chance.random() ** 2 * 0.5)  # not a wait: the random instant itself
        recorder.kill()
        safe = recorder.safe()
        seen["kills"] += 1
        try:
            store = Store(path)
        except NotAStore:
            assert rows == safe == 0
            seen["before the first commit"] += 1
            continue
        # What the writer called committed is there, and nothing that was there before has gone.
        assert store.rows >= rows + safe
        rows = store.rows
        child.check(store, newest=4)
        # All but the last episode are closed.
        assert not any(e.is_open for e in store.table[:-1])
    recorder.close()
    with StoreWriter.create_or_open(path, contract):
        pass
    store = Store(path)
    child.check(store)
    assert not any(e.is_open for e in store.table)
    seen["interrupted"] = sum(e.outcome == "interrupted" for e in store.table)
    assert seen["interrupted"] >= 1
    report = verification.verify(path, decode=True)
    assert report.ok, report.damage
    return seen | {"rows": store.rows, "episodes": len(store.table)}


@pytest.fixture(scope="module")
def with_camera(cameras: Contract) -> Contract:
    data = cameras.to_dict()
    del data["observations"]["observation.images.depth"]
    return Contract.model_validate(data)


def test_killed_two_dozen_times(tmp_path, with_camera):
    seen = kill_often(tmp_path / "store", with_camera, times=24, seed=2)
    assert seen["kills"] == 24


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_killed_two_hundred_times(tmp_path, with_camera):
    print(kill_often(tmp_path / "store", with_camera, times=200, seed=3))
