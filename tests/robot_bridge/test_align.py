import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from robot_bridge.core.align import Aligner, Ring, SequenceCounter
from trajectory_store.contract import Contract

from .cells import cartesian

MS = 1_000_000


def two_streams(align: str) -> Contract:
    data = cartesian().to_dict()
    data["observations"]["observation.state"]["align"] = align
    return Contract.model_validate(data)


@given(st.lists(st.integers(0, 500), max_size=60), st.integers(-5, 505))
def test_ring_finds_the_neighbours_of_a_tick_whatever_the_order_of_arrival(stamps, tick):
    ring = Ring()
    for stamp in stamps:
        ring.push(stamp, stamp)
    before = [s for s in set(stamps) if s <= tick]
    after = [s for s in set(stamps) if s > tick]
    assert ring.latest(tick) == ((max(before), max(before)) if before else None)
    assert ring.after(tick) == ((min(after), min(after)) if after else None)
    assert ring.received == len(stamps)
    assert ring.duplicates == len(stamps) - len(set(stamps))


def test_a_full_ring_forgets_the_oldest():
    ring = Ring(capacity=3)
    for stamp in (5, 1, 9, 7):
        ring.push(stamp, None)
    assert ring.latest(4) is None
    assert ring.latest(6) == (5, None)


def test_interpolation_is_linear_in_true_stamps_and_never_extrapolates():
    aligner = Aligner(two_streams("interpolate"))
    aligner.push("observation.state", 100 * MS, np.array([0.0, 0.0, 0.0, 1.0], np.float32))
    aligner.push("observation.state", 110 * MS, np.array([1.0, 0.0, 0.0, 1.0], np.float32))
    got = aligner.at(102 * MS).values["observation.state"]
    np.testing.assert_allclose(got, [0.2, 0.0, 0.0, 1.0], rtol=1e-6)
    assert got.dtype == np.float32
    np.testing.assert_allclose(aligner.at(115 * MS).values["observation.state"][0], 1.0)


def test_nearest_takes_the_closer_neighbour():
    aligner = Aligner(two_streams("nearest"))
    aligner.push("observation.state", 100 * MS, "early")
    aligner.push("observation.state", 110 * MS, "late")
    assert aligner.at(104 * MS).values["observation.state"] == "early"
    assert aligner.at(106 * MS).values["observation.state"] == "late"


def test_stale_and_missing_features_are_named_with_their_age():
    aligner = Aligner(cartesian())
    aligner.push("observation.state", 0, np.zeros(4))
    aligned = aligner.at(150 * MS)
    assert not aligned.usable
    assert aligned.missing == ("observation.images.corner",)
    assert aligned.why() == "observation.images.corner missing, observation.state is 150 ms old"


def test_a_slow_camera_is_complete_until_its_next_frame_is_due():
    aligner = Aligner(cartesian())
    tick = 12_500_000
    aligner.push("observation.images.corner", 0, b"frame")
    for k in range(4):
        aligner.push("observation.state", k * tick, np.zeros(4))
        assert aligner.pending(k * tick) == []
    aligner.push("observation.state", 4 * tick, np.zeros(4))
    assert aligner.pending(4 * tick) == ["observation.images.corner"]
    aligner.push("observation.images.corner", 4 * tick, b"next")
    assert aligner.pending(4 * tick) == []


@given(st.sets(st.integers(1, 200), min_size=1))
def test_losses_are_the_holes_between_sequence_numbers(arrived):
    counter = SequenceCounter()
    total = sum(counter.push(number) for number in sorted(arrived))
    assert total == counter.lost == max(arrived) - min(arrived) + 1 - len(arrived)


def test_a_restarted_publisher_is_not_a_loss():
    counter = SequenceCounter()
    assert [counter.push(n) for n in (7, 8, 1, 2, 4)] == [0, 0, 0, 0, 1]
