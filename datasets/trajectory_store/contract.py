"""The cell contract: one YAML file that describes a robot cell, and its SHA-256.

Recording, training, serving, simulation and the console all read it, so it lives in the room that
everyone may import. The hash covers the parsed values, never comments or key order; it travels with
every episode, checkpoint and export, and `ContractMismatch` names the fields that differ.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

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
    """A mapping of the contract. Its fields are pydantic's matter; `problems` are the rules that
    join several of them, and are told beside wrong fields as far as they do not need those."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def rules(cls) -> tuple[Callable[[Any], list[str]], ...]:
        """Functions of an object with these fields -> problems."""
        return ()

    @model_validator(mode="wrap")
    @classmethod
    def _tell_everything(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        errors: list[InitErrorDetails] = []
        part: Self | None = None
        try:
            part = handler(data)
        except ValidationError as error:
            errors = [_again(e) for e in error.errors()]
            if not isinstance(data, dict):
                raise
        problems: list[str] = []
        for rule in cls.rules():
            with contextlib.suppress(_Unsound):
                problems += rule(part if part is not None else _Sound(cls, data))
        if part is not None and not problems:
            return part
        errors += [InitErrorDetails(type=_problem(p), loc=(), input=data) for p in problems]
        raise ValidationError.from_exception_data(cls.__name__, errors)


class _Unsound(Exception):
    """A rule needs a field that is wrong itself."""


class _Sound:
    """The fields of a part that are right, where others are wrong."""

    def __init__(self, part: type[_Part], data: dict[Any, Any]) -> None:
        self._part, self._data = part, data

    def __getattr__(self, name: str) -> Any:
        field = self._part.model_fields.get(name)
        if field is None:
            return getattr(self._part, name).fget(self)  # a property, of other fields
        try:
            value = self._data[field.alias or name]
        except KeyError:
            if field.is_required():
                raise _Unsound from None
            return field.get_default(call_default_factory=True)
        try:
            kind: Any = (
                Annotated[field.annotation, *field.metadata]
                if field.metadata
                else (field.annotation)
            )
            return TypeAdapter(kind).validate_python(value)
        except ValidationError:
            raise _Unsound from None


def _no_name_twice(part: Any) -> list[str]:
    twice = len(set(part.names)) != len(part.names)
    return ["`names` holds the same joint twice"] if twice else []


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", "{text}", {"text": text})


def _again(error: Any) -> InitErrorDetails:
    """An error of pydantic's, to be raised once more beside others."""
    if error["type"] == "value_error":
        kind: Any = _problem(error["msg"].removeprefix("Value error, "))
        return {"type": kind, "loc": error["loc"], "input": error["input"]}
    context = error.get("ctx", {})
    return {"type": error["type"], "loc": error["loc"], "input": error["input"], "ctx": context}


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

    @classmethod
    def rules(cls) -> tuple[Callable[[Any], list[str]], ...]:
        return (cls._shape_fits_type, _no_name_twice)

    def _shape_fits_type(self) -> list[str]:
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
        return problems


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

    @classmethod
    def rules(cls) -> tuple[Callable[[Any], list[str]], ...]:
        return (_no_name_twice, cls._one_limit_per_joint, cls._holds_what_it_names)

    def _holds_what_it_names(self) -> list[str]:
        unknown = set(self.held) - set(self.names)
        return [f"`held` names {sorted(unknown)}, which `names` does not list"] if unknown else []

    def _one_limit_per_joint(self) -> list[str]:
        problems: list[str] = []
        for kind in ("position", "velocity", "acceleration", "jerk", "step"):
            bounds = getattr(self.limits, kind)
            if (kind == "position" or bounds) and len(bounds) != len(self.names):
                problems.append(
                    f"limits.{kind} has {len(bounds)} entries for {len(self.names)} joints"
                )
        for name, (low, high) in zip(self.names, self.limits.position, strict=False):
            if not low < high:
                problems.append(f"limits.position of {name} is [{low}, {high}]; low must be < high")
        return problems


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

    @classmethod
    def rules(cls) -> tuple[Callable[[Any], list[str]], ...]:
        return (cls._executes_what_it_predicts, cls._views_are_of_cameras)

    def _views_are_of_cameras(self) -> list[str]:
        unknown = sorted(self.view.cameras.keys() - self.images.keys())
        if not unknown:
            return []
        return [
            f"view.cameras names {', '.join(unknown)}; this cell's cameras are "
            f"{', '.join(self.images) or 'none'}"
        ]

    def _executes_what_it_predicts(self) -> list[str]:
        if self.execute_steps <= self.chunk_horizon:
            return []
        return [
            f"execute_steps is {self.execute_steps}, more than chunk_horizon "
            f"{self.chunk_horizon}; a chunk runs out before the next inference"
        ]

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
