"""Latency of inference without its warm-up."""

from collections import deque

import numpy as np


class Latency:
    """The last `window` durations. The first `warm_up` are left out: they compile and allocate."""

    def __init__(self, window: int = 256, warm_up: int = 2) -> None:
        self._left = warm_up
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> None:
        if self._left > 0:
            self._left -= 1
            return
        self._values.append(value)

    def quantile(self, q: float) -> float | None:
        """None before the warm-up is over."""
        return float(np.quantile(list(self._values), q)) if self._values else None

    def summary_ms(self) -> dict[str, str]:
        """Of durations in seconds."""
        if not self._values:
            return {}
        p50, p99 = np.quantile(list(self._values), [0.5, 0.99]) * 1e3
        return {"latency_p50_ms": f"{p50:.1f}", "latency_p99_ms": f"{p99:.1f}"}
