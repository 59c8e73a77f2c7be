"""A set-point arm in real time: no lockstep, the arbiter's own timer, wall-clock stamps."""

import array
import json

import numpy as np
import pytest

pytest.importorskip("rclpy")
from rclpy.clock import Clock, ClockType
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.nodes.common import set_stamp
from trajectory_store import Store

from .cells import arm
from .graph import Cell, checkpoint

pytestmark = pytest.mark.ros


class LiveArm(Cell):
    """Publishes its position at 100 Hz and follows every command at once."""

    def __init__(self, contract, folder, **config) -> None:
        super().__init__(contract, folder, **config)
        self.position = [0.1, -0.2]
        self.speaks = True
        self.node.create_timer(0.01, self.say, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def say(self) -> None:
        if self.speaks:
            message = JointState(name=self.names, position=array.array("d", self.position))
            set_stamp(message.header.stamp, self.now_ns())
            self._joints.publish(message)

    def _on_command(self, message: JointTrajectory) -> None:
        self.position = list(message.points[0].positions)
        super()._on_command(message)

    def _on_event(self, message: String) -> None:
        event = json.loads(message.data)
        self.events.append(event)
        if event["type"] == "reset":
            self.episode = event["episode"]
            self.call_later("supervisor/reset_done", Trigger)


def test_an_arm_is_driven_within_its_limits_and_held_when_it_falls_silent(tmp_path):
    # Generous ages: a loaded test machine pauses processes for longer than a robot computer may.
    contract = arm(
        chunk_horizon=100,
        execute_steps=10,
        tasks={"reach": {"instruction": "Reach the goal", "time_limit_s": 100.0}},
        safety={
            "joint_state_max_age_ms": 1000,
            "chunk_max_age_ms": 5000,
            "overrun_ticks": 1000,
        },
    )
    policy = checkpoint(tmp_path / "policy", contract, 0.4)
    with LiveArm(contract, tmp_path, policy=policy, store=tmp_path / "store") as cell:
        cell.up()
        cell.until(lambda: len(cell.executed) > 5, "ticks in HOLD")
        np.testing.assert_allclose(cell.executed[0][2], [0.1, -0.2], atol=1e-6)
        uuid = cell.start_episode()
        cell.until(lambda: abs(cell.position[0] - 0.4) < 1e-3, "the target of the policy")
        sent = np.array([command for _, _, command in cell.executed])
        assert np.abs(np.diff(sent, axis=0)).max(axis=0)[0] <= 1.0 / 50 + 1e-9
        cell.speaks = False
        cell.until(lambda: "joint states are" in cell.state.get("reason", ""), "HOLD")
        assert cell.state["mode"] == "HOLD"
        cell.speaks = True
        assert cell.call("supervisor/cancel_episode").success
        store = Store(tmp_path / "store")

        def stored() -> bool:
            store.refresh()
            return any(e.uuid == uuid and e.outcome for e in store.episodes)

        cell.until(stored, "the stored episode")
    episode = next(e for e in store.episodes if e.uuid == uuid)
    rows = np.arange(episode.first_row, episode.end_row)
    source = store.read("source", rows)
    assert {0, 3} <= set(source.tolist())
    proposals = store.read("action.policy", rows)[source == 0]
    np.testing.assert_allclose(proposals, 0.4, rtol=1e-6)


def test_a_policy_that_wavers_is_blended_into_the_chunk_that_runs(tmp_path):
    """Every chunk goes the other way; what is published still begins as the one before went on."""
    contract = arm(
        chunk_horizon=100,
        execute_steps=10,
        tasks={"pass": {"instruction": "waver", "time_limit_s": 100.0}},
        safety={
            "joint_state_max_age_ms": 5000,
            "chunk_max_age_ms": 5000,
            "overrun_ticks": 1000,
        },
    )
    policy = checkpoint(tmp_path / "policy", contract, 0.4)
    with LiveArm(contract, tmp_path, policy=policy) as cell:
        cell.up()
        cell.start_episode("pass")
        cell.until(lambda: len(cell.chunks) >= 12, "some chunks")
        pairs = 0
        for (t0, _, old), (t1, _, new) in zip(cell.chunks, cell.chunks[1:], strict=False):
            step = round((t1 - t0) / contract.dt_ns)
            if step < 1 or step >= 90:
                continue  # a test machine that slept: nothing was left to continue
            np.testing.assert_allclose(new[0], old[step], atol=1e-12)
            assert np.abs(np.diff(new, axis=0)).max() < 0.8 / 2, "no step between two minds"
            pairs += np.abs(old[-1] - new[-1]).max() > 0.5
        assert pairs >= 2, "the policy changed its mind"
