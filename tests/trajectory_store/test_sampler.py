"""Chunks, masks, shares, orders: against numbers worked out by hand or read back from the store."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trajectory_store as ts
from trajectory_store import ChunkSampler, Filter, FleetView, Outcome, Part, Source, Store
from trajectory_store.permutation import permute

STATE = "observation.state"
WRIST = "observation.images.wrist"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory, contract):
    """A store whose state is (episode, tick, row): what a batch holds tells where it came from."""
    path = tmp_path_factory.mktemp("numbers") / "store"
    with ts.StoreWriter.create_or_open(path, contract) as writer:
        row = 0
        for k, (n, task, outcome) in enumerate(
            [(5, "pick", "success"), (12, "place", "failure"), (20, "pick", "aborted")]
        ):
            state = np.array([[k, i, row + i] for i in range(n)], np.float32)
            source = [Source.HUMAN if 3 <= i < 6 else Source.POLICY for i in range(n)]
            writer.write_episode(
                task,
                {STATE: state},
                state[:, :2] + 0.5,
                outcome=outcome,
                source=np.array(source),
                reward=np.arange(n) + 1.0,
                policy_version=k,
                operator=f"op{k}",
            )
            row += n
    return Store(path)


def test_chunks_end_with_their_episode(numbers):
    sampler = ChunkSampler(numbers, horizon=4, batch_size=500, seed=3)
    batch = next(sampler)
    lengths = np.array([5, 12, 20])
    state = batch.observation[STATE]
    episode, tick = state[:, 0].astype(int), state[:, 1].astype(int)
    n = np.minimum(lengths[episode] - tick, 4)
    np.testing.assert_array_equal(batch.n, n)
    np.testing.assert_array_equal(batch.valid, np.arange(4) < n[:, None])
    steps = np.minimum(np.arange(4), n[:, None] - 1)
    np.testing.assert_array_equal(batch.action[..., 0], np.tile(episode[:, None] + 0.5, 4))
    np.testing.assert_array_equal(batch.action[..., 1], tick[:, None] + steps + 0.5)
    np.testing.assert_array_equal(batch.reward, (tick[:, None] + steps + 1) * batch.valid)
    after = np.minimum(tick + n, lengths[episode] - 1)
    np.testing.assert_array_equal(batch.next_observation[STATE][:, 1], after)
    np.testing.assert_array_equal(batch.next_observation[STATE][:, 0], episode)
    # Episode 2 was aborted: its end is a time-out and keeps its bootstrap.
    ends = (tick + 4 >= lengths[episode]) & (episode != 2)
    np.testing.assert_array_equal(batch.terminated, ends)
    np.testing.assert_array_equal(batch.left, lengths[episode] - tick)
    np.testing.assert_array_equal(batch.outcome, np.array([1, -1, 0])[episode])
    assert sampler.tasks == ["pick", "place"]
    np.testing.assert_array_equal(batch.task, episode == 1)
    assert batch.instruction[0] == ("Place it" if episode[0] == 1 else "Pick it")
    location, uuid, row = batch.provenance[7]
    assert location == numbers.location
    assert uuid == numbers.table[episode[7]].uuid
    assert row == int(state[7, 2])
    assert batch.provenance.tick[7] == tick[7]


def test_the_future_is_read_at_its_offset_and_known_to_be_missing(numbers):
    lengths = np.array([5, 12, 20])
    batch = next(ChunkSampler(numbers, horizon=4, future=7, batch_size=500, seed=3))
    whole = next(ChunkSampler(numbers, horizon=4, batch_size=500, seed=3))
    episode, tick = batch.observation[STATE].astype(int).T[:2]
    np.testing.assert_array_equal(batch.observation[STATE], whole.observation[STATE])
    np.testing.assert_array_equal(batch.next_observation[STATE], whole.next_observation[STATE])
    np.testing.assert_array_equal(batch.has_future, tick + 7 < lengths[episode])
    expected = np.minimum(tick + 7, lengths[episode] - 1)
    np.testing.assert_array_equal(batch.future_observation[STATE][:, 1], expected)
    np.testing.assert_array_equal(batch.future_observation[STATE][:, 0], episode)
    assert whole.future_observation == {}
    assert whole.has_future is None
    with pytest.raises(ts.StoreError, match="future is -1"):
        ChunkSampler(numbers, horizon=4, future=-1, batch_size=4)


def test_steps_to_a_takeover(tmp_path, contract):
    # A second takeover five ticks after the first ends, a demonstration, a start under the human.
    p, h, s, hold = Source.POLICY, Source.HUMAN, Source.SCRIPTED, Source.HOLD
    episodes = [
        [p] * 6 + [h] * 2 + [hold] * 2 + [p] * 3 + [h] * 2 + [p] * 2,
        [s] * 3 + [h] * 3,
        [h] * 2 + [p] * 2 + [h],
    ]
    never = ts.NO_TAKEOVER
    expected = [
        [6, 5, 4, 3, 2, 1, never, never, 5, 4, 3, 2, 1, never, never, never, never],
        [never] * 6,
        [never, never, 2, 1, never],
    ]
    with ts.StoreWriter.create_or_open(tmp_path / "store", contract) as writer:
        for k, sources in enumerate(episodes):
            state = np.array([[k, i, 0] for i in range(len(sources))], np.float32)
            writer.write_episode(
                "pick", {STATE: state}, state[:, :2], outcome="success", source=np.array(sources)
            )
    store = Store(tmp_path / "store")
    batch = next(ChunkSampler(store, horizon=4, takeovers=True, batch_size=300, seed=1))
    for i in range(300):
        k, tick = batch.observation[STATE][i, :2].astype(int)
        wanted = expected[k][tick : tick + 4]
        assert batch.to_takeover[i, batch.valid[i]].tolist() == wanted


def test_a_critic_may_back_up_over_fewer_steps_than_the_chunk_has(numbers):
    lengths = np.array([5, 12, 20])
    batch = next(ChunkSampler(numbers, horizon=4, backup=2, batch_size=500, seed=3))
    whole = next(ChunkSampler(numbers, horizon=4, batch_size=500, seed=3))
    episode, tick = batch.observation[STATE].astype(int).T[:2]
    for name in ("action", "valid", "reward", "left"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(whole, name))
    left = lengths[episode] - tick
    np.testing.assert_array_equal(batch.n, np.minimum(left, 2))
    after = np.minimum(tick + batch.n, lengths[episode] - 1)
    np.testing.assert_array_equal(batch.next_observation[STATE][:, 1], after)
    np.testing.assert_array_equal(batch.terminated, (left <= 2) & (episode != 2))
    with pytest.raises(ts.StoreError, match="backup is 5"):
        ChunkSampler(numbers, horizon=4, backup=5, batch_size=1)


@pytest.mark.parametrize(
    ("keep", "episodes"),
    [
        (Filter(tasks=["pick"]), {0, 2}),
        (Filter(outcomes=[Outcome.FAILURE, Outcome.ABORTED]), {1, 2}),
        (Filter(policy_versions=[1]), {1}),
        (Filter(min_policy_version=1), {1, 2}),
        (Filter(operators=["op2"]), {2}),
        (Filter(where=lambda e: len(e) > 10), {1, 2}),
    ],
)
def test_filters(numbers, keep, episodes):
    batch = next(ChunkSampler(numbers, horizon=2, batch_size=200, filter=keep))
    assert set(batch.observation[STATE][:, 0].astype(int).tolist()) == episodes


def test_filter_by_time(open_writer, contract, record, tmp_path):
    writer = open_writer(contract)
    first, second = record(writer, 3), record(writer, 3)
    writer.flush()
    store = Store(tmp_path / "store")
    cut = store.episode(second).created_ns
    for keep, wanted in ((Filter(since_ns=cut), second), (Filter(until_ns=cut), first)):
        batch = next(ChunkSampler(store, horizon=1, batch_size=20, filter=keep))
        assert {batch.provenance[i][1] for i in range(20)} == {wanted}


def test_hg_dagger_anchors_and_masks(numbers):
    sampler = ChunkSampler(
        numbers,
        horizon=4,
        batch_size=300,
        filter=Filter(sources=[Source.HUMAN]),
        valid_sources=[Source.HUMAN],
    )
    assert sampler.n_anchors == 2 + 3 + 3  # ticks 3 to 5, of which episode 0 has two
    batch = next(sampler)
    tick = batch.observation[STATE][:, 1].astype(int)
    assert set(tick.tolist()) == {3, 4, 5}
    steps = tick[:, None] + np.arange(4)
    inside = np.arange(4) < batch.n[:, None]
    np.testing.assert_array_equal(batch.valid, inside & (steps < 6))
    assert (batch.source[batch.valid] == Source.HUMAN).all()
    assert (batch.n > batch.valid.sum(1)).any()  # n counts the episode's steps, not the mask


def test_history_repeats_the_first_observation(numbers):
    sampler = ChunkSampler(numbers, horizon=2, batch_size=200, history=3, history_stride=2)
    batch = next(sampler)
    seen = batch.observation[STATE]
    assert seen.shape == (200, 3, 3)
    tick = seen[:, -1, 1]
    np.testing.assert_array_equal(seen[:, 0, 1], np.maximum(tick - 4, 0))
    np.testing.assert_array_equal(seen[:, 1, 1], np.maximum(tick - 2, 0))
    assert (seen[:, 0, 0] == seen[:, 2, 0]).all()
    after = batch.next_observation[STATE]
    np.testing.assert_array_equal(after[:, 1, 1], np.maximum(after[:, 2, 1] - 2, 0))


def test_uniform_over_ticks(numbers):
    sampler = ChunkSampler(numbers, horizon=1, batch_size=37 * 400, seed=1)
    rows = next(sampler).observation[STATE][:, 2].astype(int)
    counts = np.bincount(rows, minlength=37)
    # 400 expected, standard deviation about 20: five of them.
    assert abs(counts - 400).max() < 100


def test_shares_of_a_mixture_are_exact(numbers):
    parts = [
        Part(data=numbers, weight=3, name="good", filter=Filter(outcomes=[Outcome.SUCCESS])),
        Part(data=numbers, weight=1, name="rest", balance_tasks=True),
    ]
    sampler = ChunkSampler(parts, horizon=1, batch_size=20_000, seed=5)
    assert sampler.shares == {"good": 0.75, "rest": 0.25}
    batch = next(sampler)
    assert abs((batch.part == 0).mean() - 0.75) < 0.02
    assert set(batch.observation[STATE][batch.part == 0][:, 0]) == {0.0}
    rest = batch.task[batch.part == 1]
    assert abs((rest == 1).mean() - 0.5) < 0.04  # 12 ticks of place, 25 of pick
    assert sampler.task_shares == pytest.approx({"pick": 0.75 + 0.125, "place": 0.125})
    shares = sampler.part_task_shares
    assert shares["good"] == pytest.approx({"pick": 0.75, "place": 0.0})
    assert shares["rest"] == pytest.approx({"pick": 0.125, "place": 0.125})
    sampler.set_weights({"good": 0})
    assert sampler.shares == {"good": 0.0, "rest": 1.0}
    assert set(next(sampler).part) == {1}
    with pytest.raises(ts.StoreError, match="no part is called"):
        sampler.set_weights({"best": 1})


def test_weights_per_source_episode_and_tick(numbers):
    def share(**options):
        part = Part(data=numbers, **options)
        return next(ChunkSampler([part], horizon=1, batch_size=20_000, seed=2))

    # 8 human ticks of 37: weight 29/8 makes the halves of IWR equal.
    batch = share(source_weights={Source.HUMAN: 29 / 8})
    assert abs((batch.source == Source.HUMAN).mean() - 0.5) < 0.02
    batch = share(item_weights=lambda e: 0.0 if e.task == "pick" else 1.0)
    assert set(batch.task) == {1}
    batch = share(item_weights=lambda e: np.eye(len(e))[2] * (1 if len(e) > 5 else 3))
    state = batch.observation[STATE]
    assert set(state[:, 1]) == {2.0}
    assert abs((state[:, 0] == 0).mean() - 0.6) < 0.02


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_epoch_takes_every_tick_once(numbers, workers):
    with ChunkSampler(
        numbers, horizon=2, batch_size=10, seed=4, replacement=False, workers=workers
    ) as sampler:
        rows = np.concatenate([next(sampler).provenance.row for _ in range(37)])
    for epoch in range(10):
        assert sorted(rows[epoch * 37 : (epoch + 1) * 37].tolist()) == list(range(37))
    assert rows[:37].tolist() != rows[37:74].tolist()


@given(st.integers(1, 5000), st.integers(0, 2**32))
def test_permute_is_a_permutation(size, key):
    out = permute(np.arange(size), size, (key,))
    assert sorted(out.tolist()) == list(range(size))


def test_permute_leaves_no_pattern():
    out = permute(np.arange(100_000), 100_000, (1, 2, 3))
    ranks = np.corrcoef(np.arange(100_000), out)[0, 1]
    steps = np.corrcoef(out[:-1], out[1:])[0, 1]
    assert abs(ranks) < 0.02
    assert abs(steps) < 0.02


def _same(a, b):
    for name in ("action", "valid", "reward", "source", "n", "terminated", "task", "part"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for key in a.observation:
        np.testing.assert_array_equal(a.observation[key], b.observation[key])
        np.testing.assert_array_equal(a.next_observation[key], b.next_observation[key])
    assert a.instruction == b.instruction


@pytest.fixture
def pictures(open_writer, cameras, record, jpegs, depths, tmp_path):
    writer = open_writer(cameras)
    for seed in range(3):
        record(
            writer,
            60,
            seed=seed,
            frames=lambda i: {
                WRIST: jpegs[i // 3],
                "observation.images.depth": depths[i // 5],
            },
        )
    writer.flush()
    return Store(tmp_path / "store")


@pytest.mark.parametrize("options", [{}, {"frame_cache_bytes": 1 << 20}, {"cache_bytes": 1}])
def test_same_sequence_with_any_number_of_threads(pictures, options):
    make = {"horizon": 8, "batch_size": 16, "seed": 11, "history": 2} | options
    reference = ChunkSampler(pictures, **(make | {"cache_bytes": 64 << 20}))
    wanted = [next(reference) for _ in range(12)]
    for workers in (0, 1, 4):
        with ChunkSampler(pictures, workers=workers, **make) as sampler:
            for batch in wanted:
                _same(next(sampler), batch)


def test_images_are_those_of_the_rows(pictures):
    batch = next(ChunkSampler(pictures, horizon=4, batch_size=32, seed=1))
    for i in range(32):
        row = batch.provenance[i][2]
        for key in (WRIST, "observation.images.depth"):
            np.testing.assert_array_equal(batch.observation[key][i], pictures.read(key, [row])[0])
    assert batch.observation[WRIST].shape == (32, 48, 64, 3)
    assert batch.observation["observation.images.depth"].dtype == np.uint16


def test_images_only_of_the_keys_asked_for(pictures):
    batch = next(
        ChunkSampler(pictures, horizon=1, batch_size=2, keys=[STATE], next_observation=False)
    )
    assert list(batch.observation) == [STATE]
    assert batch.next_observation == {}
    with pytest.raises(ts.FeatureMissing, match="no store declares"):
        ChunkSampler(pictures, horizon=1, batch_size=2, keys=["observation.nose"])


def test_frame_cache_stays_in_its_bound(pictures):
    sampler = ChunkSampler(pictures, horizon=1, batch_size=64, frame_cache_bytes=100_000)
    for _ in range(10):
        next(sampler)
    cache = sampler._frame_cache
    assert 0 < cache._bytes <= 100_000
    assert cache.hits > 0


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("workers", [(0, 0), (0, 3), (2, 1)])
def test_resumes_from_a_saved_state(numbers, replacement, workers):
    """Also with another number of threads, in the middle of an epoch, after a change of weights."""

    def make(workers: int) -> ChunkSampler:
        store = Store(numbers.location)
        good = Filter(outcomes=[Outcome.SUCCESS])
        return ChunkSampler(
            [Part(data=store, name="all"), Part(data=store, name="good", filter=good)],
            horizon=4,
            batch_size=7,
            seed=9,
            replacement=replacement,
            workers=workers,
        )

    with make(workers[0]) as first, make(workers[1]) as second:
        for i in range(5):
            if i == 2:
                first.set_weights({"good": 3})
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        wanted = [next(first) for _ in range(6)]
        second.load_state_dict(state)
        assert second.shares == {"all": 0.25, "good": 0.75}
        for batch in wanted:
            _same(next(second), batch)
    with pytest.raises(ts.StoreError, match="seed 9"):
        ChunkSampler(numbers, horizon=4, batch_size=7, seed=1).load_state_dict(state)
    with pytest.raises(ts.StoreError, match="of 2 parts"):
        ChunkSampler(numbers, horizon=4, batch_size=7, seed=9).load_state_dict(state)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda e: np.ones(len(e) + 1), "expected one number, or"),
        (lambda e: np.full(len(e), np.nan), "finite and not negative"),
        (lambda e: -1.0, "finite and not negative"),
        (lambda e: 0.0, "weight is above 0"),
    ],
)
def test_senseless_weights(numbers, weights, message):
    with pytest.raises(ts.StoreError, match=message):
        ChunkSampler([Part(data=numbers, item_weights=weights)], horizon=1, batch_size=1)


def test_resumes_on_the_snapshot_of_the_state(open_writer, contract, record, tmp_path):
    writer = open_writer(contract)
    record(writer, 20)
    writer.flush()
    first = ChunkSampler(Store(tmp_path / "store"), horizon=2, batch_size=8)
    next(first)
    state = first.state_dict()
    wanted = next(first)
    record(writer, 50, seed=1)
    writer.flush()
    later = ChunkSampler(Store(tmp_path / "store"), horizon=2, batch_size=8)
    assert later.n_anchors == 70
    later.load_state_dict(state)
    _same(next(later), wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_refresh_sees_new_episodes(open_writer, contract, record, tmp_path, workers):
    writer = open_writer(contract)
    first = record(writer, 20)
    writer.flush()
    view = FleetView(tmp_path)
    with ChunkSampler(view, horizon=2, batch_size=1000, workers=workers) as sampler:
        next(sampler)
        second = record(writer, 1500, seed=1)
        writer.flush()
        assert {sampler.refresh(), sampler.refresh()} == {True, False}
        batch = next(sampler)
        assert {batch.provenance[i][1] for i in range(1000)} == {first, second}
        store = Store(tmp_path / "store")
        np.testing.assert_array_equal(
            batch.action[:, 0], store.read("action", batch.provenance.row)
        )


def test_stores_of_a_fleet_share_a_batch(open_writer, contract, record, tmp_path):
    for name in "abc":
        writer = open_writer(contract, tmp_path / "fleet" / name)
        record(writer, 30, seed=ord(name))
        writer.flush()
    view = FleetView(tmp_path / "fleet")
    sampler = ChunkSampler(view, horizon=2, batch_size=90)
    batch = next(sampler)
    by = Counter(batch.provenance[i][0][-1] for i in range(90))
    assert set(by) == set("abc")
    for store in view.stores:
        mine = np.array([batch.provenance[i][0] == store.location for i in range(90)])
        np.testing.assert_array_equal(
            batch.action[mine][:, 0], store.read("action", batch.provenance.row[mine])
        )


def test_nothing_to_sample(open_writer, contract, record, tmp_path):
    writer = open_writer(contract)
    store = Store(tmp_path / "store")
    with pytest.raises(ts.NothingToSample, match="no finished episode yet"):
        ChunkSampler(store, horizon=2, batch_size=2)
    record(writer, 3)
    writer.flush()
    store.refresh()
    with pytest.raises(ts.NothingToSample, match="nothing of 1 finished"):
        ChunkSampler(store, horizon=2, batch_size=2, filter=Filter(tasks=["place"]))
    with pytest.raises(ts.NothingToSample, match="none has a tick"):
        ChunkSampler(store, horizon=2, batch_size=2, filter=Filter(sources=[Source.HOLD]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"history": 0}, "at least 1"),
    ],
)
def test_senseless_arguments(numbers, options, message):
    with pytest.raises(ts.StoreError, match=message):
        ChunkSampler(numbers, **({"horizon": 2, "batch_size": 2} | options))


def test_stores_that_do_not_fit_are_refused(open_writer, contract, record, tmp_path, numbers):
    from trajectory_store.contract import parse_contract

    other = contract.to_json().replace('"names":["a","b","c"]', '"names":["a","b"]')
    other = other.replace('"shape":[3]', '"shape":[2]')
    writer = open_writer(parse_contract(other))
    writer.write_episode("pick", {STATE: np.zeros((4, 2))}, np.zeros((4, 2)), outcome="success")
    writer.flush()
    with pytest.raises(ts.SchemaMismatch, match="cannot share a batch"):
        ChunkSampler([numbers, Store(tmp_path / "store")], horizon=2, batch_size=2)
