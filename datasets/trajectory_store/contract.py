"""The cell contract: one YAML file that describes a robot cell, and its SHA-256.

Recording, training, serving, simulation and the console all read it, so it lives in the room that
everyone may import. The hash covers the parsed values, never comments or key order; it travels with
every episode, checkpoint and export, and `ContractMismatch` names the fields that differ.
"""

import hashlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

SCHEMA = "vla_post/cell/1"

MessageType = Literal[
    "sensor_msgs/JointState",
    "sensor_msgs/Image",
    "sensor_msgs/CompressedImage",
]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = tuple[float, float]


class ContractError(ValueError):
    """The file is not a valid cell contract; the message lists every problem with its line."""


class ContractMismatch(ValueError):
    """Two sides were made for different cells; the message names the fields that differ."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _refuse(problems: list[str]) -> None:
    """A ValueError with a line for every problem, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))


class Align(StrEnum):
    """How a stream is brought to the control tick."""

    NEAREST = "nearest"
    """The sample closest in time, within `max_age_ms`. For images."""
    INTERPOLATE = "interpolate"
    """Linear between the two samples around the tick. For joints."""
    LATEST = "latest"
    """The last sample at or before the tick."""


class ObservationFeature(_Part):
    """One input of the policy, under its LeRobot-style key such as `observation.state`."""

    topic: str
    """Relative to the cell's namespace, e.g. `cameras/wrist/image_raw/compressed`."""
    type: MessageType
    shape: tuple[Annotated[int, Field(gt=0)], ...]
    """(D,) for vectors, (height, width, channels) for images."""
    unit: str
    """Physical unit of the values (`m`, `rad`, `rgb8`, `depth16_mm`, ...)."""
    names: tuple[str, ...] = ()
    """Joint names in the order of the vector; a message may carry them in any order."""
    field: Literal["position", "velocity", "effort"] = "position"
    max_age_ms: Positive = 100.0
    """Older than this at the tick counts as stale."""
    align: Align = Align.LATEST
    rate_hz: Positive = 30.0
    """Nominal publication rate."""
    min_rate_hz: Annotated[float, Field(ge=0)] = 0.0
    """An episode with a lower measured rate is stored, and marked as not good."""
    codec: Literal["jpeg", "png", "raw"] = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Of JPEG, where we have to encode. Frames that arrive as JPEG are stored untouched."""

    @property
    def is_image(self) -> bool:
        return self.type != "sensor_msgs/JointState"

    @model_validator(mode="after")
    def _shape_fits_type(self) -> Self:
        problems: list[str] = []
        if self.is_image:
            if len(self.shape) != 3 or self.shape[2] not in (1, 3):
                problems.append(
                    f"an image's shape is (height, width, 1 or 3), found {list(self.shape)}"
                )
            if self.names:
                problems.append("`names` belongs to JointState features only")
        elif len(self.shape) != 1 or len(self.names) != self.shape[0]:
            problems.append(
                f"`names` lists {len(self.names)} joints and `shape` is {list(self.shape)}; "
                "a JointState feature needs shape [number of names]"
            )
        if len(set(self.names)) != len(self.names):
            problems.append("`names` holds the same joint twice")
        _refuse(problems)
        return self


class Limits(_Part):
    """Bounds per joint, in the feature's unit (and per s, s^2, s^3)."""

    position: tuple[Range, ...]
    velocity: tuple[Positive, ...] = ()
    acceleration: tuple[Positive, ...] = ()
    jerk: tuple[Positive, ...] = ()
    step: tuple[Positive, ...] = ()
    """Largest change of the command from one tick to the next."""


class ActionFeature(_Part):
    """What the arbiter sends to the robot."""

    topic: str = "command"
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    unit: str
    mode: Literal["absolute", "delta"]
    """`absolute`: a set-point of the joints; `delta`: a displacement per tick, zero means stay."""
    limits: Limits
    message: Literal["trajectory_msgs/JointTrajectory", "std_msgs/Float64MultiArray"] = (
        "trajectory_msgs/JointTrajectory"
    )
    held: tuple[str, ...] = ()
    """Of a `delta` feature: the names that keep their last value in HOLD (a gripper), not zero."""

    @property
    def size(self) -> int:
        return len(self.names)

    @model_validator(mode="after")
    def _one_limit_per_joint(self) -> Self:
        problems: list[str] = []
        if len(set(self.names)) != len(self.names):
            problems.append("`names` holds the same joint twice")
        for kind in ("position", "velocity", "acceleration", "jerk", "step"):
            bounds = getattr(self.limits, kind)
            if (kind == "position" or bounds) and len(bounds) != len(self.names):
                problems.append(
                    f"limits.{kind} has {len(bounds)} entries for {len(self.names)} joints"
                )
        for name, (low, high) in zip(self.names, self.limits.position, strict=False):
            if not low < high:
                problems.append(f"limits.position of {name} is [{low}, {high}]; low must be < high")
        unknown = set(self.held) - set(self.names)
        if unknown:
            problems.append(f"`held` names {sorted(unknown)}, which `names` does not list")
        _refuse(problems)
        return self


class Workspace(_Part):
    """Box that the tool must not leave, in metres in the robot's base frame."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    model: str = ""
    """MJCF or URDF beside the contract, for forward kinematics; empty: `names` are the position."""
    site: str = ""
    """Site (MJCF) or link (URDF) whose position must stay inside."""
    names: tuple[str, ...] = ()
    """Without a model: the three state names that are the tool's x, y, z."""


class Safety(_Part):
    """What the arbiter does when things go wrong; a software stop, not a certified function."""

    stale: Literal["hold", "decelerate", "stop"] = "hold"
    """When observations, chunks or teleop go stale. `stop` latches FAULT."""
    joint_state_max_age_ms: Positive = 100.0
    chunk_max_age_ms: Positive = 1000.0
    teleop_timeout_ms: Positive = 250.0
    blend_ms: Annotated[float, Field(ge=0)] = 200.0
    """Length of the blend from the measured state to a fresh chunk after hand-back."""
    overrun_ticks: Annotated[int, Field(gt=0)] = 3
    """Consecutive missed control ticks that latch a fault."""
    swap: Literal["episode", "chunk"] = "episode"
    """Where a new policy version may take over."""
    workspace: Workspace | None = None


class Task(_Part):
    instruction: Annotated[str, Field(min_length=1)]
    time_limit_s: Positive


class CameraView(_Part):
    """Where a fixed camera stands and how it looks: a pinhole without distortion."""

    focal_px: tuple[Positive, Positive]
    """fx, fy in pixels of the feature's shape."""
    center_px: tuple[float, float] | None = None
    """cx, cy; by default the picture's middle."""
    position_m: tuple[float, float, float]
    """Of the camera, in the robot's base frame."""
    quat_wxyz: tuple[float, float, float, float]
    """Of its optical frame (z ahead, x to the right of the picture, y down) in the base frame."""

    @field_validator("quat_wxyz")
    @classmethod
    def _turns(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not 0.99 < sum(x * x for x in value) < 1.01:
            raise ValueError(f"found {list(value)}, which is no unit quaternion")
        return value


class View(_Part):
    """For people who watch the cell, not for policies: so it is no part of the hash, and stores
    and checkpoints do not keep it. A camera that is calibrated again changes no contract."""

    cameras: dict[str, CameraView] = {}
    """By observation key. With `safety.workspace`, which says where the tool is, the console draws
    the plan over these pictures."""
    step_m: Positive | None = None
    """Of a `delta` action: how far one unit moves the tool in a tick."""


class Contract(_Part):
    """A robot cell. See `load_contract`."""

    schema_: Literal["vla_post/cell/1"] = Field(alias="schema")
    cell: Name
    """Namespace of the cell's topics, and its identity in the fleet."""
    robot: Name
    control_hz: Positive
    observations: Annotated[dict[str, ObservationFeature], Field(min_length=1)]
    actions: Annotated[dict[str, ActionFeature], Field(min_length=1, max_length=1)]
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    safety: Safety = Safety()
    chunk_horizon: Annotated[int, Field(gt=0)] = 16
    """H: control steps in one policy output."""
    execute_steps: Annotated[int, Field(gt=0)] = 8
    """Of those, how many run before the next inference is due."""
    sim: dict[str, Any] = {}
    """For simulated cells: what `sim` needs to build it (`env_id`, camera, lockstep, ...)."""
    view: View = Field(default=View(), exclude=True)

    @field_validator("observations")
    @classmethod
    def _known_keys(cls, value: dict[str, ObservationFeature]) -> dict[str, ObservationFeature]:
        for key, feature in value.items():
            stem = "observation.images." if feature.is_image else "observation."
            if not key.startswith(stem) or key == stem:
                raise ValueError(f"feature {key!r} of type {feature.type} must start with {stem!r}")
        return value

    @field_validator("actions")
    @classmethod
    def _action_key(cls, value: dict[str, ActionFeature]) -> dict[str, ActionFeature]:
        if set(value) != {"action"}:
            raise ValueError(f"found {sorted(value)}; the one action feature is called 'action'")
        return value

    @model_validator(mode="after")
    def _views_are_of_cameras(self) -> Self:
        unknown = sorted(self.view.cameras.keys() - self.images.keys())
        if unknown:
            raise ValueError(
                f"view.cameras names {', '.join(unknown)}; this cell's cameras are "
                f"{', '.join(self.images) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _executes_what_it_predicts(self) -> Self:
        if self.execute_steps > self.chunk_horizon:
            raise ValueError(
                f"execute_steps is {self.execute_steps}, more than chunk_horizon "
                f"{self.chunk_horizon}; a chunk runs out before the next inference"
            )
        return self

    @property
    def action(self) -> ActionFeature:
        return self.actions["action"]

    @property
    def dt_ns(self) -> int:
        """Control period in ns."""
        return round(1e9 / self.control_hz)

    @property
    def images(self) -> dict[str, ObservationFeature]:
        return {k: f for k, f in self.observations.items() if f.is_image}

    @property
    def vectors(self) -> dict[str, ObservationFeature]:
        return {k: f for k, f in self.observations.items() if not f.is_image}

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces. The hash is taken over this text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def task(self, name: str) -> Task:
        """Raises ContractError with the known names when `name` is not one of them."""
        if name not in self.tasks:
            raise ContractError(
                f"cell {self.cell!r} has no task {name!r}; it knows {', '.join(sorted(self.tasks))}"
            )
        return self.tasks[name]

    def require_same(self, other: "Contract", *, here: str, there: str) -> None:
        """Refuses another contract, naming the fields that differ.

        Args:
            here, there: what each side is, for the message ("running cell", "checkpoint v000012").

        Raises:
            ContractMismatch
        """
        if self.sha256 != other.sha256:
            lines = diff(self, other)
            raise ContractMismatch(
                f"{there} was made for another contract than {here}:\n  " + "\n  ".join(lines)
            )


def load_contract(source: str | Path) -> Contract:
    """Reads a contract from a YAML file.

    Raises:
        ContractError: missing file, YAML that does not parse, or any number of wrong fields; the
            message has one line per problem: file, line, field, found, expected.
    """
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ContractError(
            f"{path}: cannot read the contract ({error.strerror}). `vla-post contract show` lists "
            "the shipped ones."
        ) from error
    return parse_contract(text, name=str(path))


def parse_contract(text: str, *, name: str = "contract") -> Contract:
    """Like `load_contract`, from YAML (or JSON) text; `name` opens each line of an error."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        raise ContractError(f"{where}: this is not YAML: {problem}") from error
    if not isinstance(data, dict):
        raise ContractError(
            f"{name}:1: found {type(data).__name__}; a contract is a mapping that starts with "
            f"`schema: {SCHEMA}`"
        )
    try:
        return Contract.model_validate(data)
    except ValidationError as error:
        problems = [
            (_line(tree, e["loc"]), ".".join(str(p) for p in e["loc"]) or "contract", e)
            for e in error.errors()
        ]
        problems.sort(key=lambda p: p[0])
        lines = [
            f"{name}:{line}: {where}: {problem}"
            for line, where, e in problems
            for problem in _explain(e).splitlines()
        ]
        raise ContractError("\n".join(lines)) from None


def diff(a: Contract, b: Contract) -> list[str]:
    """One line per field that differs: `path: value in a -> value in b`."""
    flat_a, flat_b = _flatten(a.to_dict()), _flatten(b.to_dict())
    return [
        f"{key}: {flat_a.get(key, 'absent')} -> {flat_b.get(key, 'absent')}"
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(key, "absent") != flat_b.get(key, "absent")
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        out: dict[str, Any] = {}
        for key, inner in value.items():
            out |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return out
    return {prefix: value}


def _line(tree: yaml.Node | None, location: tuple[int | str, ...]) -> int:
    """Line of the deepest node on the path that exists; pydantic's tags are skipped."""
    node, line = tree, 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            hit = next((kv for kv in node.value if kv[0].value == str(part)), None)
            if hit is None:
                continue
            line, node = hit[0].start_mark.line + 1, hit[1]
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)
        ):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _explain(error: Any) -> str:
    kind, found = error["type"], error.get("input")
    if kind == "missing":
        return "is missing; every contract needs it"
    if kind == "extra_forbidden":
        return "is not a field of a contract; check the spelling, or remove it"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message
    return f"found {found!r}; {message[0].lower()}{message[1:]}"
