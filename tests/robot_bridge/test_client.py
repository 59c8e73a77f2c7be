"""The client of people and programs, at a cell of real processes."""

import threading
import time

import numpy as np
import pytest

pytest.importorskip("rclpy")

from robot_bridge.client import CellClient
from robot_bridge.driving import Hand, measured

from .cells import cartesian
from .graph import Cell, checkpoint

pytestmark = pytest.mark.ros
CAMERA = "observation.images.corner"


def contract():
    tasks = {
        "reach": {"instruction": "Reach the goal", "time_limit_s": 1000.0},
        "push": {"instruction": "Push it", "time_limit_s": 1000.0},
    }
    return cartesian(tasks=tasks, cell="client_cell")


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cell")
    policy = checkpoint(folder / "policy", contract())
    with Cell(contract(), folder, policy=policy) as running:
        running.up()
        yield running


@pytest.fixture
def client(cell):
    with CellClient(contract()) as client:
        yield client
        client.release()
        done(cell, client, "cancel")
        done(cell, client, "reset_estop")


def done(cell, client, name, **options):
    """Asks while the robot of the test keeps answering."""
    future = client.ask(name, timeout_s=60.0, **options)
    cell.until(future.done, f"the reply to {name}")
    return future.result()


def start(cell, client, **options):
    reply = done(cell, client, "start_episode", **options)
    assert reply.success, reply
    cell.until(lambda: (client.episode or {}).get("start_stamp_ns"), "the episode's start")
    return reply.message


def take_over(cell, driver, hand):
    """Asks again when a busy machine made the arbiter give up waiting for a tick's answer."""
    driver.drive(hand)
    asked = time.monotonic()
    assert done(cell, driver, "takeover").success

    def driving():
        nonlocal asked
        if cell.state.get("mode") == "HOLD" and time.monotonic() - asked > 2.0:
            asked = time.monotonic()
            driver.ask("takeover")
        return cell.state.get("mode") == "HUMAN"

    cell.until(driving, "HUMAN")


def test_it_sees_what_the_cell_does_and_starts_episodes_with_their_parameters(cell, client):
    heard: dict[str, object] = {}
    client.listen(lambda kind, value: heard.__setitem__(kind, value))
    client.watch(CAMERA)
    cell.until(lambda: client.state.mode == "HOLD", "the first state")
    reply = done(cell, client, "start_episode", task="no-such-task")
    assert not reply.success
    assert "the contract knows push, reach" in reply.message
    assert client.episode is None

    uuid = start(cell, client, task="push", seed=7, operator="ann")
    assert client.episode is not None
    assert {k: client.episode[k] for k in ("episode", "task", "seed", "operator")} == {
        "episode": uuid,
        "task": "push",
        "seed": 7,
        "operator": "ann",
    }
    assert done(cell, client, "resume_policy").success
    cell.until(lambda: client.executed and client.executed.label.startswith("policy:"), "a command")
    cell.until(lambda: client.chunk is not None and client.frame(CAMERA), "chunk and picture")
    chunk, frame = client.chunk, client.frame(CAMERA)
    assert chunk is not None
    assert frame is not None
    assert chunk.points.shape == (8, 4)
    np.testing.assert_allclose(chunk.points, 0.25)
    assert frame.jpeg[:2] == b"\xff\xd8"
    assert client.joints is not None
    assert client.joints.names == ("ee_x", "ee_y", "ee_z", "gripper")
    assert client.policy["version"] == 0

    def arbiter():
        health = client.health.get("/client_cell/arbiter")
        return health is not None and health.values.get("mode")

    cell.until(lambda: arbiter() == "POLICY", "diagnostics")
    assert set(heard) >= {"state", "joints", "executed", "chunk", "event", "frame", "health"}

    assert done(cell, client, "success").success
    cell.until(lambda: client.episode is None, "the end")
    assert [e.type for e in client.events[-2:]] == ["success", "episode_end"]
    assert not done(cell, client, "failure").success  # no episode any more


def test_an_operator_takes_over_drives_every_tick_and_lets_go(cell, client):
    start(cell, client, task="reach", operator="bea")
    assert done(cell, client, "resume_policy").success
    cell.mode("POLICY")
    held = threading.Event()
    held.set()
    target = np.array([0.5, 0.0, -0.5, 1.0])
    take_over(cell, client, lambda stamp_ns, joints: Hand(held.is_set(), target))
    first = len(cell.executed)
    cell.until(lambda: len(cell.executed) >= first + 12, "12 ticks of the operator")
    ticks = cell.executed[first : first + 12]
    assert {label for _, label, _ in ticks} == {"human:bea"}
    np.testing.assert_allclose([command for _, _, command in ticks], [target] * 12)
    stamps = [stamp for stamp, _, _ in ticks]
    assert set(np.diff(stamps)) == {contract().dt_ns}  # no tick left out
    held.clear()
    cell.mode("HOLD")
    assert cell.state["reason"] == "operator released the deadman"


def test_a_device_that_fails_and_a_client_that_leaves_end_in_hold(cell, client):
    start(cell, client, task="reach")

    calls = []

    def unplugged(stamp_ns, joints):
        calls.append(stamp_ns)
        if len(calls) > 20 and cell.state.get("mode") == "HUMAN":
            raise OSError("no such device")
        return Hand(True, np.zeros(4))

    take_over(cell, client, unplugged)
    cell.mode("HOLD")
    client.release()
    with CellClient(contract(), name="leaving") as leaving:
        take_over(cell, leaving, lambda stamp_ns, joints: Hand(True, np.zeros(4)))
    cell.mode("HOLD")


def test_an_emergency_stop_is_latched_until_it_is_reset(cell, client):
    assert done(cell, client, "estop").success
    cell.until(lambda: client.state.mode == "FAULT", "FAULT")
    assert client.state.reason == "emergency stop by operator"
    assert not done(cell, client, "takeover").success
    assert done(cell, client, "reset_estop").success
    cell.until(lambda: client.state.mode == "HOLD", "HOLD")


def test_nobody_there_is_said_in_time_and_nonsense_at_once():
    with CellClient(contract(), namespace="nobody") as client:
        begun = time.monotonic()
        reply = client.request("success", timeout_s=0.3)
        assert not reply.success
        assert "/nobody/supervisor/end_episode does not answer" in reply.message
        assert time.monotonic() - begun >= 0.3
        assert not client.wait_until(lambda: client.state.mode, timeout_s=0.2)
        with pytest.raises(ValueError, match="no request 'dance'"):
            client.ask("dance")
        with pytest.raises(ValueError, match=r"it has observation\.images\.corner"):
            client.watch("observation.images.front")
        open_question = client.ask("estop", timeout_s=60.0)
    assert "the client was closed" in open_question.result(timeout=10).message


def test_the_actions_joints_are_found_by_name():
    from robot_bridge.snapshots import Joints

    names = ("gripper", "ee_dx", "ee_dz", "ee_dy", "other")
    joints = Joints(1, names, np.array([4.0, 1.0, 3.0, 2.0, 9.0]), np.array([]))
    np.testing.assert_equal(measured(contract(), joints), [1.0, 2.0, 3.0, 4.0])
    assert measured(contract(), Joints(1, ("a",), np.zeros(1), np.array([]))) is None
    assert measured(contract(), None) is None


def test_what_is_asked_for_in_a_row_is_done_in_that_order(cell, client):
    done: list[int] = []
    for number in range(20):
        client._do(lambda number=number: done.append(number))
    cell.until(lambda: len(done) == 20, "all of it")
    assert done == list(range(20))
