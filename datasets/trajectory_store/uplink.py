"""The uplink: delivers a robot's closed episodes to the fleet, each exactly once.

    vla-post uplink STORE DEST

A robot records into its own disk and needs nobody for that. The uplink, a process of its own, looks
at that store and copies what has been closed to DEST/NAME, a store that only this robot feeds. The
local store is the queue: an announcement means "look now" and nothing else, so lost, repeated or
reordered ones change nothing. What was delivered is what DEST's table says; `copying.py` says why
nothing comes twice. A process that dies begins the episode in transit again.

Labels that change on the robot after delivery follow. Files beside the store:

```text
.NAME.uplink-HASH.json     health, rewritten about once a second
.NAME.uplink-HASH.jsonl    uuid and labels of each delivery; only so that a label that was changed
                           here is told from one that was changed at DEST, and for `--status`
```
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from trajectory_store.copying import Feeder, Target, fit_to_copy
from trajectory_store.errors import NotAStore, StoreBusy, StoreError
from trajectory_store.reader import Store
from trajectory_store.repository import find_stores, is_url, normalise, set_many
from trajectory_store.schema import Episode

log = logging.getLogger(__name__)
HEALTH_S = 1.0
BATCH_BYTES, BATCH_EPISODES = 4 << 20, 32
"""Episodes that wait go in one commit up to so many; a commit costs much the same for one."""
LONGEST_PAUSE_S = 30.0
"""Between two attempts while DEST does not answer; the first pause is `poll_s`."""


@dataclass(frozen=True, kw_only=True)
class UplinkConfig:
    """What goes where."""

    store: str | Path
    """A robot's local store, or a folder of several; it may not exist yet."""
    dest: str | Path
    """Prefix of the fleet: a folder or s3://bucket/prefix. Episodes go to DEST/NAME."""
    name: str = ""
    """Of this robot at DEST; empty: the store's folder name. With several stores each keeps its
    own."""
    bandwidth_mbit_s: float = 0.0
    """Megabits a second of what is sent; 0 does not limit. In any T seconds at most so much times T
    goes, and one burst beyond: see `Bandwidth`."""
    poll_s: float = 0.5
    """How often the local store is looked at, in seconds."""
    take_over: bool = False
    """DEST/NAME was fed from a store that is gone for good; this one goes on in its place."""

    def __post_init__(self) -> None:
        if self.bandwidth_mbit_s < 0 or self.poll_s <= 0:
            raise ValueError(
                f"bandwidth_mbit_s is {self.bandwidth_mbit_s} and poll_s {self.poll_s}; expected "
                "0 (no limit) or more, and more than 0"
            )
        if is_url(str(self.store)):
            raise ValueError(f"{self.store}: an uplink reads a local store; DEST may be on S3")
        normalise(self.dest)  # refuses what is neither a folder nor on S3
        if "/" in self.name:
            raise ValueError(f"name is {self.name!r}; it is one folder name under DEST")


@dataclass
class UplinkHealth:
    """Of one store's delivery; what `health.json` holds."""

    store: str
    dest: str
    ok: bool = True
    error: str = ""
    """Why the last attempt failed, in words for an operator; empty when ok."""
    backlog_episodes: int = 0
    """Closed here and not yet delivered."""
    backlog_bytes: int = 0
    """Of those, about."""
    oldest_s: float = 0.0
    """Since the oldest of those began, in seconds of wall clock."""
    delivered: int = 0
    """Episodes, by this process."""
    delivered_bytes: int = 0
    """Sent by this process, without the object storage's own overhead."""
    last_delivery_ns: int = 0
    """Wall clock; 0 before the first."""
    attempts_failed: int = 0
    """In a row."""
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    updated_ns: int = 0


class Bandwidth:
    """A token bucket that is empty while nothing is sent: in any T seconds at most `mbit_s` times T
    is spent, and the largest single spending beyond. Waits end early when `stop` is set.

    The uplink spends `burst_bytes` at a time, or one object if that is larger (a shard: a second or
    so of one camera's pictures), which the client of the object storage sends at the line's speed.
    """

    def __init__(self, mbit_s: float, stop: threading.Event) -> None:
        self._rate = mbit_s * 1e6 / 8
        self.burst_bytes = 1 << 20
        """A quarter of a second, if that is less."""
        if self._rate > 0:
            self.burst_bytes = min(self.burst_bytes, max(int(self._rate / 4), 1 << 14))
        self._free_at = 0.0
        self._stop = stop

    def spend(self, n_bytes: int) -> None:
        if self._rate <= 0:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now)
        if self._free_at > now:
            self._stop.wait(self._free_at - now)
        self._free_at += n_bytes / self._rate


class Stopped(Exception):
    """Raised inside an upload when the uplink was told to stop."""


class Uplink:
    """Delivers until `stop` is set. One process; `run` blocks, `health` may be read meanwhile."""

    def __init__(self, config: UplinkConfig, stop: threading.Event | None = None) -> None:
        self.config = config
        self.stop = stop or threading.Event()
        self._wake = threading.Event()
        self._bandwidth = Bandwidth(config.bandwidth_mbit_s, self.stop)
        self.routes: dict[str, Route] = {}
        """By local store."""

    @property
    def health(self) -> list[UplinkHealth]:
        return [route.health for route in list(self.routes.values())]

    def announce(self, uuid: str = "") -> None:
        """Somebody says that an episode is ready: look now. Wrong, repeated and late ones are fine.

        Args:
            uuid: not used; what is closed and not delivered is asked of the stores themselves.
        """
        self._wake.set()

    def run(self) -> None:
        """Raises StoreBusy when another uplink delivers the same store to the same place."""
        try:
            while not self.stop.is_set():
                self.round()
                self._wake.wait(self.config.poll_s)
                self._wake.clear()
        finally:
            self.close()

    def end(self) -> None:
        """`run` returns soon; the episode in transit is delivered by the next process."""
        self.stop.set()
        self._wake.set()

    def close(self) -> None:
        for route in self.routes.values():
            route.close()

    def round(self) -> int:
        """Delivers what is closed now, from every store; returns how many episodes went.

        What goes wrong with one store is in its health, and the others go on.
        """
        self._find_stores()
        return sum(route.deliver() for route in self.routes.values() if not self.stop.is_set())

    def _find_stores(self) -> None:
        local = normalise(self.config.store)
        found = list(find_stores(local)) if Path(local).is_dir() else []
        for place in found:
            if place in self.routes:
                continue
            name = self.config.name if place == local and self.config.name else Path(place).name
            with contextlib.suppress(NotAStore):  # its writer has not made the first commit yet
                self.routes[place] = Route(
                    Store(place),
                    f"{normalise(self.config.dest)}/{name}",
                    self._bandwidth,
                    self.stop,
                    self.config.poll_s,
                    self.config.take_over,
                )


class Route:
    """One local store and its place at the fleet."""

    def __init__(
        self,
        store: Store,
        dest: str,
        bandwidth: Bandwidth,
        stop: threading.Event,
        poll_s: float,
        take_over: bool = False,
    ) -> None:
        """Raises StoreBusy: another uplink has this route."""
        if store.location == dest:
            raise StoreError(f"{dest}: cannot be delivered to itself")
        self.health = UplinkHealth(store=store.location, dest=dest)
        self._store, self._stop, self._bandwidth = store, stop, bandwidth
        writer = f"uplink of {store.location}"
        self._target = Target(dest, writer, put=self._put, take_over=take_over)
        self._journal = Journal(store.location, dest)
        self._poll_s = poll_s
        self._sizes: dict[str, int] = {}
        self._waits: dict[str, Episode] = {}
        self._not_before = self._told = 0.0
        self._changed = True
        """The local store has moved since the last round that succeeded."""
        self._measure()
        self._tell(force=True)

    def close(self) -> None:
        self._tell(force=True)
        self._journal.close()

    def deliver(self) -> int:
        """One round; returns how many episodes went. Never raises what a later round may cure."""
        if time.monotonic() < self._not_before:
            self._tell()
            return 0
        before = self.health.delivered
        try:
            self._changed |= self._store.refresh()
            if self._changed:
                self._measure()
                # The journal is held against the target once, even if nothing waits.
                first = not self._target.episodes and bool(self._journal.labels)
                if self._waits or self._relabelled() or first:
                    with self._target.held(self._store.contract, Feeder.of(self._store)):
                        self._deliver()
                self._changed = False
                self._tell(force=True)
            self.health.ok, self.health.error, self.health.attempts_failed = True, "", 0
        except Stopped:
            pass
        except (StoreError, OSError) as error:
            self._failed(error)
        self._tell()
        return self.health.delivered - before

    def _failed(self, error: Exception) -> None:
        if self.health.error != str(error):
            log.warning("%s", error)
        self.health.ok, self.health.error, self._changed = False, str(error), True
        self.health.attempts_failed += 1
        pause = self._poll_s
        if not isinstance(error, StoreBusy):  # a busy store is worth asking again at once
            pause = min(pause * 2.0**self.health.attempts_failed, LONGEST_PAUSE_S)
        self._not_before = time.monotonic() + pause
        self._tell(force=True)

    def _deliver(self) -> None:
        """The target is held."""
        there = self._target.episodes
        if self._journal.forget(self._journal.labels.keys() - there.keys()):
            log.warning("%s lost episodes that it had; they go again", self.health.dest)
            self._measure()
        here = {e.uuid: e for e in self._store.table}
        for batch in self._batches():
            if self._stop.is_set():
                raise Stopped
            added = self._target.add_all(self._store, [here[uuid] for uuid in batch])
            if added:
                self.health.delivered += len(added)
                self.health.last_delivery_ns = time.time_ns()
            for uuid in batch:
                self._journal.add(uuid, _labels(there[uuid]))
                del self._waits[uuid]
            self._count()
            self._tell(force=True)
        relabelled = self._relabelled()
        changed = {u: _with_labels(there[u], here[u]) for u in relabelled}
        differing = {u: e for u, e in changed.items() if e != there[u]}
        if differing:
            self._target.change(differing)
        for uuid in relabelled:
            self._journal.add(uuid, _labels(here[uuid]))

    def _batches(self) -> list[list[str]]:
        """What waits, as commits: a large episode alone, small ones together."""
        out: list[list[str]] = []
        room = 0
        for uuid in self._waits:
            size = self._sizes[uuid]
            if not out or size > room or len(out[-1]) == BATCH_EPISODES:
                out.append([])
                room = BATCH_BYTES
            out[-1].append(uuid)
            room -= size
        return out

    def _put(self, session_store: Any, values: dict[str, bytes]) -> None:
        """Sends chunks, metadata first, at the pace of the bandwidth."""
        nodes = {k: v for k, v in values.items() if k.endswith("zarr.json")}
        chunks = {k: v for k, v in values.items() if k not in nodes}
        batches, room = [nodes] if nodes else [], 0
        for key, data in chunks.items():
            if not batches or room < len(data):
                batches.append({})
                room = self._bandwidth.burst_bytes
            batches[-1][key] = data
            room -= len(data)
        for batch in batches:
            size = sum(map(len, batch.values()))
            self._bandwidth.spend(size)
            if self._stop.is_set():
                raise Stopped
            self._target.still_held()
            set_many(session_store, batch)
            self.health.delivered_bytes += size
            self._tell()

    def _measure(self) -> None:
        """What waits, and how much it is."""
        done = self._journal.labels
        self._waits = {
            e.uuid: e for e in self._store.table if fit_to_copy(e) and e.uuid not in done
        }
        for uuid, episode in self._waits.items():
            if uuid not in self._sizes:
                self._sizes[uuid] = _size(self._store, episode)
        self._count()

    def _count(self) -> None:
        self.health.backlog_episodes = len(self._waits)
        self.health.backlog_bytes = sum(self._sizes[uuid] for uuid in self._waits)

    def _relabelled(self) -> list[str]:
        """Episodes that were delivered with other labels than they have now."""
        done = self._journal.labels
        return [
            e.uuid
            for e in self._store.table
            if e.uuid in done and not e.purged and done[e.uuid] != _labels(e)
        ]

    def _tell(self, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._told < HEALTH_S:
            return
        self._told = now
        oldest = min((e.created_ns for e in self._waits.values()), default=0)
        self.health.oldest_s = round((time.time_ns() - oldest) / 1e9, 3) if oldest else 0.0
        self.health.updated_ns = time.time_ns()
        self._journal.write_health(self.health)


class Journal:
    """What this robot has delivered to one place, and the health file. Only a memory: with both
    files gone, the table at DEST still says everything."""

    def __init__(self, store: str, dest: str) -> None:
        """Raises StoreBusy: another uplink has this route."""
        self.path = _beside(store, dest, ".jsonl")
        self.labels: dict[str, str] = {}
        self._health = self.path.with_suffix(".json")
        file = self.path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise StoreBusy(
                f"{store}: another uplink delivers it to {dest}; see `vla-post uplink --status`"
            ) from None
        self._file: IO[bytes] = file
        self.labels = read_journal(self.path)
        whole = file.tell() == 0 or self.path.read_bytes().endswith(b"\n")
        if not whole:  # the last process died in the middle of a line
            file.write(b"\n")
            file.flush()

    def add(self, uuid: str, labels: str) -> None:
        if self.labels.get(uuid) != labels:
            self.labels[uuid] = labels
            self._write(uuid, labels)

    def forget(self, uuids: Iterable[str]) -> bool:
        """True when there was anything to forget."""
        gone = list(uuids)
        for uuid in gone:
            del self.labels[uuid]
            self._write(uuid, None)
        return bool(gone)

    def _write(self, uuid: str, labels: str | None) -> None:
        line = json.dumps({"uuid": uuid, "labels": labels})
        with contextlib.suppress(OSError):  # a full disk must not stop the delivery
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def write_health(self, health: UplinkHealth) -> None:
        part = self._health.with_suffix(".part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(asdict(health), indent=2) + "\n")
            part.replace(self._health)

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> dict[str, str]:
    """uuid -> labels at its last delivery; empty where there is no journal."""
    found: dict[str, str | None] = {}
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            found[entry["uuid"]] = entry["labels"]
    return {uuid: labels for uuid, labels in found.items() if labels is not None}


def read_health(store: str | Path) -> Iterator[UplinkHealth]:
    """Of every uplink that has ever delivered a store, or the stores of a folder; the backlog is
    counted now, also while no uplink runs."""
    local = normalise(store)
    for place in find_stores(local) if Path(local).is_dir() else ():
        folder = Path(place).parent
        for path in sorted(folder.glob(f".{Path(place).name}.uplink-*.json")):
            health = UplinkHealth(**json.loads(path.read_text()))
            done = read_journal(path.with_suffix(".jsonl"))
            reader = Store(place)
            waits = [e for e in reader.table if fit_to_copy(e) and e.uuid not in done]
            oldest = min((e.created_ns for e in waits), default=0)
            health.backlog_episodes = len(waits)
            health.backlog_bytes = sum(_size(reader, e) for e in waits)
            health.oldest_s = round((time.time_ns() - oldest) / 1e9, 3) if oldest else 0.0
            yield health


def _beside(store: str, dest: str, suffix: str) -> Path:
    place = Path(store)
    digest = hashlib.sha256(dest.encode()).hexdigest()[:8]
    return place.parent / f".{place.name}.uplink-{digest}{suffix}"


_LABELS = ("task", "instruction", "outcome", "notes", "problems", "deleted", "damaged")
"""What may change after an episode was closed, and follows to the fleet."""


def _labels(episode: Episode) -> str:
    values: Sequence[Any] = [getattr(episode, name) for name in _LABELS]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _with_labels(there: Episode, here: Episode) -> Episode:
    return there.replace(**{name: getattr(here, name) for name in _LABELS})


def _size(store: Store, episode: Episode) -> int:
    """Bytes of an episode: its rows, uncompressed, and its frames."""
    total = len(episode) * sum(c.row_bytes for c in store.columns.values())
    for array in store.frames.values():
        places = store.read(array.reference, episode)
        places = np.unique(places[places[:, 0] >= 0], axis=0)
        total += int(places[:, 2].sum())
    return total
