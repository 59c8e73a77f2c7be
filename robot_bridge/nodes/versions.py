"""Where a runner's policies come from: one folder, or the versions of a registry. No ROS here."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robot_bridge.nodes.common import UserError
from trajectory_store.contract import Contract
from vla_post.export.card import policy_contract
from vla_post.export.registry import open_registry

if TYPE_CHECKING:
    from vla_post.export import ChunkPolicy

FIXED = 0
"""Version number of a policy that comes from a folder and not from a registry."""


@dataclass(frozen=True)
class Loaded:
    """A policy and where it came from."""

    policy: "ChunkPolicy"
    version: int
    card: dict[str, Any]
    """What `policy/active` says."""
    folder: Path | None = None
    """Where its files lie; None for a policy on another machine."""


class Versions:
    """Loads policies and refuses those of another cell.

    Args:
        load: reads one folder; raises what `vla_post.export.load_policy` raises.
        cell: this cell's name, by which a canary chooses cells.
    """

    def __init__(
        self,
        contract: Contract,
        load: Callable[[Path | str], "ChunkPolicy"],
        *,
        registry: str = "",
        policy: str = "",
        backend: str = "torch",
        cell: str = "",
    ) -> None:
        if bool(registry) == bool(policy):
            raise UserError(
                "runner: pass exactly one of `-p registry:=FOLDER` and `-p policy:=CHECKPOINT`"
            )
        if backend == "remote" and registry:
            raise UserError(
                "runner: backend remote asks a server; pass `-p policy:=ws://HOST:PORT`"
            )
        self.contract = contract
        self.cell = cell or contract.cell
        self.registry = open_registry(registry) if registry else None
        self._load, self._policy, self._backend = load, policy, backend

    def first(self) -> Loaded:
        """The policy to begin with."""
        if self._backend == "remote":
            return self._checked(self._load(self._policy), FIXED, {"path": self._policy})
        if self.registry is None:
            return self.folder(Path(self._policy))
        number = self.wanted()
        if number is None:
            raise UserError(f"runner: {self.registry.location} has no active version yet")
        return self.version(number)

    def wanted(self) -> int | None:
        """The version that this cell should run: the active one, or the canary."""
        assert self.registry is not None
        version = self.registry.wanted(self.cell)
        return None if version is None else version.number

    def folder(self, path: Path) -> Loaded:
        if not path.is_dir():
            raise UserError(f"runner: no checkpoint folder at {path}")
        self.contract.require_same(policy_contract(path), here="this cell", there=str(path))
        return self._checked(self._load(path), FIXED, {"path": str(path)}, path)

    def version(self, number: int) -> Loaded:
        """Raises VersionDamaged, ContractMismatch and what loading raises."""
        assert self.registry is not None
        version = self.registry.verify(number, contract=self.contract)
        path = self.registry.path(number)
        card = {
            "step": version.learner_step,
            "parent": version.parent,
            "sha256": hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest(),
        }
        return self._checked(self._load(path), number, card, path)

    def resolve(self, wanted: str) -> int | None:
        """The version that a name stands for: `newest` is the newest one that is not active.

        None: there is no such version yet. FIXED: it is a folder.
        """
        if self.registry is None:
            return FIXED
        if wanted != "newest":
            digits = wanted.removeprefix("v")
            return int(digits) if digits.isdecimal() else FIXED
        active = self.registry.active()
        numbers = {v.number for v in self.registry.versions()}
        return max(numbers - {active.number if active else None}, default=None)

    def load(self, wanted: str, number: int) -> Loaded:
        """What `resolve` found."""
        return self.folder(Path(wanted)) if number == FIXED else self.version(number)

    def _checked(
        self,
        policy: "ChunkPolicy",
        version: int,
        card: dict[str, Any],
        folder: Path | None = None,
    ) -> Loaded:
        problem = ""
        if policy.contract_sha256 != self.contract.sha256:
            problem = (
                "runner: the policy was made for another contract "
                f"({policy.contract_sha256[:12]}, this cell has {self.contract.sha256[:12]})"
            )
        unknown = set(policy.observation_keys) - set(self.contract.observations)
        if unknown:
            problem = f"runner: the policy wants {sorted(unknown)}, which no topic brings"
        if problem:
            policy.close()
            raise UserError(problem)
        card = {"version": version, "backend": self._backend} | card
        return Loaded(policy, version, card, folder)
