"""verify, repair, gc, relabel, delete, merge, split, statistics."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import trajectory_store as ts
from trajectory_store import (
    Filter,
    FleetView,
    Source,
    Store,
    copying,
    maintenance,
    stats,
    verification,
)

WRIST = "observation.images.wrist"


@pytest.fixture
def filled(open_writer, cameras, record, jpegs, depths, tmp_path):
    """Three closed episodes and nobody writing."""
    writer = open_writer(cameras)
    for seed, (task, outcome) in enumerate(
        [("pick", "success"), ("place", "failure"), ("pick", "success")]
    ):
        record(
            writer,
            40,
            seed=seed,
            task=task,
            outcome=outcome,
            operator=f"op{seed}",
            frames=lambda i, seed=seed: {
                WRIST: jpegs[(i // 3 + seed) % 40],
                "observation.images.depth": depths[i // 5],
            },
        )
        writer.flush()
    writer.close()
    return tmp_path / "store"


def contents(store: Store, leave_out: frozenset[str] = frozenset()) -> dict[str, list[object]]:
    """Everything of every episode, by uuid; places of frames aside."""
    out: dict[str, list[object]] = {}
    for e in (e for e in store.episodes if e.uuid not in leave_out):
        columns = [c for c in store.columns if not c.endswith(".frame")]
        values: list[object] = [store.read(c, e).tobytes() for c in columns]
        out[e.uuid] = [
            *values,
            *(store.read_encoded(k, e) for k in store.frames),
            e.replace(first_row=0, end_row=len(e)),
        ]
    return out


def chunk_file(path: Path, array: str, index: int) -> Path:
    found = Store(path).snapshot._files.find(array, index)
    assert found is not None
    return Path(found.path)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def test_verify_finds_nothing_wrong(filled):
    report = verification.verify(filled, decode=True)
    assert report.ok
    assert report.frames == 3 * (14 + 8)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_found_named_and_set_aside(filled, harm):
    store = Store(filled)
    victim = store.episodes[1]
    shard = int(store.read(f"{WRIST}.frame", victim)[0, 0]) // store.frames[WRIST].shard
    file = chunk_file(filled, WRIST, shard)
    if harm == "flip":
        flip(file, 100)
    elif harm == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    report = verification.verify(filled)
    assert report.damaged_episodes == {victim.uuid}
    assert report.damage[0].chunk == f"{WRIST}/c/{shard}/0/0/0"
    rows = np.arange(victim.first_row, victim.end_row)
    with pytest.raises(ts.DamagedChunk, match="repair"):
        Store(filled).read(WRIST, rows)
    with pytest.raises(ts.DamagedChunk):
        next(ts.ChunkSampler(Store(filled), horizon=2, batch_size=512))
    verification.repair(filled)
    after = Store(filled)
    assert [e.uuid for e in after.episodes] == [store.table[0].uuid, store.table[2].uuid]
    assert after.table[1].damaged
    assert len(after.table) == 3  # set aside, not deleted
    next(ts.ChunkSampler(after, horizon=2, batch_size=64))


def test_a_damaged_last_chunk_of_a_column_does_not_stop_recording(
    filled, cameras, record, open_writer
):
    flip(chunk_file(filled, "action", 0), 30)
    with pytest.raises(ts.DamagedChunk, match="action, chunk 0"):
        Store(filled).read("action", [0])
    with pytest.raises(ts.DamagedChunk, match="action, chunk 0"):
        open_writer(cameras, filled)
    report = verification.repair(filled)
    assert len(report.damaged_episodes) == 3  # they all lie in that chunk
    writer = open_writer(cameras, filled)
    uuid = record(writer, 10, seed=8)
    writer.flush()
    assert [e.uuid for e in Store(filled).episodes] == [uuid]
    assert verification.verify(filled).ok


def test_repair_closes_an_interrupted_episode(open_writer, contract, tick, tmp_path):
    writer = open_writer(contract)
    writer.begin_episode("pick")
    writer.append(tick(0))
    writer.flush()
    with pytest.raises(ts.StoreBusy):
        verification.repair(tmp_path / "store")
    writer._lock.release()  # as if its process had died
    report = verification.verify(tmp_path / "store")
    assert len(report.open_episodes) == 1
    assert not report.ok
    verification.repair(tmp_path / "store")
    (e,) = Store(tmp_path / "store").episodes
    assert e.outcome == "interrupted"
    assert verification.verify(tmp_path / "store").ok
    writer.end_episode("success")
    with pytest.raises(ts.StoreError, match="somebody else committed"):
        writer.close(timeout_s=5)


def test_relabel(filled):
    uuid = Store(filled).episodes[0].uuid
    maintenance.relabel(filled, [uuid[:8]], outcome="failure", notes="slipped")
    e = Store(filled).episode(uuid)
    assert (e.outcome, e.notes, e.task) == ("failure", "slipped", "pick")
    with pytest.raises(ts.StoreError, match="outcome is 'won'; expected one of success"):
        maintenance.relabel(filled, [uuid], outcome="won")
    with pytest.raises(ts.StoreError, match="the store knows pick, place"):
        maintenance.relabel(filled, [uuid], task="juggle")
    with pytest.raises(ts.EpisodeState, match="no episode"):
        maintenance.relabel(filled, ["ffffffff-none"], outcome="success")


def test_delete_undelete_gc(filled):
    before = contents(Store(filled))
    first, *rest = before
    snapshot = Store(filled).snapshot_id
    maintenance.delete(filled, [first])
    assert list(contents(Store(filled))) == rest
    maintenance.undelete(filled, [first])
    assert contents(Store(filled)) == before
    maintenance.delete(filled, [first])
    kept = maintenance.gc(filled, keep_days=7)
    assert kept.snapshots_expired == 0
    assert kept.episodes_purged == 1
    Store(filled, snapshot)  # still readable
    report = maintenance.gc(filled, keep_days=0)
    assert report.snapshots_expired > 0
    assert report.chunks_deleted > 0
    after = Store(filled)
    assert contents(after) == {u: v for u, v in before.items() if u != first}
    assert verification.verify(filled).ok
    with pytest.raises(ts.EpisodeState, match="freed"):
        maintenance.undelete(filled, [first])
    with pytest.raises(ts.StoreUnavailable):
        Store(filled, snapshot)


def test_merge_is_complete_and_repeatable(filled, open_writer, cameras, record, jpegs, tmp_path):
    other = open_writer(cameras, tmp_path / "other")
    extra = record(other, 7, seed=50, frames=lambda i: {WRIST: jpegs[i]})
    running = other.begin_episode("pick")
    other.flush()
    target = tmp_path / "merged"
    copied = copying.merge([filled, tmp_path / "other"], target)
    assert len(copied) == 4
    assert copying.merge([filled, tmp_path / "other"], target) == []
    merged = Store(target)
    assert contents(merged, leave_out=frozenset({extra})) == contents(Store(filled))
    e = merged.episode(extra)
    assert merged.read_encoded(WRIST, e) == jpegs[:7]
    assert running not in {e.uuid for e in merged.table}
    assert verification.verify(target).ok
    with pytest.raises(ts.StoreError, match="into itself"):
        copying.merge([filled], filled)
    other.end_episode("aborted")


def test_merge_remaps_features(filled, contract, open_writer, tick, tmp_path):
    """Bits of `late` follow the target's order of features."""
    small = open_writer(contract, tmp_path / "target")
    small.close()
    first = copying.merge([filled], tmp_path / "target")
    assert len(first) == 3
    target = Store(tmp_path / "target")
    assert target.info.features[0] == "observation.state"
    assert contents(target).keys() == contents(Store(filled)).keys()


def test_split(filled, tmp_path):
    parts = copying.split(filled, tmp_path / "parts", by="task")
    assert {k: len(v) for k, v in parts.items()} == {"pick": 2, "place": 1}
    whole = contents(Store(filled))
    assert contents(Store(tmp_path / "parts" / "place")) == {u: whole[u] for u in parts["place"]}
    halves = copying.split(filled, tmp_path / "halves", by="fraction", fraction=0.5)
    assert sorted(u for v in halves.values() for u in v) == sorted(whole)
    with pytest.raises(ts.StoreError, match="by is"):
        copying.split(filled, tmp_path / "x", by="colour")


def test_statistics_are_those_of_numpy(filled, monkeypatch):
    store = Store(filled)
    found = stats.normalisation(store)
    assert set(found) == {"observation.state", "action"}
    for key, got in found.items():
        values = store.read(key, slice(None)).astype(np.float64)
        assert got.count == len(values) == 120
        np.testing.assert_allclose(got.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(got.std, values.std(0), rtol=1e-12)
        np.testing.assert_array_equal(got.min, values.min(0))
        np.testing.assert_array_equal(got.max, values.max(0))
        # The histogram picks an order statistic: within a bin of the inverted CDF.
        bin_width = np.ptp(values, axis=0) / stats.BINS
        for q, name in ((0.01, "q01"), (0.99, "q99")):
            exact = np.quantile(values, q, axis=0, method="inverted_cdf")
            assert (np.abs(np.array(getattr(got, name)) - exact) <= bin_width).all()
    human = stats.normalisation(store, keys=["action"], filter=Filter(sources=[Source.HUMAN]))
    mine = store.read("source", slice(None)) == Source.HUMAN
    np.testing.assert_allclose(
        human["action"].mean, store.read("action", slice(None))[mine].mean(0, np.float64)
    )
    # From the cache: the same numbers, with the columns out of reach.
    monkeypatch.setattr(Store, "read", None)
    assert stats.normalisation(store) == found


def test_statistics_errors(filled, open_writer, contract, tmp_path):
    with pytest.raises(ts.FeatureMissing, match="not a vector"):
        stats.normalisation(Store(filled), keys=[WRIST])
    open_writer(contract, tmp_path / "empty")
    with pytest.raises(ts.NothingToSample):
        stats.normalisation(FleetView(tmp_path / "empty"))


def run_cli(*arguments: str) -> None:
    import tyro

    from vla_post.cli.store import store_command

    tyro.cli(store_command, args=list(arguments), config=(tyro.conf.OmitArgPrefixes,)).run()


def test_command_line(filled, tmp_path, capsys):
    from vla_post.cli.errors import UserError

    run_cli("info", str(filled), "--json")
    info = json.loads(capsys.readouterr().out)
    assert (info["ticks"], info["tasks"]) == (120, {"pick": 2, "place": 1})
    run_cli("ls", str(filled), "--json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["operator"] for e in lines] == ["op0", "op1", "op2"]
    uuid = lines[0]["uuid"]
    run_cli("ls", str(filled), "--outcome", "failure")
    assert lines[1]["uuid"][:8] in capsys.readouterr().out
    run_cli("show", str(filled), uuid[:8])
    shown = json.loads(capsys.readouterr().out)
    assert shown["features"][WRIST]["frames"] == 14
    run_cli("relabel", str(filled), uuid, "--outcome", "failure")
    run_cli("delete", str(filled), uuid)
    run_cli("delete", str(filled), uuid, "--undo")
    run_cli("merge", str(tmp_path / "m"), str(filled))
    run_cli("split", str(filled), str(tmp_path / "s"), "--by", "outcome")
    run_cli("stats", str(filled))
    run_cli("gc", str(filled), "--keep-days", "0")
    run_cli("verify", str(filled), "--decode")
    assert Store(filled).episode(uuid).outcome == "failure"
    assert len(Store(tmp_path / "m").episodes) == 3
    flip(chunk_file(filled, WRIST, 0), 50)
    with pytest.raises(UserError, match="1 damaged"):
        run_cli("verify", str(filled))
    capsys.readouterr()
    run_cli("repair", str(filled))
    assert "set 1 damaged" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no store"):
        run_cli("merge", str(tmp_path / "z"), str(tmp_path / "empty"))
