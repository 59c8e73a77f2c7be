"""A candidate policy beside the active one: it sees the same observations and moves nothing.

It runs in a thread of its own after the active policy's chunk is out, with the same seed, the
same
running chunk and the same delay; what it proposes is published on `policy/shadow_chunk` and
the comparison on `policy/shadow` (and appended to a file). A shadow that is slow skips, one that
raises is counted, one that hangs is left alone: the robot never waits for it.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robot_bridge.core.chunking import Question, ask
from robot_bridge.core.shadow import Record, compare
from robot_bridge.nodes.common import monotonic_s
from robot_bridge.nodes.versions import Loaded
from trajectory_store.contract import Contract

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Proposal:
    """What the active policy was asked, and its answer."""

    question: Question
    version: int
    chunk_id: int
    chunk: Rows
    guide: bool


class Shadow:
    """Owns the candidate and its thread.

    Args:
        say: called with (proposal, the shadow's version, its chunk, the comparison as JSON), from
            the shadow's thread.
        log: gets one JSON line a comparison; None for none.
    """

    def __init__(
        self,
        contract: Contract,
        loaded: Loaded,
        say: Callable[[Proposal, int, Rows, str], None],
        log: Path | None,
    ) -> None:
        self.loaded = loaded
        self.record = Record()
        self._contract, self._say, self._log = contract, say, log
        self._slot: Proposal | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        return self.loaded.version

    def offer(self, proposal: Proposal) -> None:
        """Never blocks; skips while the shadow is busy."""
        if self._slot is not None:
            self.record.skipped += 1
            return
        self._slot = proposal
        self._wake.set()

    def close(self, patience_s: float = 2.0) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=patience_s)
        if not self._thread.is_alive():
            self.loaded.policy.close()

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            proposal = self._slot
            if self._stop.is_set():
                return
            if proposal is None:
                continue
            try:
                self._look(proposal)
            except Exception as error:
                self.record.errors += 1
                self.record.last_error = f"{type(error).__name__}: {error}"
            self._slot = None

    def _look(self, proposal: Proposal) -> None:
        started = monotonic_s()
        question = proposal.question
        chunk = ask(self.loaded.policy, question, self._contract, guide=proposal.guide)
        comparison = compare(proposal.chunk, chunk, self._contract.action)
        self.record.add(comparison)
        text = json.dumps(
            {
                "v": 1,
                "stamp_ns": question.stamp_ns,
                "active": proposal.version,
                "shadow": self.version,
                "chunk": proposal.chunk_id,
                "latency_ms": round((monotonic_s() - started) * 1e3, 2),
            }
            | asdict(comparison)
            | {"so_far": self.record.summary()}
        )
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        if not self._stop.is_set():
            self._say(proposal, self.version, chunk, text)
