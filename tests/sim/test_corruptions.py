"""Imperfect data: each fault is where its marks say, and nowhere else."""

import numpy as np
import pytest

import sim
from sim.corruptions import (
    Marked,
    action_noise,
    behave,
    misjoined,
    mislabelled,
    spoil_some,
    truncation,
)
from trajectory_store import load_contract

CONTRACT = load_contract(sim.CONTRACTS / "metaworld_state.yaml")


@pytest.fixture(scope="module")
def experts():
    return behave(CONTRACT, "reach", "expert", 4, seed=1_000)


def test_experts_succeed_and_have_no_bad_ticks(experts: list[Marked]):
    assert all(m.episode.success and not m.bad.any() for m in experts)


def test_a_gentle_expert_takes_longer(experts: list[Marked]):
    (slow,) = behave(CONTRACT, "reach", "gentle", 1, seed=experts[0].episode.seed)
    assert slow.episode.success
    assert len(slow.episode) > len(experts[0].episode)


def test_a_hesitating_demonstrator_stands_still_exactly_where_it_is_marked():
    (marked,) = behave(CONTRACT, "push", "hesitating", 1, seed=1_000)
    still = ~marked.episode.action[:, :3].any(axis=1)
    assert 10 <= marked.bad.sum() < len(marked.bad)
    np.testing.assert_array_equal(marked.bad, still)


def test_a_mistaken_demonstrator_does_not_reach_the_goal():
    (marked,) = behave(CONTRACT, "reach", "wrong-goal", 1, seed=1_000)
    assert not marked.episode.success
    assert marked.bad.all()


def test_spoilers_strike_their_share_and_change_only_what_they_say(experts: list[Marked]):
    noisy = spoil_some(experts, [(action_noise(CONTRACT, 0.1), 0.5)], seed=0)
    struck = [k for k in range(4) if noisy[k].bad.any()]
    assert len(struck) == 2
    before, after = experts[struck[0]].episode, noisy[struck[0]].episode
    change = after.action - before.action
    assert 0.02 < change.std() < 0.2
    for key, value in before.observation.items():
        np.testing.assert_array_equal(after.observation[key], value)
    assert (np.abs(after.action) <= 1).all()

    short = spoil_some(experts, [(truncation(), 1.0)], seed=0)
    for old, new in zip(experts, short, strict=True):
        assert 0.4 <= len(new.episode) / len(old.episode) <= 0.75
        assert not new.episode.success
        assert len(new.episode.observation["observation.state"]) == len(new.episode)

    other = spoil_some(experts, [(mislabelled(CONTRACT, ("reach", "push")), 1.0)], seed=0)
    assert {m.episode.task for m in other} == {"push"}
    assert {m.episode.instruction for m in other} == {CONTRACT.task("push").instruction}


def test_an_unknown_demonstrator_is_refused():
    with pytest.raises(ValueError, match="no demonstrator 'lazy'"):
        behave(CONTRACT, "reach", "lazy", 1, seed=0)


def test_wrongly_joined_logs_have_anothers_actions_and_their_own_sensors(
    experts: list[Marked],
):
    wrong = spoil_some(experts, [(misjoined(experts), 1.0)], seed=0)
    for old, new in zip(experts, wrong, strict=True):
        assert new.bad.all()
        assert new.episode.action.shape == old.episode.action.shape
        assert not np.array_equal(new.episode.action, old.episode.action)
        others = [np.resize(o.episode.action, new.episode.action.shape) for o in experts]
        assert any(np.array_equal(action, new.episode.action) for action in others)
