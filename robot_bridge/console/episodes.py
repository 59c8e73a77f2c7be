"""Recorded episodes for people: list, film strip, traces, labels.

Reads any stores under a prefix. Labels of a store that nobody writes are changed directly; while a
recorder holds it, the recorder is asked through the cell's events and the answer is what the store
says afterwards.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import simplejpeg

from trajectory_store import (
    Episode,
    FleetView,
    NotAStore,
    Outcome,
    Source,
    Store,
    StoreBusy,
    StoreError,
)
from trajectory_store.maintenance import relabel

if TYPE_CHECKING:
    from robot_bridge.console.desk import Desk

REFRESH_S = 1.0
LABEL_WAIT_S = 8.0
"""For a recorder to write a label: a commit interval, and a busy machine."""
MAX_POINTS = 600
"""Of one trace that is sent to a browser."""
OVERLAYS = ("q", "value", "advantage", "doubt")
"""First words of columns that are drawn over an episode, when a store has them."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Entry:
    store: Store
    episode: Episode


class Library:
    """Every episode under a prefix. Methods that read files are coroutines and use threads.

    Args:
        prefix: a folder of stores, one store, or `s3://bucket/prefix`; None for no stores.
    """

    def __init__(self, prefix: str | Path | None) -> None:
        self._prefix = prefix
        self._view: FleetView | None = None
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._looked_s = -1e9

    async def listing(
        self,
        *,
        cell: str = "",
        task: str = "",
        outcome: str = "",
        limit: int = 100,
        offset: int = 0,
    ) -> dict[str, Any]:
        """Newest first."""
        return await self._in_thread(
            lambda: self._listing(cell=cell, task=task, outcome=outcome, limit=limit, offset=offset)
        )

    async def detail(self, uuid: str) -> dict[str, Any]:
        """Traces and cameras of one episode. Raises KeyError for an unknown one."""
        return await self._in_thread(lambda: self._detail(self._entry(uuid)))

    async def picture(self, uuid: str, camera: str, step: int) -> bytes:
        """JPEG of a camera at a step. Raises KeyError."""
        return await self._in_thread(lambda: self._picture(self._entry(uuid), camera, step))

    async def summaries(self) -> list[Episode]:
        """All finished episodes."""
        return await self._in_thread(lambda: [e.episode for e in self._entries.values()])

    async def label(
        self, uuid: str, changes: Mapping[str, str], desk: "Desk", *, by: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Changes outcome, task, instruction or notes. Returns the labels before and after.

        Raises:
            ValueError: unknown episode or label, or nobody could write it.
        """
        try:
            entry = await self._in_thread(lambda: self._entry(uuid))
        except KeyError as error:
            raise ValueError(str(error.args[0])) from None
        if "outcome" in changes and changes["outcome"] not in list(Outcome):
            raise ValueError(
                f"outcome is {changes['outcome']!r}; expected one of {', '.join(Outcome)}"
            )
        if "task" in changes and changes["task"] not in {
            t for c in entry.store.contracts.values() for t in c.tasks
        }:
            raise ValueError(f"the store knows no task {changes['task']!r}")
        before = _labels(entry.episode)
        try:
            await asyncio.to_thread(relabel, entry.store.location, [uuid], **changes)
        except StoreBusy:
            if desk.link is None or not desk.online:
                raise
            desk.link.note("label", {"episode": uuid, "by": by, **changes})
        after = await self._wait_for(uuid, changes)
        return before, after

    async def _wait_for(self, uuid: str, changes: Mapping[str, str]) -> dict[str, Any]:
        deadline = time.monotonic() + LABEL_WAIT_S
        while True:
            self._looked_s = -1e9
            entry = await self._in_thread(lambda: self._entry(uuid))
            labels = _labels(entry.episode)
            if all(labels[name] == value for name, value in changes.items()):
                return labels
            if time.monotonic() > deadline:
                raise ValueError(
                    "the recorder has not written the label yet; look again in a moment, and at "
                    "its log if it stays like this"
                )
            await asyncio.sleep(0.2)

    # In a thread ----------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], T]) -> T:
        def locked() -> T:
            with self._lock:
                self._look()
                return work()

        return await asyncio.to_thread(locked)

    def _look(self) -> None:
        """Sees what was recorded since the last time."""
        if self._prefix is None or time.monotonic() - self._looked_s < REFRESH_S:
            return
        self._looked_s = time.monotonic()
        try:
            if self._view is None:
                self._view = FleetView(self._prefix)
            elif not self._view.refresh():
                return
        except NotAStore:
            return  # the recorder makes it with its first episode
        self._entries = {
            episode.uuid: _Entry(store, episode)
            for store in self._view.stores
            for episode in store.episodes
        }

    def _entry(self, uuid: str) -> _Entry:
        entry = self._entries.get(uuid)
        if entry is None:
            raise KeyError(f"no episode {uuid[:40]!r}")
        return entry

    def _listing(
        self, *, cell: str, task: str, outcome: str, limit: int, offset: int
    ) -> dict[str, Any]:
        found = [
            entry
            for entry in self._entries.values()
            if (not cell or entry.episode.cell == cell)
            and (not task or entry.episode.task == task)
            and (not outcome or entry.episode.outcome == outcome)
        ]
        found.sort(key=lambda entry: entry.episode.created_ns, reverse=True)
        page = found[offset : offset + limit]
        return {
            "total": len(found),
            "episodes": [self._row(entry) for entry in page],
            "tasks": sorted({entry.episode.task for entry in self._entries.values()}),
        }

    def _row(self, entry: _Entry) -> dict[str, Any]:
        episode = entry.episode
        steps = max(1, len(episode))
        return {
            "uuid": episode.uuid,
            "cell": episode.cell,
            "task": episode.task,
            "instruction": episode.instruction,
            "operator": episode.operator,
            "outcome": episode.outcome,
            "version": episode.policy_version,
            "steps": len(episode),
            "duration_s": round(episode.duration_s, 2),
            "created_s": round(episode.created_ns / 1e9, 1),
            "interventions": episode.interventions,
            "human_share": round(episode.ticks_by(Source.HUMAN) / steps, 4),
            "runs": [
                [start, stop, Source(source).name.lower()] for start, stop, source in episode.runs()
            ],
            "notes": episode.notes,
            "problems": list(episode.problems),
            "cameras": [key for key, _ in episode.first_seen if key in entry.store.frames],
        }

    def _detail(self, entry: _Entry) -> dict[str, Any]:
        store, episode = entry.store, entry.episode
        contract = store.contracts.get(episode.contract_sha256, store.contract)
        n = len(episode)
        steps = np.unique(np.linspace(0, max(0, n - 1), min(n, MAX_POINTS)).astype(np.int64))
        rows = episode.first_row + steps

        def column(name: str) -> np.ndarray:
            return store.read(name, rows)

        stamps = column("stamp_ns") if n else np.zeros(0, np.int64)
        series: list[dict[str, Any]] = []
        for source, name in (
            ("sent", "action"),
            ("policy", "action.policy"),
            ("human", "action.human"),
        ):
            if n:
                series.append(
                    {
                        "name": source,
                        "axes": list(contract.action.names),
                        "values": _table(column(name)),
                    }
                )
        late = column("late") if n else np.zeros(0, np.uint32)
        dropped = column("dropped") if n else np.zeros(0, np.uint32)
        overlays = {
            name: _list(column(name))
            for name, found in store.columns.items()
            if n and not found.shape and name.replace("/", ".").split(".")[0] in OVERLAYS
        }
        return {
            **self._row(entry),
            "steps_shown": steps.tolist(),
            "time_s": _list((stamps - episode.start_ns) / 1e9),
            "series": series,
            "reward": _list(column("reward")) if n else [],
            "overlays": overlays,
            "late_ticks": int((late != 0).sum()),
            "dropped_ticks": int((dropped != 0).sum()),
            "first_seen": dict(episode.first_seen),
        }

    def _picture(self, entry: _Entry, camera: str, step: int) -> bytes:
        store, episode = entry.store, entry.episode
        first = dict(episode.first_seen).get(camera)
        if camera not in store.frames or first is None or not 0 <= step < len(episode):
            raise KeyError("no such picture")
        row = episode.first_row + max(step, first)
        try:
            data = store.read_encoded(camera, [row])[0]
            if data[:2] == b"\xff\xd8":
                return data
            image = store.read(camera, [row])[0]
        except StoreError as error:
            raise KeyError(str(error)) from error
        if image.dtype != np.uint8:  # depth in mm: nearer is brighter, for looking at only
            image = (255 - np.clip(image / 16.0, 0, 255)).astype(np.uint8)
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image))


def _labels(episode: Episode) -> dict[str, Any]:
    return {
        "outcome": str(episode.outcome),
        "task": episode.task,
        "instruction": episode.instruction,
        "notes": episode.notes,
    }


def _list(values: np.ndarray) -> list[float | None]:
    return [round(float(v), 5) if np.isfinite(v) else None for v in values]


def _table(values: np.ndarray) -> Sequence[list[float | None]]:
    return [_list(row) for row in values]
