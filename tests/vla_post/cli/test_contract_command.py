"""`vla-post contract` as a user calls it, and a draft from a real graph."""

import array
import threading
from pathlib import Path

import pytest
import yaml

import robot_bridge
import sim
from trajectory_store.contract import load_contract, parse_contract
from vla_post.cli.contract import shipped
from vla_post.cli.main import main

ROBOTS = Path(robot_bridge.__file__).parent / "contracts"
SHIPPED = Path(sim.__file__).parent / "contracts" / "metaworld_state.yaml"


def test_check_prints_the_hash_of_a_file_or_a_shipped_name(capsys):
    main(["contract", "check", str(SHIPPED)])
    by_path = capsys.readouterr().out
    main(["contract", "check", "metaworld_state"])
    assert capsys.readouterr().out == by_path
    assert parse_contract(SHIPPED.read_text()).sha256 in by_path


def test_check_names_every_problem_with_its_line(tmp_path, capsys):
    text = SHIPPED.read_text().replace("control_hz: 80", "control_hz: -80")
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace("mode: delta", "mode: sideways"))
    with pytest.raises(SystemExit) as caught:
        main(["contract", "check", str(broken)])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    lines = text.splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "control_hz" in line)
    assert f"broken.yaml:{number}: control_hz" in error
    assert "mode" in error
    assert "Traceback" not in error


def test_several_problems_of_one_part_are_several_lines(tmp_path, capsys):
    broken = tmp_path / "broken.yaml"
    text = (ROBOTS / "so101.yaml").read_text()
    text = text.replace("[-1.69, 1.69]", "[1.69, -1.69]").replace("[2, 2, 2, 2, 2, 2]", "[2, 2]")
    broken.write_text(text.replace("shape: [6]", "shape: [5]"))
    with pytest.raises(SystemExit):
        main(["contract", "check", str(broken)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "`names` lists 6 joints and `shape` is [5]" in lines[0]
    assert "limits.velocity has 2 entries for 6 joints" in lines[1]
    assert "limits.position of elbow_flex is [1.69, -1.69]; low must be < high" in lines[2]
    assert all("broken.yaml:" in line for line in lines)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_contract_passes_the_check(name, capsys):
    main(["contract", "check", name])
    assert "valid, sha256" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["so101", "ur5e_robotiq"])
class TestRealRobots:
    def test_the_two_controllers_own_the_joints_of_the_contract_in_its_order(self, name):
        contract = load_contract(ROBOTS / f"{name}.yaml")
        controllers = yaml.safe_load((ROBOTS / "controllers" / f"{name}.yaml").read_text())
        joints = list(contract.action.names)
        for controller in ("vla_joint_trajectory_controller", "vla_forward_position_controller"):
            assert controllers[controller]["ros__parameters"]["joints"] == joints
            assert controller in controllers["controller_manager"]["ros__parameters"]
        assert list(contract.observations["observation.state"].names) == joints
        update_rate = controllers["controller_manager"]["ros__parameters"]["update_rate"]
        assert contract.observations["observation.state"].rate_hz == update_rate

    def test_the_variants_differ_in_the_kind_of_command_alone(self, name, capsys):
        with pytest.raises(SystemExit):
            main(["contract", "diff", name, f"{name}_forward"])
        assert capsys.readouterr().out == (
            "actions.action.message: trajectory_msgs/JointTrajectory -> "
            "std_msgs/Float64MultiArray\n"
        )

    def test_the_launch_command_in_the_file_names_its_own_controller(self, name):
        for variant, topic in (
            (name, "/vla_joint_trajectory_controller/joint_trajectory"),
            (f"{name}_forward", "/vla_forward_position_controller/commands"),
        ):
            text = (ROBOTS / f"{variant}.yaml").read_text()
            assert f"contract:={variant}.yaml" in text
            assert f"command_topic:={topic}" in text


def test_check_tells_what_only_the_arbiter_can_know(tmp_path, capsys):
    broken = tmp_path / "box.yaml"
    broken.write_text(
        SHIPPED.read_text().replace("names: [ee_x, ee_y, ee_z]\n", "names: [a_x, b_y, c_z]\n")
    )
    with pytest.raises(SystemExit):
        main(["contract", "check", str(broken)])
    assert "no action is called 'a_dx'" in capsys.readouterr().err


def test_show_lists_the_shipped_ones_and_describes_one(capsys):
    main(["contract", "show"])
    assert "metaworld_pixels" in capsys.readouterr().out
    main(["contract", "show", "metaworld_state"])
    shown = capsys.readouterr().out
    assert "80 Hz" in shown
    assert "task pick-place: 'Pick and place a puck to a goal', 2.5 s" in shown


def test_diff_names_the_fields_and_ends_with_1(tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(SHIPPED.read_text().replace("execute_steps: 4", "execute_steps: 8"))
    with pytest.raises(SystemExit) as caught:
        main(["contract", "diff", "metaworld_state", str(other)])
    assert caught.value.code == 1
    assert capsys.readouterr().out == "execute_steps: 4 -> 8\n"
    main(["contract", "diff", "metaworld_state", str(SHIPPED)])
    assert capsys.readouterr().out == ""


@pytest.mark.ros
def test_a_draft_from_a_graph_is_valid_and_barely_lets_the_robot_move(tmp_path):
    rclpy = pytest.importorskip("rclpy")
    import numpy as np
    import simplejpeg
    from sensor_msgs.msg import CompressedImage, JointState

    from robot_bridge.dds import use_default_profile

    use_default_profile()
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("driver", namespace="/ur", context=context)
    joints = node.create_publisher(JointState, "joint_states", 10)
    camera = node.create_publisher(CompressedImage, "cameras/wrist/image_raw/compressed", 5)
    state = JointState(name=["shoulder", "elbow"], position=array.array("d", [0.5, -1.0]))
    jpeg = simplejpeg.encode_jpeg(np.zeros((48, 64, 3), np.uint8))
    frame = CompressedImage(format="jpeg", data=array.array("B", jpeg))
    stop = threading.Event()

    def drive() -> None:
        while not stop.wait(0.02):
            joints.publish(state)
            camera.publish(frame)

    thread = threading.Thread(target=drive)
    thread.start()
    out = tmp_path / "draft.yaml"
    try:
        main(["contract", "from-graph", "--namespace", "/ur", "--seconds", "4", "--out", str(out)])
    finally:
        stop.set()
        thread.join()
        node.destroy_node()
        rclpy.try_shutdown(context=context)
    contract = parse_contract(out.read_text())
    assert contract.action.names == ("shoulder", "elbow")
    assert contract.action.limits.position == ((0.45, 0.55), (-1.05, -0.95))
    image = contract.observations["observation.images.wrist"]
    assert image.shape == (48, 64, 3)
    assert image.topic == "cameras/wrist/image_raw/compressed"
    assert 20 <= image.rate_hz <= 60
    assert "CHECK" in out.read_text()


@pytest.mark.ros
def test_a_silent_graph_is_one_clear_line(capsys):
    pytest.importorskip("rclpy")
    with pytest.raises(SystemExit) as caught:
        main(["contract", "from-graph", "--namespace", "/nobody", "--seconds", "0.5"])
    assert caught.value.code == 1
    assert "no JointState was heard under /nobody/" in capsys.readouterr().err
