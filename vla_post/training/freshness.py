"""How fresh the data is and how fast it comes round: versions behind, and two latencies.

From a tick on the robot to the first batch that holds it, and from an update to the robot that runs
it, both on wall clocks of two machines: what their clocks differ by is in the figures.
"""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from trajectory_store import ChunkBatch, Episode

ONE_CLOCK_S = 60.0
"""Tick stamps further than this from the wall clock at the episode's start are simulated time."""


class Freshness:
    """Follows episodes from their arrival to their first batch; gives rows for `metrics.jsonl`.

    Args:
        since_ns: episodes that began before are old news: a resumed learner has told of them.
    """

    def __init__(self, since_ns: int = 0) -> None:
        self._since_ns = since_ns
        self._known: dict[str, Episode] = {}
        self._waiting: set[str] = set()
        """Arrived, in no batch yet."""
        self._published_s: dict[int, float] = {}
        self._ran: set[int] = set()

    def published(self, version: int, stamp_s: float | None = None) -> None:
        """Args:
        stamp_s: wall clock, now by default.
        """
        self._published_s[version] = time.time() if stamp_s is None else stamp_s

    def saw(self, episodes: Iterable[Episode], current: int | None) -> list[dict[str, Any]]:
        """Rows of episodes that are new: how many versions they are behind, and the first episode
        of each version, which says that a robot runs it.

        Args:
            current: the newest version.
        """
        rows: list[dict[str, Any]] = []
        for e in episodes:
            if e.uuid in self._known or e.created_ns < self._since_ns:
                continue
            self._known[e.uuid] = e
            self._waiting.add(e.uuid)
            row: dict[str, Any] = {
                "episode": e.uuid,
                "task": e.task,
                "cell": e.cell,
                "of_version": e.policy_version,
                "arrived_s": time.time(),
            }
            if current is not None and e.policy_version:
                row["versions_behind"] = max(current - e.policy_version, 0)
            if _on_wall_clock(e):
                row["tick_to_learner_s"] = round(time.time() - e.end_ns / 1e9, 3)
            rows.append(row)
            stamp = self._published_s.get(e.policy_version)
            if stamp is not None and e.policy_version not in self._ran:
                self._ran.add(e.policy_version)
                waited = round(e.created_ns / 1e9 - stamp, 3)
                rows.append({"running": e.policy_version, "update_to_robot_s": waited})
        return rows

    def drew(self, chunk: ChunkBatch) -> list[dict[str, Any]]:
        """Rows of episodes that are in a batch for the first time."""
        if not self._waiting:
            return []
        found = chunk.provenance
        uuids = {found.uuids[int(k)] for k in np.unique(found.episode)} & self._waiting
        self._waiting -= uuids
        rows: list[dict[str, Any]] = []
        for uuid in sorted(uuids):
            e = self._known[uuid]
            row: dict[str, Any] = {"first_batch_of": uuid}
            row["start_to_batch_s"] = round(time.time() - e.created_ns / 1e9, 3)
            if _on_wall_clock(e):
                row["tick_to_batch_s"] = round(time.time() - e.end_ns / 1e9, 3)
            rows.append(row)
        return rows


def _on_wall_clock(e: Episode) -> bool:
    return abs(e.start_ns - e.created_ns) / 1e9 < ONE_CLOCK_S
