"""The scripted operator's node over real DDS; the test plays supervisor, arbiter and robot."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sim
from sim.cell import make_cell
from trajectory_store import load_contract

rclpy = pytest.importorskip("rclpy")
from rclpy.callback_groups import ReentrantCallbackGroup  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.task import Future  # noqa: E402
from sensor_msgs.msg import JointState, Joy  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402

from robot_bridge.nodes.common import latched, reliable  # noqa: E402

pytestmark = pytest.mark.ros
PATH = sim.CONTRACTS / "metaworld_state.yaml"
DEADLINE_S = 60.0


class Rest:
    """Everything but the operator, in one node, with a policy that moves the wrong way."""

    def __init__(self, *, loses: set[str] | None = None) -> None:
        self.loses = set(loses or ())
        """Requests that are carried out, and whose next answer never arrives."""
        self.contract = load_contract(PATH)
        self.cell = make_cell(self.contract)
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("supervisor", namespace="/sawyer_state", context=self.context)
        for name, value in {"task": "", "seed": 0, "operator": ""}.items():
            self.node.declare_parameter(name, value)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.events = self.node.create_publisher(String, "events", latched(200))
        self.scene = self.node.create_publisher(JointState, "sim/scene_state", reliable(10))
        self.executed = self.node.create_publisher(JointState, "arbiter/executed", reliable(50))
        self.node.create_subscription(Joy, "teleop/joy", self._on_joy, reliable(10))
        self.node.create_subscription(
            JointState, "teleop/joint_target", self._on_target, reliable(10)
        )
        for kind, name, answer in [
            (Trigger, "start_episode", self._start),
            (SetBool, "end_episode", self._end),
            (SetBool, "set_intervention", self._intervene),
            (Trigger, "resume_policy", self._resume),
            (Trigger, "reset_estop", self._resume),
        ]:
            # An answer that never comes must not hold up the others.
            group = ReentrantCallbackGroup()
            self.node.create_service(kind, f"~/{name}", answer, callback_group=group)
        self.refusals = 1
        self.running = False
        self.tick = 1
        self.episode = ""
        self.mode = "hold"
        self.wanted = False
        self.joy: Joy | None = None
        self.target: JointState | None = None
        self.log: list[tuple[str, str]] = []
        """(what, detail) in order."""
        self.drivers: list[str] = []

    def _say(self, kind: str, **fields: Any) -> None:
        event = {"v": 1, "type": kind, "episode": self.episode, **fields}
        self.events.publish(String(data=json.dumps(event)))

    async def _answer(self, what: str, response: Any) -> Any:
        if what in self.loses:
            self.loses.discard(what)
            await Future(executor=self.executor)
        return response

    async def _start(self, request: Any, response: Any) -> Any:
        if self.refusals:
            self.refusals -= 1
            response.success, response.message = False, "the recorder is not ready"
            return response
        if self.running:
            response.success, response.message = False, f"episode {self.episode} is running"
            return response
        self.running = True
        task = str(self.node.get_parameter("task").value)
        seed = int(self.node.get_parameter("seed").value or 0)
        self.episode = f"episode-{len([1 for w, _ in self.log if w == 'start'])}"
        self.log.append(("start", f"{task} {seed} {self.node.get_parameter('operator').value}"))
        self.cell.reset(seed=seed, options={"task": task})
        self.mode, self.wanted = "hold", False
        self.drivers.append("new episode")
        self.tick += 1
        response.success, response.message = True, self.episode
        stamp = self.tick * self.contract.dt_ns
        self._say("episode_start", task=task, seed=seed, start_stamp_ns=stamp)
        self._publish()
        return await self._answer("start_episode", response)

    async def _end(self, request: Any, response: Any) -> Any:
        self.running = False
        outcome = "success" if request.data else "failure"
        self.log.append(("end", f"{outcome} {self.cell.success}"))
        response.success = True
        self._say("episode_end", outcome=outcome)
        return await self._answer("end_episode", response)

    async def _intervene(self, request: Any, response: Any) -> Any:
        self.log.append(("intervene", str(request.data)))
        self.wanted = request.data
        response.success = True
        return await self._answer("set_intervention", response)

    async def _resume(self, request: Any, response: Any) -> Any:
        self.log.append(("resume", self.mode))
        self.mode = "policy:1#1"
        response.success = True
        return await self._answer("resume_policy", response)

    def _on_target(self, message: JointState) -> None:
        self.target = message
        self._proceed()

    def _on_joy(self, message: Joy) -> None:
        assert self._stamp(message) == self.tick * self.contract.dt_ns, "answered another tick"
        self.joy = message
        self._proceed()

    def _proceed(self) -> None:
        """A tick, once the operator's joy for it is here, and its command while it drives."""
        now = self.tick * self.contract.dt_ns
        if self.joy is None or self._stamp(self.joy) != now:
            return
        deadman = bool(self.joy.buttons[0])
        if self.mode == "human" and not deadman:
            self.mode = "hold"
        elif deadman and self.wanted:
            self.mode = "human"
        command = -np.ones(4) if self.mode.startswith("policy") else np.zeros(4)
        if self.mode == "human":
            if self.target is None or self._stamp(self.target) != now:
                return
            assert list(self.target.name) == list(self.contract.action.names)
            command = np.array(self.target.position)
        self.drivers.append(self.mode.partition(":")[0])
        message = JointState(name=list(self.contract.action.names), position=list(command))
        message.header.stamp = self.joy.header.stamp
        message.header.frame_id = "human:scripted" if self.mode == "human" else self.mode
        self.executed.publish(message)
        self.cell.advance(command)
        self.tick += 1
        self._publish()

    @staticmethod
    def _stamp(message: Any) -> int:
        return message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec

    def _publish(self) -> None:
        message = JointState(name=list(self.cell.scene_names), position=list(self.cell.scene))
        stamp = message.header.stamp
        stamp.sec, stamp.nanosec = divmod(self.tick * self.contract.dt_ns, 1_000_000_000)
        self.scene.publish(message)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"waited {DEADLINE_S:.0f} s for {what}"
            self.executor.spin_once(timeout_sec=0.05)

    def close(self) -> None:
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def operator(*parameters: str) -> subprocess.Popen[str]:
    words = [w for p in (f"contract:={PATH}", *parameters) for w in ("-p", p)]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sim.nodes.operator",
            "--ros-args",
            "-r",
            "__ns:=/sawyer_state",
            *words,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def test_a_session_of_episodes_like_a_person_would_run_it():
    rest = Rest()
    process = operator(
        "episodes:=3", "tasks:=[reach,button-press]", "seed:=40", "patience:=8", "window:=4",
        "reaction_delay:=3", "min_drive:=12", "recovered:=3", "max_takeovers:=2",
    )  # fmt: skip
    try:
        rest.wait(lambda: process.poll() is not None, "the session to end")
    finally:
        process.kill()
        said, _ = process.communicate()
        rest.close()
    assert process.returncode == 0, said
    starts = [detail for what, detail in rest.log if what == "start"]
    assert starts == ["reach 40 scripted", "button-press 41 scripted", "reach 42 scripted"]
    # It labels success only where the scene says so.
    assert [d for w, d in rest.log if w == "end"] == ["success True"] * 3
    assert said.count("success,") == 3, said
    assert "waiting to start: the recorder is not ready" in said
    assert "session over" in said
    # Control goes policy -> human -> hold -> policy, never straight back.
    changes = set(itertools.pairwise(rest.drivers))
    assert {("policy", "human"), ("human", "hold"), ("hold", "policy")} <= changes
    assert ("human", "policy") not in changes
    hand_backs = [k for k, (w, d) in enumerate(rest.log) if (w, d) == ("intervene", "False")]
    assert hand_backs
    for k in hand_backs:
        assert rest.log[k + 1] == ("resume", "hold")


def test_lost_answers_cost_time_and_no_episode():
    rest = Rest(loses={"start_episode", "resume_policy", "set_intervention", "end_episode"})
    process = operator(
        "episodes:=2", "tasks:=[reach]", "seed:=40", "patience:=8", "window:=4",
        "reaction_delay:=3", "min_drive:=12", "recovered:=3", "max_takeovers:=2",
    )  # fmt: skip
    try:
        rest.wait(lambda: process.poll() is not None, "the session to end")
    finally:
        process.kill()
        said, _ = process.communicate()
        rest.close()
    assert process.returncode == 0, said
    assert rest.loses == set()
    starts = [detail for what, detail in rest.log if what == "start"]
    assert starts == ["reach 40 scripted", "reach 41 scripted"]
    assert [d for w, d in rest.log if w == "end"] == ["success True"] * 2


def test_wrong_parameters_are_one_line_and_status_2():
    for parameter, message in [
        ("tasks:=[fold-laundry]", "no task fold-laundry"),
        ("window:=0", "window is 0"),
    ]:
        process = operator(parameter)
        said, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 2, said
        assert message in said
        assert "Traceback" not in said
