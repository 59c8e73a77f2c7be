"""Key maps and what they do to a deadman, a target and requests; no ROS."""

from pathlib import Path

import numpy as np
import pytest

import sim
from robot_bridge.core.teleop import (
    MAPS,
    KeyMap,
    KeyMapError,
    Leader,
    LeaderJoint,
    Teleop,
    load_key_map,
)
from trajectory_store.contract import load_contract

from .cells import arm, cartesian

PAD = KeyMap.model_validate(
    {
        "device": "gamepad",
        "deadman": ["rb"],
        "requests": {"a": "success", "back": "estop"},
        "motion": [
            {"moves": "x", "axis": "left_y", "scale": -1.0},
            {"moves": "y", "plus": ["left"], "minus": ["right"]},
            {"moves": "selected", "plus": ["up"], "minus": ["down"]},
        ],
        "gripper": ["x"],
        "select_next": ["next"],
        "deadzone": 0.2,
    }
)


def step(teleop, held=(), axes=None, pressed=(), *, present=True, current=None, driving=True):
    return teleop.step(
        frozenset(held), pressed, axes or {}, present=present, current=current, driving=driving,
        dt_s=0.02,
    )  # fmt: skip


class TestDeadman:
    def test_it_counts_only_after_it_was_seen_released(self):
        teleop = Teleop(arm(), PAD)
        assert not step(teleop, ["rb"]).deadman  # held while it was plugged in
        assert not step(teleop, []).deadman
        assert step(teleop, ["rb"]).deadman

    def test_its_press_asks_for_control_once(self):
        teleop = Teleop(arm(), PAD)
        step(teleop)
        assert step(teleop, ["rb"], driving=False).requests == ("takeover",)
        assert step(teleop, ["rb"], driving=False).requests == ()
        step(teleop)
        assert step(teleop, ["rb"], driving=True).requests == ()  # has it already

    def test_asking_can_be_a_key_of_its_own(self):
        keys = PAD.model_copy(update={"takeover_on_deadman": False, "requests": {"y": "takeover"}})
        teleop = Teleop(arm(), keys)
        step(teleop)
        assert step(teleop, ["rb"], driving=False).requests == ()
        assert step(teleop, ["rb", "y"], pressed=["y"], driving=False).requests == ("takeover",)

    def test_a_device_that_goes_lets_go_and_starts_over(self):
        teleop = Teleop(arm(), PAD)
        step(teleop)
        assert step(teleop, ["rb"]).deadman
        gone = step(teleop, ["rb"], present=False)
        assert not gone.deadman
        assert gone.target is None
        assert not step(teleop, ["rb"]).deadman
        step(teleop)
        assert step(teleop, ["rb"]).deadman

    def test_requests_need_no_deadman_and_an_estop_works_while_it_is_held(self):
        teleop = Teleop(arm(), PAD)
        assert step(teleop, ["a"], pressed=["a"]).requests == ("success",)
        assert step(teleop, ["back", "rb"], pressed=["back"]).requests == ("estop",)

    def test_on_a_keyboard_moving_keeps_it_but_does_not_press_it(self):
        teleop = Teleop(arm(), load_key_map("keyboard"))
        step(teleop)
        assert not step(teleop, ["up"], pressed=["up"]).deadman
        step(teleop)
        assert step(teleop, ["space"]).deadman
        assert step(teleop, ["up"]).deadman
        assert not step(teleop, []).deadman


class TestMotion:
    def test_a_joint_moves_at_its_share_of_the_velocity_limit_from_where_the_robot_is(self):
        teleop = Teleop(arm(), PAD)  # velocity limits 1.0 and 1.5 rad/s
        at = np.array([0.1, -0.2])
        step(teleop)
        step(teleop, ["rb"], current=at, driving=False)
        # Not driving yet: the target stays on the robot, wherever that goes meanwhile.
        moved = step(teleop, ["rb", "up"], current=at + 0.05, driving=False)
        np.testing.assert_allclose(moved.target, at + 0.05)
        first = step(teleop, ["rb", "up"], current=at + 0.05)
        np.testing.assert_allclose(first.target, [0.15 + 0.2 * 1.0 * 0.02, -0.15])
        step(teleop, ["rb"], pressed=["next"])
        second = step(teleop, ["rb", "down"])
        np.testing.assert_allclose(second.target, [0.154, -0.15 - 0.2 * 1.5 * 0.02])

    def test_targets_stay_inside_the_limits(self):
        teleop = Teleop(arm(), PAD)
        step(teleop)
        step(teleop, ["rb"], current=np.array([0.99, 0.0]))
        for _ in range(100):
            output = step(teleop, ["rb", "up"])
        np.testing.assert_allclose(output.target, [1.0, 0.0])

    def test_displacements_follow_the_axes_and_the_gripper_is_held(self):
        teleop = Teleop(cartesian(), PAD)
        step(teleop)
        output = step(teleop, ["rb", "left"], {"left_y": -1.0})
        np.testing.assert_allclose(output.target, [0.5, 0.5, 0.0, 0.0])  # half of the limits
        closing = step(teleop, ["rb", "x"], pressed=["x"])
        np.testing.assert_allclose(closing.target, [0.0, 0.0, 0.0, 1.0])
        step(teleop)
        # Taking over again starts from the gripper that was last commanded.
        kept = step(teleop, ["rb"], current=np.array([0.3, 0.0, 0.0, 1.0]))
        np.testing.assert_allclose(kept.target, [0.0, 0.0, 0.0, 1.0])
        opened = step(teleop, ["rb"], pressed=["x"])
        np.testing.assert_allclose(opened.target, [0.0, 0.0, 0.0, -1.0])

    @pytest.mark.parametrize(
        ("stick", "speed"), [(0.0, 0.0), (-0.2, 0.0), (-0.6, 0.25), (-1.0, 0.5), (1.0, -0.5)]
    )
    def test_a_deadzone_is_cut_out_without_a_jump(self, stick, speed):
        teleop = Teleop(cartesian(), PAD)
        step(teleop)
        output = step(teleop, ["rb"], {"left_y": stick})
        assert output.target is not None
        assert output.target[0] == pytest.approx(speed)

    def test_the_tool_of_the_franka_moves_along_the_axis_that_was_pushed(self):
        from sim.franka_cell import HOME, Kinematics

        path = Path(sim.CONTRACTS) / "franka_joint.yaml"
        keys = load_key_map("gamepad")
        teleop = Teleop(load_contract(path), keys, folder=path.parent)
        kinematics = Kinematics()
        start = np.append(HOME, 0.04)
        before, turned_before = kinematics.pose(start[:7])
        step(teleop)
        step(teleop, ["rb"], current=start)
        for _ in range(50):  # one second
            output = step(teleop, ["rb"], {"left_y": -1.0})
        assert output.target is not None
        after, turned = kinematics.pose(output.target[:7])
        np.testing.assert_allclose(after - before, [keys.linear_m_s, 0.0, 0.0], atol=0.004)
        np.testing.assert_allclose(turned, turned_before, atol=0.02)
        assert output.target[7] == 0.04

    def test_every_shipped_map_fits_every_shipped_contract(self):
        for map_ in MAPS.glob("*.yaml"):
            for path in Path(sim.CONTRACTS).glob("*.yaml"):
                contract = load_contract(path)
                teleop = Teleop(contract, load_key_map(map_.stem), folder=path.parent)
                deadman = teleop.keys.deadman[0]
                step(teleop)
                output = step(teleop, [deadman], current=np.zeros(contract.action.size))
                assert output.target is not None
                assert output.target.shape == (contract.action.size,)


class TestKeyMapFiles:
    def test_every_problem_is_a_line(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("device: trackball\ndeadman: []\nrequests: {a: dance}\nspeed: 3\n")
        with pytest.raises(KeyMapError) as caught:
            load_key_map(path)
        text = str(caught.value)
        assert len(text.splitlines()) == 4
        for word in ("device", "deadman", "requests.a", "speed"):
            assert f"mine.yaml: {word}" in text

    def test_a_missing_file_names_the_shipped_ones(self):
        with pytest.raises(KeyMapError, match="gamepad, keyboard, spacemouse"):
            load_key_map("joystick")

    def test_a_joint_that_the_cell_lacks_is_named(self):
        keys = PAD.model_copy(update={"motion": (PAD.motion[0].model_copy(update={"moves": "q"}),)})
        with pytest.raises(KeyMapError, match="moves q; this cell has selected, a, b"):
            Teleop(arm(), keys)


class TestLeader:
    def test_joints_are_mapped_by_name_scaled_and_shifted(self):
        leader = Leader(arm(), {"b": LeaderJoint(joint="elbow", scale=-1.0, offset=0.5)})
        assert leader.target(10.0) is None
        leader.hear(["other", "elbow", "a"], [9.0, 0.2, 0.7], 10.0)
        np.testing.assert_allclose(leader.target(10.05), [0.7, 0.3])

    def test_silence_a_missing_joint_and_nan_leave_no_target(self):
        leader = Leader(arm())
        leader.hear(["a", "b"], [0.1, 0.2], 10.0)
        assert leader.target(10.2) is None
        assert "silent" in leader.problem
        leader.hear(["a"], [0.1], 10.3)
        assert leader.target(10.3) is None
        assert "missing b" in leader.problem
        leader.hear(["a", "b"], [0.1, float("nan")], 10.4)
        assert leader.target(10.4) is None
        assert "not finite" in leader.problem

    def test_a_cell_of_displacements_and_an_unknown_joint_are_refused(self):
        with pytest.raises(KeyMapError, match="takes displacements"):
            Leader(cartesian())
        with pytest.raises(KeyMapError, match="sets wrist; this cell has a, b"):
            Leader(arm(), {"wrist": LeaderJoint(joint="wrist")})
