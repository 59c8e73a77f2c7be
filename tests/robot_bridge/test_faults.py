"""Faults of the table in docs/safety.md, with real processes over real DDS."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
from rclpy.clock import Clock, ClockType
from rosgraph_msgs.msg import Clock as ClockMessage
from std_srvs.srv import SetBool

from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
from robot_bridge.nodes.common import reliable, set_stamp
from trajectory_store.contract import Contract

from .cells import arm, cartesian
from .graph import Cell, checkpoint
from .test_nodes import TASKS
from .test_real_time import LiveArm

pytestmark = pytest.mark.ros


class TestLockstepCell:
    @pytest.fixture(scope="class")
    def cell(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("faults")
        contract = cartesian(tasks=TASKS, cell="fault_cell")
        policy = checkpoint(folder / "policy", contract)
        with Cell(contract, folder, policy=policy) as running:
            running.up()
            yield running

    @pytest.fixture(autouse=True)
    def clean_up(self, cell):
        yield
        cell.frozen = set()
        if cell.moving:
            cell.call("supervisor/cancel_episode")
            cell.until(lambda: not cell.moving, "the cancelled episode's end")
        cell.call("supervisor/reset_estop")
        cell.mode("HOLD")

    def drive(self, cell: Cell) -> None:
        before = len(cell.executed)
        cell.start_episode()
        cell.until(
            lambda: any(label.startswith("policy:") for _, label, _ in cell.executed[before:]),
            "the policy drives",
        )

    def test_a_camera_freezes(self, cell):
        self.drive(cell)
        cell.frozen = {"observation.images.corner"}
        cell.until(lambda: "images.corner is" in cell.state.get("reason", ""), "the reason")
        assert "the observation is not complete" in cell.state["reason"]
        assert cell.state["mode"] == "HOLD"
        cell.ticks(3)
        assert cell.executed[-1][1] == "hold"
        cell.frozen = set()

        def drives_again() -> bool:
            cell.call("supervisor/resume_policy")
            cell.ticks(3)
            return cell.executed[-1][1].startswith("policy:")

        cell.until(drives_again, "the policy after the camera came back")

    def test_joints_in_another_order_are_read_by_name(self, cell):
        self.drive(cell)
        cell.names, cell.position = cell.names[::-1], cell.position[::-1]
        try:
            cell.ticks(20)
            assert cell.state["mode"] == "POLICY"
            assert cell.executed[-1][1].startswith("policy:")
        finally:
            cell.names, cell.position = cell.names[::-1], cell.position[::-1]

    def test_two_arbiters_on_one_cell(self, cell, tmp_path):
        self.drive(cell)
        spec = next(
            s
            for s in cell_nodes(CellConfig(contract=cell.folder / "cell.yaml", simulated=False))
            if s.name == "arbiter"
        )
        second = type(spec)(**vars(spec) | {"parameters": {**spec.parameters, "autostart": True}})
        with ProcessGroup([second], log_dir=tmp_path):
            cell.until(
                lambda: "one arbiter drives a cell" in cell.state.get("reason", ""), "the fault"
            )
            assert cell.state["mode"] == "FAULT"
        topic = f"/{cell.contract.cell}/command"
        cell.until(lambda: cell.node.count_publishers(topic) == 1, "the second arbiter's end")

        def reset() -> bool:
            cell.call("supervisor/reset_estop")
            cell.ticks(2) if cell.moving else None
            return cell.state["mode"] == "HOLD"

        cell.until(reset, "HOLD after the reset")


def test_a_policy_of_another_cell(tmp_path):
    contract = cartesian(tasks=TASKS, cell="mismatch_cell")
    other = Contract.model_validate(contract.to_dict() | {"control_hz": 40})
    policy = checkpoint(tmp_path / "policy", other)
    with Cell(contract, tmp_path, policy=policy) as cell:
        name = "/mismatch_cell/runner"

        def said() -> str:
            return cell.diagnostics.get(name, (0, ""))[1]

        cell.until(lambda: "another contract" in said(), "the refusal")
        assert "control_hz: 80.0 -> 40.0" in said()
        answer = cell.call("supervisor/start_episode")
        assert (answer.success, "runner" in answer.message) == (False, True)
        assert all(label == "hold" for _, label, _ in cell.executed)


class TimedArm(LiveArm):
    """A `LiveArm` whose time is the test's: /clock runs with the wall, plus `offset_ns`."""

    def __init__(self, contract, folder, **config) -> None:
        super().__init__(contract, folder, sim_time=True, **config)
        self.offset_ns = 0
        self._clock = self.node.create_publisher(ClockMessage, "/clock", reliable(10))
        self.node.create_timer(0.005, self.say_time, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def now_ns(self) -> int:
        return 1_000_000_000_000 + time.monotonic_ns() % 10**15 + self.offset_ns

    def say_time(self) -> None:
        message = ClockMessage()
        set_stamp(message.clock, self.now_ns())
        self._clock.publish(message)


class TestRealTimeCell:
    @pytest.fixture(scope="class")
    def cell(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("timed")
        contract = arm(
            cell="timed_cell",
            chunk_horizon=250,
            execute_steps=10,
            tasks={"reach": {"instruction": "Reach the goal", "time_limit_s": 1000.0}},
            # Generous ages: a loaded test machine pauses processes for longer than a robot may.
            safety={
                "joint_state_max_age_ms": 2000,
                "chunk_max_age_ms": 10000,
                "teleop_timeout_ms": 2000,
                "overrun_ticks": 100000,
            },
        )
        policy = checkpoint(folder / "policy", contract, 0.4)
        with TimedArm(contract, folder, policy=policy) as running:
            running.up()
            yield running

    @pytest.fixture(autouse=True)
    def clean_up(self, cell):
        yield
        cell.speaks = True
        cell.call("supervisor/cancel_episode")
        cell.call("supervisor/reset_estop")
        cell.mode("HOLD")

    def drive(self, cell: TimedArm) -> str:
        """Until the policy drives."""
        uuid = cell.start_episode()

        def driving() -> bool:
            if cell.state.get("mode") == "HOLD":
                cell.call("supervisor/resume_policy")
            cell.ticks(2)
            return cell.executed[-1][1].startswith("policy:")

        cell.until(driving, "the policy drives")
        return uuid

    def test_joint_states_stop(self, cell):
        self.drive(cell)
        cell.speaks = False
        cell.until(lambda: "joint states are" in cell.state.get("reason", ""), "the reason")
        assert cell.state["mode"] == "HOLD"
        assert "the limit is 2000 ms" in cell.state["reason"]

    def test_an_operator_s_process_is_killed_while_driving(self, cell):
        self.drive(cell)
        names = list(cell.contract.action.names)
        script = Path(__file__).with_name("teleop.py")
        command = [sys.executable, str(script), f"/{cell.contract.cell}", *names]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as teleop:
            try:
                cell.until(
                    lambda: cell.node.count_publishers(f"/{cell.contract.cell}/teleop/joy") == 2,
                    "the operator's device",
                )

                def human() -> bool:
                    cell.call("supervisor/set_intervention", SetBool, data=True)
                    cell.ticks(2)
                    return cell.executed[-1][1] == "human:ann"

                cell.until(human, "the human drives")
            finally:
                os.kill(teleop.pid, signal.SIGKILL)
        cell.until(lambda: cell.state["mode"] == "HOLD", "HOLD after the kill")
        assert any(
            reason in cell.state["reason"]
            for reason in ("no sign of the operator", "no command of the operator")
        )
        cell.ticks(5)
        assert cell.executed[-1][1] == "hold"

    @pytest.mark.parametrize("jump_s", [-5.0, 5.0])
    def test_the_clock_jumps(self, cell, jump_s):
        uuid = self.drive(cell)
        cell.offset_ns += round(jump_s * 1e9)
        cell.mode("HOLD")
        if jump_s < 0:
            cell.until(
                lambda: cell.has_event(
                    "episode_end", episode=uuid, outcome="aborted", reason="the clock jumped back"
                ),
                "the episode's end",
            )
        else:
            # Whichever input shows it first.
            words = ("old", "run out", "in the future")
            assert any(word in cell.state["reason"] for word in words)
            cell.call("supervisor/cancel_episode")
        self.drive(cell)  # and all of it goes on in the new time
