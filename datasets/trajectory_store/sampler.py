"""`ChunkSampler`: action chunks with their observations, from any mixture of stores.

B batch, H chunk length. Rules of docs/concepts.md: a chunk never crosses an episode, `valid` masks
what would, `n` counts the rest, only `terminated` cuts the bootstrap. Drawing (`draws.py`) happens
in the caller's thread and loading in others, so the sequence does not depend on their number.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from trajectory_store.blocks import Blocks, FrameCache, Frames
from trajectory_store.draws import Data, Draw, Draws, Filter, Part, Place, stores_of
from trajectory_store.errors import FeatureMissing, NothingToSample, SchemaMismatch, StoreError
from trajectory_store.reader import FleetView, Store
from trajectory_store.schema import Episode, Outcome, Source


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where items come from: `batch.provenance[i]` is (store, episode uuid, row)."""

    stores: tuple[str, ...]
    """Locations that `store` indexes."""
    uuids: Sequence[str]
    """Episode uuids that `episode` indexes."""
    store: np.ndarray
    """(B,)"""
    episode: np.ndarray
    """(B,)"""
    row: np.ndarray
    """(B,) of the anchor, in its store."""
    tick: np.ndarray
    """(B,) of the anchor, counted from the episode's first."""

    def __getitem__(self, item: int) -> tuple[str, str, int]:
        return (
            self.stores[int(self.store[item])],
            self.uuids[int(self.episode[item])],
            int(self.row[item]),
        )

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class ChunkBatch:
    """What a learner gets; `vla_post.batch.Batch` is the same as tensors.

    Observations are as stored: vectors (B, D) float32 in the contract's unit, images
    (B, height, width, C) uint8 (depth uint16); with `history=T` they are (B, T, ...), oldest first.
    """

    observation: dict[str, np.ndarray]
    action: np.ndarray
    """(B, H, A) float32, sent to the robot; past the episode's end the last command repeats."""
    valid: np.ndarray
    """(B, H) bool: inside the episode and, with `valid_sources`, commanded by one of those."""
    reward: np.ndarray
    """(B, H) float32, zero past the end."""
    source: np.ndarray
    """(B, H) uint8 `Source` of each step."""
    next_observation: dict[str, np.ndarray]
    """At step n, or the last stored one when the episode ends inside the chunk; {} if switched
    off."""
    n: np.ndarray
    """(B,) int64: steps inside the episode, `backup` at most; the bootstrap is gamma**n."""
    terminated: np.ndarray
    """(B,) bool: a real end lies within those steps. A time-out is not one."""
    left: np.ndarray
    """(B,) int64: steps from the anchor to the end of its episode, the anchor's included."""
    outcome: np.ndarray
    """(B,) int8: how the episode ended. 1 success, -1 failure, 0 anything else."""
    task: np.ndarray
    """(B,) int64, index into `ChunkSampler.tasks`."""
    instruction: list[str]
    part: np.ndarray
    """(B,) int64: which `Part` of the mixture the item was drawn from."""
    provenance: Provenance
    future_observation: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """`future` steps after the anchor, or the last stored one; {} if switched off."""
    has_future: np.ndarray | None = None
    """(B,) bool: the episode reaches that far."""
    to_takeover: np.ndarray | None = None
    """(B, H) int32, if asked for: steps until a person takes over, at ticks that the robot drove;
    `NO_TAKEOVER` where nobody does, and at every other tick."""

    def __len__(self) -> int:
        return len(self.n)


NO_TAKEOVER = 2**31 - 1
"""In `ChunkBatch.to_takeover`."""

_SIGN: dict[Outcome | None, int] = {Outcome.SUCCESS: 1, Outcome.FAILURE: -1}


class ChunkSampler:
    """An endless iterator of `ChunkBatch`."""

    def __init__(
        self,
        data: Data | Sequence[Part],
        *,
        horizon: int,
        batch_size: int,
        seed: int = 0,
        filter: Filter | None = None,
        balance_tasks: bool = False,
        keys: Sequence[str] | None = None,
        history: int = 1,
        history_stride: int = 1,
        next_observation: bool = True,
        backup: int | None = None,
        future: int = 0,
        takeovers: bool = False,
        valid_sources: Sequence[Source] | None = None,
        replacement: bool = True,
        missing: Literal["error", "skip"] = "error",
        shard: tuple[int, int] = (0, 1),
        workers: int = 0,
        prefetch: int = 2,
        cache_bytes: int = 256 << 20,
        frame_cache_bytes: int = 0,
    ) -> None:
        """Args:
            data: a fleet view, store(s), or parts of a mixture.
            horizon: H, control steps in a chunk.
            filter, balance_tasks: for a single part; parts carry their own.
            keys: observation features to load; default: all that the stores declare.
            history: T observations up to the start tick, `history_stride` ticks apart; 1 drops the
                axis. Before the episode's first tick the first is repeated.
            next_observation: off saves half of the decoding for learners without a critic.
            backup: steps after which `next_observation`, `n` and `terminated` are read; default:
                the horizon. A critic of shorter chunks than the policy's sets it.
            future: steps from the anchor to `future_observation`; 0 loads none.
            takeovers: fill in `to_takeover`.
            valid_sources: `valid` only where one of these commanded (HG-DAgger: HUMAN).
            replacement: False goes through every start tick once per epoch, in a random order.
            missing: what to do about episodes that lack one of `keys`.
            shard: (k, n) loads only the k-th of n equal slices of every batch. Samplers that differ
                in nothing else draw the same batches, so n processes load one batch together.
            workers: threads that load ahead; 0 loads when asked. The sequence is the same.
            prefetch: batches kept ready per worker.
            cache_bytes: bound on cached columns (ticks, not images).
            frame_cache_bytes: bound on cached decoded frames.

        Raises:
            NothingToSample: empty stores, or nothing left by the filters.
            FeatureMissing, SchemaMismatch, StoreError
        """
        if horizon < 1 or batch_size < 1 or history < 1 or history_stride < 1:
            raise StoreError(
                f"horizon {horizon}, batch_size {batch_size}, history {history}, history_stride "
                f"{history_stride}: each must be at least 1"
            )
        if backup is not None and not 1 <= backup <= horizon:
            raise StoreError(
                f"backup is {backup}; expected between 1 and the horizon, {horizon}: the next "
                "observation lies at the end of the chunk or before"
            )
        number, shards = shard
        if not 0 <= number < shards or batch_size % shards:
            raise StoreError(
                f"shard is {shard} of batches of {batch_size}; expected (k, n) with k below n, and "
                "batches that n divides"
            )
        self._slice = slice(number * batch_size // shards, (number + 1) * batch_size // shards)
        if future < 0:
            raise StoreError(f"future is {future}; expected a number of steps, or 0 for none")
        if isinstance(data, (FleetView, Store)) or not any(isinstance(d, Part) for d in data):
            whole: Any = data
            parts = [Part(data=whole, filter=filter or Filter(), balance_tasks=balance_tasks)]
        else:
            parts = [p for p in data if isinstance(p, Part)]
            if filter is not None or balance_tasks:
                raise StoreError("with parts, give `filter` and `balance_tasks` to each part")
        self._parts = parts
        self._weights = [float(p.weight) for p in parts]
        self.horizon, self.batch_size, self.seed = horizon, batch_size, seed
        self._keys = None if keys is None else list(keys)
        self._history, self._stride = history, history_stride
        self._next = next_observation
        self._backup = horizon if backup is None else backup
        self._future, self._takeovers = future, takeovers
        self._valid_sources = None if valid_sources is None else [int(s) for s in valid_sources]
        self._replacement, self._missing = replacement, missing
        self._frame_cache = FrameCache(frame_cache_bytes)
        self._cache_bytes = cache_bytes
        self._blocks: Blocks | None = None
        self._draws = self._index()
        self._queue: deque[tuple[dict[str, Any], Future[ChunkBatch]]] = deque()
        self._ahead = workers * max(prefetch, 1)
        self._pool = ThreadPoolExecutor(workers, "chunk-sampler") if workers else None

    # Iterating

    def __iter__(self) -> Iterator[ChunkBatch]:
        return self

    def __next__(self) -> ChunkBatch:
        if self._pool is None:
            position = self._draws.position()
            try:
                return self._load(self._draw())
            except StoreError:
                self._draws.go(position)  # a store that does not answer just now: the same again
                raise
        while len(self._queue) <= self._ahead:
            state, draw = self._draws.position(), self._draw()
            self._queue.append((state, self._pool.submit(self._load, draw)))
        _, future = self._queue.popleft()
        return future.result()

    def _draw(self) -> Draw:
        """Item numbers of this shard's slice of the next batch."""
        d, mine = self._draws.next(self.batch_size), self._slice
        return Draw(d.store[mine], d.episode[mine], d.row[mine], d.part[mine])

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What there is

    @property
    def n_anchors(self) -> int:
        """Ticks at which a chunk may start, over all parts."""
        return self._draws.n_ticks

    @property
    def batches_per_epoch(self) -> int:
        """Batches until as many items were drawn as there are start ticks."""
        return -(-self.n_anchors // self.batch_size)

    @property
    def shares(self) -> dict[str, float]:
        """Expected share of each part, by name (or number)."""
        return self._draws.shares

    @property
    def task_shares(self) -> dict[str, float]:
        """Expected share of each task."""
        return self._by_task(None)

    @property
    def part_task_shares(self) -> dict[str, dict[str, float]]:
        """Expected share of each task in each part; all of them add up to 1."""
        return {part: self._by_task(part) for part in self.shares}

    def _by_task(self, part: str | None) -> dict[str, float]:
        found = self._draws.share_by(self._ep_task, len(self.tasks), part)
        return dict(zip(self.tasks, found.tolist(), strict=True))

    @property
    def stores(self) -> list[Store]:
        """Every store in use, at the snapshot that batches are drawn from."""
        return list(self._stores)

    @property
    def snapshot_ids(self) -> dict[str, str]:
        """Location -> snapshot of every store in use."""
        return {s.location: s.snapshot_id for s in self._stores}

    # Following writers

    def refresh(self) -> bool:
        """Sees what was committed since; True when anything is new.

        Batches already prefetched are dropped and drawn again from the new index. Without
        replacement a new epoch begins.
        """
        self._rewind()
        views = {id(p.data): p.data for p in self._parts}.values()
        moved = [
            d.refresh() for data in views for d in (data if isinstance(data, Sequence) else [data])
        ]
        if any(moved):
            before, self._draws = self._draws, self._index()
            self._draws.batch = before.batch
            self._draws.epoch = before.epoch + (not self._replacement)
        return any(moved)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """New weights for parts, by name; applies from the next batch that `__next__` returns.

        Raises:
            StoreError: unknown name, negative or all zero.
        """
        names = [p.name for p in self._parts]
        unknown = weights.keys() - set(names)
        if unknown:
            raise StoreError(f"no part is called {sorted(unknown)}; parts are {names}")
        self._rewind()
        self._weights = [
            float(weights.get(n, w)) for n, w in zip(names, self._weights, strict=True)
        ]
        self._draws.share_out(self._weights)

    # State

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position after the last batch returned, with weights and snapshots."""
        position = self._queue[0][0] if self._queue else self._draws.position()
        return position | {
            "seed": self.seed,
            "weights": list(self._weights),
            "snapshots": self.snapshot_ids,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `state_dict` was taken, on the same snapshots, whatever `workers`
        was there and is here.

        Raises:
            StoreError: another seed, other stores or another mixture.
            StoreUnavailable: a snapshot has expired.
        """
        wanted: Mapping[str, str] = state["snapshots"]
        if state["seed"] != self.seed or wanted.keys() != self.snapshot_ids.keys():
            raise StoreError(
                f"the state is of seed {state['seed']} and stores {sorted(wanted)}; this sampler "
                f"has seed {self.seed} and stores {sorted(self.snapshot_ids)}"
            )
        if len(state["weights"]) != len(self._parts):
            raise StoreError(
                f"the state is of {len(state['weights'])} parts; this mixture has "
                f"{len(self._parts)}"
            )
        self._clear_queue()
        self._weights = [float(w) for w in state["weights"]]
        for store in self._stores:
            store.go_to(wanted[store.location])
        self._draws = self._index()
        self._draws.go(state)

    def _rewind(self) -> None:
        """Takes back what was drawn and not returned yet."""
        if self._queue:
            self._draws.go(self._queue[0][0])
        self._clear_queue()

    def _clear_queue(self) -> None:
        for _, future in self._queue:
            future.cancel()
        while self._queue:
            _, future = self._queue.popleft()
            if not future.cancelled():
                future.exception()

    # Index

    def _index(self) -> Draws:
        """Episodes, features and strata of the stores as they stand."""
        stores: dict[str, Store] = {}
        chosen: list[list[tuple[Store, Episode]]] = []
        seen = 0
        for part in self._parts:
            many = stores_of(part.data)
            for store in many:
                known = stores.setdefault(store.location, store)
                if known is not store and known.snapshot_id != store.snapshot_id:
                    raise StoreError(
                        f"{store.location} takes part at two snapshots; use one Store object"
                    )
            seen += sum(len(s.episodes) for s in many)
            keep = part.filter.keeps
            chosen.append([(stores[s.location], e) for s in many for e in s.table if keep(e)])
        self._stores = list(stores.values())
        if not any(chosen):
            where = ", ".join(s.location for s in self._stores[:3]) or "no store"
            raise NothingToSample(
                f"{where}: the filters leave nothing of {seen} finished episodes"
                if seen
                else f"{where}: no finished episode yet; record some, or wait and refresh"
            )
        self._choose_keys()
        chosen = [self._with_features(c) for c in chosen]
        number = {s.location: i for i, s in enumerate(self._stores)}
        tasks = sorted({e.task for c in chosen for _, e in c})
        self.tasks: list[str] = tasks
        """Names that `ChunkBatch.task` indexes."""
        self._episodes = list(
            {(number[s.location], e.uuid): e for c in chosen for s, e in c}.items()
        )
        place = {key: i for i, (key, _) in enumerate(self._episodes)}
        flat = [e for _, e in self._episodes]
        self._uuids = [e.uuid for e in flat]
        self._instructions = [e.instruction for e in flat]
        self._ep_first = np.array([e.first_row for e in flat], np.int64)
        self._ep_usable = np.array([e.first_row + self._first_tick(e) for e in flat], np.int64)
        self._ep_end = np.array([e.end_row for e in flat], np.int64)
        if self._takeovers:
            steps = [steps_to_takeover(e) for e in flat]
            self._to_takeover = np.concatenate(steps)
            self._ep_offset = np.cumsum([0, *map(len, steps[:-1])])
        self._ep_outcome = np.array([_SIGN.get(e.outcome, 0) for e in flat], np.int8)
        self._ep_task = np.array([tasks.index(e.task) for e in flat], np.int64)
        if self._blocks is None:
            self._blocks = Blocks(self._names(), self._cache_bytes)
        self._blocks.use(self._stores)
        places = [
            [
                Place(
                    number[s.location],
                    place[number[s.location], e.uuid],
                    e,
                    self._first_tick(e),
                    s.location,
                )
                for s, e in episodes
            ]
            for episodes in chosen
        ]
        return Draws(
            self._parts, self._weights, places, seed=self.seed, replacement=self._replacement
        )

    def _first_tick(self, e: Episode) -> int:
        """Before it, some of the wanted features had not arrived."""
        seen = dict(e.first_seen)
        return max((seen[k] for k in self.keys), default=0)

    def _with_features(self, chosen: list[tuple[Store, Episode]]) -> list[tuple[Store, Episode]]:
        wanted = set(self.keys)
        lacking = [
            (s, e, wanted - {k for k, _ in e.first_seen})
            for s, e in chosen
            if not wanted <= {k for k, _ in e.first_seen}
        ]
        if lacking and self._missing == "error":
            s, e, keys = lacking[0]
            raise FeatureMissing(
                f"{s.location}: {len(lacking)} of {len(chosen)} episodes lack a feature, the first "
                f"is {e.uuid} without {sorted(keys)}. Leave it out of `keys`, or skip such "
                'episodes with missing="skip"'
            )
        gone = {(s.location, e.uuid) for s, e, _ in lacking}
        return [(s, e) for s, e in chosen if (s.location, e.uuid) not in gone]

    def _choose_keys(self) -> None:
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for store in self._stores:
            for contract in store.contracts.values():
                declared = {k: f.shape for k, f in contract.observations.items()}
                declared["action"] = (contract.action.size,)
                for key, shape in declared.items():
                    if self._keys is not None and key not in (*self._keys, "action"):
                        continue
                    other, where = shapes.setdefault(key, (shape, store.location))
                    if other != shape:
                        raise SchemaMismatch(
                            f"{key} has shape {other} in {where} and {shape} in {store.location}; "
                            "such stores cannot share a batch"
                        )
        self.keys: list[str] = self._keys or [k for k in shapes if k != "action"]
        unknown = [k for k in self.keys if k not in shapes]
        if unknown:
            raise FeatureMissing(
                f"no store declares {unknown}; they have {sorted(shapes.keys() - {'action'})}"
            )
        self._image_keys = [k for k in self.keys if any(k in s.frames for s in self._stores)]
        self._vector_keys = [k for k in self.keys if k not in self._image_keys]

    def _names(self) -> list[str]:
        return [
            *self._vector_keys,
            *(f"{k}.frame" for k in self._image_keys),
            *("action", "reward", "source", "terminated"),
        ]

    # Loading

    def _load(self, d: Draw) -> ChunkBatch:
        assert self._blocks is not None
        end = self._ep_end[d.episode]
        steps = np.arange(self.horizon)
        left = end - d.row
        n = np.minimum(left, self._backup)
        inside = steps < left[:, None]
        chunk_rows = np.minimum(d.row[:, None] + steps, end[:, None] - 1)
        back = self._stride * np.arange(self._history - 1, -1, -1)
        seen_rows = np.maximum(d.row[:, None] - back, self._ep_usable[d.episode][:, None])
        wanted = {"chunk": (chunk_rows, ["action", "reward", "source", "terminated"])}
        names = [*self._vector_keys, *(f"{k}.frame" for k in self._image_keys)]
        wanted["now"] = (seen_rows, names)
        if self._next:
            after = np.minimum(d.row + n, end - 1)
            next_rows = np.maximum(after[:, None] - back, self._ep_usable[d.episode][:, None])
            wanted["next"] = (next_rows, names)
        if self._future:
            ahead = np.minimum(d.row + self._future, end - 1)
            ahead_rows = np.maximum(ahead[:, None] - back, self._ep_usable[d.episode][:, None])
            wanted["future"] = (ahead_rows, names)
        got = self._blocks.gather(d.store, wanted)
        chunk = got["chunk"]
        source = chunk["source"]
        valid = inside
        if self._valid_sources is not None:
            valid = inside & np.isin(source, self._valid_sources)
        frames = Frames(self._stores, self._frame_cache)
        moments = {name: got[name] for name in ("now", "next", "future") if name in got}
        images = {
            k: frames.decode(k, d.store, [m[f"{k}.frame"] for m in moments.values()])
            for k in self._image_keys
        }
        observations: dict[str, dict[str, np.ndarray]] = {}
        for i, (name, moment) in enumerate(moments.items()):
            values = {k: moment[k] for k in self._vector_keys}
            values |= {k: images[k][i] for k in self._image_keys}
            if self._history == 1:
                values = {k: v[:, 0] for k, v in values.items()}
            observations[name] = {k: values[k] for k in self.keys}
        uuids = self._uuids
        return ChunkBatch(
            observation=observations["now"],
            action=chunk["action"],
            valid=valid,
            reward=chunk["reward"] * inside,
            source=source,
            next_observation=observations.get("next", {}),
            n=n,
            terminated=np.any(chunk["terminated"] & (steps < n[:, None]), axis=1),
            left=left,
            outcome=self._ep_outcome[d.episode],
            task=self._ep_task[d.episode],
            instruction=[self._instructions[e] for e in d.episode.tolist()],
            part=d.part,
            provenance=Provenance(
                tuple(s.location for s in self._stores),
                uuids,
                d.store,
                d.episode,
                d.row,
                d.row - self._ep_first[d.episode],
            ),
            future_observation=observations.get("future", {}),
            has_future=left > self._future if self._future else None,
            to_takeover=self._takeover_steps(d, chunk_rows) if self._takeovers else None,
        )

    def _takeover_steps(self, d: Draw, chunk_rows: np.ndarray) -> np.ndarray:
        tick = chunk_rows - self._ep_first[d.episode][:, None]
        return self._to_takeover[self._ep_offset[d.episode][:, None] + tick]


def steps_to_takeover(e: Episode) -> np.ndarray:
    """(ticks,) int32: see `ChunkBatch.to_takeover`.

    A person who drives from an episode's first tick took nothing over; who drives again after a
    hand-back takes over anew.
    """
    out = np.full(len(e), NO_TAKEOVER, np.int32)
    robot = (Source.POLICY, Source.HOLD)
    begin = None
    for start, _, source in e.runs():
        if source in robot:
            begin = start if begin is None else begin
        else:
            if source == Source.HUMAN and begin is not None:
                out[begin:start] = np.arange(start - begin, 0, -1)
            begin = None
    return out
