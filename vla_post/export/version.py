"""What a version of a policy is: its manifest, and what must hold of its files.

Needs neither torch nor ROS: robots read it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize

MANIFEST = "manifest.json"


class RegistryError(ValueError):
    """The registry cannot do what was asked; the message says what was found and what to do."""


class RegistryUnavailable(RegistryError):
    """The object storage does not answer; what a robot runs goes on, and later is soon enough."""


class GateRefused(RegistryError):
    """The registry's gate holds the version: it was not shown to be better than the running one."""


class VersionDamaged(RegistryError):
    """A version fails its checks: a file changed or is missing, or its weights are not finite."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """What the manifest of one version says."""

    number: int
    parent: int | None
    """The version whose weights the learner started from; None for the first."""
    created_ns: int
    learner_step: int
    contract_sha256: str
    snapshots: dict[str, str] = field(default_factory=dict[str, str])
    """Store name -> snapshot id that the learner had read."""
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    files: dict[str, str] = field(default_factory=dict[str, str])
    """Relative path -> SHA-256 of its bytes."""
    stored: dict[str, str] = field(default_factory=dict[str, str])
    """In a bucket: relative path -> object that holds it, whole or as a difference."""
    sent_bytes: int = 0
    """In a bucket: what a robot with the base at hand downloads; 0 in a folder."""
    publication: str = ""
    """The publisher's own name of this publication, by which it is made only once."""

    @property
    def name(self) -> str:
        return version_name(self.number)


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A version that some cells run before all do."""

    version: int
    share: float = 0.0
    """Of the cells, chosen by their names' hash."""
    cells: tuple[str, ...] = ()
    """Named ones, whatever the share."""
    since_ns: int = 0

    def takes(self, cell: str) -> bool:
        """Always the same answer for the same cell and version."""
        digest = hashlib.sha256(f"{self.version}/{cell}".encode()).digest()
        return cell in self.cells or int.from_bytes(digest[:8], "big") / 2**64 < self.share


def version_name(number: int) -> str:
    return f"v{number:06d}"


def parse_version(text: str | int) -> int:
    """`12`, `v12` and `v000012` are all version 12.

    Raises:
        RegistryError: something else.
    """
    digits = str(text).removeprefix("v")
    if not digits.isdecimal():
        raise RegistryError(f"{text!r} is no version; write it as 12 or v000012")
    return int(digits)


def manifest_bytes(version: Version) -> bytes:
    return (json.dumps(asdict(version), indent=2) + "\n").encode()


def parse_manifest(data: bytes, where: str) -> Version:
    try:
        return Version(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise VersionDamaged(f"{where}: not a manifest ({error}); roll back") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def require_finite(path: Path) -> None:
    weights = sorted(path.rglob("*.safetensors"))
    if not weights:
        raise VersionDamaged(f"{path}: holds no *.safetensors file, so it is no policy")
    for file in weights:
        try:
            tensors = deserialize(file.read_bytes())
        except Exception as error:  # safetensors raises its own, undocumented class
            raise VersionDamaged(f"{file}: does not read as safetensors ({error})") from error
        for name, tensor in tensors:
            if not _finite(tensor["dtype"], tensor["data"]):
                raise VersionDamaged(f"{file}: tensor {name!r} holds NaN or infinity")


def _finite(dtype: str, data: bytes) -> bool:
    if dtype in _FLOATS:
        return bool(np.isfinite(np.frombuffer(data, _FLOATS[dtype])).all())
    if dtype == "BF16":
        # numpy has no bfloat16; an exponent of all ones is infinity or NaN.
        return not bool(((np.frombuffer(data, np.uint16) & 0x7F80) == 0x7F80).any())
    return True
