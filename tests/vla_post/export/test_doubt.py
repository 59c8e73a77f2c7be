"""Doubt: check HG-9 and Eq. H3-H4, by hand."""

import numpy as np
import pytest

from vla_post.export.doubt import DoubtMeter, chunk_doubt, ensemble_doubt, policy_doubt


class Noisy:
    """A policy whose chunk is its bias plus noise of its spread."""

    def __init__(self, bias: float, spread: float) -> None:
        self.bias, self.spread = bias, spread

    def act_batch(self, observation, instructions, seeds):
        noise = [np.random.default_rng(int(s)).normal(size=(6, 2)) for s in seeds]
        return (self.bias + self.spread * np.stack(noise)).astype(np.float32)

    def act(self, observation, instruction, seed=0):
        return self.act_batch({}, [instruction], np.array([seed]))[0]


SEEN = {"observation.state": np.zeros(3, np.float32)}


def test_hg9_members_that_agree_have_no_doubt():
    assert chunk_doubt(np.ones((4, 6, 2))) == 0.0
    assert ensemble_doubt([Noisy(0.3, 1.0), Noisy(0.3, 1.0)], SEEN, "go", seed=3) == 0.0
    assert policy_doubt(Noisy(0.3, 0.0), SEEN, "go") == 0.0


def test_doubt_is_the_norm_of_the_variances():
    chunks = np.zeros((2, 3, 2))
    chunks[0, :, 0], chunks[0, 0, 1] = 2.0, 4.0  # variances 1 at each step, and 4 at the first
    expected = (np.hypot(1.0, 4.0) + 1.0 + 1.0) / 3
    assert chunk_doubt(chunks) == pytest.approx(expected)
    assert chunk_doubt(chunks, steps=1) == pytest.approx(np.hypot(1.0, 4.0))


def test_doubt_grows_with_the_spread_of_a_policys_samples():
    low, high = (policy_doubt(Noisy(0.0, s), SEEN, "go", samples=16) for s in (0.1, 0.5))
    assert high == pytest.approx(25 * low, rel=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        policy_doubt(Noisy(0.0, 1.0), SEEN, "go", samples=1)


def test_the_threshold_is_the_mean_of_the_last_quarter_of_the_takeovers():
    meter = DoubtMeter()
    assert meter.threshold is None
    assert not meter.hint(1e9)
    for doubt in (9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 3.0):
        meter.took_over(doubt)
    assert meter.threshold == 2.0
    assert meter.hint(2.5)
    assert not meter.hint(1.5)
    assert DoubtMeter([4.0]).threshold == 4.0
