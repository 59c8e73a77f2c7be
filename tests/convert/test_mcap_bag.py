"""Bags written by mcap's own ROS 2 writer; whole, cut off, with and without events."""

import json

import numpy as np
import pytest
import simplejpeg

from trajectory_store import Source, Store
from trajectory_store.contract import parse_contract
from vla_post.convert.common import ConversionError

pytest.importorskip("mcap_ros2", reason="the bags extra is not installed")

from mcap_ros2.writer import Writer

from vla_post.convert.mcap_bag import from_mcap

HEADER = """
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
JOINTS = "std_msgs/Header header\nstring[] name\nfloat64[] position\nfloat64[] velocity\n"
JOINTS += "float64[] effort" + HEADER
IMAGE = "std_msgs/Header header\nstring format\nuint8[] data" + HEADER
CELL = """
schema: vla_post/cell/1
cell: bench
robot: arm
control_hz: 20
observations:
  observation.state:
    {topic: joint_states, type: sensor_msgs/JointState, names: [a, b], shape: [2], unit: rad,
     align: interpolate}
  observation.images.front:
    {topic: cameras/front, type: sensor_msgs/CompressedImage, shape: [32, 48, 3], unit: rgb8,
     align: latest}
actions:
  action: {names: [x, y], unit: m, mode: absolute, limits: {position: [[-9, 9], [-9, 9]]}}
tasks:
  pick: {instruction: Pick it, time_limit_s: 10}
"""
JPEGS = [
    simplejpeg.encode_jpeg(np.full((32, 48, 3), 20 + 9 * i, np.uint8), quality=90)
    for i in range(20)
]
FIRST = 10**18


def header(ns: int, frame: str = "") -> dict:
    return {"stamp": {"sec": ns // 10**9, "nanosec": ns % 10**9}, "frame_id": frame}


def write(path, *, events: bool, ticks: range = range(40)) -> None:
    with path.open("wb") as file, Writer(file, chunk_size=2000) as writer:
        joints = writer.register_msgdef("sensor_msgs/msg/JointState", JOINTS)
        image = writer.register_msgdef("sensor_msgs/msg/CompressedImage", IMAGE)
        text = writer.register_msgdef("std_msgs/msg/String", "string data")

        def put(topic, schema, message, at):
            writer.write_message(f"/bench/{topic}", schema, message, log_time=at, publish_time=at)

        def event(at, **fields):
            put("events", text, {"data": json.dumps({"v": 1, "seq": 0} | fields)}, at)

        if events and ticks.start == 0:
            uuid = "11111111-2222-3333-4444-555555555555"
            event(FIRST, type="episode_start", episode=uuid, task="pick", operator="ann")
        for i in ticks:
            at = FIRST + i * 50_000_000
            state = {"name": ["b", "a"], "velocity": [], "effort": []}
            before = at - 10_000_000
            put("joint_states", joints, state | {"header": header(before), "position": [i, -i]}, at)
            if i % 2 == 0:
                frame = {"header": header(before), "format": "jpeg", "data": JPEGS[i // 2 % 20]}
                put("cameras/front", image, frame, at)
            who = "human:ann" if i >= 30 else "policy:7#3"
            sent = {"name": ["x", "y"], "position": [i / 10, 1.0], "velocity": [], "effort": []}
            put("arbiter/executed", joints, sent | {"header": header(at, who)}, at)
        if events and ticks.stop == 40:
            event(at + 1, type="episode_end", outcome="failure")


def test_a_bag_with_events(tmp_path):
    contract = parse_contract(CELL)
    write(tmp_path / "run.mcap", events=True)
    uuids = from_mcap(tmp_path / "run.mcap", tmp_path / "store", contract)
    assert uuids == ["11111111-2222-3333-4444-555555555555"]
    assert from_mcap(tmp_path / "run.mcap", tmp_path / "store", contract) == []
    store = Store(tmp_path / "store")
    (e,) = store.episodes
    assert (e.outcome, e.operator, len(e), e.interventions) == ("failure", "ann", 40, 1)
    assert e.runs() == [(0, 30, Source.POLICY), (30, 40, Source.HUMAN)]
    np.testing.assert_allclose(store.read("action", e)[:, 0], np.arange(40) / 10, rtol=1e-6)
    assert store.read("policy_version", e).tolist() == [7] * 30 + [0] * 10
    assert store.read_encoded("observation.images.front", e) == [JPEGS[i // 2] for i in range(40)]
    # Joints are sampled 10 ms before each tick, every 50 ms: a fifth of the way to the next.
    state = store.read("observation.state", e)[:-1]
    np.testing.assert_allclose(state[:, 1], np.arange(39) + 0.2, rtol=1e-5)
    np.testing.assert_allclose(state[:, 0], -state[:, 1], rtol=1e-5)


@pytest.mark.parametrize("events", [True, False])
def test_a_bag_that_was_cut_off(tmp_path, events):
    contract = parse_contract(CELL)
    write(tmp_path / "run.mcap", events=events)
    whole = (tmp_path / "run.mcap").read_bytes()
    (tmp_path / "cut.mcap").write_bytes(whole[: len(whole) * 2 // 3])
    from_mcap(tmp_path / "cut.mcap", tmp_path / "store", contract)
    store = Store(tmp_path / "store")
    (e,) = store.episodes
    assert e.outcome == "interrupted"
    assert 10 < len(e) < 40
    np.testing.assert_allclose(store.read("action", e)[:, 0], np.arange(len(e)) / 10, rtol=1e-6)


def test_a_bag_that_rosbag2_split(tmp_path):
    """An episode goes on in the next file."""
    (tmp_path / "bag").mkdir()
    parts = [range(4 * i, 4 * i + 4) for i in range(10)]
    for number, ticks in enumerate(parts, 1):
        write(tmp_path / "bag" / f"bag_{number}.mcap", events=True, ticks=ticks)
    from_mcap(tmp_path / "bag", tmp_path / "store", parse_contract(CELL))
    store = Store(tmp_path / "store")
    (e,) = store.episodes
    assert (e.outcome, len(e)) == ("failure", 40)
    np.testing.assert_allclose(store.read("action", e)[:, 0], np.arange(40) / 10, rtol=1e-6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"no \.mcap file"):
        from_mcap(tmp_path / "empty", tmp_path / "store", parse_contract(CELL))


def test_a_bag_without_events(tmp_path):
    write(tmp_path / "run.mcap", events=False)
    from_mcap(tmp_path / "run.mcap", tmp_path / "store", parse_contract(CELL), outcome="success")
    (e,) = Store(tmp_path / "store").episodes
    assert (e.outcome, e.task, len(e)) == ("success", "pick", 40)


def test_what_is_not_a_bag_of_this_cell(tmp_path):
    contract = parse_contract(CELL)
    with pytest.raises(ConversionError, match="cannot read"):
        from_mcap(tmp_path / "none.mcap", tmp_path / "store", contract)
    (tmp_path / "text.mcap").write_text("hello, this is not a bag")
    with pytest.raises(ConversionError, match="expected an MCAP file"):
        from_mcap(tmp_path / "text.mcap", tmp_path / "store", contract)
    write(tmp_path / "run.mcap", events=True)
    other = parse_contract(CELL.replace("cell: bench", "cell: other"))
    with pytest.raises(ConversionError, match="is this the contract of that cell"):
        from_mcap(tmp_path / "run.mcap", tmp_path / "other", other)
