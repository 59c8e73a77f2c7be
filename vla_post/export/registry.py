"""The policy registry: immutable, hashed versions in a folder, and a pointer to the active one.

```text
registry/
  v000012/            a checkpoint folder (lerobot policy + vla_post.json) and its manifest.json
  active.json         which version robots run, which some of them try, and what the gate asks of
                      new ones; replaced atomically
  history.jsonl       every publish, hold, promote, canary and rollback, with reason
```

A version is written under a temporary name, flushed to disk and renamed, so it is there whole or
not at all. Nothing in a version changes afterwards. Needs neither torch nor ROS: robots read it.
`open_registry` opens a folder or, through `bucket.py`, an S3 prefix.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trajectory_store.contract import Contract, parse_contract
from trajectory_store.repository import is_url, normalise
from vla_post.export.version import (
    MANIFEST,
    Canary,
    GateRefused,
    RegistryError,
    RegistryUnavailable,
    Version,
    VersionDamaged,
    manifest_bytes,
    parse_manifest,
    parse_version,
    require_finite,
    sha256,
    version_name,
)
from vla_post.policies.checkpoint import CARD, read_card

__all__ = [
    "SCORES",
    "Canary",
    "GateRefused",
    "Registry",
    "RegistryError",
    "RegistryUnavailable",
    "Version",
    "VersionDamaged",
    "open_registry",
    "parse_version",
    "version_name",
]

SCORES = ("gate/candidate", "gate/running", "gate/against")
"""Metrics of a version that the gate reads: two values, and the number of the version that ran."""
_NAME = re.compile(r"^v(\d{6})$")

State = dict[str, Any]
"""What `active.json` holds: version, pinned, canary, rejected, gate, ... Without a version before
the first promotion."""


def open_registry(root: str | Path) -> "Registry":
    """A folder's registry, or that of an s3://bucket/prefix (needs the extra `s3`)."""
    if is_url(str(root)):
        from vla_post.export.bucket import BucketRegistry

        return BucketRegistry(normalise(root))
    return Registry(root)


class Registry:
    """The folder of versions. Creating it is the first `publish`; reading one needs it to exist."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def location(self) -> str:
        """For messages and for another process."""
        return str(self.root)

    def path(self, number: int) -> Path:
        """Folder of the version's files on this machine."""
        return self.root / version_name(number)

    def versions(self) -> list[Version]:
        """All versions, oldest first; empty for a folder that does not exist yet."""
        return [self.version(number) for number in self.numbers()]

    def numbers(self) -> list[int]:
        """Of all versions, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(int(m[1]) for p in self.root.iterdir() if (m := _NAME.match(p.name)))

    def version(self, number: int) -> Version:
        """Raises RegistryError when there is no such version, naming those that exist."""
        path = self.path(number) / MANIFEST
        try:
            return parse_manifest(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise self._missing(number) from None

    def _missing(self, number: int) -> RegistryError:
        known = [version_name(n) for n in self.numbers()]
        there = ", ".join(known) if known else "no version at all"
        return RegistryError(
            f"{self.location}: no version {version_name(number)}; there is {there}"
        )

    def contract(self, number: int) -> Contract:
        """The contract that the version was trained for."""
        card = read_card(self.path(number))
        return parse_contract(card["contract"], name=str(self.path(number) / CARD))

    # The pointer ---------------------------------------------------------------------------------

    def active(self) -> Version | None:
        """The version that robots should run; None before the first promotion."""
        state = self._state()
        return self.version(state["version"]) if "version" in state else None

    def wanted(self, cell: str) -> Version | None:
        """What this cell should run: the canary if it is one of those that try it."""
        state = self._state()
        if "version" not in state:
            return None
        canary = _canary(state)
        chosen = canary is not None and canary.takes(cell)
        return self.version(canary.version if canary and chosen else state["version"])

    @property
    def pinned(self) -> bool:
        """A person chose the active version: publishing does not move the pointer."""
        return bool(self._state().get("pinned"))

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

    # Gate ----------------------------------------------------------------------------------------

    @property
    def gate(self) -> float | None:
        """The margin that a version must show before it is adopted; None without a gate."""
        return self._state().get("gate")

    def set_gate(self, margin: float | None) -> None:
        """Requires from now on that a version's estimated value beats the active one's by `margin`
        of it, 0 meaning strictly better; None requires nothing."""
        if margin is not None and not 0.0 <= margin < float("inf"):
            raise RegistryError(f"margin is {margin}; expected a share such as 0.05, or 0")
        self.root.mkdir(parents=True, exist_ok=True)
        self._change(lambda state: state | {"gate": margin}, [])

    def held(self, version: Version) -> str | None:
        """Why the gate does not let a version be adopted; None if it may be.

        Both values stand in the version's metrics as `SCORES` names them: those of the candidate
        and of the version that ran, by one critic on the same observations.
        """
        return _held(self._state(), version)

    # Canary --------------------------------------------------------------------------------------

    @property
    def canary(self) -> Canary | None:
        return _canary(self._state())

    @property
    def rejected(self) -> list[int]:
        """Versions that were rolled back or that failed as a canary; oldest first."""
        return list(self._state().get("rejected", ()))

    def start_canary(
        self, number: int, *, share: float = 0.0, cells: Sequence[str] = (), reason: str = ""
    ) -> Canary:
        """Lets some cells run a version, after `verify`; the others stay with the active one.

        Publishing does not move the active version meanwhile.

        Args:
            share: of all cells, chosen by their names; `cells` are taken in any case.
        """
        if not 0.0 <= share <= 1.0 or not (share or cells):
            raise RegistryError(
                f"share is {share} and cells {list(cells)}; a canary needs a share of the cells "
                "above 0 and up to 1, or names"
            )
        version = self.verify(number)
        canary = Canary(
            version=version.number, share=share, cells=tuple(cells), since_ns=time.time_ns()
        )

        def begin(state: State) -> State:
            if state.get("version") in (None, number):
                raise RegistryError(
                    f"{self.location}: {version.name} cannot be a canary beside "
                    + ("itself" if "version" in state else "nothing; promote a version first")
                )
            return state | {"canary": asdict(canary)}

        self._change(begin, [_entry("canary", number, reason)])
        return canary

    def end_canary(self, *, reason: str = "", reject: bool = True) -> Canary:
        """All cells run the active version again. To keep the canary, `promote` it instead."""
        ended: list[Canary] = []

        def end(state: State) -> State:
            canary = _canary(state)
            if canary is None:
                raise RegistryError(f"{self.location}: no canary is out")
            ended[:] = [canary]
            entries[:] = [_entry("withdraw", canary.version, reason)]
            state = state | {"canary": None}
            return _reject(state, canary.version) if reject else state

        entries: list[dict[str, Any]] = []
        self._change(end, entries)
        return ended[0]

    def rollback(self, *, to: int | None = None, reason: str = "") -> Version:
        """Back to `to`, else to the version that was active before; stays pinned there.

        Raises:
            RegistryError: there is no earlier version.
        """
        version = self.verify(self.previous() if to is None else to)
        self._point(version, "rollback", reason, True)
        return version

    def prune(self, keep: int) -> list[int]:
        """Deletes all but the newest `keep` versions; returns which went.

        The active version, the canary and the one to which a rollback leads stay in any case.
        """
        if keep < 1:
            raise RegistryError(f"keep is {keep}; expected at least 1")
        state = self._state()
        stay = {state.get("version"), *self.numbers()[-keep:]}
        if (canary := _canary(state)) is not None:
            stay.add(canary.version)
        with contextlib.suppress(RegistryError):
            stay.add(self.previous())
        gone = [number for number in self.numbers() if number not in stay]
        if gone:
            self._drop(gone)
        return gone

    def previous(self) -> int:
        """The version to which a plain rollback leads: the last that is whole and not rejected.

        Raises:
            RegistryError: nothing is active, or nothing was before.
        """
        current = self._state()
        if "version" not in current:
            raise RegistryError(
                f"{self.location}: nothing is active, so there is nothing to roll back"
            )
        there, refused = set(self.numbers()), set(current.get("rejected", ()))
        earlier = [
            int(entry["version"])
            for entry in self.history()
            if entry["action"] in ("promote", "rollback")
            and entry["version"] < current["version"]
            and entry["version"] in there - refused
        ]
        for number in reversed(earlier):
            with contextlib.suppress(VersionDamaged):
                return self.verify(number).number
        raise RegistryError(
            f"{self.location}: {version_name(current['version'])} is the first version that was "
            "ever active, of those that are left, whole and not rejected; name another one"
        )

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
        publication: str = "",
    ) -> Version:
        """Copies a checkpoint folder in as the next version.

        Args:
            contract: of the cell; must be the one inside the checkpoint.
            publication: a name that the publisher never uses again. A version above `parent` that
                has it is completed, and no second one is made: who died meanwhile, or lost the
                answer, makes the same call again.
            promote: make it active at once, unless a person pinned another version, a canary is
                out, or the gate holds this one.

        Raises:
            vla_post.policies.checkpoint.CheckpointError: no checkpoint there.
            trajectory_store.contract.ContractMismatch: it was made for another cell.
            VersionDamaged: its weights are not finite; nothing is published.
        """
        source = Path(checkpoint).absolute()
        made_for = parse_contract(read_card(source)["contract"], name=str(source / CARD))
        contract.require_same(made_for, here="the registry's cell", there=str(source))
        self.root.mkdir(parents=True, exist_ok=True)
        made = self._made(publication, parent or 0) if publication else None
        if made is not None:
            told = {e["version"] for e in self.history() if e["action"] == "publish"}
            return made if made.number in told else self._published(made, promote)
        temporary = Path(tempfile.mkdtemp(prefix=".publishing-", dir=self.root))
        try:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
            files = {
                str(p.relative_to(temporary)): sha256(p)
                for p in sorted(temporary.rglob("*"))
                if p.is_file() and p.name != MANIFEST
            }
            require_finite(temporary)
            version = self._take_in(
                temporary,
                {
                    "parent": parent,
                    "created_ns": time.time_ns(),
                    "learner_step": learner_step,
                    "contract_sha256": contract.sha256,
                    "snapshots": dict(snapshots or {}),
                    "metrics": dict(metrics or {}),
                    "files": files,
                    "publication": publication,
                },
            )
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return self._published(version, promote)

    def _made(self, publication: str, after: int) -> Version | None:
        newer = (self.version(number) for number in self.numbers() if number > after)
        return next((version for version in newer if version.publication == publication), None)

    def _published(self, version: Version, promote: bool) -> Version:
        """The second half of `publish`: history and pointer."""
        entries = [_entry("publish", version.number, "")]

        def move(state: State) -> State:
            """Decided on the state that is replaced, so a person's rollback is never run over."""
            del entries[1:]
            if not promote or state.get("pinned") or _canary(state) is not None:
                return state
            if state.get("version", 0) > version.number:
                return state  # completed late: robots never go back by themselves
            if (held := _held(state, version)) is not None:
                entries.append(_entry("hold", version.number, held))
                return state
            entries.append(_entry("promote", version.number, "newest"))
            return _pointed(state, version, "newest", pin=False)

        self._change(move, entries)
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
            if sha256(there[name]) != version.files[name]:
                raise VersionDamaged(
                    f"{path / name}: its SHA-256 is not the manifest's; the file changed after it "
                    "was published. Roll back to another version"
                )
        if contract is not None:
            contract.require_same(
                self.contract(number), here="the running cell", there=version.name
            )
        require_finite(path)
        return version

    # ---------------------------------------------------------------------------------------------

    def _take_in(self, temporary: Path, manifest: dict[str, Any]) -> Version:
        """Takes the next free number; another publisher may take one at the same moment."""
        while True:
            version = Version(number=max(self.numbers(), default=0) + 1, **manifest)
            (temporary / MANIFEST).write_bytes(manifest_bytes(version))
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

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            gone = self.root / f".removed-{version_name(number)}"
            shutil.rmtree(gone, ignore_errors=True)
            self.path(number).rename(gone)  # a robot never sees half of it
            shutil.rmtree(gone)

    def _point(self, version: Version, action: str, reason: str, pin: bool) -> None:
        def move(state: State) -> State:
            before, back = state.get("version"), action == "rollback"
            state = _pointed(state, version, reason, pin=pin)
            canary = _canary(state)
            # A rollback is for all cells; a promoted canary has become the active version.
            if canary is not None and (back or canary.version == version.number):
                state |= {"canary": None}
            if back and before is not None and before != version.number:
                state = _reject(state, before)
            return state

        self._change(move, [_entry(action, version.number, reason)])

    # State: read often, changed rarely, and never by two at once ---------------------------------

    def _state(self) -> State:
        path = self.root / "active.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except json.JSONDecodeError as error:
            raise RegistryError(
                f"{path}: not JSON ({error}); delete it and promote a version again"
            ) from error

    def _change(self, change: Callable[[State], State], entries: list[dict[str, Any]]) -> None:
        """Replaces the state by what `change` makes of it, then writes the history's entries.

        `change` may be called again when somebody else was quicker.
        """
        with self._locked():
            old = self._state()
            new = change(old)
            if new != old:
                handle, name = tempfile.mkstemp(prefix=".active-", dir=self.root)
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(json.dumps(new) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).chmod(0o644)  # robots may run as somebody else
                Path(name).replace(self.root / "active.json")
                _flush(self.root)
            with (self.root / "history.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _canary(state: State) -> Canary | None:
    found = state.get("canary")
    return Canary(**found | {"cells": tuple(found["cells"])}) if found else None


def _held(state: State, version: Version) -> str | None:
    margin, active = state.get("gate"), state.get("version")
    if margin is None or active is None or active == version.number:
        return None
    needed = f"the gate asks for a value {margin:.0%} above that of {version_name(active)}"
    if any(name not in version.metrics for name in SCORES):
        return f"{needed}, and nobody compared them"
    candidate, running, against = (version.metrics[name] for name in SCORES)
    if against != active:
        return f"{needed}, and it was compared with {version_name(int(against))}"
    # Written so that NaN does not pass.
    if candidate > running and candidate - running >= margin * abs(running):
        return None
    return f"{needed}: {candidate:.4g} against {running:.4g}"


def _pointed(state: State, version: Version, reason: str, *, pin: bool) -> State:
    return state | {
        "version": version.number,
        "learner_step": version.learner_step,
        "since_ns": time.time_ns(),
        "pinned": pin,
        "reason": reason,
        "rejected": [n for n in state.get("rejected", ()) if n != version.number],
    }


def _reject(state: State, number: int) -> State:
    others = [n for n in state.get("rejected", ()) if n != number]
    return state | {"rejected": [*others, number][-100:]}


def _entry(action: str, number: int, reason: str) -> dict[str, Any]:
    return {"action": action, "version": number, "stamp_ns": time.time_ns(), "reason": reason}


def _flush(path: Path) -> None:
    """To the disk, so that a rename never outlives the bytes that it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
