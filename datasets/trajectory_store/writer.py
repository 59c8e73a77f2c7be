"""`StoreWriter`: takes ticks from a control loop, commits them from a background thread.

`append` touches memory only. Every `commit_interval_s`, and when an episode ends, the ticks so far
become a segment and the thread commits it; a segment that cannot be committed waits in memory and
in the local spool (`spool.py`) until the store answers again.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid4

import numpy as np

from trajectory_store import commit as committing
from trajectory_store.coding import check_frame
from trajectory_store.commit import Head, Segment
from trajectory_store.contract import Contract
from trajectory_store.errors import (
    BadTick,
    EpisodeState,
    SpoolFull,
    StoreBusy,
    StoreError,
    StoreUnavailable,
)
from trajectory_store.lock import WriterLock
from trajectory_store.repository import (
    create_repository,
    normalise,
    open_repository,
)
from trajectory_store.schema import (
    AGE_ABSENT,
    Episode,
    Outcome,
    Source,
    Tick,
    columns,
    frame_arrays,
)
from trajectory_store.spool import Spool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """How the writer is doing; cheap to read at any time."""

    ok: bool
    """The last attempt to commit succeeded."""
    error: str
    """Why not, in words for an operator; empty when ok."""
    pending_ticks: int
    """Appended and not yet committed."""
    pending_bytes: int
    """Of segments that wait for the store."""
    spooled_segments: int
    """Of those, written to the local spool."""
    committed_ticks: int
    """By this writer object."""
    last_commit_s: float
    """Duration of the last commit."""
    snapshot_id: str
    """Of the last commit."""


@dataclass
class _Running:
    """The episode being recorded."""

    episode: Episode
    features: dict[str, int]
    last: dict[str, Any] = field(default_factory=dict)
    """Last value of each feature, for ticks without a new one."""
    last_stamp: dict[str, int] = field(default_factory=dict)
    n_frames: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[Any]] = field(default_factory=dict)
    """Columns of the ticks since the last segment."""
    frames: dict[str, list[bytes | np.ndarray]] = field(default_factory=dict)


class StoreWriter:
    """The one writer of a store. Thread-safe; use as a context manager or call `close`."""

    def __init__(
        self,
        path: str | Path,
        contract: Contract,
        *,
        writer: str = "",
        commit_interval_s: float = 1.0,
        spool: str | Path | None = None,
        spool_limit_bytes: int = 4 << 30,
        memory_limit_bytes: int = 256 << 20,
    ) -> None:
        """See `create_or_open`."""
        self.location = normalise(path)
        self.contract = contract
        self.writer = writer or contract.cell
        self._interval_s = commit_interval_s
        self._memory_limit = memory_limit_bytes
        self._columns = columns(contract)
        self._images = frame_arrays(contract)
        self._mutex = threading.Condition()
        self._pending: list[Segment] = []
        self._running: _Running | None = None
        self._busy = self._closed = self._urgent = False
        self._error: StoreError | None = None
        self._crash: BaseException | None = None
        self._committed = 0
        self._last_commit_s = 0.0
        self._lock = WriterLock(self.location, self.writer)
        self._head: Head | None = None
        self._lock.acquire()
        try:
            if not committing.is_store(self.location):
                create_repository(
                    self.location,
                    lambda r: committing.create(r, self.location, contract, self.writer),
                )
                self._lock.refresh()
            self._repository = open_repository(self.location)
            head = committing.read_head(self._repository, self.location)
            if contract.sha256 != head.contract.sha256:
                committing.evolve(self._repository, self.location, head, contract)
                head = committing.read_head(self._repository, self.location)
            self._spool = Spool(self.location, spool, spool_limit_bytes)
            for segment in self._spool.left_behind(head.last_segment):
                head = committing.commit(self._repository, self.location, head, [segment], "spool")
            self._spool.clear()
            self._head = self._interrupt_open_episode(head)
            self._snapshot_id = self._head.snapshot_id
            self._features = list(self._head.features)
            self._last_segment = self._head.last_segment
        except BaseException:
            self._lock.release()
            raise
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    @classmethod
    def create_or_open(cls, path: str | Path, contract: Contract, **options: Any) -> Self:
        """Opens the store at `path`, or creates it.

        An episode that a dead writer left open is closed as interrupted. A contract that adds
        features or tasks extends the store.

        Args:
            path: local folder, or `s3://bucket/prefix` (AWS_* variables say where and as whom).
            options: `writer` names the holder; `commit_interval_s` bounds what a crash can lose;
                `spool` is a local folder for segments that the store does not take (default: under
                the user's state folder), at most `spool_limit_bytes`; `memory_limit_bytes` bounds
                what waits in memory when the spool cannot be written either.

        Raises:
            StoreBusy: another writer holds it; the message names it.
            SchemaMismatch: the contract contradicts what is stored.
            StoreUnavailable, NotAStore, NewerFormat
        """
        return cls(path, contract, **options)

    # Recording

    def begin_episode(
        self,
        task: str,
        instruction: str = "",
        operator: str = "",
        policy_version: int = 0,
        *,
        uuid: str | None = None,
        notes: str = "",
    ) -> str:
        """Starts an episode and returns its uuid. Without an instruction, the contract's is taken.

        Raises:
            EpisodeState: one is running, or the uuid is not one.
            ContractError: unknown task.
        """
        known = self.contract.task(task)
        try:
            name = str(UUID(uuid)) if uuid else str(uuid4())
        except ValueError:
            raise EpisodeState(f"found uuid {uuid!r}; expected 32 hexadecimal digits") from None
        with self._mutex:
            self._require_open()
            if self._running is not None:
                raise EpisodeState(
                    f"episode {self._running.episode.uuid} is still running; end it first"
                )
            episode = Episode(
                uuid=name,
                task=task,
                instruction=instruction or known.instruction,
                robot=self.contract.robot,
                cell=self.contract.cell,
                operator=operator,
                policy_version=policy_version,
                contract_sha256=self.contract.sha256,
                first_row=0,
                end_row=0,
                start_ns=0,
                end_ns=0,
                created_ns=time.time_ns(),
                notes=notes,
            )
            bits = {key: i for i, key in enumerate(self._features)}
            self._running = _Running(episode, bits, n_frames=dict.fromkeys(self._images, 0))
            self._reset_rows(self._running)
        return name

    def append(self, tick: Tick) -> None:
        """Adds a tick of the running episode. Memory only: returns in well under a millisecond.

        Raises:
            EpisodeState: no episode is running.
            BadTick: something in it contradicts the contract; the tick is not stored.
            SpoolFull: the store has not taken anything for too long.
        """
        with self._mutex:
            running = self._require_running()
            row, fresh = self._check(running, tick)
            for key in self._images:
                if key in fresh:
                    running.frames[key].append(fresh[key])
                    running.n_frames[key] += 1
                    running.last[key] = fresh[key]
                row[f"{key}.frame"] = (running.n_frames[key] - 1, 0, 0)
            for name, value in row.items():
                running.rows[name].append(value)
            episode = running.episode
            if len(episode.first_seen) < len(running.last):
                seen = dict(episode.first_seen)
                seen = {key: seen.get(key, len(episode)) for key in running.last}
                episode = episode.replace(first_seen=tuple(seen.items()))
            first, source = len(episode) == 0, int(tick.source)
            changed = first or episode.sources[-1][1] != source
            took_over = changed and source == Source.HUMAN and not first
            running.episode = episode.replace(
                end_row=episode.end_row + 1,
                start_ns=tick.stamp_ns if first else episode.start_ns,
                end_ns=tick.stamp_ns,
                sources=(*episode.sources, (len(episode), source)) if changed else episode.sources,
                interventions=episode.interventions + took_over,
            )

    def end_episode(
        self, outcome: Outcome | str, notes: str = "", problems: Sequence[str] = ()
    ) -> None:
        """Ends the running episode; the commit follows in the background (`flush` waits)."""
        outcome = Outcome(outcome)
        with self._mutex:
            running = self._require_running()
            running.episode = running.episode.replace(
                outcome=outcome,
                notes="\n".join(n for n in (running.episode.notes, notes) if n),
                problems=tuple(problems),
            )
            self._cut(running)
            self._running = None
            self._urgent = True
            self._mutex.notify_all()

    def write_episode(
        self,
        task: str,
        observation: Mapping[str, Any],
        action: np.ndarray,
        *,
        outcome: Outcome | str,
        source: Source | np.ndarray = Source.SCRIPTED,
        stamp_ns: np.ndarray | None = None,
        reward: np.ndarray | None = None,
        terminated: np.ndarray | None = None,
        truncated: np.ndarray | None = None,
        instruction: str = "",
        operator: str = "",
        policy_version: int = 0,
        uuid: str | None = None,
        notes: str = "",
    ) -> str:
        """Writes a whole episode from arrays, for demonstrations and converters.

        Args:
            observation: per feature (T, D) or (T, height, width, C), or a sequence of T encoded
                frames; None in place of a frame means no new one since the tick before.
            action: (T, A).
            source: one for all, or (T,).
            stamp_ns: (T,); default: the contract's control period from 0.
            terminated: (T,); default: at the last tick of a success or failure.

        Returns:
            The uuid. The episode is queued; `flush` waits until it is committed.
        """
        outcome = Outcome(outcome)
        n = len(action)
        if n == 0:
            raise BadTick("an episode needs at least one tick; found an action array of length 0")
        for key, values in observation.items():
            if len(values) != n:
                raise BadTick(f"{key}: found {len(values)} values for {n} actions")
        sources = np.broadcast_to(np.asarray(source), (n,))
        stamps = np.arange(n) * self.contract.dt_ns if stamp_ns is None else np.asarray(stamp_ns)
        ended = outcome in (Outcome.SUCCESS, Outcome.FAILURE)
        name = self.begin_episode(
            task, instruction, operator, policy_version, uuid=uuid, notes=notes
        )
        try:
            for i in range(n):
                last = i == n - 1
                self.append(
                    Tick(
                        observation={k: v[i] for k, v in observation.items() if v[i] is not None},
                        action=action[i],
                        source=Source(int(sources[i])),
                        stamp_ns=int(stamps[i]),
                        policy_version=policy_version,
                        reward=0.0 if reward is None else float(reward[i]),
                        terminated=last and ended if terminated is None else bool(terminated[i]),
                        truncated=last and not ended if truncated is None else bool(truncated[i]),
                    )
                )
                if i % 256 == 255:
                    self._breathe()
        except BaseException:
            self.end_episode(Outcome.INTERRUPTED, "write_episode stopped at an invalid tick")
            raise
        self.end_episode(outcome)
        self._breathe()
        return name

    # State

    @property
    def episode_uuid(self) -> str | None:
        """Of the running episode."""
        running = self._running
        return running.episode.uuid if running else None

    @property
    def health(self) -> Health:
        with self._mutex:
            loose = len(self._running.rows["stamp_ns"]) if self._running else 0
            return Health(
                ok=self._error is None and self._crash is None,
                error=str(self._error or self._crash or ""),
                pending_ticks=loose + sum(s.n_ticks for s in self._pending),
                pending_bytes=sum(s.n_bytes for s in self._pending),
                spooled_segments=len(self._spool),
                committed_ticks=self._committed,
                last_commit_s=self._last_commit_s,
                snapshot_id=self._snapshot_id,
            )

    def flush(self, timeout_s: float = 60.0) -> str:
        """Waits until everything appended so far is committed; returns the snapshot id.

        Raises:
            StoreUnavailable: it is not, after `timeout_s`; nothing is lost, the writer goes on.
        """
        deadline = time.monotonic() + timeout_s
        with self._mutex:
            if self._running is not None:
                self._cut(self._running)
            self._urgent = True
            self._mutex.notify_all()
            while self._pending or self._busy:
                self._raise_crash()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise StoreUnavailable(
                        f"{self.location}: {sum(s.n_ticks for s in self._pending)} ticks are not "
                        f"committed after {timeout_s} s; {self._error or 'the commit is slow'}"
                    )
                self._mutex.wait(min(left, 0.5))
            return self._snapshot_id

    def close(self, timeout_s: float = 60.0) -> None:
        """Commits what is left and lets go of the store. A running episode becomes interrupted.

        Raises:
            StoreUnavailable: the store did not answer in time; what is left stays in the spool, if
                there is one, for the next writer.
        """
        if self._closed:
            return
        try:
            if self._running is not None:
                self.end_episode(Outcome.INTERRUPTED, "the writer was closed")
            self.flush(timeout_s)
        finally:
            with self._mutex:
                self._closed = True
                self._mutex.notify_all()
            self._thread.join(timeout=10)
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside

    def _breathe(self) -> None:
        """Keeps a fast producer of whole episodes from running ahead of the disk."""
        with self._mutex:
            if self._running is not None:
                self._cut(self._running)
            self._urgent = True
            self._mutex.notify_all()
            while sum(s.n_bytes for s in self._pending) > self._memory_limit // 4:
                self._raise_crash()
                if self._error is not None:
                    break
                self._mutex.wait(0.5)

    def _check(
        self, running: _Running, tick: Tick
    ) -> tuple[dict[str, Any], dict[str, bytes | np.ndarray]]:
        """Row of the tick, and its new frames. Nothing is changed before all of it is valid."""
        contract, size = self.contract, self.contract.action.size
        if tick.stamp_ns < 0:
            raise BadTick(f"stamp_ns is {tick.stamp_ns}; expected nanoseconds, not negative")
        if len(running.episode) and tick.stamp_ns <= running.episode.end_ns:
            raise BadTick(
                f"stamp_ns is {tick.stamp_ns}, not after the tick before at "
                f"{running.episode.end_ns}; stamps increase strictly inside an episode"
            )
        unknown = tick.observation.keys() - contract.observations.keys()
        if unknown:
            raise BadTick(
                f"found {sorted(unknown)}; cell {contract.cell!r} declares "
                f"{sorted(contract.observations)}"
            )
        row: dict[str, Any] = {}
        fresh: dict[str, bytes | np.ndarray] = {}
        stamps: dict[str, int] = {}
        for key, feature in contract.observations.items():
            value = tick.observation.get(key)
            before = running.last_stamp.get(key)
            if value is None:
                value, stamp = running.last.get(key), before
            else:
                stamp = int(tick.stamps.get(key, tick.stamp_ns))
                if stamp < 0 or (before is not None and stamp < before):
                    raise BadTick(
                        f"{key}: sensor stamp {stamp} ns after {before} ns; stamps are not "
                        "negative and never run backwards inside an episode"
                    )
            age = AGE_ABSENT if stamp is None else tick.stamp_ns - stamp
            row[f"{key}.age_ns"] = max(min(age, 2**31 - 1), AGE_ABSENT)
            if stamp is not None:
                stamps[key] = stamp
            if feature.is_image:
                last = running.last.get(key)
                if value is not None and value is not last and not _same(value, last):
                    fresh[key] = check_frame(key, feature, value)
            elif value is None:
                row[key] = np.full(feature.shape, np.nan, np.float32)
            else:
                row[key] = _vector(key, value, feature.shape[0])
        row["action"] = _vector("action", tick.action, size)
        nothing = np.full(size, np.nan, np.float32)
        for name, value in (
            ("action.policy", tick.action_policy),
            ("action.human", tick.action_human),
        ):
            row[name] = nothing if value is None else _vector(name, value, size)
        if not np.isfinite(tick.reward):
            raise BadTick(f"reward is {tick.reward}; expected a finite number")
        try:
            row["source"] = int(Source(tick.source))
        except ValueError:
            raise BadTick(f"source is {tick.source!r}; expected one of {list(Source)}") from None
        for name, value in (("late", tick.late), ("dropped", tick.dropped)):
            strangers = set(value) - running.features.keys()
            if strangers:
                raise BadTick(f"{name} names {sorted(strangers)}, which the contract does not")
            row[name] = sum(1 << running.features[k] for k in set(value))
        for name, value, bits in (
            ("policy_version", tick.policy_version, 32),
            ("chunk_id", tick.chunk_id, 32),
            ("chunk_step", tick.chunk_step, 16),
        ):
            if not 0 <= value < 1 << bits:
                raise BadTick(f"{name} is {value}; expected 0 to {(1 << bits) - 1}")
            row[name] = value
        row |= {
            "reward": tick.reward,
            "terminated": bool(tick.terminated),
            "truncated": bool(tick.truncated),
            "stamp_ns": tick.stamp_ns,
        }
        running.last_stamp.update(stamps)
        for key in contract.vectors:
            if key in tick.observation and tick.observation[key] is not None:
                running.last[key] = row[key]
        return row, fresh

    def _require_open(self) -> None:
        if self._closed:
            raise EpisodeState(f"{self.location}: the writer is closed")
        self._raise_crash()
        waiting = sum(s.n_bytes for s in self._pending)
        if self._error is not None and waiting > self._memory_limit:
            raise SpoolFull(
                f"{self.location}: {waiting >> 20} MiB wait for the store, the limit is "
                f"{self._memory_limit >> 20} MiB; {self._error}"
            )

    def _require_running(self) -> _Running:
        self._require_open()
        if self._running is None:
            raise EpisodeState("no episode is running; call begin_episode first")
        return self._running

    def _raise_crash(self) -> None:
        if self._crash is not None:
            raise StoreError(
                f"{self.location}: the writer's thread stopped: {self._crash!r}"
            ) from self._crash

    def _reset_rows(self, running: _Running) -> None:
        running.rows = {name: [] for name in self._columns}
        running.frames = {key: [] for key in self._images}

    def _cut(self, running: _Running) -> None:
        """Moves the ticks since the last cut into a segment. The mutex is held."""
        n = len(running.rows["stamp_ns"])
        episode = running.episode
        if n == 0 and episode.outcome is None:
            return
        first = {k: count - len(running.frames[k]) for k, count in running.n_frames.items()}
        segment = Segment(
            episode,
            running.rows,  # plain lists: the thread packs and encodes them
            running.frames,
            first,
        )
        self._reset_rows(running)
        self._pending.append(segment)

    def _work(self) -> None:
        next_cut = time.monotonic() + self._interval_s
        while True:
            with self._mutex:
                while not (self._closed or self._urgent):
                    left = next_cut - time.monotonic()
                    if left <= 0:
                        break
                    self._mutex.wait(left)
                if self._closed:
                    return
                self._urgent = False
                if self._running is not None:
                    self._cut(self._running)
                next_cut = time.monotonic() + self._interval_s
                batch = list(self._pending)
                self._busy = bool(batch)
            if not batch:
                continue
            try:
                self._deliver(batch)
            except StoreUnavailable as error:
                self._keep_for_later(batch, error)
            except BaseException as error:
                log.exception("%s: the writer's thread stopped", self.location)
                with self._mutex:
                    self._crash = error
                    self._busy = False
                    self._mutex.notify_all()
                return
            with self._mutex:
                self._busy = False
                self._mutex.notify_all()

    def _deliver(self, batch: list[Segment]) -> None:
        """Commits the segments, exactly once even if an earlier answer was lost."""
        for segment in batch:
            self._spool.restore(segment)
            segment.pack(self._columns, self._images)
        started = time.monotonic()
        if self._head is None:
            self._repository = open_repository(self.location)
            self._head = committing.read_head(self._repository, self.location)
            ids = [s.id for s in batch]
            if self._head.last_segment not in (self._last_segment, *ids):
                raise StoreBusy(
                    f"{self.location}: somebody else wrote here while the store was away; what "
                    f"waits is in {self._spool.folder}"
                )
            if self._head.last_segment in ids:
                done = ids.index(self._head.last_segment) + 1
                self._forget(batch[:done])
                batch = batch[done:]
        if batch:
            head = self._head
            self._head = None  # unknown while the commit is under way
            self._head = committing.commit(self._repository, self.location, head, batch)
        self._snapshot_id = self._head.snapshot_id
        self._last_segment = self._head.last_segment
        self._forget(batch)
        self._last_commit_s = time.monotonic() - started
        if self._error is not None:
            log.info("%s: the store answers again", self.location)
        self._error = None
        self._lock.refresh()

    def _forget(self, done: list[Segment]) -> None:
        self._spool.remove(done)
        with self._mutex:
            del self._pending[: len(done)]
            self._committed += sum(s.n_ticks for s in done)
            self._mutex.notify_all()

    def _keep_for_later(self, batch: list[Segment], error: StoreUnavailable) -> None:
        self._head = None
        if self._error is None:
            log.warning("%s", error)
        self._error = error
        try:
            self._spool.add(batch)
        except StoreUnavailable as full:
            self._error = full

    def _interrupt_open_episode(self, head: Head) -> Head:
        """Closes what a dead writer left open."""
        if not head.table_tail:
            return head
        last = Episode.from_json(head.table_tail[-1])
        if last.outcome is not None:
            return head
        log.warning("%s: episode %s was interrupted", self.location, last.uuid)
        closed = last.replace(
            outcome=Outcome.INTERRUPTED,
            notes="\n".join(n for n in (last.notes, "the writer died") if n),
        )
        return committing.replace_episodes(
            self._repository, self.location, head, {head.n_episodes - 1: closed}, "interrupted"
        )


def _same(a: Any, b: Any) -> bool:
    """Equal frames; cheap when they differ early, which camera frames do."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return (
            isinstance(a, np.ndarray)
            and isinstance(b, np.ndarray)
            and a.shape == b.shape
            and bool(np.array_equal(a, b))
        )
    return b is not None and a == b


def _vector(name: str, value: Any, size: int) -> np.ndarray:
    try:
        vector = np.array(value, np.float32)
    except (TypeError, ValueError) as error:
        raise BadTick(f"{name}: found {value!r}, expected {size} numbers ({error})") from None
    if vector.shape != (size,):
        raise BadTick(f"{name}: found shape {vector.shape}, expected ({size},)")
    if not np.isfinite(vector).all():
        raise BadTick(
            f"{name}: found {vector.tolist()}; NaN and infinity are not data. Leave the feature "
            "out of the tick when the sensor gave nothing"
        )
    return vector
