"""The doubts at takeovers, kept in a file, so that the threshold learned yesterday is there today.

{"format": "vla_post/takeovers/1", "joints": ["a", "b"], "unit": "rad",
 "takeovers": [{"doubt": 0.013, "version": 7, "time_s": 1795000000.0}, ...]}

They belong to the cell, not to a version: HG-DAgger's threshold (H4) is meant to go on while the
policy becomes better. Doubts of other joints or units are no measure and are not read. No ROS.
"""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from trajectory_store.contract import Contract
from vla_post.export.doubt import DoubtMeter

FORMAT = "vla_post/takeovers/1"
KEPT = 400
"""Takeovers, the newest; so the threshold is the mean of at most 100. Doubts of years ago, when the
policy was another, say nothing; and the file stays small."""

log = logging.getLogger(__name__)


class Takeovers:
    """Learns the threshold. Never raises for what is wrong with the file: `problem` says it, the
    file is put aside as NAME.unreadable, and learning begins anew.

    Args:
        path: made at the first takeover, its folder too. Empty: they end with the process.
    """

    def __init__(self, contract: Contract, path: str = "") -> None:
        self._path = Path(path) if path else None
        self._head = {
            "format": FORMAT,
            "joints": list(contract.action.names),
            "unit": contract.action.unit,
        }
        self._rows: list[dict[str, Any]] = []
        self.problem = ""
        try:
            self._rows = [] if self._path is None else self._read(self._path)
        except FileNotFoundError:
            pass  # nobody took over yet
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._complain(f"{path}: {error}; learning the threshold of doubt anew")
            self._put_aside(Path(path))
        self._learn()

    @property
    def threshold(self) -> float | None:
        return self._meter.threshold

    def exceeded(self, doubt: float) -> bool:
        return self._meter.hint(doubt)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, doubt: float, version: int) -> None:
        """Somebody took over while the policy, of this version, had this doubt."""
        row = {"doubt": float(doubt), "version": version, "time_s": round(time.time(), 3)}
        self._rows = [*self._rows, row][-KEPT:]
        self._learn()
        if self._path is None:
            return
        try:
            self._write(self._path)
            self.problem = ""
        except OSError as error:
            self._complain(f"{self._path}: {error.strerror}; the takeover is not kept")

    def _learn(self) -> None:
        self._meter = DoubtMeter([row["doubt"] for row in self._rows])

    def _read(self, path: Path) -> list[dict[str, Any]]:
        """Raises OSError, ValueError, TypeError or KeyError."""
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        head = {key: data.get(key) for key in self._head} if isinstance(data, dict) else data
        if head != self._head:
            raise ValueError(f"found {str(head)[:120]}, expected {self._head}")
        rows: list[dict[str, Any]] = [
            {"doubt": float(r["doubt"]), "version": int(r["version"]), "time_s": float(r["time_s"])}
            for r in data["takeovers"]
        ]
        if not all(math.isfinite(row["doubt"]) and row["doubt"] >= 0 for row in rows):
            raise ValueError("a doubt is no number of at least 0")
        return rows[-KEPT:]

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.part")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self._head | {"takeovers": self._rows}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _put_aside(self, path: Path) -> None:
        try:
            path.replace(path.with_name(f"{path.name}.unreadable"))
        except OSError as error:
            log.warning("%s cannot be put aside: %s", path, error.strerror)

    def _complain(self, problem: str) -> None:
        self.problem = problem
        log.warning("%s", problem)
