"""Labels that come while a writer holds the store."""

import numpy as np

from trajectory_store import Outcome, Store


def test_a_label_is_written_beside_the_recording_and_survives_a_reopening(
    open_writer, contract, record, tmp_path
):
    writer = open_writer(contract)
    first = record(writer, 30, outcome="success")
    second = record(writer, 20, seed=1, outcome="success")  # not committed yet
    before = writer.flush()
    writer.change_episode(first, lambda e: e.replace(outcome=Outcome.FAILURE))
    writer.change_episode(first, lambda e: e.replace(notes="slipped"))
    writer.change_episode(second, lambda e: e.replace(notes="good"))
    assert writer.flush() != before
    store = Store(tmp_path / "store")
    assert [(e.outcome, e.notes) for e in store.episodes] == [
        ("failure", "slipped"),
        ("success", "good"),
    ]
    third = record(writer, 25, seed=2, outcome="failure")
    writer.close()
    store.refresh()
    assert [e.uuid for e in store.episodes] == [first, second, third]
    assert store.episode(first).outcome is Outcome.FAILURE
    assert len(store.read("action", store.episode(third))) == 25
    assert np.isfinite(store.read("action", store.episode(first))).all()


def test_a_label_for_nobody_changes_nothing_and_does_not_stop_the_writer(
    open_writer, contract, record, tmp_path
):
    writer = open_writer(contract)
    writer.change_episode("no-such-episode", lambda e: e.replace(notes="lost"))
    uuid = record(writer, 10, outcome="success")
    writer.flush()
    assert [e.notes for e in Store(tmp_path / "store").episodes] == [""]
    assert writer.health.ok
    writer.change_episode(uuid, lambda e: e.replace(notes="kept"))
    writer.close()
    assert [e.notes for e in Store(tmp_path / "store").episodes] == ["kept"]
