"""Raw MCAP beside the store: readable by everybody, exact in its counts, whole after a kill."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("mcap_ros2", reason="the bags extra is not installed")
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory

from robot_bridge.nodes.definitions import definition
from trajectory_store import Outcome, Store
from vla_post.convert.mcap_bag import from_mcap

from .cells import cartesian
from .graph import Cell, checkpoint
from .test_nodes import TASKS

pytestmark = pytest.mark.ros


def test_a_definition_holds_every_part_once():
    text = definition("trajectory_msgs/msg/JointTrajectory")
    assert text.count("MSG: builtin_interfaces/Time") == 1
    assert text.count("MSG: trajectory_msgs/JointTrajectoryPoint") == 1
    assert "MSG: builtin_interfaces/Duration" in text


@pytest.mark.parametrize("kind", ["sensor_msgs/JointState", "nothing/msg/Nothing"])
def test_a_type_without_definition_is_refused(kind):
    with pytest.raises((ValueError, OSError), match=kind.split("/")[0]):
        definition(kind)


def files(cell: Cell) -> list[Path]:
    return sorted((cell.folder / "bag").glob("*.mcap"))


def check_with_another_reader(bag: Path, cell: str, counts: dict[str, int]) -> None:
    """`rosbags` shares no code with the mcap library that wrote the file; it also parses our
    message definitions, where the other reader has its own."""
    highlevel = pytest.importorskip("rosbags.highlevel")
    with highlevel.AnyReader([bag]) as reader:
        found: dict[str, int] = {}
        for connection, _, raw in reader.messages():
            found[connection.topic] = found.get(connection.topic, 0) + 1
            message = reader.deserialize(raw, connection.msgtype)
            if connection.topic == f"/{cell}/joint_states":
                assert list(message.name) == ["ee_x", "ee_y", "ee_z", "gripper"]
                np.testing.assert_allclose(message.position, [0.0, 0.5, 0.2, 0.0])
    assert found == counts


def test_bags_hold_what_was_sent_and_a_killed_one_is_read_up_to_the_cut(tmp_path):
    contract = cartesian(tasks=TASKS, cell="bag_cell")
    policy = checkpoint(tmp_path / "policy", contract)
    with Cell(contract, tmp_path, policy=policy, bag=tmp_path / "bag") as cell:
        cell.up()
        joints = "/bag_cell/joint_states"
        cell.until(lambda: cell.node.count_subscribers(joints) >= 4, "the bag's subscriptions")
        uuid = cell.start_episode()
        cell.ticks(40)
        cell.end_episode()
        cell.until(lambda: cell.has_event("episode_end", episode=uuid), "its end")
        # Killed while it records: what was written before is whole.
        second = cell.start_episode()
        cell.until(lambda: files(cell)[0].stat().st_size > 300_000, "a written chunk")
        old = cell.group.pids()["bag"]
        os.kill(old, signal.SIGKILL)
        cell.until(lambda: cell.group.pids().get("bag", old) != old, "its successor")
        cell.until(lambda: len(files(cell)) == 2, "the second file")
        cell.up()
        cell.until(lambda: files(cell)[1].stat().st_size > 300_000, "a chunk of the successor")
        cell.end_episode()
    whole = files(cell)[1]
    with whole.open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        counts: dict[str, int] = {}
        for _, channel, message, _ in reader.iter_decoded_messages():
            counts[channel.topic] = counts.get(channel.topic, 0) + 1
            assert message.sequence > 0
        assert counts["/bag_cell/arbiter/state"] > 0
        assert counts["/bag_cell/events"] > 0
        summary = reader.get_summary()
        assert summary is not None
        assert summary.statistics is not None
        assert summary.statistics.message_count == sum(counts.values())
        (loss,) = reader.iter_metadata()
        for topic, count in counts.items():
            assert loss.metadata[topic] == f"0 lost, {count} received"
    check_with_another_reader(whole, "bag_cell", counts)
    from_mcap(files(cell)[0], tmp_path / "store", contract)
    store = Store(tmp_path / "store")
    first, cut = store.table
    assert (first.uuid, first.outcome) == (uuid, Outcome.SUCCESS)
    assert (cut.uuid, cut.outcome) == (second, Outcome.INTERRUPTED)
    sent = {ns: values for ns, _, values in cell.executed}
    for episode in (first, cut):
        stamps, actions = store.read("stamp_ns", episode), store.read("action", episode)
        assert len(stamps) > 20
        np.testing.assert_array_equal(np.diff(stamps), contract.dt_ns)
        np.testing.assert_allclose(actions, [sent[int(ns)] for ns in stamps], rtol=1e-6)
