"""Demonstrations in a trajectory store are what the cell showed and what the expert sent."""

from pathlib import Path

import numpy as np
import pytest

import sim
from sim.cell import make_cell
from sim.demonstrations import collect, write_demonstrations, write_episode
from sim.operator import OperatorConfig
from sim.rollout import Case, rollout
from trajectory_store import Outcome, Source, Store, StoreWriter, load_contract

STATE = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
PIXELS = load_contract(sim.CONTRACTS / "metaworld_pixels.yaml")


def test_written_demonstrations_read_back_and_replay(tmp_path: Path):
    seen: list[str] = []
    rows = write_demonstrations(
        tmp_path / "demos",
        STATE,
        tasks=["reach", "push"],
        episodes_per_task=2,
        seed=50,
        on_episode=lambda episode: seen.append(episode.task),
    )
    store = Store(tmp_path / "demos")
    assert seen == ["reach", "reach", "push", "push"] == [e.task for e in store.episodes]
    assert rows == sum(len(e) for e in store.episodes)
    for episode in store.episodes:
        assert episode.outcome is Outcome.SUCCESS
        assert episode.instruction == STATE.task(episode.task).instruction
        span = range(episode.first_row, episode.end_row)
        assert set(store.read("source", span)) == {Source.SCRIPTED}
        assert list(store.read("terminated", span)) == [False] * (len(episode) - 1) + [True]
        assert store.read("reward", span).sum() == 1
        # The stored actions lead a fresh cell through the stored observations to success.
        cell = make_cell(STATE, episode.task)
        cell.reset(seed=int(episode.notes.removeprefix("seed ")))
        observations = store.read("observation.environment_state", span)
        for action, observation in zip(store.read("action", span), observations, strict=True):
            shown = cell.vector("observation.environment_state")
            np.testing.assert_array_equal(shown, observation)
            cell.step(action)
        assert cell.success


def test_a_rollout_with_takeovers_keeps_both_proposals(tmp_path: Path):
    config = OperatorConfig(patience=4, window=4, reaction_delay=2, min_drive=8)

    def drift(observation: dict[str, np.ndarray], instruction: list[str]) -> np.ndarray:
        return np.full((len(instruction), 8, 4), -1.0)

    (result,) = rollout(drift, STATE, [Case("reach", 2)], operator=config, record=True)
    episode = result.episode
    assert episode is not None
    with StoreWriter.create_or_open(tmp_path / "store", STATE) as writer:
        uuid = write_episode(writer, episode, operator="scripted", policy_version=3)
    store = Store(tmp_path / "store")
    (row,) = store.episodes
    assert row.uuid == uuid
    assert row.interventions == result.takeovers >= 1
    span = range(row.first_row, row.end_row)
    np.testing.assert_array_equal(store.read("source", span), episode.source)
    np.testing.assert_array_equal(store.read("action.policy", span), episode.action_policy)
    np.testing.assert_array_equal(store.read("action.human", span), episode.action_human)
    np.testing.assert_array_equal(store.read("chunk_id", span), episode.chunk_id)


@pytest.mark.pixels
def test_frames_are_stored_once_with_their_age(tmp_path: Path):
    key = "observation.images.corner"
    (episode,) = collect(PIXELS, "button-press-topdown", 1, seed=3)
    with StoreWriter.create_or_open(tmp_path / "store", PIXELS) as writer:
        write_episode(writer, episode)
    store = Store(tmp_path / "store")
    from sim.camera import decode_jpeg

    expected = np.stack([decode_jpeg(jpeg) for jpeg in episode.jpeg[key]])
    stored = store.read(key, range(len(episode)))
    assert np.abs(stored.astype(int) - expected).max() <= 2  # two decoders
    ages_ms = store.read(f"{key}.age_ns", range(8)) / 1e6
    np.testing.assert_allclose(ages_ms, [0, 12.5, 25, 37.5] * 2)
