"""What there is to see of a cell, as JSON for the page."""

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robot_bridge.console.drive import silence_ms
from robot_bridge.core.sightline import ToolPath, project
from robot_bridge.driving import measured
from trajectory_store.contract import Contract, ContractError

if TYPE_CHECKING:
    from robot_bridge.client import CellClient

log = logging.getLogger(__name__)


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
    }


def shadow(link: "CellClient") -> dict[str, Any] | None:
    """What a candidate beside the policy would have done otherwise, in shares of joints' ranges;
    and why it does not run, if it was refused."""
    for name, said in link.health.items():
        if not name.endswith("/runner"):
            continue
        found: dict[str, Any] = {}
        for key in ("version", "chunks", "errors", "mean", "first", "worst", "outside"):
            with contextlib.suppress(KeyError, ValueError):
                found[key] = float(said.values[f"shadow_{key}"])
        if "shadow_refused" in said.values:
            found["refused"] = said.values["shadow_refused"]
        return found or None
    return None


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


class Overlay:
    """The plan over the pictures of fixed cameras, where the contract's `view` knows them.

    Args:
        folder: where the contract lies.
    """

    def __init__(self, contract: Contract, folder: Path) -> None:
        self._contract = contract
        self._path: ToolPath | None = None
        if contract.view.cameras:
            try:
                self._path = ToolPath(contract, folder)
            except ContractError as error:
                log.warning("%s: no plan over its pictures: %s", contract.cell, error)
        known = contract.view.cameras if self._path is not None else {}
        self.cameras = [n for n, key in enumerate(contract.images) if key in known]
        """Indices of those over which a plan is drawn."""

    def paths(self, link: "CellClient") -> dict[int, list[list[float | None]]]:
        """Camera's index -> the tool after each step to come of the newest chunk, [x, y] in shares
        of the picture's width and height; null behind the camera."""
        chunk, joints = link.chunk, link.joints
        if self._path is None or chunk is None or joints is None:
            return {}
        passed = max(0, (joints.stamp_ns - chunk.stamp_ns) // self._contract.dt_ns)
        points = chunk.points[passed:]
        if not len(points):
            return {}
        tool = self._path.positions(points, joints.names, joints.position)
        if tool is None:
            return {}
        images = list(self._contract.images.items())
        return {
            number: [
                _rounded(point)
                for point in project(tool, self._contract.view.cameras[key], feature.shape)
            ]
            for number, (key, feature) in enumerate(images)
            if number in self.cameras
        }


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
