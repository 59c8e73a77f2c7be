"""The episode that fills a chunk of the episode table is one episode, however it is committed."""

from pathlib import Path

import numpy as np

from trajectory_store import Contract, Outcome, Source, Store, StoreWriter, Tick, load_contract
from trajectory_store.coding import EPISODE_ROWS

CONTRACT = load_contract(Path(__file__).parents[2] / "sim" / "contracts" / "metaworld_state.yaml")


def tick(number: int) -> Tick:
    vectors = {
        key: np.full(feature.shape, number, np.float32)
        for key, feature in CONTRACT.observations.items()
    }
    return Tick(observation=vectors, action=np.zeros(4), source=Source.POLICY, stamp_ns=number + 1)


def start(path: Path, episodes: int) -> StoreWriter:
    """A writer in the middle of its last episode, the first half committed."""
    writer = StoreWriter.create_or_open(path, CONTRACT)
    for number in range(episodes):
        writer.begin_episode("reach")
        writer.append(tick(number * 10))
        if number < episodes - 1:
            writer.end_episode(Outcome.SUCCESS)
    writer.flush()
    return writer


def test_an_episode_in_two_commits_stays_one(tmp_path: Path):
    for episodes in (EPISODE_ROWS - 1, EPISODE_ROWS, EPISODE_ROWS + 1, 2 * EPISODE_ROWS):
        path = tmp_path / str(episodes)
        with start(path, episodes) as writer:
            writer.append(tick(7777))
            writer.end_episode(Outcome.FAILURE)
            writer.flush()
            for number in range(2):  # and the table goes on behind it
                writer.begin_episode("push")
                writer.append(tick(8000 + number))
                writer.end_episode(Outcome.SUCCESS)
        store = Store(path)
        assert len(store.table) == len(store.episodes) == episodes + 2
        rows = [(e.first_row, e.end_row) for e in store.table]
        assert rows[episodes - 1] == (episodes - 1, episodes + 1)
        assert [a for a, _ in rows[1:]] == [b for _, b in rows[:-1]]
        last = store.table[episodes - 1]
        assert store.read("observation.state", last)[:, 0].tolist() == [
            (episodes - 1) * 10,
            7777,
        ]
        assert store.table[-1].task == "push"


def test_the_next_writer_closes_it_as_interrupted(tmp_path: Path):
    writer = start(tmp_path / "store", EPISODE_ROWS)
    contract: Contract = writer.contract
    writer.close()
    with StoreWriter.create_or_open(tmp_path / "store", contract):
        pass
    store = Store(tmp_path / "store")
    assert len(store.table) == EPISODE_ROWS
    assert store.table[-1].outcome is Outcome.INTERRUPTED
