"""Intervals hold what they promise: checked by coverage, limits and a hand-worked table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_post.evaluation.paired import PairedResult, wilson_interval

counts = st.integers(0, 60)


def test_wilson_of_ten_in_twenty_is_the_textbook_value():
    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = .5, n = 20, z = 1.959964
    low, high = wilson_interval(10, 20)
    assert (low, high) == (pytest.approx(0.29930, abs=1e-5), pytest.approx(0.70070, abs=1e-5))


def test_an_exact_mcnemar_by_hand():
    # One against nine discordant pairs: 2 * (C(10,0) + C(10,1)) / 2**10.
    result = PairedResult(both=5, only_first=1, only_last=9, neither=5)
    assert result.p_value == pytest.approx(2 * 11 / 1024)
    assert result.difference == pytest.approx(8 / 20)


@given(counts, counts, counts, counts)
def test_the_interval_holds_the_difference_and_turns_with_the_sides(a: int, b: int, c: int, d: int):
    result = PairedResult(both=a, only_first=b, only_last=c, neither=d)
    low, high = result.difference_interval()
    assert -1.0 <= low <= result.difference <= high <= 1.0
    mirrored = PairedResult(both=a, only_first=c, only_last=b, neither=d)
    assert mirrored.difference_interval() == pytest.approx((-high, -low))
    assert 0.0 < result.p_value <= 1.0


@pytest.mark.parametrize(("p_first", "p_last"), [(0.2, 0.8), (0.5, 0.5), (0.05, 0.1), (0.6, 0.95)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(p_first: float, p_last: float):
    random = np.random.default_rng(7)
    hits = 0
    for _ in range(1500):
        # A shared difficulty makes the pairs correlated, as equal seeds do.
        difficulty = random.random(30) * 0.4 - 0.2
        first = random.random(30) < np.clip(p_first + difficulty * 0.5, 0, 1)
        last = random.random(30) < np.clip(p_last + difficulty * 0.5, 0, 1)
        truth = np.clip(p_last + difficulty * 0.5, 0, 1).mean()
        truth -= np.clip(p_first + difficulty * 0.5, 0, 1).mean()
        low, high = PairedResult.from_outcomes(list(first), list(last)).difference_interval()
        hits += low <= truth <= high
    assert hits / 1500 >= 0.93


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="cannot be"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="needs the same cases"):
        PairedResult.from_outcomes([True], [True, False])
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert PairedResult(both=0, only_first=0, only_last=0, neither=0).difference_interval() == (
        -1.0,
        1.0,
    )
