"""`policy.json`: what an exported folder holds and expects, and the hashes of its files.

Read by the robot before ONNX Runtime sees a byte of the graph, so that a damaged file is a message
and not a crash inside a native library. Needs neither torch nor onnx.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trajectory_store.contract import Contract, parse_contract
from vla_post.policies.checkpoint import CARD, CheckpointError, read_card

EXPORT_FORMAT = "vla_post/export/2"
POLICY_CARD = "policy.json"
WHOLE_FILE, ENCODER_FILE, STEP_FILE = "policy.onnx", "encoder.onnx", "step.onnx"
EXAMPLE_FILE = "example.safetensors"

Layout = Literal["unrolled", "steps"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-calibrated"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Feature(_Model):
    """One observation feature as the graph takes it, which is as the store keeps it."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "uint8"]
    unit: str
    names: tuple[str, ...] = ()


class Action(_Model):
    names: tuple[str, ...]
    unit: str


class ParityCard(_Model):
    """PyTorch against ONNX Runtime on recorded observations, in action units."""

    observations: int
    max_error: float
    mean_error: float
    cosine: float
    """Smallest cosine between the two chunks of one observation."""
    bound: float

    @property
    def ok(self) -> bool:
        return self.max_error <= self.bound


class PolicyCard(_Model):
    """See the module. Shapes are without batch axis."""

    format: Literal["vla_post/export/2"] = EXPORT_FORMAT
    kind: str
    layout: Layout
    precision: Precision
    dynamic_batch: bool
    opset: int
    contract: str
    contract_sha256: str
    observations: dict[str, Feature]
    action: Action
    horizon: int = Field(gt=0)
    action_size: int = Field(gt=0)
    noise_size: int = Field(gt=0)
    control_hz: float
    execute_steps: int
    denoising_steps: int = Field(gt=0)
    takes_previous: bool
    """The graph can continue a running chunk: it has the inputs `previous` and `follow`."""
    instructions: dict[str, dict[str, int | list[int] | list[list[int]]]]
    """Instruction -> what the graph reads of it (tokens and mask, or a slot), int32; twice, for the
    prompt that asks for positive chunks and the plain one, where a guided policy runs on both."""
    files: dict[str, str]
    """SHA-256 of every file beside this one."""
    parity: ParityCard
    closed_loop: dict[str, Any] | None = None
    """Success in simulation beside PyTorch's on the same seeds, if it was measured."""
    latency_ms: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str]

    @property
    def graphs(self) -> tuple[str, ...]:
        return (WHOLE_FILE,) if self.layout == "unrolled" else (ENCODER_FILE, STEP_FILE)

    def the_contract(self) -> Contract:
        return parse_contract(self.contract, name=POLICY_CARD)


def read_policy_card(folder: Path) -> PolicyCard:
    """The card of an export folder, after every file was held against its hash.

    Raises:
        CheckpointError: not an export folder, one of another format, or a file is missing or not
            what was exported.
    """
    path = folder / POLICY_CARD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: not an exported policy ({POLICY_CARD} is missing); make one with "
            "`vla-post export CHECKPOINT`"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); export again") from error
    if not isinstance(found, dict) or found.get("format") != EXPORT_FORMAT:
        raise CheckpointError(f"{path}: expected format {EXPORT_FORMAT!r}; export again")
    try:
        card = PolicyCard.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}; export again") from error
    for name in (*card.graphs, EXAMPLE_FILE):
        if name not in card.files:
            raise CheckpointError(f"{path}: lists no hash of {name}; export again")
    for name, digest in card.files.items():
        try:
            same = sha256(folder / name) == digest
        except FileNotFoundError:
            raise CheckpointError(f"{folder / name}: missing; export again") from None
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error})") from error
        if not same:
            raise CheckpointError(
                f"{folder / name}: not the file that was exported (its SHA-256 differs); a copy "
                "may have been cut short. Copy or export again"
            )
    return card


def write_policy_card(folder: Path, card: PolicyCard) -> None:
    text = json.dumps(card.model_dump(mode="json"), indent=2)
    (folder / POLICY_CARD).write_text(text + "\n", encoding="utf-8")


def is_export(folder: Path) -> bool:
    """Does it look like an export folder, rather than a checkpoint?"""
    return (folder / POLICY_CARD).is_file()


def policy_contract(folder: str | Path) -> Contract:
    """The cell that a checkpoint folder or an export folder was made for."""
    folder = Path(folder)
    if is_export(folder):
        return read_policy_card(folder).the_contract()
    return parse_contract(read_card(folder)["contract"], name=str(folder / CARD))


def hashes(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: sha256(folder / name) for name in names}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def language_inputs(card: PolicyCard) -> set[str]:
    """Names of the language inputs."""
    return {name for inputs in card.instructions.values() for name in inputs}
