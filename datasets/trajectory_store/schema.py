"""The nouns on disk: `Tick`, `Episode`, `Source`, `Outcome`, and the columns that a contract asks
for.

One row per control tick. A column is a zarr array whose first axis is the row; an image feature has
one array of frames and one column of references into it, because cameras are slower than control.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import IntEnum, StrEnum
from typing import Any, Self

import numpy as np

from trajectory_store.contract import Contract, ObservationFeature
from trajectory_store.errors import SchemaMismatch

FORMAT = "vla_post/store/1"
FORMAT_VERSION = 1
BRANCH = "main"
"""Of the icechunk repository; a store has one."""
CHUNK_ROWS = 1024
"""Ticks in a chunk of a column."""


class Source(IntEnum):
    """Who commanded the robot at a tick."""

    POLICY = 0
    HUMAN = 1
    SCRIPTED = 2
    HOLD = 3


class Outcome(StrEnum):
    """How an episode ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    ABORTED = "aborted"
    INTERRUPTED = "interrupted"
    """The writer died or lost its robot; closed by the next writer or by `repair`."""


@dataclass(slots=True)
class Tick:
    """One control tick, as the recorder saw it.

    A feature that has not arrived since the last tick is left out of `observation` or given again;
    either way the store keeps the frame once and `stamps` says how old it is.
    """

    observation: Mapping[str, Any]
    """Vectors (D,) in the contract's unit; images as encoded bytes, or (height, width, C) arrays.
    """
    action: Any
    """(A,) what was sent to the robot."""
    source: Source
    stamp_ns: int
    """Of the control tick; strictly increasing inside an episode."""
    stamps: Mapping[str, int] = field(default_factory=dict[str, int])
    """Sensor stamp per feature, ns. A feature without one counts as sampled at the tick."""
    action_policy: Any = None
    """(A,) what the policy proposed, if it did."""
    action_human: Any = None
    policy_version: int = 0
    chunk_id: int = 0
    """Which inference the command came from."""
    chunk_step: int = 0
    reward: float = 0.0
    terminated: bool = False
    """The task really ended here (success or failure)."""
    truncated: bool = False
    """The clock or the operator ended it."""
    late: frozenset[str] | set[str] | tuple[str, ...] = ()
    """Features older than their `max_age_ms` at this tick."""
    dropped: frozenset[str] | set[str] | tuple[str, ...] = ()
    """Features of which the aligner threw samples away since the last tick."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A row of the episode table. Rows `first_row` up to, not including, `end_row`."""

    uuid: str
    task: str
    instruction: str
    robot: str
    cell: str
    operator: str
    policy_version: int
    contract_sha256: str
    first_row: int
    end_row: int
    start_ns: int
    """Stamp of the first tick (ROS time, simulated on simulated cells)."""
    end_ns: int
    created_ns: int
    """Wall clock when the episode began, ns since 1970."""
    outcome: Outcome | None = None
    """None while it is being recorded."""
    interventions: int = 0
    """How often a human took over."""
    sources: tuple[tuple[int, int], ...] = ()
    """Runs of equal source: (first tick relative to the episode, source)."""
    first_seen: tuple[tuple[str, int], ...] = ()
    """Per feature that arrived at all: the tick, relative to the episode, of its first value."""
    notes: str = ""
    problems: tuple[str, ...] = ()
    """Why the recorder does not call it good (a rate below its minimum, ...); empty when good."""
    deleted: bool = False
    """Hidden from readers; comes back with `undelete` until gc."""
    damaged: bool = False
    """Set aside by `repair`: some of its bytes are lost."""
    purged: bool = False
    """Its frames were freed by gc after a deletion."""

    def __len__(self) -> int:
        return self.end_row - self.first_row

    @property
    def is_open(self) -> bool:
        return self.outcome is None

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def ticks_by(self, source: Source) -> int:
        """How many ticks `source` commanded."""
        return sum(stop - start for start, stop, s in self.runs() if s == source)

    def runs(self) -> list[tuple[int, int, int]]:
        """(start, stop, source) in ticks relative to the episode."""
        starts = [start for start, _ in self.sources] + [len(self)]
        return [(a, b, s) for (a, s), b in zip(self.sources, starts[1:], strict=True)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        data = json.loads(text)
        known = {f.name for f in fields(cls)}
        data = {k: v for k, v in data.items() if k in known}
        data["outcome"] = Outcome(data["outcome"]) if data.get("outcome") else None
        for key in ("sources", "first_seen"):
            data[key] = tuple((a, b) for a, b in data.get(key, ()))
        data["problems"] = tuple(data.get("problems", ()))
        return cls(**data)

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)


@dataclass(frozen=True)
class Column:
    """One array along the time axis."""

    name: str
    dtype: str
    """numpy name, little-endian on disk."""
    shape: tuple[int, ...] = ()
    """Of one row."""
    fill: float | int = 0
    names: tuple[str, ...] = ()

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        return self.numpy.itemsize * int(np.prod(self.shape, dtype=int))

    def chunk_key(self, chunk: int) -> str:
        return f"{self.name}/c/{chunk}" + "/0" * len(self.shape)


@dataclass(frozen=True)
class FrameArray:
    """The frames of one camera: zarr chunk (1, height, width, C) in shards of `shard` frames."""

    key: str
    feature: ObservationFeature
    shard: int

    @property
    def numpy(self) -> np.dtype[Any]:
        return frame_dtype(self.feature)

    @property
    def reference(self) -> str:
        """Name of the column that refers to the frames."""
        return f"{self.key}.frame"

    def shard_key(self, shard: int) -> str:
        return f"{self.key}/c/{shard}/0/0/0"


def frame_dtype(feature: ObservationFeature) -> np.dtype[Any]:
    """Depth in millimetres is 16 bit, everything else 8 bit."""
    return np.dtype("uint16" if feature.unit.startswith("depth16") else "uint8")


AGE_ABSENT = -(2**31)
"""In `<feature>.age_ns`: the feature has not been seen in this episode yet."""


def frame_arrays(contract: Contract) -> dict[str, FrameArray]:
    """A shard holds about what a camera delivers in one commit interval of 1 s."""
    out: dict[str, FrameArray] = {}
    for key, feature in contract.images.items():
        if frame_dtype(feature).itemsize == 2 and feature.codec == "jpeg":
            raise SchemaMismatch(
                f"{key} has unit {feature.unit} and codec jpeg, which is lossy and 8 bit; "
                "choose `codec: png` or `codec: raw` in the contract"
            )
        shard = 16
        while shard < min(feature.rate_hz, 128):
            shard *= 2
        out[key] = FrameArray(key, feature, shard)
    return out


def columns(contract: Contract) -> dict[str, Column]:
    """Every column that ticks of this contract fill, by name."""
    action, size = contract.action, contract.action.size
    nan = float("nan")
    found = [Column(key, "float32", f.shape, nan, f.names) for key, f in contract.vectors.items()]
    # (frame, byte offset in its shard, bytes): what a random read needs, without a look-up table.
    found += [Column(a.reference, "int32", (3,), -1) for a in frame_arrays(contract).values()]
    found += [Column(f"{key}.age_ns", "int32", (), AGE_ABSENT) for key in contract.observations]
    found += [
        Column("action", "float32", (size,), nan, action.names),
        Column("action.policy", "float32", (size,), nan, action.names),
        Column("action.human", "float32", (size,), nan, action.names),
        Column("source", "uint8"),
        Column("policy_version", "uint32"),
        Column("chunk_id", "uint32"),
        Column("chunk_step", "uint16"),
        Column("reward", "float32"),
        Column("terminated", "bool"),
        Column("truncated", "bool"),
        Column("stamp_ns", "int64"),
        Column("late", "uint32"),
        Column("dropped", "uint32"),
    ]
    return {c.name: c for c in found}


def require_compatible(old: Contract, new: Contract, *, where: str) -> None:
    """Refuses a contract whose rows could not stand beside the store's.

    Features and tasks may be added, and those of the store left out. Limits, safety, topics and
    rates may change: each episode names its own contract.

    Raises:
        SchemaMismatch: lists every feature whose shape, names, unit or coding differs.
    """
    problems: list[str] = []

    def compare(key: str, a: Any, b: Any, attributes: tuple[str, ...]) -> None:
        problems.extend(
            f"{key}.{name}: store has {getattr(a, name)!r}, contract has {getattr(b, name)!r}"
            for name in attributes
            if getattr(a, name) != getattr(b, name)
        )

    for key in old.observations.keys() & new.observations.keys():
        a, b = old.observations[key], new.observations[key]
        if a.is_image != b.is_image:
            problems.append(f"{key}.type: store has {a.type}, contract has {b.type}")
            continue
        compare(key, a, b, ("shape", "unit", "names") + (("codec",) if a.is_image else ()))
    compare("action", old.action, new.action, ("names", "unit", "mode"))
    compare("contract", old, new, ("robot", "cell", "control_hz"))
    if problems:
        raise SchemaMismatch(
            f"{where}: its rows were written under another contract:\n  "
            + "\n  ".join(problems)
            + "\nRecord into a new folder; a fleet view reads both."
        )
