"""The simulated robot's node over real DDS, in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sim
from sim.cell import SCENE_TOPIC, make_cell
from trajectory_store import Contract, load_contract

rclpy = pytest.importorskip("rclpy")
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import CameraInfo, CompressedImage, JointState  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint  # noqa: E402

from robot_bridge.nodes.common import latched, reliable  # noqa: E402

pytestmark = pytest.mark.ros
DEADLINE_S = 60.0


def stamp_ns(message: Any) -> int:
    stamp = message.clock if isinstance(message, Clock) else message.header.stamp
    return stamp.sec * 1_000_000_000 + stamp.nanosec


class Graph:
    """Plays supervisor and arbiter for one robot process.

    Args:
        told: events (kind, episode, fields) that were said before it was started.
    """

    def __init__(
        self,
        contract_path: Path,
        *parameters: str,
        told: Sequence[tuple[str, str, dict[str, Any]]] = (),
    ) -> None:
        self.contract: Contract = load_contract(contract_path)
        cell = self.contract.cell
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node(
            "supervisor", namespace=f"/{cell}", context=self.context, start_parameter_services=False
        )
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.events = self.node.create_publisher(String, "events", latched(200))
        self.command = self.node.create_publisher(JointTrajectory, "command", reliable(10))
        self.resets_done = 0
        self.node.create_service(Trigger, "~/reset_done", self._reset_done)
        self.heard: dict[str, list[Any]] = {}
        for kind, topic in [
            (Clock, "/clock"),
            (JointState, "joint_states"),
            (JointState, "sim/scene_state"),
        ]:
            self.listen(kind, topic)
        for feature in self.contract.images.values():
            self.listen(CompressedImage, feature.topic)
            self.listen(CameraInfo, feature.topic.partition("/image_raw")[0] + "/camera_info")
        for kind, episode, fields in told:
            self.say(kind, episode, **fields)
        arguments = [f"contract:={contract_path}", *parameters]
        arguments = [word for argument in arguments for word in ("-p", argument)]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sim.nodes.robot",
                "--ros-args",
                "-r",
                f"__ns:=/{cell}",
                *arguments,
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        self.wait(lambda: self.command.get_subscription_count() > 0, "the robot to subscribe")

    def listen(self, kind: Any, topic: str) -> None:
        heard = self.heard.setdefault(topic, [])
        late = kind is CameraInfo
        self.node.create_subscription(
            kind, topic, heard.append, latched(100) if late else reliable(100)
        )

    def _reset_done(self, request: Any, response: Any) -> Any:
        self.resets_done += 1
        response.success = True
        return response

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"waited {DEADLINE_S:.0f} s for {what}"
            assert self.process.poll() is None, "the robot's process ended"
            self.executor.spin_once(timeout_sec=0.1)

    def say(self, kind: str, episode: str, **more: Any) -> None:
        event = {"v": 1, "type": kind, "episode": episode, "stamp_ns": 0} | more
        self.events.publish(String(data=json.dumps(event)))

    def reset(self, episode: str, task: str, seed: int) -> int:
        """Stamp of the first tick."""
        done, ticks = self.resets_done, len(self.heard["joint_states"])
        self.say("reset", episode, task=task, seed=seed)
        self.wait(lambda: self.resets_done > done, "reset_done")
        self.wait(lambda: len(self.heard["joint_states"]) > ticks, "the first tick")
        return stamp_ns(self.heard["joint_states"][-1])

    def send(self, stamp: int, positions: Any, names: list[str] | None = None) -> None:
        message = JointTrajectory(joint_names=names or list(self.contract.action.names))
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 1_000_000_000)
        message.points = [JointTrajectoryPoint(positions=[float(p) for p in positions])]
        self.command.publish(message)

    def scene(self, stamp: int) -> np.ndarray:
        def there() -> bool:
            heard = self.heard["sim/scene_state"]
            return bool(heard) and stamp_ns(heard[-1]) >= stamp

        self.wait(there, f"tick {stamp}")
        message = self.heard["sim/scene_state"][-1]
        assert stamp_ns(message) == stamp
        return np.array(message.position)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.communicate(timeout=DEADLINE_S)
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture(scope="module")
def state() -> Iterator[Graph]:
    graph = Graph(sim.CONTRACTS / "metaworld_state.yaml")
    yield graph
    graph.close()
    assert graph.process.returncode == 0


def test_a_robot_that_comes_late_answers_the_open_reset_and_joins_no_running_episode():
    """What began before it was another robot's, in another scene."""
    dt = 12_500_000
    told = [
        ("reset", "old", {"task": "push", "seed": 3}),
        ("episode_start", "old", {"stamp_ns": 400 * dt}),
        ("reset", "open", {"task": "push", "seed": 11, "stamp_ns": 500 * dt}),
    ]
    graph = Graph(sim.CONTRACTS / "metaworld_state.yaml", told=told)
    try:
        graph.wait(lambda: graph.resets_done == 1, "reset_done")
        graph.wait(lambda: bool(graph.heard["joint_states"]), "the first tick")
        assert [stamp_ns(m) for m in graph.heard["joint_states"]] == [501 * dt]
        with contextlib.closing(make_cell(graph.contract)) as cell:
            cell.reset(seed=11, options={"task": "push"})
            np.testing.assert_array_equal(graph.scene(501 * dt), cell.streams[SCENE_TOPIC].position)
    finally:
        graph.close()


def test_lockstep_episode_equals_the_cell_played_directly(state: Graph):
    dt = state.contract.dt_ns
    cell = make_cell(state.contract)
    _, info = cell.reset(seed=11, options={"task": "push"})
    stamp = state.reset("e1", "push", 11)
    np.testing.assert_array_equal(state.scene(stamp), info["scene"])
    assert stamp % dt == 0
    assert tuple(state.heard["sim/scene_state"][-1].name) == cell.scene_names

    # A command before the episode has started is kept, and moves nothing yet.
    actions = np.random.default_rng(1).uniform(-1, 1, (30, 4))
    state.send(stamp, actions[0])
    state.say("episode_start", "e1")
    for action in actions:
        _, _, _, _, info = cell.step(action)
        np.testing.assert_array_equal(state.scene(stamp + dt), info["scene"])
        stamp += dt
        following = actions[min(cell.tick, 29)]
        if cell.tick < 30:
            state.send(stamp, following)
    for topic in ("joint_states", "/clock"):
        state.wait(lambda t=topic: stamp_ns(state.heard[t][-1]) == stamp, f"the last of {topic}")
        stamps = [stamp_ns(m) for m in state.heard[topic][-31:]]
        assert stamps == list(range(stamp - 30 * dt, stamp + 1, dt))
    state.say("episode_end", "e1")


def test_what_must_not_be_obeyed_is_not_and_the_tick_is_said_again(state: Graph):
    dt = state.contract.dt_ns
    stamp = state.reset("e2", "reach", 1)
    before = state.scene(stamp)
    state.say("episode_start", "e2")
    state.send(stamp, [np.nan, 0, 0, 0])
    state.send(stamp, [0, 0, 0])
    state.send(stamp, [0, 0, 0, 0], ["ee_dx", "ee_dy", "ee_dz", "elbow"])
    state.send(stamp - dt, [1, 1, 1, 1])
    state.send(stamp + dt, [1, 1, 1, 1])
    ticks = len(state.heard["joint_states"])
    state.wait(lambda: len(state.heard["joint_states"]) > ticks, "the tick to be said again")
    np.testing.assert_array_equal(state.scene(stamp), before)

    # Any order of names is right as long as they are the contract's; limits clamp.
    state.send(stamp, [0.25, 7.0, -0.5, 0.0], ["gripper", "ee_dx", "ee_dy", "ee_dz"])
    cell = make_cell(state.contract)
    cell.reset(seed=1, options={"task": "reach"})
    info = cell.step(np.array([1.0, -0.5, 0.0, 0.25]))[4]
    np.testing.assert_array_equal(state.scene(stamp + dt), info["scene"])
    state.say("episode_end", "e2")


def test_time_never_goes_back_and_an_ended_episode_stands_still(state: Graph):
    dt = state.contract.dt_ns
    first = state.reset("e3", "hammer", 2)
    state.say("episode_start", "e3")
    state.send(first, np.zeros(4))
    state.scene(first + dt)
    state.say("episode_end", "e3")
    second = state.reset("e4", "soccer", 2)
    assert second > first + dt
    state.say("episode_start", "e3")  # of an episode that is over
    state.send(second, np.ones(4))
    third = state.reset("e5", "soccer", 2)
    # Between the two resets the scene did not move.
    scenes = [m for m in state.heard["sim/scene_state"] if stamp_ns(m) >= second]
    assert {stamp_ns(m) for m in scenes} == {second, third}
    np.testing.assert_array_equal(scenes[0].position, scenes[-1].position)


def test_an_unknown_task_leaves_the_robot_ready(state: Graph):
    done = state.resets_done
    state.say("reset", "e6", task="fold-laundry", seed=1)
    state.reset("e7", "reach", 1)
    assert state.resets_done == done + 1


@pytest.mark.pixels
def test_frames_are_the_cells_own_at_the_cameras_rate():
    graph = Graph(sim.CONTRACTS / "metaworld_pixels.yaml")
    try:
        dt, key = graph.contract.dt_ns, "observation.images.corner"
        cell = make_cell(graph.contract)
        cell.reset(seed=5, options={"task": "window-open"})
        first = stamp = graph.reset("e1", "window-open", 5)
        jpegs = {stamp: cell.jpeg(key)}
        graph.say("episode_start", "e1")
        for _ in range(9):
            graph.send(stamp, [1, 1, -1, 0])
            cell.step(np.array([1.0, 1, -1, 0]))
            stamp += dt
            graph.scene(stamp)
            if cell.frame_due(key):
                jpegs[stamp] = cell.jpeg(key)
        topic = graph.contract.observations[key].topic
        graph.wait(lambda: len(graph.heard[topic]) >= 3, "three frames")
        heard = {stamp_ns(m): m.data.tobytes() for m in graph.heard[topic]}
        assert list(heard) == [first, first + 4 * dt, first + 8 * dt]
        assert heard == jpegs
        graph.wait(lambda: bool(graph.heard["cameras/corner/camera_info"]), "camera_info")
        (info,) = graph.heard["cameras/corner/camera_info"]
        assert (info.height, info.width) == (64, 64)
        assert info.k[0] == info.k[4] > 0
        assert info.k[2] == 32
    finally:
        graph.close()
    assert graph.process.returncode == 0


def test_without_lockstep_the_robot_keeps_its_own_time_and_times_commands_out(tmp_path: Path):
    text = (sim.CONTRACTS / "metaworld_state.yaml").read_text()
    path = tmp_path / "free.yaml"
    path.write_text(text.replace("lockstep: true", "lockstep: false").replace("sawyer_", "free_"))
    graph = Graph(path, "real_time_factor:=2.0", "command_timeout_s:=0.3")
    try:
        states = graph.heard["joint_states"]
        graph.wait(lambda: len(states) > 20, "ticks without any command")
        stamps = np.array([stamp_ns(m) for m in states])
        assert set(np.diff(stamps)) == {graph.contract.dt_ns}

        def x() -> float:
            return states[-1].position[0]

        rest = x()
        graph.send(0, [0.2, 0, 0, 0])
        graph.wait(lambda: x() > rest + 0.02, "the command to move the hand")
        # One command, never repeated: after its time-out the hand settles.
        graph.wait(
            lambda: len(states) > 100 and abs(x() - states[-40].position[0]) < 1e-4,
            "the robot to hold",
        )
        # 0.3 s at 160 ticks/s and 2 mm a tick are 0.1 m; without the time-out it would reach 0.5 m.
        assert x() < 0.25
    finally:
        graph.close()
    assert graph.process.returncode == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "robot: no contract"),
        (["contract:=/nowhere.yaml"], "cannot read the contract"),
        (["contract:=CONTRACT", "real_time_factor:=0.0"], "real_time_factor is 0.0"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(parameters: list[str], message: str):
    contract = str(sim.CONTRACTS / "metaworld_state.yaml")
    words = [w for p in parameters for w in ("-p", p.replace("CONTRACT", contract))]
    done = subprocess.run(
        [sys.executable, "-m", "sim.nodes.robot", "--ros-args", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
