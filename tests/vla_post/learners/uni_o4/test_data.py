"""Transitions: round trips, missing next observations, returns, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_post.learners.uni_o4 import BadTransitions, Transitions
from vla_post.learners.uni_o4.data import check, discounted_returns, rows_left


def walk(n: int = 64, seed: int = 0) -> Transitions:
    """Two-dimensional random walk, episodes of 16, every second one ending for real."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
    observations = rng.normal(size=(n, 3)).astype(np.float32)
    last = np.arange(n) % 16 == 15
    real = last & (np.arange(n) // 16 % 2 == 0)
    return Transitions(
        observations=observations,
        actions=actions,
        rewards=rng.normal(size=n).astype(np.float32),
        terminals=real,
        timeouts=last & ~real,
        next_observations=rng.normal(size=(n, 3)).astype(np.float32),
    )


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_a_file_reads_back_equal(tmp_path: Path, suffix: str):
    data = replace(walk(), action_high=np.array([1.0, 2.0], np.float32))
    back = Transitions.load(data.save(tmp_path / f"walk{suffix}"))
    for name in ("observations", "actions", "rewards", "terminals", "timeouts", "action_high"):
        np.testing.assert_array_equal(getattr(back, name), getattr(data, name))
    assert [p.name for p in tmp_path.iterdir()] == [f"walk{suffix}"]


def test_without_next_observations_the_last_row_before_a_timeout_goes():
    data = walk(32)
    arrays = {
        "observations": data.observations,
        "actions": data.actions,
        "rewards": data.rewards,
        "terminals": data.terminals,
        "timeouts": data.timeouts,
    }
    got = Transitions.from_arrays(arrays)
    assert len(got) == 31  # row 15 ended for real and stays, row 31 was cut by the clock
    np.testing.assert_array_equal(got.next_observations[:15], data.observations[1:16])
    assert got.terminals[15]
    assert got.timeouts[30]
    assert got.timeouts.sum() == 1


def test_returns_stop_at_ends():
    rewards = np.array([1, 2, 4, 8], np.float32)
    ends = np.array([False, True, False, True])
    np.testing.assert_allclose(discounted_returns(rewards, ends, 0.5), [2, 2, 8, 8])
    np.testing.assert_array_equal(rows_left(ends), [2, 1, 2, 1])
    data = walk(32)
    np.testing.assert_allclose(
        data.episode_returns(), [data.rewards[:16].sum(), data.rewards[16:].sum()], rtol=1e-5
    )


def test_what_cannot_be_learned_from_is_refused_by_name():
    data = walk()
    zeros = np.zeros(64, np.bool_)
    check(data, batch_size=32)
    with pytest.raises(BadTransitions, match="need at least 128"):
        check(data, batch_size=64)
    with pytest.raises(BadTransitions, match="every reward is 0"):
        check(replace(data, rewards=np.zeros(64, np.float32)), batch_size=8)
    with pytest.raises(BadTransitions, match="neither `terminals` nor `timeouts`"):
        check(replace(data, terminals=zeros, timeouts=zeros), batch_size=8)
    far = data.actions.copy()
    far[5, 1] = 3.0
    with pytest.raises(BadTransitions, match="action 1 of row 5: 3, limits -1 to 1"):
        check(replace(data, actions=far), batch_size=8)
    nan = data.rewards.copy()
    nan[7] = np.nan
    with pytest.raises(BadTransitions, match=r"rewards holds NaN.*row 7"):
        replace(data, rewards=nan)
    with pytest.raises(BadTransitions, match="rewards has shape"):
        replace(data, rewards=data.rewards[:-1])


def test_wrong_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file of transitions"):
        Transitions.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(BadTransitions, match="does not read"):
        Transitions.load(tmp_path / "text.npz")
    np.savez(tmp_path / "half.npz", observations=np.zeros((2, 2)))
    with pytest.raises(BadTransitions, match="no actions, rewards, terminals"):
        Transitions.load(tmp_path / "half.npz")
