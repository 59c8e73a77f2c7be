"""Devices, the teleop process and the terminal commands at a real-time arm of real processes."""

import array
import json
import os
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("rclpy")
from rclpy.clock import Clock, ClockType
from sensor_msgs.msg import JointState

from robot_bridge.nodes.common import reliable
from vla_post.cli.main import main

from .cells import arm
from .graph import Cell
from .test_real_time import LiveArm

pytestmark = pytest.mark.ros
RB, DPAD_Y = 5, 7


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cell")
    contract = arm(
        cell="teleop_cell",
        tasks={"reach": {"instruction": "Reach the goal", "time_limit_s": 1000.0}},
        # Generous: a loaded test machine pauses processes for longer than a robot computer may.
        safety={
            "joint_state_max_age_ms": 2000,
            "teleop_timeout_ms": 2000,
            "overrun_ticks": 1000,
        },
    )
    with LiveArm(contract, folder) as running:
        running.up()
        running.path = str(folder / "cell.yaml")
        yield running


@pytest.fixture
def environment():
    return {**os.environ, "PYTHONWARNINGS": "ignore"}


class Pad:
    """A gamepad's device file, written as the kernel does."""

    def __init__(self, path) -> None:
        self.path = path
        os.mkfifo(path)
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.kernel = os.open(path, os.O_WRONLY)

    def send(self, kind: int, number: int, value: int) -> None:
        os.write(self.kernel, struct.pack("=IhBB", 0, value, kind, number))

    def hold(self, down: bool) -> None:
        self.send(1, RB, int(down))

    def unplug(self) -> None:
        os.close(self.kernel)
        self.kernel = -1

    def close(self) -> None:
        os.close(self._reader)
        if self.kernel >= 0:
            self.unplug()


@pytest.fixture
def pad(tmp_path):
    pad = Pad(tmp_path / "js0")
    yield pad
    pad.close()


@pytest.fixture
def start(environment, tmp_path):
    """Starts a process; it is gone when the test ends."""
    started = []

    def run(*words, **options):
        with (tmp_path / f"process{len(started)}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                env=environment,
                **({"stdout": log, "stderr": log} | options),
            )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def node(cell, *parameters: str) -> list[str]:
    words = [w for p in (f"contract:={cell.path}", *parameters) for w in ("-p", p)]
    return ["robot_bridge.nodes.teleop", "--ros-args", "-r", "__ns:=/teleop_cell", *words]


def take_over(cell: Cell, hold, release) -> None:
    """Presses until control is given: the first press may come before the process listens."""
    pressed = -1e9

    def driving() -> bool:
        nonlocal pressed
        if cell.state.get("mode") == "HOLD" and time.monotonic() - pressed > 3.0:
            release()
            # The release must be seen as one, so let some ticks of the device pass.
            pause = time.monotonic() + 0.3
            cell.until(lambda: time.monotonic() > pause, "a pause")
            hold()
            pressed = time.monotonic()
        return cell.state.get("mode") == "HUMAN"

    cell.until(driving, "HUMAN")


def test_a_gamepad_drives_while_its_deadman_is_held_and_the_process_lives(cell, pad, start):
    process = start(*node(cell, "device:=gamepad", f"path:={pad.path}"))
    take_over(cell, lambda: pad.hold(True), lambda: pad.hold(False))
    before = cell.position[0]
    pad.send(2, DPAD_Y, -32767)  # up: the chosen joint moves
    cell.until(lambda: cell.position[0] > before + 0.05, "the joint to move")
    label = cell.executed[-1][1]
    assert label.startswith("human:")
    pad.send(2, DPAD_Y, 0)
    pad.hold(False)
    cell.mode("HOLD")
    assert cell.state["reason"] == "operator released the deadman"

    take_over(cell, lambda: pad.hold(True), lambda: pad.hold(False))
    pad.unplug()
    cell.mode("HOLD")
    assert cell.state["reason"] == "operator released the deadman"
    pad.kernel = os.open(pad.path, os.O_WRONLY)

    take_over(cell, lambda: pad.hold(True), lambda: pad.hold(False))
    process.kill()
    cell.mode("HOLD")
    assert cell.state["reason"] in ("no sign of the operator", "the operator's link is lost")


def test_a_keyboard_drives_through_a_terminal_and_stops_out_of_focus(cell, start):
    person, tty = os.openpty()
    process = start(
        "vla_post.cli.main", "teleop", "--contract", cell.path, stdin=tty, stdout=tty, stderr=tty
    )
    os.close(tty)
    shown = bytearray()

    def look() -> None:
        while True:
            try:
                shown.extend(os.read(person, 4096))
            except OSError:
                return

    screen = threading.Thread(target=look)
    screen.start()
    try:
        cell.until(lambda: b"\x1b[?u" in shown, "the question for the kitty protocol")
        os.write(person, b"\x1b[?0u")
        cell.until(lambda: b"\x1b[>11u" in shown, "the kitty protocol")
        take_over(
            cell,
            lambda: os.write(person, b"\x1b[32;1:1u"),
            lambda: os.write(person, b"\x1b[32;1:3u"),
        )
        before = cell.position[1]
        os.write(person, b"\x1b[50;1:1u\x1b[50;1:3u\x1b[1;1:1B")  # 2: joint b; then down
        cell.until(lambda: cell.position[1] < before - 0.05, "the joint to move")
        os.write(person, b"\x1b[O")
        cell.mode("HOLD")
        cell.until(lambda: b"not in focus" in shown, "the reason on the screen")
        os.write(person, b"\x1b[I\x1b[120;1:1u\x1b[120;1:3u")  # x: emergency stop
        cell.mode("FAULT")
        os.write(person, b"\x1b[98;1:1u\x1b[98;1:3u")  # b: reset
        cell.mode("HOLD")
        os.write(person, b"\x1b[99;5u")  # Ctrl-C
        cell.until(lambda: process.poll() is not None, "the end")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        screen.join(timeout=20)
        os.close(person)


def test_a_leader_arm_is_followed_from_where_the_robot_is(cell, pad, start, tmp_path):
    joints = tmp_path / "leader.yaml"
    joints.write_text("a: {joint: one, scale: -1.0}\nb: {joint: two}\n")
    publisher = cell.node.create_publisher(JointState, "leader/joint_states", reliable(5))
    leader = JointState(name=["two", "one"], position=array.array("d", [0.0, 0.0]))
    speaks = True

    def speak() -> None:
        if speaks:
            publisher.publish(leader)

    timer = cell.node.create_timer(0.01, speak, clock=Clock(clock_type=ClockType.STEADY_TIME))
    start(
        *node(
            cell, "device:=leader", f"path:={pad.path}", f"leader_joints:={joints}",
        )
    )  # fmt: skip
    try:
        take_over(cell, lambda: pad.hold(True), lambda: pad.hold(False))
        origin = np.array(cell.position)
        leader.position = array.array("d", [0.3, 0.2])
        moved = np.add(origin, [-0.2, 0.3])
        cell.until(lambda: np.allclose(cell.position, moved, atol=1e-3), "the robot to follow")
        speaks = False
        cell.mode("HOLD")
    finally:
        cell.node.destroy_timer(timer)
        cell.node.destroy_publisher(publisher)


def test_the_terminal_client_asks_and_tells(cell, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        status: list[int] = []

        def call() -> None:
            try:
                main(["operate", "--contract", cell.path, "--timeout-s", "30", *words])
                status.append(0)
            except SystemExit as end:
                status.append(int(end.code or 0))

        thread = threading.Thread(target=call)
        thread.start()
        cell.until(lambda: not thread.is_alive(), f"operate {words}")
        said = capsys.readouterr()
        return status[0], said.out, said.err

    status, _, error = run("success")
    assert (status, error) == (1, "vla-post: success: no episode is running\n")
    status, _, error = run("shadow", "--version", "2", "--timeout-s", "1")
    assert status == 1
    assert "runner/set_parameters does not answer" in error  # this cell has no policy
    words = ("--task", "reach", "--operator", "cy", "--instruction", "Reach the red goal")
    status, uuid, _ = run("start", *words)
    assert status == 0
    cell.until(lambda: cell.has_event("episode_start", episode=uuid.strip()), "the start")
    status, shown, _ = run("status")
    told = json.loads(shown)
    assert told["cell"] == "/teleop_cell"
    assert told["mode"] == "HOLD"
    assert told["episode"]["operator"] == "cy"
    assert told["episode"]["instruction"] == "Reach the red goal"
    assert set(told["joints"]) == {"a", "b"}
    assert run("estop")[0] == 0
    cell.mode("FAULT")
    assert run("reset-estop")[0] == 0
    assert run("cancel")[:2] == (0, uuid)
    cell.until(lambda: cell.has_event("episode_end", outcome="aborted"), "the end")


def test_mistakes_are_one_line(cell, capsys, tmp_path):
    for words, problem in [
        (["teleop", "--contract", cell.path, "--device", "gamepad", "--map", "keyboard"],
         "keyboard is a map for a keyboard, the device is a gamepad"),
        (["teleop", "--contract", str(tmp_path / "none.yaml")], "cannot read the contract"),
        (["teleop", "--contract", cell.path, "--map", str(tmp_path / "m.yaml")],
         "shipped key maps are gamepad, keyboard, spacemouse"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 1
        error = capsys.readouterr().err
        assert problem in error
        assert "Traceback" not in error
