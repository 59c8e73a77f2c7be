"""What there is to see of a cell, as JSON for the page."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from robot_bridge.console.drive import silence_ms
from robot_bridge.driving import measured
from trajectory_store.contract import Contract

if TYPE_CHECKING:
    from robot_bridge.client import CellClient

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


def arbiter(link: "CellClient") -> dict[str, Any]:
    """Who drives and why, with which policy, and how the nodes are."""
    state = link.state
    return {
        "mode": state.mode,
        "phase": state.phase,
        "reason": state.reason,
        "operator": state.operator,
        "chunk_age_ms": round(state.chunk_age_ms),
        "clipped": dict(state.clipped),
        "policy": {k: link.policy[k] for k in ("version", "backend", "step") if k in link.policy},
        "nodes": [
            {"name": name.rpartition("/")[2], "level": health.level, "message": health.message}
            for name, health in sorted(link.health.items())
        ],
        "traces": traces(link),
    }


def episode(contract: Contract, link: "CellClient") -> dict[str, Any] | None:
    """The one that runs, or waits for its scene."""
    found = link.episode
    if found is None:
        return None
    start, task = found.get("start_stamp_ns"), contract.tasks.get(str(found.get("task")))
    elapsed = 0.0 if start is None else max(0.0, (link.state.stamp_ns - int(start)) / 1e9)
    return {
        "uuid": found.get("episode"),
        "task": found.get("task"),
        "instruction": found.get("instruction", ""),
        "operator": found.get("operator", ""),
        "running": start is not None,
        "elapsed_s": round(elapsed, 1),
        "limit_s": None if task is None else task.time_limit_s,
    }


def traces(link: "CellClient") -> dict[str, float]:
    """Doubt of the policy, value of the critic and the like, where a node publishes them."""
    found: dict[str, float] = {}
    for health in link.health.values():
        for name in TRACES:
            try:
                found[name] = round(float(health.values[name]), 4)
            except (KeyError, ValueError):
                continue
    return {name: value for name, value in found.items() if np.isfinite(value)}


def trace(contract: Contract, link: "CellClient") -> dict[str, Any] | None:
    """The newest command, and where the robot is."""
    executed, joints = link.executed, link.joints
    if executed is None:
        return None
    where = measured(contract, joints)
    return {
        "stamp_s": round(executed.stamp_ns / 1e9, 4),
        "label": executed.label,
        "executed": _rounded(executed.position),
        "measured": None if where is None else _rounded(where),
        "joints": None
        if joints is None
        else dict(zip(joints.names, _rounded(joints.position), strict=True)),
    }


def chunk(contract: Contract, link: "CellClient") -> dict[str, Any] | None:
    """What the policy wants to do next."""
    found = link.chunk
    if found is None:
        return None
    return {
        "stamp_s": round(found.stamp_ns / 1e9, 4),
        "label": found.label,
        "dt_s": 1.0 / contract.control_hz,
        "points": [_rounded(row) for row in found.points],
    }


def streams(contract: Contract, meters: Mapping[str, Meter]) -> list[dict[str, Any]]:
    """Rate and age of every stream as it arrives here, beside its nominal rate."""
    now = time.monotonic()
    nominal = {"joint_states": contract.control_hz}
    nominal |= {key: feature.rate_hz for key, feature in contract.images.items()}
    rows: list[dict[str, Any]] = []
    for key in sorted(nominal.keys() | meters.keys()):
        meter = meters.get(key)
        rows.append(
            {
                "key": key,
                "rate_hz": 0.0 if meter is None else round(meter.rate_hz, 1),
                "nominal_hz": nominal.get(key),
                "age_ms": None if meter is None else round((now - meter.seen_s) * 1e3),
            }
        )
    return rows


def counts(link: "CellClient") -> dict[str, dict[str, str]]:
    """What each node counts in its diagnostics."""
    return {
        name.rpartition("/")[2]: dict(list(health.values.items())[:40])
        for name, health in link.health.items()
    }


def describe(contract: Contract, name: str) -> dict[str, Any]:
    """What does not change: names, limits, tasks, cameras."""
    action = contract.action
    return {
        "cell": name,
        "robot": contract.robot,
        "control_hz": contract.control_hz,
        "silence_ms": silence_ms(contract),
        "lockstep": bool(contract.sim.get("lockstep", False)),
        "simulated": bool(contract.sim),
        "cameras": [
            {
                "key": key,
                "name": key.removeprefix("observation.images."),
                "height": feature.shape[0],
                "width": feature.shape[1],
                "rate_hz": feature.rate_hz,
            }
            for key, feature in contract.images.items()
        ],
        "action": {
            "names": list(action.names),
            "mode": action.mode,
            "unit": action.unit,
            "held": list(action.held),
            "low": [low for low, _ in action.limits.position],
            "high": [high for _, high in action.limits.position],
        },
        "tasks": {
            key: {"instruction": task.instruction, "time_limit_s": task.time_limit_s}
            for key, task in contract.tasks.items()
        },
    }


def _rounded(values: np.ndarray) -> list[float | None]:
    return [round(float(v), 4) if np.isfinite(v) else None for v in values]
