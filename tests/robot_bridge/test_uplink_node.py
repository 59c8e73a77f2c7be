"""The uplink's node says in /diagnostics what was delivered and what waits."""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("rclpy")
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter

import sim
from robot_bridge.nodes.common import UserError, reliable
from robot_bridge.nodes.uplink import UplinkNode
from trajectory_store import Store, StoreError, StoreWriter, load_contract

pytestmark = pytest.mark.ros


@contextmanager
def uplink(**parameters):
    """(node, its last words, spin(condition))."""
    context = rclpy.Context()
    rclpy.init(context=context)
    executor = SingleThreadedExecutor(context=context)
    words: list[DiagnosticStatus] = []
    node = None
    try:
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        node = UplinkNode(context=context, namespace="cell_7", parameter_overrides=overrides)
        node.create_subscription(
            DiagnosticArray, "/diagnostics", lambda m: words.extend(m.status), reliable(10)
        )
        executor.add_node(node)

        def spin(condition) -> DiagnosticStatus:
            deadline = time.monotonic() + 60
            while not any(condition(w) for w in words):
                assert time.monotonic() < deadline, words
                executor.spin_once(timeout_sec=0.2)
            return next(w for w in words if condition(w))

        yield spin
    finally:
        if node is not None:
            node.close()
            node.destroy_node()
        executor.shutdown()
        context.try_shutdown()


def test_diagnostics(tmp_path):
    contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    observation = {k: np.zeros((4, *f.shape)) for k, f in contract.vectors.items()}
    store, fleet = tmp_path / "store", tmp_path / "fleet"
    with StoreWriter.create_or_open(store, contract) as writer:
        for _ in range(2):
            action = np.zeros((4, contract.action.size))
            writer.write_episode("reach", observation, action, outcome="success")
        writer.flush()
        with uplink(store=str(store), dest=str(fleet), name="seven") as spin:
            told = spin(lambda w: values(w)["delivered"] == "2")
            assert told.name == "/cell_7/uplink"
            assert told.level == DiagnosticStatus.OK
            assert values(told)["backlog_episodes"] == "0"
    assert len(Store(fleet / "seven").episodes) == 2
    (tmp_path / "file").write_text("in the way")
    with uplink(store=str(store), dest=str(tmp_path / "file")) as spin:
        told = spin(lambda w: w.level == DiagnosticStatus.WARN)
        assert told.message.startswith("2 episodes wait, oldest")
        assert values(told)["backlog_episodes"] == "2"


def test_killed_in_the_middle_of_an_upload(tmp_path, s3):
    """The process of a cell; what was in transit goes again, once, and bit for bit."""
    contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    random, store, dest = np.random.default_rng(0), tmp_path / "store", "s3://fleet/cells"
    with StoreWriter.create_or_open(store, contract) as writer:
        for ticks in (5, 6000):  # noise: nothing of it is compressed away
            writer.write_episode(
                "reach",
                {k: random.normal(size=(ticks, *f.shape)) for k, f in contract.vectors.items()},
                random.uniform(-1, 1, (ticks, contract.action.size)),
                outcome="success",
            )

    def start(mbit_s: float) -> subprocess.Popen:
        words = ["--ros-args", "-r", "__ns:=/cell_7", "-p", f"store:={store}", "-p"]
        words += [f"dest:={dest}", "-p", f"bandwidth_mbit_s:={mbit_s}"]
        return subprocess.Popen([sys.executable, "-m", "robot_bridge.nodes.uplink", *words])

    def until(condition, what: str) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)

    def delivered() -> list[str]:
        try:
            return [e.uuid for e in Store(f"{dest}/store").table]
        except StoreError:
            return []

    here = Store(store)
    size = 6000 * sum(c.row_bytes for c in here.columns.values())
    killed = start(size * 8e-6 / 60)  # a minute, if nobody stops it
    try:
        until(lambda: s3.sent > 300_000, "it sent nothing")
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(30) == -signal.SIGKILL
    finally:
        killed.kill()
        killed.wait()
    assert len(delivered()) < 2
    again = start(0.0)
    try:
        until(lambda: len(delivered()) == 2, "it did not go on")
    finally:
        again.send_signal(signal.SIGINT)
        assert again.wait(60) == 0
    there = Store(f"{dest}/store")
    assert sorted(delivered()) == sorted(e.uuid for e in here.table)
    for a in here.table:
        b = there.episode(a.uuid)
        for name in here.columns:
            np.testing.assert_array_equal(here.read(name, a), there.read(name, b), err_msg=name)


def values(status: DiagnosticStatus) -> dict[str, str]:
    return {pair.key: pair.value for pair in status.values}


def test_parameters_that_mean_nothing_are_one_line(tmp_path):
    for parameters, problem in [
        ({}, "pass `--ros-args"),
        ({"store": str(tmp_path), "dest": "gs://x"}, "another scheme"),
    ]:
        with pytest.raises(UserError, match=problem), uplink(**parameters):
            pass
