"""The policy registry: immutable, hashed versions in a folder, and a pointer to the active one.

```text
registry/
  v000012/            a checkpoint folder (lerobot policy + vla_post.json) and its manifest.json
  active.json         which version robots run; replaced atomically
  gate.json           by how much a version must beat the active one before it is adopted, if at all
  history.jsonl       every publish, hold, promote and rollback, with reason
```

A version is written under a temporary name, flushed to disk and renamed, so it is there whole or
not at all. Nothing in a version changes afterwards. Needs neither torch nor ROS: robots read it.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize

from trajectory_store.contract import Contract, parse_contract
from vla_post.policies.checkpoint import CARD, read_card

MANIFEST = "manifest.json"
SCORES = ("gate/candidate", "gate/running", "gate/against")
"""Metrics of a version that the gate reads: two values, and the number of the version that ran."""
_NAME = re.compile(r"^v(\d{6})$")


class RegistryError(ValueError):
    """The registry cannot do what was asked; the message says what was found and what to do."""


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

    @property
    def name(self) -> str:
        return version_name(self.number)


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


class Registry:
    """The folder of versions. Creating it is the first `publish`; reading one needs it to exist."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, number: int) -> Path:
        return self.root / version_name(number)

    def versions(self) -> list[Version]:
        """All versions, oldest first; empty for a folder that does not exist yet."""
        if not self.root.is_dir():
            return []
        numbers = sorted(int(m[1]) for p in self.root.iterdir() if (m := _NAME.match(p.name)))
        return [self.version(number) for number in numbers]

    def version(self, number: int) -> Version:
        """Raises RegistryError when there is no such version, naming those that exist."""
        path = self.path(number) / MANIFEST
        try:
            return Version(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            known = sorted(p.name for p in self.root.glob("v??????")) if self.root.is_dir() else []
            there = ", ".join(known) if known else "no version at all"
            raise RegistryError(
                f"{self.root}: no version {version_name(number)}; there is {there}"
            ) from None
        except (json.JSONDecodeError, TypeError) as error:
            raise VersionDamaged(f"{path}: not a manifest ({error}); roll back") from error

    def contract(self, number: int) -> Contract:
        """The contract that the version was trained for."""
        card = read_card(self.path(number))
        return parse_contract(card["contract"], name=str(self.path(number) / CARD))

    # The pointer ---------------------------------------------------------------------------------

    def active(self) -> Version | None:
        """The version that robots should run; None before the first promotion."""
        pointer = self._pointer()
        return self.version(pointer["version"]) if pointer else None

    @property
    def pinned(self) -> bool:
        """A person chose the active version: publishing does not move the pointer."""
        pointer = self._pointer()
        return bool(pointer and pointer["pinned"])

    def promote(
        self, number: int, *, reason: str = "", pin: bool = False, force: bool = False
    ) -> Version:
        """Makes a version the active one, after `verify`.

        Args:
            pin: hold it there until somebody promotes again without pin.
            force: past the gate.

        Raises:
            GateRefused: the gate holds it.
        """
        version = self.verify(number)
        held = None if force else self.held(version)
        if held is not None:
            raise GateRefused(
                f"{version.name}: {held}. Let it run as a shadow first (`vla-post up --shadow "
                f"{version.name}`), or promote it with --force"
            )
        self._point(version, "promote", reason, pin)
        return version

    def rollback(self, *, to: int | None = None, reason: str = "") -> Version:
        """Back to `to`, else to the version that was active before; stays pinned there.

        Raises:
            RegistryError: there is no earlier version.
        """
        version = self.verify(self.previous() if to is None else to)
        self._point(version, "rollback", reason, True)
        return version

    @property
    def gate(self) -> float | None:
        """The margin that a version must show before it is adopted; None without a gate."""
        try:
            text = (self.root / "gate.json").read_text(encoding="utf-8")
            return float(json.loads(text)["margin"])
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise RegistryError(
                f"{self.root / 'gate.json'}: not a gate ({error}); set it again"
            ) from error

    def set_gate(self, margin: float | None) -> None:
        """Requires from now on that a version's estimated value beats the active one's by `margin`
        of it, 0 meaning strictly better; None requires nothing."""
        path = self.root / "gate.json"
        if margin is None:
            path.unlink(missing_ok=True)
            return
        if not 0.0 <= margin < float("inf"):
            raise RegistryError(f"margin is {margin}; expected a share such as 0.05, or 0")
        self.root.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps({"margin": margin}) + "\n", encoding="utf-8")
        unfinished.replace(path)

    def held(self, version: Version) -> str | None:
        """Why the gate does not let a version be adopted; None if it may be.

        Both values stand in the version's metrics as `SCORES` names them: those of the candidate
        and of the version that ran, by one critic on the same observations.
        """
        margin, active = self.gate, self.active()
        if margin is None or active is None or active.number == version.number:
            return None
        needed = f"the gate asks for a value {margin:.0%} above that of {active.name}"
        if any(name not in version.metrics for name in SCORES):
            return f"{needed}, and nobody compared them"
        candidate, running, against = (version.metrics[name] for name in SCORES)
        if against != active.number:
            return f"{needed}, and it was compared with {version_name(int(against))}"
        # Written so that NaN does not pass.
        if candidate > running and candidate - running >= margin * abs(running):
            return None
        return f"{needed}: {candidate:.4g} against {running:.4g}"

    def previous(self) -> int:
        """The version to which a plain rollback leads.

        Raises:
            RegistryError: nothing is active, or nothing was before.
        """
        current = self._pointer()
        if current is None:
            raise RegistryError(f"{self.root}: nothing is active, so there is nothing to roll back")
        earlier = [
            int(entry["version"])
            for entry in self.history()
            if entry["action"] in ("promote", "rollback") and entry["version"] < current["version"]
        ]
        if not earlier:
            raise RegistryError(
                f"{self.root}: {version_name(current['version'])} is the first version that "
                "was ever active; name another one to go to"
            )
        return earlier[-1]

    def history(self) -> list[dict[str, Any]]:
        """Every publish, promote and rollback, oldest first."""
        try:
            lines = (self.root / "history.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.strip()]

    # Writing and checking ------------------------------------------------------------------------

    def publish(
        self,
        checkpoint: str | Path,
        *,
        contract: Contract,
        parent: int | None = None,
        learner_step: int = 0,
        snapshots: Mapping[str, str] | None = None,
        metrics: Mapping[str, Any] | None = None,
        promote: bool = True,
    ) -> Version:
        """Copies a checkpoint folder in as the next version.

        Args:
            contract: of the cell; must be the one inside the checkpoint.
            promote: make it active at once, unless a person pinned another version or the gate
                holds this one.

        Raises:
            vla_post.policies.checkpoint.CheckpointError: no checkpoint there.
            trajectory_store.contract.ContractMismatch: it was made for another cell.
            VersionDamaged: its weights are not finite; nothing is published.
        """
        source = Path(checkpoint)
        made_for = parse_contract(read_card(source)["contract"], name=str(source / CARD))
        contract.require_same(made_for, here="the registry's cell", there=str(source))
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".publishing-", dir=self.root))
        try:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
            files = {
                str(p.relative_to(temporary)): _sha256(p)
                for p in sorted(temporary.rglob("*"))
                if p.is_file() and p.name != MANIFEST
            }
            _require_finite(temporary)
            version = self._rename_in(
                temporary,
                {
                    "parent": parent,
                    "created_ns": time.time_ns(),
                    "learner_step": learner_step,
                    "contract_sha256": contract.sha256,
                    "snapshots": dict(snapshots or {}),
                    "metrics": dict(metrics or {}),
                    "files": files,
                },
            )
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._record("publish", version.number, "")
        if promote and not self.pinned:
            held = self.held(version)
            if held is None:
                self._point(version, "promote", "newest", False)
            else:
                self._record("hold", version.number, held)
        return version

    def verify(self, number: int, *, contract: Contract | None = None) -> Version:
        """Checks a version's files against its manifest, its weights, and its contract if given.

        Raises:
            VersionDamaged: a file is missing, added or changed, or a weight is not finite.
            trajectory_store.contract.ContractMismatch: made for another cell.
        """
        version, path = self.version(number), self.path(number)
        there = {
            str(p.relative_to(path)): p
            for p in path.rglob("*")
            if p.is_file() and p.name != MANIFEST
        }
        for name in sorted(version.files.keys() | there.keys()):
            if name not in there:
                raise VersionDamaged(f"{path / name}: missing; roll back to another version")
            if name not in version.files:
                raise VersionDamaged(f"{path / name}: not in the manifest; remove it or roll back")
            if _sha256(there[name]) != version.files[name]:
                raise VersionDamaged(
                    f"{path / name}: its SHA-256 is not the manifest's; the file changed after it "
                    "was published. Roll back to another version"
                )
        if contract is not None:
            contract.require_same(
                self.contract(number), here="the running cell", there=version.name
            )
        _require_finite(path)
        return version

    # ---------------------------------------------------------------------------------------------

    def _rename_in(self, temporary: Path, manifest: dict[str, Any]) -> Version:
        """Takes the next free number; another publisher may take one at the same moment."""
        while True:
            taken = [int(m[1]) for p in self.root.iterdir() if (m := _NAME.match(p.name))]
            version = Version(number=max(taken, default=0) + 1, **manifest)
            (temporary / MANIFEST).write_text(json.dumps(asdict(version), indent=2) + "\n")
            for file in temporary.rglob("*"):
                _flush(file)
            _flush(temporary)
            try:
                temporary.rename(self.path(version.number))
            except OSError:
                if not self.path(version.number).exists():
                    raise
                continue
            _flush(self.root)
            return version

    def _pointer(self) -> dict[str, Any] | None:
        path = self.root / "active.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise RegistryError(
                f"{path}: not JSON ({error}); delete it and promote a version again"
            ) from error

    def _point(self, version: Version, action: str, reason: str, pin: bool) -> None:
        text = json.dumps(
            {
                "version": version.number,
                "learner_step": version.learner_step,
                "since_ns": time.time_ns(),
                "pinned": pin,
                "reason": reason,
            }
        )
        handle, name = tempfile.mkstemp(prefix=".active-", dir=self.root)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(self.root / "active.json")
        _flush(self.root)
        self._record(action, version.number, reason)

    def _record(self, action: str, number: int, reason: str) -> None:
        entry = {"action": action, "version": number, "stamp_ns": time.time_ns(), "reason": reason}
        with (self.root / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """To the disk, so that a rename never outlives the bytes that it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def _require_finite(path: Path) -> None:
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
