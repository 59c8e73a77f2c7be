"""The recorder's process: it may lag behind and it may be told to stop, and loses nothing."""

import array
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import rclpy
from rclpy.duration import Duration
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from robot_bridge.core.events import EventType, EventWriter
from robot_bridge.dds import use_default_profile
from robot_bridge.nodes.common import latched, reliable, set_stamp
from trajectory_store import NotAStore, Outcome, Store

from .cells import one_axis

pytestmark = pytest.mark.ros

CONTRACT = one_axis()
TICKS = 15
EPISODES = [str(uuid.UUID(int=number)) for number in range(1, 5)]
PATIENCE_S = 120.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def stored(store: Path) -> list[tuple[str, int, Outcome | None]]:
    try:
        return [(e.uuid, len(e), e.outcome) for e in Store(store).episodes]
    except NotAStore:
        return []


def joints(tick: int, name: str, label: str = "") -> JointState:
    message = JointState(name=[name], position=array.array("d", [tick / 1000]))
    message.header.frame_id = label
    set_stamp(message.header.stamp, tick * CONTRACT.dt_ns)
    return message


def test_short_episodes_that_wait_in_its_queue_when_it_is_told_to_stop_are_recorded(
    tmp_path: Path,
):
    use_default_profile()
    contract, store = tmp_path / "cell.yaml", tmp_path / "store"
    contract.write_text(json.dumps(CONTRACT.to_dict()))
    arguments = ["--ros-args", "-r", "__ns:=/lagging", "-p", f"contract:={contract}"]
    arguments += ["-p", f"store:={store}", "-p", "autostart:=true"]
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("robot", namespace="/lagging", context=context)
    process = subprocess.Popen(
        [sys.executable, "-m", "robot_bridge.nodes.recorder", *arguments],
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    try:
        states = node.create_publisher(JointState, "joint_states", reliable(1000))
        executed = node.create_publisher(JointState, "arbiter/executed", reliable(1000))
        events = node.create_publisher(String, "events", latched(200))
        wait_until(
            lambda: (
                process.poll() is not None
                or all(p.get_subscription_count() for p in (states, executed, events))
            ),
            "the recorder does not subscribe",
        )
        assert process.poll() is None
        said = EventWriter()

        def play(number: int) -> None:
            first = 1 + 100 * number
            start, end = first * CONTRACT.dt_ns, (first + TICKS - 1) * CONTRACT.dt_ns
            fields = {"episode": EPISODES[number], "task": "push"}
            for kind, stamp, more in (
                (EventType.EPISODE_START, start, {"start_stamp_ns": start}),
                (EventType.EPISODE_END, end, {"end_stamp_ns": end, "outcome": "success"}),
            ):
                text = said.make(kind, stamp, **fields, **more).to_json()
                events.publish(String(data=text))
            for tick in range(first, first + TICKS):
                states.publish(joints(tick, "x"))
                executed.publish(joints(tick, "dx", "hold"))

        play(0)  # once that is stored, both sides know each other
        wait_until(lambda: bool(stored(store)), "the first episode is not stored")
        # The recorder is not scheduled for a while, in which three episodes are played.
        process.send_signal(signal.SIGSTOP)
        for number in range(1, len(EPISODES)):
            play(number)
        process.send_signal(signal.SIGCONT)
        for publisher in (events, states, executed):
            assert publisher.wait_for_all_acked(Duration(seconds=PATIENCE_S))
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        node.destroy_node()
        context.try_shutdown()
    assert stored(store) == [(episode, TICKS, Outcome.SUCCESS) for episode in EPISODES]
