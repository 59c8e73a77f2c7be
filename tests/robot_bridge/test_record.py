"""Messages to rows, on a fake clock."""

import numpy as np
import pytest

from robot_bridge.core.chunks import Chunk
from robot_bridge.core.events import Event, EventError, EventType, EventWriter, parse_event
from robot_bridge.core.record import Ending, EpisodeAssembler
from trajectory_store.schema import Source

from .cells import cartesian

DT = 12_500_000
STATE, IMAGE = "observation.state", "observation.images.corner"


class Session:
    """Feeds an assembler like a cell would: a frame every fourth tick."""

    def __init__(self) -> None:
        self.assembler = EpisodeAssembler(cartesian())
        self.mono_s = 0.0
        self.rows = []

    def state(self, tick: int) -> None:
        self.assembler.push(STATE, tick * DT, np.full(4, tick, np.float32))

    def frame(self, tick: int) -> None:
        self.assembler.push(IMAGE, tick * DT, f"frame{tick}".encode())

    def executed(self, tick: int, label: str = "hold", command: float = 0.0) -> None:
        self.assembler.executed(tick * DT, np.full(4, command), label, self.mono_s)

    def tick(self, tick: int, label: str = "hold", command: float = 0.0) -> None:
        self.state(tick)
        if tick % 4 == 0:
            self.frame(tick)
        self.executed(tick, label, command)
        self.wait(0.01)

    def wait(self, seconds: float) -> None:
        self.mono_s += seconds
        self.rows += self.assembler.rows_ready(self.mono_s)

    def end(self, tick: int, outcome: str, *, truncated: bool = False):
        self.assembler.end(Ending(tick * DT, outcome, truncated), self.mono_s)
        self.wait(0.0)
        assert not self.assembler.finished(self.mono_s)
        self.wait(0.3)
        assert self.assembler.finished(self.mono_s)
        last, rates = self.assembler.finish()
        if last is not None:
            self.rows.append(last)
        return rates


@pytest.fixture
def session() -> Session:
    return Session()


def test_one_row_a_tick_with_true_stamps_and_the_reward_at_the_end(session):
    session.assembler.begin(4 * DT)
    for k in range(4, 24):
        session.tick(k)
    rates = session.end(23, "success")
    assert [row.stamp_ns for row in session.rows] == [k * DT for k in range(4, 24)]
    assert session.rows[3].observation[IMAGE] == b"frame4"
    assert session.rows[3].stamps == {STATE: 7 * DT, IMAGE: 4 * DT}
    assert session.rows[5].observation[IMAGE] == b"frame8"
    assert [row.reward for row in session.rows[-2:]] == [0.0, 1.0]
    assert [row.terminated for row in session.rows[-2:]] == [False, True]
    assert not any(row.truncated for row in session.rows)
    assert all(rate.good for rate in rates)


@pytest.mark.parametrize(
    ("outcome", "truncated", "flags"),
    [
        ("failure", False, (0.0, True, False)),
        ("failure", True, (0.0, False, True)),
        ("aborted", False, (0.0, False, True)),
    ],
)
def test_only_a_real_end_terminates(session, outcome, truncated, flags):
    session.assembler.begin(0)
    for k in range(8):
        session.tick(k)
    session.end(7, outcome, truncated=truncated)
    last = session.rows[-1]
    assert (last.reward, last.terminated, last.truncated) == flags


def test_ticks_after_the_end_do_not_belong_to_the_episode(session):
    """The arbiter had gone on for two ticks when the label came."""
    session.assembler.begin(0)
    for k in range(10):
        session.tick(k)
    session.assembler.end(Ending(7 * DT, "success"), session.mono_s)
    session.wait(0.0)
    assert session.assembler.finished(session.mono_s)
    session.rows.append(session.assembler.finish()[0])
    assert [row.stamp_ns for row in session.rows] == [k * DT for k in range(8)]
    assert session.rows[-1].reward == 1.0


def test_a_row_waits_for_a_frame_that_is_due_and_then_gives_up(session):
    session.assembler.begin(0)
    session.tick(0)
    for k in range(1, 6):
        session.state(k)
        session.executed(k)
    session.wait(0.1)
    assert session.rows == []
    session.frame(4)
    session.wait(0.21)
    assert [row.observation[IMAGE] for row in session.rows] == [b"frame0"] * 4 + [b"frame4"]
    for k in range(6, 15):
        session.state(k)
        session.executed(k)
    session.wait(1.0)
    assert [row.stamp_ns // DT for row in session.rows] == list(range(14))
    assert {row.observation[IMAGE] for row in session.rows[4:]} == {b"frame4"}
    # 100 ms after its last frame the camera is late by the contract.
    assert [k for k, row in enumerate(session.rows) if IMAGE in row.late] == [13]


def test_a_row_holds_what_was_sent_and_both_proposals(session):
    ramp = np.arange(8.0)[:, None] * np.ones(4)
    session.assembler.begin(0)
    session.assembler.chunk(Chunk(0, 5, 17, ramp))
    session.tick(0, "policy:5#17", 0.0)
    session.tick(1, "policy:5#17", 0.9)
    session.assembler.human(2 * DT, np.full(4, -0.5))
    session.tick(2, "human:ann", -0.4)
    session.tick(3, "hold")
    session.end(3, "failure")
    policy, clipped, human, hold = session.rows
    assert (policy.source, policy.policy_version, policy.chunk_id) == (Source.POLICY, 5, 17)
    assert clipped.chunk_step == 1
    np.testing.assert_allclose(clipped.action, 0.9)
    np.testing.assert_array_equal(clipped.action_policy, 1.0)
    assert clipped.action_human is None
    assert (human.source, human.chunk_id) == (Source.HUMAN, 0)
    np.testing.assert_allclose(human.action, -0.4)
    np.testing.assert_array_equal(human.action_policy, 2.0)
    np.testing.assert_array_equal(human.action_human, -0.5)
    assert (hold.source, hold.action_human) == (Source.HOLD, None)


def test_messages_of_one_tick_may_come_in_any_order(session):
    session.assembler.begin(0)
    session.executed(0, "policy:1#1", 0.3)
    session.wait(0.0)
    session.frame(0)
    session.state(0)
    session.assembler.chunk(Chunk(0, 1, 1, np.full((8, 4), 0.3)))
    session.tick(1, "policy:1#1", 0.3)
    session.end(1, "success")
    assert [row.chunk_step for row in session.rows] == [0, 1]
    assert all(row.action_policy is not None for row in session.rows)


def test_an_episode_below_its_minimum_rate_is_named(session):
    session.assembler.begin(0)
    for k in range(80):
        session.state(k)
        if k % 16 == 0:
            session.frame(k)
        session.executed(k)
        session.wait(0.05)
    session.assembler.lost(IMAGE, 15)
    rates = {rate.key: rate for rate in session.end(79, "success")}
    assert rates[STATE].good
    assert not rates[IMAGE].good
    assert str(rates[IMAGE]) == (
        "observation.images.corner: 5.0 Hz, the contract asks for 10 Hz (5 received, 15 lost)"
    )
    assert len(session.rows) == 80


def test_lost_samples_mark_the_next_row(session):
    session.assembler.begin(0)
    for k in range(4):
        session.tick(k)
    session.wait(0.3)
    session.assembler.lost(STATE, 2)
    for k in range(4, 8):
        session.tick(k)
    session.end(7, "success")
    assert [k for k, row in enumerate(session.rows) if row.dropped == {STATE}] == [4]


def test_two_episodes_share_nothing(session):
    for first in (0, 40):
        session.assembler.begin(first * DT)
        for k in range(first, first + 8):
            session.tick(k)
        session.end(first + 7, "success")
    assert len(session.rows) == 16
    assert [k for k, row in enumerate(session.rows) if row.terminated] == [7, 15]


def test_events_survive_the_wire():
    event = EventWriter().make(EventType.TAKEOVER, 5, episode="x", reason="drift")
    assert parse_event(event.to_json()) == event
    assert event.seq == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"v":2,"seq":1,"stamp_ns":1,"type":"reset"}', '{"v":1,"seq":"1"}', "nul"],
)
def test_what_is_no_event_is_refused(text):
    with pytest.raises(EventError):
        parse_event(text)


def test_an_unknown_type_is_kept_for_newer_writers():
    event = parse_event('{"v":1,"seq":1,"stamp_ns":1,"type":"dance","how":"slowly"}')
    assert event == Event("dance", 1, 1, {"how": "slowly"})
