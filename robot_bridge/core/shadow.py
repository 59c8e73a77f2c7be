"""What a shadow policy would have done otherwise: its chunks beside those of the active one.

Differences are shares of each joint's range, so that radians and metres compare. H chunk length,
A action size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trajectory_store.contract import ActionFeature

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Of one observation."""

    first: float
    """Largest difference of a joint in the first row: what would have been felt at once."""
    mean: float
    """Over all rows and joints."""
    worst: float
    joint: str
    """Where `worst` is."""
    outside: float
    """How far the shadow's chunk leaves the position limits."""


def compare(active: Rows, shadow: Rows, action: ActionFeature) -> Comparison:
    """Both (H, A) in robot units."""
    low, high = np.asarray(action.limits.position, np.float64).T
    share = np.abs(shadow - active) / (high - low)
    beyond = np.maximum(low - shadow, shadow - high) / (high - low)
    _, joint = np.unravel_index(int(share.argmax()), share.shape)
    return Comparison(
        first=float(share[0].max()),
        mean=float(share.mean()),
        worst=float(share.max()),
        joint=action.names[int(joint)],
        outside=float(max(0.0, beyond.max())),
    )


class Record:
    """The comparisons so far, as a report shows them."""

    def __init__(self) -> None:
        self.chunks = self.skipped = self.errors = 0
        """Compared; not compared because the shadow was still busy; where it failed."""
        self.last_error = ""
        self._sum_mean = self._sum_first = 0.0
        self._worst = self._outside = 0.0

    def add(self, comparison: Comparison) -> None:
        self.chunks += 1
        self._sum_mean += comparison.mean
        self._sum_first += comparison.first
        self._worst = max(self._worst, comparison.worst)
        self._outside = max(self._outside, comparison.outside)

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "chunks": self.chunks,
            "skipped": self.skipped,
            "errors": self.errors,
        }
        if self.chunks:
            out |= {
                "mean": round(self._sum_mean / self.chunks, 6),
                "first": round(self._sum_first / self.chunks, 6),
                "worst": round(self._worst, 6),
                "outside": round(self._outside, 6),
            }
        if self.last_error:
            out["last_error"] = self.last_error
        return out
