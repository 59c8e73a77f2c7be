"""Latency of inference without its warm-up."""

from collections import deque

import numpy as np


class Latency:
    """The last `window` durations. The first `warm_up` are left out: they compile and allocate."""

    def __init__(self, window: int = 256, warm_up: int = 2) -> None:
        self._left = warm_up
        self._seconds: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        if self._left > 0:
            self._left -= 1
            return
        self._seconds.append(seconds)

    def quantile_s(self, q: float) -> float | None:
        """None before the warm-up is over."""
        return float(np.quantile(list(self._seconds), q)) if self._seconds else None

    def summary_ms(self) -> dict[str, str]:
        if not self._seconds:
            return {}
        p50, p99 = np.quantile(list(self._seconds), [0.5, 0.99]) * 1e3
        return {"latency_p50_ms": f"{p50:.1f}", "latency_p99_ms": f"{p99:.1f}"}
