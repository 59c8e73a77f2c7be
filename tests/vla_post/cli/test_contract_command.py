"""`vla-post contract` as a user calls it, and a draft from a real graph."""

import array
import threading
from pathlib import Path

import pytest

import sim
from trajectory_store.contract import parse_contract
from vla_post.cli.main import main

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
