"""The learner's progress and the policy versions, for people.

Curves come from `metrics.jsonl` as it grows, success and interventions from the episodes, versions
from the registry. What a learner does not write is not shown.
"""

import json
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from trajectory_store import Episode, Outcome, Source
from vla_post.evaluation.paired import wilson_interval
from vla_post.export.registry import Canary, Registry, RegistryError, Version, open_registry

Action = Literal["activate", "rollback", "canary", "withdraw"]
"""What a person may do with versions."""
Plan = Literal[Action, "shadow"]
"""What can be told beforehand. A shadow is no matter of the registry: a cell's runner is asked."""
MAX_POINTS = 400
"""Of one curve; longer ones are thinned by halves."""
MAX_CURVES = 60
LABELLED = (Outcome.SUCCESS, Outcome.FAILURE)
MIX = "mix/"
"""Metrics `mix/TASK/online` and `mix/TASK/offline`: what share of a batch is drawn from where."""
MIX_UPDATES = 50
"""Updates over which these shares are averaged. A fixed mixture is written once: `mixing`."""
FRESHNESS = ("tick_to_batch_s", "update_to_robot_s", "versions_behind")
"""Numbers of single episodes and versions in the metrics; the median of the last 20 is shown."""


class Curves:
    """Follows a metrics file; keeps each number's curve at a bounded length."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._offset = 0
        self._lock = threading.Lock()
        self._curves: dict[str, list[tuple[float, float]]] = {}
        self._every: dict[str, int] = {}
        self._count: dict[str, int] = defaultdict(int)
        self._mix: deque[dict[str, float]] = deque(maxlen=MIX_UPDATES)
        self._fixed_mix: dict[str, float] = {}
        self._fresh = {name: deque[float](maxlen=20) for name in FRESHNESS}
        self.published: list[dict[str, float]] = []
        self.last: dict[str, Any] = {}
        self.changed_s = 0.0

    def look(self) -> None:
        """Reads what was appended since the last time; a half-written line waits."""
        if self._path is None:
            return
        with self._lock:
            try:
                size = self._path.stat().st_size
                if size < self._offset:  # a new run wrote over the old one
                    self._offset = 0
                    self._curves.clear()
                    self._every.clear()
                    self._count.clear()
                    self.published.clear()
                    self._mix.clear()
                    self._fixed_mix.clear()
                    for values in self._fresh.values():
                        values.clear()
                if size == self._offset:
                    return
                with self._path.open("rb") as file:
                    file.seek(self._offset)
                    data = file.read(8 << 20)
                self.changed_s = self._path.stat().st_mtime
            except OSError:
                return
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict):
            return
        if "published" in row:
            self.published.append(
                {k: row[k] for k in ("published", "at_update", "time_s") if k in row}
            )
        for name, values in self._fresh.items():
            if _is_number(row.get(name)):
                values.append(float(row[name]))
        mix = {
            name.removeprefix(MIX): float(value)
            for name, value in row.items()
            if name.startswith(MIX) and _is_number(value)
        }
        if row.get("mixing") == "fixed":
            self._fixed_mix = mix
            self._mix.clear()
        elif mix:
            self._mix.append(mix)
        update = row.get("update")
        if not isinstance(update, int | float) or "learner" in row:
            return
        self.last = row
        for name, value in row.items():
            known = name in ("update", "time_s", "stamp_s", "version") or name.startswith(MIX)
            if not known and _is_number(value):
                self._add(name, float(update), float(value))

    def _add(self, name: str, update: float, value: float) -> None:
        if name not in self._curves and len(self._curves) >= MAX_CURVES:
            return
        curve = self._curves.setdefault(name, [])
        every = self._every.setdefault(name, 1)
        self._count[name] += 1
        if self._count[name] % every:
            return
        curve.append((update, value))
        if len(curve) > 2 * MAX_POINTS:
            del curve[::2]
            self._every[name] = every * 2

    @property
    def mixture_updates(self) -> int:
        """Updates over which `mixture` is averaged; 0 for a fixed one."""
        return len(self._mix)

    def mixture(self) -> list[dict[str, Any]]:
        """Of each task: shares of fresh and static data, in the mean of the last updates."""
        with self._lock:
            rows = list(self._mix) or ([self._fixed_mix] if self._fixed_mix else [])
        shares: dict[str, dict[str, float]] = {}
        for row in rows:
            for name, value in row.items():
                task, _, which = name.rpartition("/")
                if which in ("online", "offline"):
                    kinds = shares.setdefault(task, {"online": 0.0, "offline": 0.0})
                    kinds[which] += value / len(rows)
        return [
            {"task": task} | {which: round(share, 4) for which, share in kinds.items()}
            for task, kinds in sorted(shares.items())
        ]

    def freshness(self) -> dict[str, float]:
        """Seconds from a tick to its first batch and from an update to a robot; versions behind."""
        with self._lock:
            found = {name: sorted(values) for name, values in self._fresh.items() if values}
        return {name: _short(values[len(values) // 2]) for name, values in found.items()}

    def to_dict(self) -> dict[str, list[list[float]]]:
        with self._lock:
            return {
                name: [[x, _short(y)] for x, y in curve] for name, curve in self._curves.items()
            }


class Learning:
    """What the learner page shows.

    Args:
        metrics: a learner's `metrics.jsonl`; None or missing shows no curves.
        registry: folder or s3:// prefix of versions; None shows none.
    """

    def __init__(self, metrics: Path | None, registry: str | Path | None) -> None:
        self.curves = Curves(metrics)
        self.registry = None if registry is None else open_registry(registry)

    def progress(self, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Curves, and what the episodes say by version."""
        self.curves.look()
        last = self.curves.last
        return {
            "curves": self.curves.to_dict(),
            "published": self.curves.published[-200:],
            "mixture": self.curves.mixture(),
            "mixture_updates": self.curves.mixture_updates,
            "freshness": self.curves.freshness(),
            "last": {k: last[k] for k in ("update", "loss", "version", "waited_s") if k in last},
            "silent_s": None
            if not self.curves.changed_s
            else round(max(0.0, time.time() - self.curves.changed_s), 1),
            "versions": by_version(episodes),
            "recent": recent(episodes),
            "human_minutes": round(sum(_human_s(e) for e in episodes) / 60, 2),
            "episodes": len(episodes),
        }

    def versions(self) -> dict[str, Any]:
        """All versions, newest first, with lineage and metrics."""
        if self.registry is None:
            nothing: dict[str, Any] = {"active": None, "pinned": False, "canary": None}
            return nothing | {"versions": [], "history": [], "gate": None}
        found: list[Version] = self.registry.versions()
        active, canary = self.registry.active(), self.registry.canary
        rejected = set(self.registry.rejected)
        return {
            "versions": [
                {
                    "version": v.number,
                    "parent": v.parent,
                    "created_s": v.created_ns / 1e9,
                    "learner_step": v.learner_step,
                    "metrics": v.metrics,
                    "contract": v.contract_sha256[:12],
                    "snapshots": len(v.snapshots),
                    "files": len(v.files),
                    "rejected": v.number in rejected,
                    # Of what waits to be adopted; older ones were there before.
                    "held": self.registry.held(v) if active and v.number > active.number else None,
                }
                for v in reversed(found)
            ],
            "active": None if active is None else active.number,
            "pinned": self.registry.pinned,
            "gate": self.registry.gate,
            "canary": None
            if canary is None
            else {"version": canary.version, "share": canary.share, "cells": list(canary.cells)},
            "history": self.registry.history()[-100:][::-1],
        }

    def point(
        self,
        action: Action,
        number: int | None,
        *,
        reason: str,
        pin: bool = True,
        share: float = 0.0,
        cells: Sequence[str] = (),
    ) -> int:
        """Activates a version, rolls back, lets some cells try one, or ends that.

        Returns:
            The number of the version that is active, was sent out or was taken back.

        Raises:
            RegistryError: no registry, no such version, or it fails its checks.
        """
        registry = self._registry()
        if action == "withdraw":
            return registry.end_canary(reason=reason).version
        if action == "rollback":
            return registry.rollback(to=number, reason=reason).number
        if number is None:
            raise RegistryError("name a version")
        if action == "canary":
            return registry.start_canary(number, share=share, cells=cells, reason=reason).version
        return registry.promote(number, reason=reason, pin=pin).number

    def plan(
        self,
        action: Plan,
        number: int | None,
        *,
        share: float = 0.0,
        cells: Sequence[str] = (),
        known: Sequence[str] = (),
    ) -> dict[str, Any]:
        """What `point` would do, without doing it; for the page that asks whether one is sure.

        Args:
            known: names of this console's cells; `takes` are those that change.

        Raises:
            RegistryError: it would be refused.
        """
        registry = self._registry()
        active, canary = registry.active(), registry.canary
        if action == "withdraw":
            if canary is None or active is None:
                raise RegistryError("no canary is out")
            return {
                "from": canary.version,
                "to": active.number,
                "takes": [name for name in known if canary.takes(name)],
            }
        if action == "rollback" and number is None:
            number = registry.previous()
        if number is None:
            raise RegistryError("name a version")
        version = registry.verify(number)
        held = registry.held(version) if action in ("activate", "canary") else None
        if held is not None and action == "activate":
            raise RegistryError(f"{version.name}: {held}. Let it run as a shadow first, or try it")
        if action == "shadow" and active is not None and active.number == number:
            raise RegistryError(f"{version.name} is the active version; a shadow is another one")
        takes = list(known)
        if action == "canary":
            if active is None or active.number == number:
                raise RegistryError("a canary is another version than the active one")
            tried = Canary(version=number, share=share, cells=tuple(cells))
            takes = [name for name in known if tried.takes(name)]
        ends = canary is not None and (action == "rollback" or canary.version == number)
        return {
            "takes": takes,
            "ends": canary.version if canary is not None and ends else None,
            "from": None if active is None else active.number,
            "to": version.number,
            "pins": action == "rollback",
            "held": held,
            "files": len(version.files),
            "parent": version.parent,
            "learner_step": version.learner_step,
        }

    def _registry(self) -> Registry:
        if self.registry is None:
            raise RegistryError("this console has no registry; start it with --registry")
        return self.registry


def by_version(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """Success without help, interventions and human time of each policy version."""
    groups: dict[int, list[Episode]] = defaultdict(list)
    for episode in episodes:
        if episode.outcome in LABELLED and episode.ticks_by(Source.SCRIPTED) == 0:
            groups[episode.policy_version].append(episode)
    return [_group(group) | {"version": number} for number, group in sorted(groups.items())]


def recent(episodes: Sequence[Episode], window: int = 20) -> dict[str, Any]:
    """The same over the newest labelled episodes, whatever their version."""
    labelled = [e for e in episodes if e.outcome in LABELLED and not e.ticks_by(Source.SCRIPTED)]
    labelled.sort(key=lambda e: e.created_ns)
    return _group(labelled[-window:])


def _group(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Success counts as the policy's only where nobody took over."""
    n = len(episodes)
    alone = sum(e.outcome is Outcome.SUCCESS and e.interventions == 0 for e in episodes)
    success = sum(e.outcome is Outcome.SUCCESS for e in episodes)
    low, high = wilson_interval(alone, n)
    ticks = sum(len(e) for e in episodes)
    human = sum(e.ticks_by(Source.HUMAN) for e in episodes)
    return {
        "episodes": n,
        "success": success,
        "success_alone": alone,
        "low": round(low, 4),
        "high": round(high, 4),
        "intervened": sum(e.interventions > 0 for e in episodes),
        "human_share": round(human / ticks, 4) if ticks else 0.0,
        "human_minutes": round(sum(_human_s(e) for e in episodes) / 60, 3),
    }


def _human_s(episode: Episode) -> float:
    steps = len(episode)
    return episode.duration_s * episode.ticks_by(Source.HUMAN) / steps if steps else 0.0


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
