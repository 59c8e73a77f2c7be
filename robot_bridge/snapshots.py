"""What a cell said last, as values: the messages of its topics without ROS types."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from numpy.typing import NDArray
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.nodes.common import stamp_ns


@dataclass(frozen=True)
class Reply:
    """Of the supervisor; also a refusal of the client when nobody answered."""

    success: bool
    message: str


@dataclass(frozen=True)
class State:
    """`arbiter/state`: who drives, and why."""

    mode: str = ""
    """HOLD, POLICY, HUMAN or FAULT; empty before the arbiter's first word."""
    phase: str = ""
    reason: str = ""
    operator: str = ""
    chunk_age_ms: float = 0.0
    clipped: Mapping[str, int] = field(default_factory=dict[str, int])
    """Joint -> how often its command was limited."""
    stamp_ns: int = 0
    """Of the last tick, in the cell's time."""
    event_seq: int = 0
    """Of the last event that the arbiter has heard."""
    seen_s: float = -math.inf
    """When it came, in monotonic seconds."""


@dataclass(frozen=True)
class Frame:
    """A camera's picture."""

    key: str
    """Of the contract, `observation.images.NAME`."""
    seq: int
    """Counts what this client received."""
    stamp_ns: int
    jpeg: bytes
    """The camera's own bytes where it sends JPEG."""


@dataclass(frozen=True)
class Chunk:
    """What the policy wants to do next; point i is for `stamp_ns + i * dt`."""

    stamp_ns: int
    label: str
    """`VERSION#CHUNK`, or `error: ...` with no points."""
    names: tuple[str, ...]
    points: NDArray[np.float64]
    """(H, A)."""


@dataclass(frozen=True)
class Health:
    """A node's entry in /diagnostics."""

    level: int
    """0 ok, 1 warning, 2 error, 3 stale."""
    message: str
    values: Mapping[str, str]
    seen_s: float


@dataclass(frozen=True)
class Joints:
    """A sample of `joint_states`, or of `arbiter/executed` (then `label` says who commanded)."""

    stamp_ns: int
    names: tuple[str, ...]
    position: NDArray[np.float64]
    velocity: NDArray[np.float64]
    """Empty where the driver does not say."""
    label: str = ""


def read_state(message: DiagnosticStatus) -> State:
    values = _values(message)
    return State(
        mode=values.get("mode", ""),
        phase=values.get("phase", ""),
        reason=values.get("reason", ""),
        operator=values.get("operator", ""),
        chunk_age_ms=float(values.get("chunk_age_ms", "0") or 0),
        clipped={
            key.removeprefix("clipped_"): int(value)
            for key, value in values.items()
            if key.startswith("clipped_")
        },
        stamp_ns=int(values.get("stamp_ns", "0") or 0),
        event_seq=int(values.get("event_seq", "0") or 0),
        seen_s=time.monotonic(),
    )


def read_joints(message: JointState) -> Joints:
    return Joints(
        stamp_ns(message.header.stamp),
        tuple(message.name),
        np.array(message.position, np.float64),
        np.array(message.velocity, np.float64),
        str(message.header.frame_id),
    )


def read_chunk(message: JointTrajectory) -> Chunk:
    """Points of unequal length, which the arbiter refuses, count as none."""
    points: Any = message.points
    names = tuple(message.joint_names)
    rows = [list(point.positions) for point in points]
    if any(len(row) != len(names) for row in rows):
        rows = []
    return Chunk(
        stamp_ns(message.header.stamp),
        str(message.header.frame_id),
        names,
        np.array(rows, np.float64).reshape(len(rows), len(names)),
    )


def read_health(status: DiagnosticStatus) -> Health:
    level = int.from_bytes(status.level, "little")
    return Health(level, str(status.message), _values(status), time.monotonic())


def _values(status: DiagnosticStatus) -> dict[str, str]:
    pairs: Any = status.values
    return {str(pair.key): str(pair.value) for pair in pairs}
