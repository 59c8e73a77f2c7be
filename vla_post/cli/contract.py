"""`vla-post contract ...`: check, show and compare cell contracts, or draft one from a robot."""

import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import tyro

from trajectory_store.contract import Contract, diff, load_contract, parse_contract
from vla_post.cli.errors import UserError

File = Annotated[Path, tyro.conf.Positional]


def shipped() -> dict[str, Path]:
    """Contracts that come with the software, by file name without suffix: simulated cells, then
    real robots as examples."""
    folders = [Path(str(files(package))) / "contracts" for package in ("sim", "robot_bridge")]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def path_of(source: Path) -> Path:
    """The file of a contract that was named by path, or by the name of a shipped one."""
    return shipped().get(str(source), source)


def find(source: Path) -> Contract:
    """A contract by path, or by the name of a shipped one.

    Raises:
        ContractError: every problem of the file, one a line.
    """
    return load_contract(path_of(source))


@dataclass(frozen=True, kw_only=True)
class Check:
    """Is the file a valid contract? Prints its hash, or every problem with its line."""

    contract: File
    """A YAML file, or the name of a shipped contract."""

    def run(self) -> None:
        contract = find(self.contract)
        from robot_bridge.core.safety import Gate

        folder = path_of(self.contract).parent
        Gate(
            contract, folder
        )  # what only the arbiter can tell: the workspace box, the kinds of limits
        print(f"{contract.cell}: valid, sha256 {contract.sha256}")


@dataclass(frozen=True, kw_only=True)
class Show:
    """A contract in words; without a file, the list of the shipped ones."""

    contract: Annotated[Path | None, tyro.conf.Positional] = None
    """A YAML file, or the name of a shipped contract."""

    def run(self) -> None:
        if self.contract is None:
            for name, path in shipped().items():
                contract = load_contract(path)
                print(f"{name:<21} {contract.robot:<10} {len(contract.tasks):>2} tasks  {path}")
            return
        contract = find(self.contract)
        action, safety = contract.action, contract.safety
        print(f"cell {contract.cell}, robot {contract.robot}, {contract.control_hz:g} Hz")
        print(f"sha256 {contract.sha256}")
        for key, feature in contract.observations.items():
            what = "x".join(str(n) for n in feature.shape)
            print(
                f"  {key:<32} {what:<11} {feature.unit:<11} {feature.rate_hz:g} Hz from "
                f"{feature.topic}, {feature.align}, at most {feature.max_age_ms:g} ms old"
            )
        print(f"  action ({action.mode}, {action.unit}) to {action.topic}:")
        limits = action.limits
        for i, name in enumerate(action.names):
            low, high = limits.position[i]
            rates = [
                f"{kind} {getattr(limits, kind)[i]:g}"
                for kind in ("velocity", "acceleration", "jerk", "step")
                if getattr(limits, kind)
            ]
            held = "held" if name in action.held else ""
            print(f"    {name:<14} [{low:g}, {high:g}] {' '.join([*rates, held])}".rstrip())
        print(
            f"  chunks of {contract.chunk_horizon}, {contract.execute_steps} executed; stale: "
            f"{safety.stale}; joint states at most {safety.joint_state_max_age_ms:g} ms old, "
            f"teleop silent for at most {safety.teleop_timeout_ms:g} ms"
        )
        for name, task in contract.tasks.items():
            print(f"  task {name}: {task.instruction!r}, {task.time_limit_s:g} s")


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Which fields differ? Ends with status 1 if any do."""

    a: File
    b: File

    def run(self) -> None:
        lines = diff(find(self.a), find(self.b))
        for line in lines:
            print(line)
        if lines:
            sys.exit(1)
        print("equal", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class FromGraph:
    """Draft a contract from the topics of a running robot, for you to complete."""

    namespace: str = "/"
    """Where the robot's topics are."""
    cell: str = "my_cell"
    robot: str = "my_robot"
    seconds: float = 5.0
    """How long to listen."""
    out: Path | None = None
    """File to write; it must not exist. Standard output otherwise."""

    def run(self) -> None:
        from robot_bridge.from_graph import GraphError, draft, listen

        if self.out is not None and self.out.exists():
            raise UserError(f"{self.out} exists; choose another file, nothing is overwritten")
        try:
            text = draft(listen(self.namespace, self.seconds), cell=self.cell, robot=self.robot)
        except GraphError as error:
            raise UserError(str(error)) from error
        parse_contract(text, name="draft")
        if self.out is None:
            print(text, end="")
        else:
            self.out.write_text(text, encoding="utf-8")
            print(f"{self.out}: complete the lines with CHECK, then `vla-post contract check`")


contract_command = (
    Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[FromGraph, tyro.conf.subcommand("from-graph")]
)
