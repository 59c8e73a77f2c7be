"""What was heard of a cell: who drove when, rates, ages and losses of its streams, events.

`hear` runs in the link's thread and only puts values into slots; everything else is read from the
event loop.
"""

import json
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from robot_bridge.snapshots import Health
from trajectory_store.contract import Contract

TIMELINE_S = 600.0
TRACES = ("doubt", "value", "q", "advantage")
"""Numbers that a node may publish in its diagnostics; drawn when they are there."""


class Meter:
    """Rate and age of one stream."""

    def __init__(self) -> None:
        self.count = 0
        self.seen_s = 0.0
        self._last = (0, 0.0)
        self.rate_hz = 0.0

    def hit(self) -> None:
        self.count += 1
        self.seen_s = time.monotonic()

    def measure(self, now_s: float) -> None:
        count, since = self._last
        if now_s - since >= 1.0:
            self.rate_hz = (self.count - count) / (now_s - since) if since else 0.0
            self._last = (self.count, now_s)


class Counted:
    """One topic as the recorder counts it: nothing is lost on the way to a console."""

    def __init__(self) -> None:
        self.received = self.lost = 0
        self.rate_hz: float | None = None
        self.age_ms: float | None = None
        self.said_s = 0.0
        self.lost_s = -np.inf
        """When `lost` last rose."""

    def update(self, received: int, lost: int, age_ms: float | None, now_s: float) -> None:
        new = received - self.received
        if self.said_s and now_s > self.said_s and new >= 0:
            self.rate_hz = new / (now_s - self.said_s)
        if lost > self.lost and self.said_s:
            self.lost_s = now_s
        self.received, self.lost, self.age_ms, self.said_s = received, lost, age_ms, now_s


class Ears:
    """Owned by a desk; see the module."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self.events: deque[str] = deque(maxlen=500)
        self.chunk_new = self.runs_new = False
        self.mode_s = time.monotonic()
        """Since when the arbiter is in its mode."""
        self._mode = ""
        self._runs: deque[tuple[float, str]] = deque(maxlen=400)
        self.clear()

    def clear(self) -> None:
        """The link was closed: what was measured is over."""
        self._meters: dict[str, Meter] = {}
        self._counted: dict[str, Counted] = {}

    def hear(self, kind: str, value: Any) -> None:
        if kind == "frame":
            self._meter(value.key).hit()
        elif kind == "joints":
            self._meter("joint_states").hit()
        elif kind == "executed":
            self._meter("executed").hit()
            who = value.label.partition(":")[0]
            if not self._runs or self._runs[-1][1] != who:
                self._runs.append((time.monotonic() * 1e3, who))
                self.runs_new = True
        elif kind == "chunk":
            self._meter("action_chunk").hit()
            self.chunk_new = True
        elif kind == "event":
            self.events.append(value.to_json())
        elif kind == "state":
            self._meter("arbiter_state").hit()
            if value.mode != self._mode:
                self._mode, self.mode_s = value.mode, time.monotonic()

    def measure(self, health: Mapping[str, Health], now_s: float) -> None:
        """Rates, and what the recorder counted since."""
        for meter in list(self._meters.values()):
            meter.measure(now_s)
        for name, said in health.items():
            if name.endswith("/recorder"):
                self._count(said)

    def timeline(self) -> dict[str, Any]:
        """[start in ms, who] of the last minutes."""
        now = time.monotonic() * 1e3
        runs = [run for run in self._runs if now - run[0] < TIMELINE_S * 1e3]
        if not runs and self._runs:
            runs = [self._runs[-1]]
        return {"runs": [[round(start), who] for start, who in runs]}

    def recent_events(self) -> list[Any]:
        return [json.loads(text) for text in list(self.events)[-100:]]

    def streams(self) -> list[dict[str, Any]]:
        """Rate, age and losses of every stream, beside its nominal rate.

        Rate and age are the console's own where it listens, otherwise the recorder's; losses are
        always the recorder's, who counts every sequence number.
        """
        now = time.monotonic()
        topics: dict[str, tuple[str, float]] = {}
        for key, feature in self._contract.observations.items():
            topics.setdefault(feature.topic, (key if feature.is_image else "", feature.rate_hz))
        rows: list[dict[str, Any]] = []
        for topic, (camera, nominal) in topics.items():
            meter, counted = self._meters.get(camera or topic), self._counted.get(topic)
            rows.append(_row(camera or topic, nominal, meter, counted, now))
        for key in ("action_chunk", "executed", "arbiter_state"):
            rows.append(_row(key, None, self._meters.get(key), None, now))
        return rows

    def _count(self, said: Health) -> None:
        for key, value in said.values.items():
            if not key.startswith("received "):
                continue
            topic = key.removeprefix("received ")
            age = said.values.get(f"age_ms {topic}")
            try:
                received, lost = int(value), int(said.values.get(f"lost {topic}", 0))
                age_ms = None if age is None else float(age)
            except ValueError:
                continue
            counted = self._counted.setdefault(topic, Counted())
            if counted.said_s != said.seen_s:
                counted.update(received, lost, age_ms, said.seen_s)

    def _meter(self, key: str) -> Meter:
        meter = self._meters.get(key)
        if meter is None:
            meter = self._meters[key] = Meter()
        return meter


def traces(health: Mapping[str, Health]) -> dict[str, float]:
    """Doubt of the policy, value of the critic and the like, where a node publishes them."""
    found: dict[str, float] = {}
    for said in health.values():
        for name in TRACES:
            try:
                found[name] = float(f"{float(said.values[name]):.4g}")
            except (KeyError, ValueError):
                continue
    return {name: value for name, value in found.items() if np.isfinite(value)}


def hint(health: Mapping[str, Health]) -> dict[str, Any] | None:
    """Whether the policy doubts more than people let pass so far, and what that is: `on` and
    `threshold`, where a node publishes `doubt_threshold`. None before anything was learned."""
    for said in health.values():
        try:
            threshold = float(f"{float(said.values['doubt_threshold']):.4g}")
        except (KeyError, ValueError):
            continue
        if np.isfinite(threshold):
            return {"on": said.values.get("hint") == "true", "threshold": threshold}
    return None


def _row(
    key: str, nominal: float | None, meter: Meter | None, counted: Counted | None, now_s: float
) -> dict[str, Any]:
    rate: float | None = None
    age: float | None = None
    if meter is not None:
        rate, age = meter.rate_hz, (now_s - meter.seen_s) * 1e3
    elif counted is not None:
        rate = counted.rate_hz
        if counted.age_ms is not None:
            age = counted.age_ms + (now_s - counted.said_s) * 1e3
    return {
        "key": key,
        "rate_hz": None if rate is None else round(rate, 1),
        "nominal_hz": nominal,
        "age_ms": None if age is None else round(age),
        "lost": None if counted is None else counted.lost,
        "losing": counted is not None and now_s - counted.lost_s < 5.0,
    }
