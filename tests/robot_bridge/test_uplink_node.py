"""The uplink's node says in /diagnostics what was delivered and what waits."""

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
from trajectory_store import Store, StoreWriter, load_contract

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


def values(status: DiagnosticStatus) -> dict[str, str]:
    return {pair.key: pair.value for pair in status.values}


def test_parameters_that_mean_nothing_are_one_line(tmp_path):
    for parameters, problem in [
        ({}, "pass `--ros-args"),
        ({"store": str(tmp_path), "dest": "gs://x"}, "another scheme"),
    ]:
        with pytest.raises(UserError, match=problem), uplink(**parameters):
            pass
