"""What was appended reads back bit for bit; what is not valid never gets in."""

from pathlib import Path

import icechunk
import imagecodecs
import imagecodecs.zarr
import numpy as np
import pytest
import zarr

import trajectory_store as ts
from trajectory_store import Source, Store, StoreWriter, Tick
from trajectory_store.contract import parse_contract


def test_every_column_reads_back(open_writer, contract, tick, tmp_path):
    writer = open_writer(contract)
    ticks = [tick(i) for i in range(2500)]  # more than two chunks of a column
    uuid = writer.begin_episode("pick", operator="ann", policy_version=3)
    for i, t in enumerate(ticks):
        writer.append(t)
        if i % 700 == 0:
            writer.flush()
    writer.end_episode("failure", notes="dropped it")
    writer.flush()

    store = Store(tmp_path / "store")
    e = store.episode(uuid)
    assert (e.task, e.instruction, e.operator, e.outcome) == ("pick", "Pick it", "ann", "failure")
    assert (len(e), e.start_ns, e.end_ns) == (2500, ticks[0].stamp_ns, ticks[-1].stamp_ns)
    assert e.interventions == 250
    assert e.ticks_by(Source.HUMAN) == 750
    for key, wanted in {
        "observation.state": [t.observation["observation.state"] for t in ticks],
        "action": [t.action for t in ticks],
        "source": [t.source for t in ticks],
        "chunk_id": [t.chunk_id for t in ticks],
        "chunk_step": [t.chunk_step for t in ticks],
        "policy_version": [3] * 2500,
        "reward": np.array([t.reward for t in ticks], np.float32),
        "stamp_ns": [t.stamp_ns for t in ticks],
    }.items():
        np.testing.assert_array_equal(store.read(key, e), wanted, err_msg=key)
    human = np.array([t.source == Source.HUMAN for t in ticks])
    assert np.isnan(store.read("action.human", e)).all(1).tolist() == (~human).tolist()
    np.testing.assert_array_equal(
        store.read("action.policy", e)[~human],
        [t.action_policy for t in ticks if t.source != Source.HUMAN],
    )


def test_frames_pass_through_untouched_and_are_stored_once(
    open_writer, cameras, record, jpegs, depths, tmp_path
):
    def frames(i):
        new = {} if i < 2 else {"observation.images.wrist": jpegs[i // 4]}
        if i % 5 == 0:
            new["observation.images.depth"] = depths[i // 5]
        return new

    writer = open_writer(cameras, commit_interval_s=0.01)
    first = record(writer, 90, frames=frames)
    writer.flush()
    second = record(writer, 60, frames=frames)
    writer.flush()

    store = Store(tmp_path / "store")
    for uuid, n in ((first, 90), (second, 60)):
        e = store.episode(uuid)
        assert dict(e.first_seen)["observation.images.wrist"] == 2
        rows = np.arange(e.first_row + 2, e.end_row)
        wanted = [jpegs[i // 4] for i in range(2, n)]
        assert store.read_encoded("observation.images.wrist", rows) == wanted
        np.testing.assert_array_equal(
            store.read("observation.images.depth", e), [depths[i // 5] for i in range(n)]
        )
        places = store.read("observation.images.wrist.frame", e)[:, 0]
        assert places[:2].tolist() == [-1, -1]
        assert len(set(places[2:].tolist())) == -(-n // 4)
        ages = store.read("observation.images.depth.age_ns", e)
        assert ages[:6].tolist() == [0, 20_000_000, 40_000_000, 60_000_000, 80_000_000, 0]
        with pytest.raises(ts.FeatureMissing, match="row"):
            store.read("observation.images.wrist", e)


def test_any_zarr_reader_opens_it(open_writer, cameras, record, jpegs, depths, tmp_path):
    frames = {
        "observation.images.wrist": jpegs[3],
        "observation.images.depth": depths[2],
    }
    writer = open_writer(cameras)
    record(writer, 30, frames=lambda i: frames)
    writer.flush()
    imagecodecs.zarr.register_codecs()
    repository = icechunk.Repository.open(
        icechunk.local_filesystem_storage(str(tmp_path / "store"))
    )
    root = zarr.open_group(repository.readonly_session("main").store, mode="r")
    store = Store(tmp_path / "store")
    for name in store.columns:
        np.testing.assert_array_equal(root[name][:], store.read(name, slice(None)), err_msg=name)
    at = int(root["observation.images.wrist.frame"][5, 0])
    np.testing.assert_array_equal(
        root["observation.images.depth"][int(root["observation.images.depth.frame"][0, 0])],
        depths[2],
    )
    seen = root["observation.images.wrist"][at].astype(int)
    ours = store.read("observation.images.wrist", [5])[0].astype(int)
    assert np.abs(seen - ours).max() <= 2  # two JPEG decoders
    assert str(root["episodes"][:][0]).startswith('{"uuid":')


def test_raw_arrays_are_encoded_with_the_contracts_codec(open_writer, tmp_path, cameras):
    text = cameras.to_json().replace('"codec":"jpeg"', '"codec":"raw"')
    raw = parse_contract(text)
    writer = open_writer(raw)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    writer.write_episode(
        "pick",
        {
            "observation.state": np.zeros((3, 3)),
            "observation.images.wrist": np.stack([image, image + 1, image]),
            "observation.images.depth": np.zeros((3, 24, 32, 1), np.uint16),
        },
        np.zeros((3, 2)),
        outcome="success",
    )
    writer.flush()
    got = Store(tmp_path / "store").read("observation.images.wrist", slice(None))
    np.testing.assert_array_equal(got, [image, image + 1, image])


def test_write_episode_defaults(open_writer, contract, tmp_path):
    writer = open_writer(contract)
    action = np.arange(20, dtype=np.float32).reshape(10, 2)
    done = writer.write_episode(
        "place", {"observation.state": np.ones((10, 3))}, action, outcome="success"
    )
    cut = writer.write_episode(
        "place", {"observation.state": np.ones((10, 3))}, action, outcome="aborted"
    )
    writer.flush()
    store = Store(tmp_path / "store")
    e = store.episode(done)
    np.testing.assert_array_equal(store.read("action", e), action)
    assert store.read("terminated", e).tolist() == [False] * 9 + [True]
    assert np.diff(store.read("stamp_ns", e)).tolist() == [20_000_000] * 9
    e = store.episode(cut)
    assert not store.read("terminated", e).any()
    assert store.read("truncated", e).tolist() == [False] * 9 + [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.zeros(3)}, r"action: found shape \(3,\), expected \(2,\)"),
        ({"action": [np.nan, 0]}, "NaN and infinity"),
        ({"action": ["x", 0]}, "expected 2 numbers"),
        ({"action_human": [np.inf, 0]}, "action.human"),
        ({"stamp_ns": -1}, "not negative"),
        ({"stamp_ns": 1_000_000}, "increase strictly"),
        ({"observation": {"observation.state": np.zeros(4)}}, "observation.state: found shape"),
        ({"observation": {"observation.images.front": b""}}, "declares"),
        ({"observation": {"observation.images.wrist": b"GIF89a"}}, "not a JPEG"),
        (
            {"observation": {"observation.images.wrist": np.zeros((4, 4, 3), np.uint8)}},
            r"found an image \(4, 4, 3\)",
        ),
        (
            {"observation": {"observation.images.depth": np.zeros((24, 32, 1), np.uint8)}},
            "uint16",
        ),
        ({"stamps": {"observation.state": -5}}, "never run backwards"),
        ({"stamps": {"observation.state": 5}}, "never run backwards"),
        ({"reward": float("nan")}, "reward"),
        ({"source": 9}, "source is 9"),
        ({"late": {"observation.nose"}}, "late names"),
        ({"chunk_step": 70_000}, "chunk_step is 70000"),
    ],
)
def test_an_invalid_tick_is_refused_and_leaves_no_trace(
    open_writer, cameras, tick, tmp_path, change, message
):
    writer = open_writer(cameras)
    uuid = writer.begin_episode("pick")
    writer.append(tick(0))
    with pytest.raises(ts.BadTick, match=message):
        writer.append(tick(1, **change))
    writer.append(tick(1))
    writer.end_episode("success")
    writer.flush()
    store = Store(tmp_path / "store")
    assert len(store.episode(uuid)) == 2
    np.testing.assert_array_equal(
        store.read("action", slice(None)), [tick(0).action, tick(1).action]
    )


def test_a_frame_of_another_size_is_refused(open_writer, cameras, tick):
    import simplejpeg

    writer = open_writer(cameras)
    writer.begin_episode("pick")
    small = simplejpeg.encode_jpeg(np.zeros((24, 64, 3), np.uint8))
    with pytest.raises(ts.BadTick, match="64 x 24, expected 64 x 48"):
        writer.append(tick(0, observation={"observation.images.wrist": small}))
    # 8 bit grey values are no millimetres; 16 bit ones come back exactly.
    grey = bytes(imagecodecs.png_encode(np.zeros((24, 32), np.uint8)))
    with pytest.raises(ts.BadTick, match="PNG of 8 bits and colour type 0, expected 16"):
        writer.append(tick(0, observation={"observation.images.depth": grey}))
    depth = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 85
    png = bytes(imagecodecs.png_encode(depth))
    writer.append(tick(0, observation={"observation.images.depth": png}))
    writer.end_episode("success")
    writer.flush()
    read = Store(writer.location).read("observation.images.depth", [0])
    np.testing.assert_array_equal(read[0, :, :, 0], depth)


def test_calls_at_the_wrong_moment(open_writer, contract, tick):
    writer = open_writer(contract)
    with pytest.raises(ts.EpisodeState, match="no episode is running"):
        writer.append(tick(0))
    with pytest.raises(ts.ContractError, match="no task"):
        writer.begin_episode("dance")
    with pytest.raises(ts.EpisodeState, match="uuid"):
        writer.begin_episode("pick", uuid="seven")
    writer.begin_episode("pick")
    with pytest.raises(ts.EpisodeState, match="still running"):
        writer.begin_episode("pick")
    writer.close()
    with pytest.raises(ts.EpisodeState, match="closed"):
        writer.begin_episode("pick")


def test_a_second_writer_is_refused_with_the_holders_name(open_writer, contract, tmp_path):
    open_writer(contract, writer="robot-7")
    with pytest.raises(ts.StoreBusy, match=r"robot-7 \(.*process \d+"):
        StoreWriter.create_or_open(tmp_path / "store", contract)


def test_close_interrupts_the_running_episode(open_writer, contract, tick, tmp_path):
    writer = open_writer(contract)
    writer.begin_episode("pick")
    writer.append(tick(0))
    writer.close()
    (e,) = Store(tmp_path / "store").episodes
    assert (e.outcome, len(e)) == ("interrupted", 1)


def test_late_and_dropped_bits(open_writer, cameras, tick, tmp_path):
    writer = open_writer(cameras)
    writer.begin_episode("pick")
    writer.append(tick(0, late={"observation.images.wrist"}, dropped=["observation.state"]))
    writer.end_episode("success", problems=["wrist below 10 Hz"])
    writer.flush()
    store = Store(tmp_path / "store")
    bits = {k: i for i, k in enumerate(store.info.features)}
    assert store.read("late", [0])[0] == 1 << bits["observation.images.wrist"]
    assert store.read("dropped", [0])[0] == 1 << bits["observation.state"]
    assert store.episodes[0].problems == ("wrist below 10 Hz",)


# Opening


def test_not_a_store(tmp_path, contract):
    with pytest.raises(ts.NotAStore, match="no such folder"):
        Store(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ts.NotAStore, match="a folder without one"):
        Store(tmp_path / "folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ts.NotAStore, match="a file"):
        Store(tmp_path / "file")
    with pytest.raises(ts.NotAStore, match="another scheme"):
        Store("ftp://host/store")
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    with pytest.raises(ts.NotAStore, match="something else"):
        StoreWriter.create_or_open(tmp_path / "folder", contract)
    assert (tmp_path / "folder" / "thesis.tex").exists()


def _set_root(path: Path, **attributes) -> None:
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    session = repository.writable_session("main")
    zarr.open_group(session.store, mode="r+").attrs.update(attributes)
    session.commit("test")


def test_foreign_and_newer_formats(open_writer, contract, tmp_path):
    open_writer(contract).close()
    _set_root(tmp_path / "store", format="vla_post/store/99")
    with pytest.raises(ts.NewerFormat, match=r"store/99.*update"):
        Store(tmp_path / "store")
    with pytest.raises(ts.NewerFormat):
        StoreWriter.create_or_open(tmp_path / "store", contract)
    _set_root(tmp_path / "store", format="other")
    with pytest.raises(ts.NotAStore, match="icechunk repository without"):
        Store(tmp_path / "store")
    with pytest.raises(ts.NotAStore):
        StoreWriter.create_or_open(tmp_path / "store", contract)


def test_a_feature_and_a_task_can_be_added(
    open_writer, contract, cameras, record, jpegs, depths, tmp_path
):
    open_writer(contract).close()
    writer = open_writer(contract)
    old = record(writer, 30)
    writer.close()
    more = parse_contract(
        cameras.to_json().replace(
            '"tasks":{', '"tasks":{"sort":{"instruction":"Sort","time_limit_s":5},'
        )
    )
    writer = open_writer(more)
    frames = {"observation.images.wrist": jpegs[0], "observation.images.depth": depths[0]}
    new = record(writer, 20, task="sort", frames=lambda i: frames, seed=5)
    writer.flush()
    store = Store(tmp_path / "store")
    assert set(store.contracts) == {contract.sha256, more.sha256}
    assert store.episode(old).contract_sha256 == contract.sha256
    assert store.read("observation.images.wrist", store.episode(new)).shape == (20, 48, 64, 3)
    assert (store.read("observation.images.wrist.frame", store.episode(old)) == -1).all()
    with pytest.raises(ts.FeatureMissing, match=r"1 of 2 episodes lack.*skip"):
        ts.ChunkSampler(store, horizon=2, batch_size=2)
    sampler = ts.ChunkSampler(store, horizon=2, batch_size=8, missing="skip")
    assert {next(sampler).provenance[i][1] for i in range(8)} == {new}
    writer.close()
    writer = open_writer(contract)  # the smaller contract still fits
    record(writer, 5, seed=9)
    writer.flush()
    assert len(Store(tmp_path / "store").episodes) == 3


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"unit":"rad"', '"unit":"deg"', "observation.state.unit: store has 'rad'"),
        ('["a","b","c"]', '["a","b","d"]', "observation.state.names"),
        ('"mode":"absolute"', '"mode":"delta"', "action.mode"),
        ('"control_hz":50.0', '"control_hz":25.0', "contract.control_hz"),
    ],
)
def test_a_contradicting_contract_is_refused(open_writer, contract, tmp_path, old, new, named):
    open_writer(contract).close()
    assert old in contract.to_json()
    with pytest.raises(ts.SchemaMismatch, match=named):
        open_writer(parse_contract(contract.to_json().replace(old, new)))
    open_writer(contract)


def test_lossy_depth_is_refused(open_writer, cameras):
    text = cameras.to_json().replace('"codec":"png"', '"codec":"jpeg"')
    with pytest.raises(ts.SchemaMismatch, match="depth16_mm and codec jpeg"):
        open_writer(parse_contract(text))


def test_a_reader_keeps_its_snapshot_until_it_refreshes(open_writer, contract, record, tmp_path):
    writer = open_writer(contract)
    record(writer, 10)
    writer.flush()
    store = Store(tmp_path / "store")
    before, name = store.read("action", slice(None)), store.snapshot_id
    record(writer, 10, seed=1)
    writer.flush()
    assert store.rows == 10
    assert store.refresh()
    assert not store.refresh()
    assert (store.rows, len(store.episodes)) == (20, 2)
    past = Store(tmp_path / "store", name)
    assert (past.rows, past.snapshot_id) == (10, name)
    np.testing.assert_array_equal(past.read("action", slice(None)), before)


def test_a_running_episode_is_visible_in_the_table_only(open_writer, contract, tick, tmp_path):
    writer = open_writer(contract)
    writer.begin_episode("pick")
    writer.append(tick(0))
    writer.flush()
    store = Store(tmp_path / "store")
    assert store.episodes == []
    assert store.table[0].is_open
    assert len(store.table[0]) == 1


def test_rows_outside_the_store(open_writer, contract, record, tmp_path):
    writer = open_writer(contract)
    record(writer, 4)
    writer.flush()
    store = Store(tmp_path / "store")
    with pytest.raises(ts.StoreError, match="rows 0 to 3"):
        store.read("action", [4])
    with pytest.raises(ts.FeatureMissing, match=r"observation\.state"):
        store.read("observation.nose", [0])
    with pytest.raises(ts.EpisodeState, match="no episode"):
        store.episode("zz")


def test_many_episodes_fill_several_chunks_of_the_table(open_writer, contract, record, tmp_path):
    writer = open_writer(contract)
    uuids = [record(writer, 2, seed=i) for i in range(130)]
    writer.flush()
    store = Store(tmp_path / "store")
    assert [e.uuid for e in store.episodes] == uuids
    writer.close()
    writer = open_writer(contract)
    uuids.append(record(writer, 2))
    writer.flush()
    store.refresh()
    assert [e.uuid for e in store.episodes] == uuids


def test_append_copies_what_the_caller_reuses(open_writer, cameras, tmp_path):
    writer = open_writer(cameras)
    writer.begin_episode("pick")
    state, action = np.zeros(3, np.float32), np.zeros(2, np.float32)
    depth = np.zeros((24, 32, 1), np.uint16)
    for i in range(4):
        state[:], action[:], depth[:] = i, i, i
        writer.append(
            Tick(
                observation={"observation.state": state, "observation.images.depth": depth},
                action=action,
                source=Source.HUMAN,
                stamp_ns=i,
            )
        )
    writer.end_episode("success")
    writer.flush()
    store = Store(tmp_path / "store")
    assert store.read("action", slice(None))[:, 0].tolist() == [0, 1, 2, 3]
    assert store.read("observation.state", slice(None))[:, 0].tolist() == [0, 1, 2, 3]
    assert store.read("observation.images.depth", slice(None))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_fleet_view_finds_new_stores(open_writer, contract, record, tmp_path):
    writers = [open_writer(contract, tmp_path / "fleet" / name) for name in ("a", "b")]
    view = ts.FleetView(tmp_path / "fleet")
    assert len(view.stores) == 2
    assert not view.refresh()
    record(writers[1], 3)
    writers[1].flush()
    assert view.refresh()
    assert len(view.episodes) == 1
    third = open_writer(contract, tmp_path / "fleet" / "deep" / "c")
    record(third, 3)
    third.flush()
    assert view.refresh()
    assert list(view.snapshot_ids) == [str(tmp_path / "fleet" / n) for n in ("a", "b", "deep/c")]
    with pytest.raises(ts.NotAStore, match="no such folder"):
        ts.FleetView(tmp_path / "nothing")


def test_a_store_that_is_away_does_not_stop_a_fleet(open_writer, contract, record, tmp_path):
    writers = [open_writer(contract, tmp_path / "fleet" / name) for name in ("a", "b")]
    for writer in writers:
        record(writer, 3)
        writer.flush()
    view = ts.FleetView(tmp_path / "fleet")
    repo, whole = tmp_path / "fleet" / "a" / "repo", b""
    writers[0].close()
    whole = repo.read_bytes()
    repo.write_bytes(whole[:50])
    record(writers[1], 4, seed=1)
    writers[1].flush()
    assert view.refresh()
    assert list(view.problems) == [str(repo.parent)]
    assert [len(e) for e in view.episodes] == [3, 3, 4]
    # A view that begins without it would be another data set than was asked for.
    with pytest.raises(ts.DamagedChunk, match="vla-post store repair"):
        ts.FleetView(tmp_path / "fleet")
    repo.write_bytes(whole)
    view.refresh()
    assert view.problems == {}
