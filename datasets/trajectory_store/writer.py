"""`StoreWriter`: takes ticks from a control loop, commits them from a background thread.

`append` touches memory only. Every `commit_interval_s`, and when an episode ends, the ticks so far
become a segment and the thread commits it; a segment that cannot be committed waits in memory and
in the local spool (`spool.py`) until the store answers again.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args
from uuid import UUID, uuid4

import numpy as np

from trajectory_store.commit import commit, replace_episodes
from trajectory_store.contract import Contract
from trajectory_store.durability import prune_backups, restore_repo_file, settle
from trajectory_store.errors import (
    BadTick,
    EpisodeState,
    SpoolFull,
    StoreBusy,
    StoreError,
    StoreUnavailable,
)
from trajectory_store.head import Head, is_store, read_head
from trajectory_store.layout import create, evolve
from trajectory_store.lock import WriterLock
from trajectory_store.reader import Store
from trajectory_store.repository import (
    create_repository,
    normalise,
    open_repository,
)
from trajectory_store.running import RunningEpisode
from trajectory_store.schema import (
    Episode,
    Outcome,
    Source,
    Tick,
    columns,
    frame_arrays,
)
from trajectory_store.segment import Segment
from trajectory_store.spool import Spool

log = logging.getLogger(__name__)


Durability = Literal["power_loss", "process"]
"""What a commit on a local disk survives. On S3 it is durable when it returns."""
_COMMITS_BETWEEN_PRUNING = 64


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
        durability: Durability = "power_loss",
    ) -> None:
        """See `create_or_open`."""
        self.location = normalise(path)
        self.contract = contract
        self.writer = writer or contract.cell
        self._interval_s = commit_interval_s
        self._memory_limit = memory_limit_bytes
        if durability not in get_args(Durability):
            raise StoreError(
                f"durability is {durability!r}; expected one of {', '.join(get_args(Durability))}"
            )
        self._durable = durability == "power_loss"
        self._columns = columns(contract)
        self._images = frame_arrays(contract)
        self._mutex = threading.Condition()
        self._pending: list[Segment] = []
        self._running: RunningEpisode | None = None
        self._changes: list[tuple[str, Callable[[Episode], Episode]]] = []
        self._busy = self._closed = self._urgent = False
        self._error: StoreError | None = None
        self._crash: BaseException | None = None
        self._committed = self._commits = 0
        self._last_commit_s = 0.0
        self._lock = WriterLock(self.location, self.writer)
        self._head: Head | None = None
        self._lock.acquire()
        try:
            restore_repo_file(self.location)
            if not is_store(self.location):
                create_repository(
                    self.location,
                    lambda r: create(r, self.location, contract, self.writer),
                )
                self._lock.refresh()
            self._repository = open_repository(self.location)
            head = read_head(self._repository, self.location)
            if contract.sha256 != head.contract.sha256:
                evolve(self._repository, self.location, head, contract)
                head = read_head(self._repository, self.location)
            self._spool = Spool(self.location, spool, spool_limit_bytes)
            for segment in self._spool.left_behind(head.last_segment):
                head = commit(
                    self._repository,
                    self.location,
                    head,
                    [segment],
                    "spool",
                    durable=self._durable,
                )
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
                what waits in memory when the spool cannot be written either;
                `durability="process"` leaves out the two syncs of a commit: what is committed
                then survives the death of the process, not always that of the machine.

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
            self._running = RunningEpisode(self.contract, episode, self._features)
        return name

    def append(self, tick: Tick) -> None:
        """Adds a tick of the running episode. Memory only: returns in well under a millisecond.

        Raises:
            EpisodeState: no episode is running.
            BadTick: something in it contradicts the contract; the tick is not stored.
            SpoolFull: the store has not taken anything for too long.
        """
        with self._mutex:
            self._require_running().append(tick)

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

    def change_episode(self, uuid: str, change: Callable[[Episode], Episode]) -> None:
        """Rewrites the entry of a finished episode, after everything appended so far.

        For labels that come while this writer holds the store. Never touches the disk: the change
        follows in the background (`flush` waits), and is dropped with a warning if there is no such
        episode then.
        """
        with self._mutex:
            self._require_open()
            self._changes.append((uuid, change))
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
        action_policy: np.ndarray | None = None,
        action_human: np.ndarray | None = None,
        instruction: str = "",
        operator: str = "",
        policy_version: int = 0,
        uuid: str | None = None,
        notes: str = "",
    ) -> str:
        """Writes a whole episode from arrays, for demonstrations and converters.

        Args:
            observation: per feature (T, D) or (T, height, width, C), or a sequence of T encoded
                frames, read one after the other; None in place of a frame means no new one since
                the tick before.
            action: (T, A).
            source: one for all, or (T,).
            stamp_ns: (T,); default: the contract's control period from 0.
            terminated: (T,); default: at the last tick of a success or failure.
            action_policy, action_human: (T, A), NaN where there was none.

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
                        observation={
                            k: value
                            for k, values in observation.items()
                            if (value := values[i]) is not None
                        },
                        action=action[i],
                        action_policy=_proposal(action_policy, i),
                        action_human=_proposal(action_human, i),
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
            loose = self._running.n_waiting if self._running else 0
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
            while self._pending or self._busy or self._changes:
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

    def _require_running(self) -> RunningEpisode:
        self._require_open()
        if self._running is None:
            raise EpisodeState("no episode is running; call begin_episode first")
        return self._running

    def _raise_crash(self) -> None:
        if self._crash is not None:
            raise StoreError(
                f"{self.location}: the writer's thread stopped: {self._crash!r}"
            ) from self._crash

    def _cut(self, running: RunningEpisode) -> None:
        """Moves the ticks since the last cut into a segment. The mutex is held."""
        if (segment := running.cut()) is not None:
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
                batch, changes = list(self._pending), list(self._changes)
                self._busy = bool(batch or changes)
            if not (batch or changes):
                continue
            try:
                if batch:
                    self._deliver(batch)
                if changes:
                    self._change(changes)
            except StoreUnavailable as error:
                self._keep_for_later(list(self._pending), error)
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
            self._head = read_head(self._repository, self.location)
            ids = [s.id for s in batch]
            if self._head.last_segment not in (self._last_segment, *ids):
                raise StoreBusy(
                    f"{self.location}: somebody else wrote here while the store was away; what "
                    f"waits is in {self._spool.folder}"
                )
            if self._head.last_segment in ids:
                if self._durable:
                    settle(self.location)
                done = ids.index(self._head.last_segment) + 1
                self._forget(batch[:done])
                batch = batch[done:]
        if batch:
            head = self._head
            self._head = None  # unknown while the commit is under way
            self._head = commit(self._repository, self.location, head, batch, durable=self._durable)
        self._snapshot_id = self._head.snapshot_id
        self._last_segment = self._head.last_segment
        self._forget(batch)
        self._last_commit_s = time.monotonic() - started
        if self._error is not None:
            log.info("%s: the store answers again", self.location)
        self._error = None
        self._lock.refresh()
        self._commits += 1
        if self._commits % _COMMITS_BETWEEN_PRUNING == 0:
            prune_backups(self.location)

    def _change(self, changes: list[tuple[str, Callable[[Episode], Episode]]]) -> None:
        """Rewrites rows of the episode table; what `relabel` does while nobody else writes."""
        head = self._head
        if head is None:
            head = read_head(self._repository, self.location)
        table = Store(self.location).table
        numbers = {episode.uuid: number for number, episode in enumerate(table)}
        changed: dict[int, Episode] = {}
        for uuid, change in changes:
            number = numbers.get(uuid)
            if number is None or table[number].is_open:
                log.warning("%s: no finished episode %s to change", self.location, uuid)
                continue
            changed[number] = change(changed.get(number, table[number]))
        if changed:
            self._head = None  # unknown while the commit is under way
            self._head = replace_episodes(self._repository, self.location, head, changed, "relabel")
            self._snapshot_id = self._head.snapshot_id
        self._error = None
        with self._mutex:
            del self._changes[: len(changes)]
            self._mutex.notify_all()

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
        return replace_episodes(
            self._repository, self.location, head, {head.n_episodes - 1: closed}, "interrupted"
        )


def _proposal(proposals: np.ndarray | None, tick: int) -> np.ndarray | None:
    if proposals is None or np.isnan(proposals[tick]).all():
        return None
    return proposals[tick]
