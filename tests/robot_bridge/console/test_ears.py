"""Rates, ages and losses of streams, from what the console hears and what the recorder counts."""

import pytest

pytest.importorskip("rclpy")

from robot_bridge.console.ears import Ears, hint, traces
from robot_bridge.snapshots import Health

from .testbed import arm

CAMERA = "observation.images.front"
TOPIC = "cameras/front/image_raw/compressed"


def recorder(received: int, lost: int, seen_s: float) -> dict[str, Health]:
    values = {f"received {TOPIC}": str(received), f"lost {TOPIC}": str(lost)}
    values |= {f"age_ms {TOPIC}": "40", "received joint_states": "x"}
    return {"/cell/recorder": Health(0, "", values, seen_s)}


def row(ears: Ears, key: str) -> dict[str, object]:
    return next(row for row in ears.streams() if row["key"] == key)


def test_a_stream_that_only_the_recorder_hears_has_its_rate_age_and_losses():
    ears = Ears(arm())
    assert row(ears, CAMERA)["rate_hz"] is None
    assert row(ears, CAMERA)["nominal_hz"] == 10
    ears.measure(recorder(100, 3, 50.0), 50.0)
    found = row(ears, CAMERA)
    assert (found["rate_hz"], found["lost"], found["losing"]) == (None, 3, False)
    ears.measure(recorder(100, 3, 50.0), 50.05)  # the same word of the recorder
    ears.measure(recorder(118, 5, 52.0), 52.0)
    found = row(ears, CAMERA)
    assert (found["rate_hz"], found["lost"]) == (9.0, 5)
    # A restarted recorder counts from the beginning: no negative rate.
    ears.measure(recorder(4, 0, 53.0), 53.0)
    assert row(ears, CAMERA)["rate_hz"] == 9.0
    assert row(ears, CAMERA)["lost"] == 0
    ears.clear()
    assert row(ears, CAMERA)["lost"] is None


def test_what_the_console_hears_itself_is_measured_here(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("robot_bridge.console.ears.time.monotonic", lambda: now)
    ears = Ears(arm())
    ears.measure({}, now)
    for _ in range(26):
        ears.hear("joints", None)
        now += 0.04
        ears.measure(recorder(1, 7, now), now)
    found = row(ears, "joint_states")
    assert found["rate_hz"] == pytest.approx(25, abs=1.5)
    assert found["age_ms"] == 40
    assert found["lost"] is None  # the recorder's number was no number
    assert row(ears, CAMERA)["lost"] == 7
    keys = [row["key"] for row in ears.streams()]
    assert keys == [*dict.fromkeys(["joint_states", CAMERA]), "action_chunk", "executed",
                    "arbiter_state"]  # fmt: skip


def test_losses_are_marked_while_they_rise(monkeypatch: pytest.MonkeyPatch):
    now = 10.0
    monkeypatch.setattr("robot_bridge.console.ears.time.monotonic", lambda: now)
    ears = Ears(arm())
    for lost, losing in [(0, False), (2, True), (2, True), (2, False)]:
        ears.measure(recorder(10, lost, now), now)
        assert row(ears, CAMERA)["losing"] is losing
        now += 3.0


def test_traces_are_what_nodes_publish_as_numbers():
    health = {
        "/cell/runner": Health(0, "", {"doubt": "0.25", "value": "nan", "q": "many"}, 1.0),
        "/cell/critic": Health(0, "", {"advantage": "-1.5"}, 1.0),
    }
    assert traces(health) == {"doubt": 0.25, "advantage": -1.5}


def test_the_hint_is_of_the_node_that_has_a_threshold():
    said = {"doubt": "0.00031234", "doubt_threshold": "0.000256789", "hint": "true"}
    health = {
        "/cell/arbiter": Health(0, "", {}, 1.0),
        "/cell/runner": Health(0, "", said, 1.0),
    }
    assert hint(health) == {"on": True, "threshold": 0.0002568}
    assert traces(health) == {"doubt": 0.0003123}  # digits, not places: doubts are small squares
    assert hint({"/cell/runner": Health(0, "", said | {"hint": "false"}, 1.0)}) == {
        "on": False,
        "threshold": 0.0002568,
    }
    assert hint({"/cell/runner": Health(0, "", {"doubt": "0.3", "hint": "false"}, 1.0)}) is None
    assert hint({"/cell/runner": Health(0, "", {"doubt_threshold": "much"}, 1.0)}) is None
