"""`vla-post data ...`: data sets to learn from: locomotion, noisy experts on cells, D4RL files."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vla_post.cli.errors import UserError
from vla_post.cli.signals import ends_in_order
from vla_post.recipes.locomotion import LocomotionData, make_dataset


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Locomotion:
    """Train a behaviour agent to a stated level and record it, as D4RL did.

    Writes transitions.hdf5 (D4RL's layout), a trajectory store and about.json into --out. Called
    again after a stop, it goes on where it was.
    """

    data: Annotated[LocomotionData, tyro.conf.arg(name="")]
    out: Path
    """Folder for the data set."""
    agent: Path | None = None
    """Folder of the agent; default OUT/agent. Several qualities of one environment and seed can
    share it, so that it is trained once."""
    force: bool = False
    """Replace a data set that is there."""

    def run(self) -> None:
        try:
            with ends_in_order():
                about = make_dataset(
                    self.data, self.out, agent_folder=self.agent, force=self.force, say=_say
                )
        except KeyboardInterrupt:
            raise UserError(
                f"stopped; the same command goes on where it was ({self.out})"
            ) from None
        print(json.dumps({key: about[key] for key in about if key != "options"}, indent=2))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Record the scripted expert with noise on its commands: successes and failures, in a store."""

    contract: Path
    """Of a simulated cell; `vla-post contract show` lists the shipped ones."""
    out: Path
    """The store; it must not exist."""
    tasks: tuple[str, ...] = ()
    """All of the contract's by default."""
    episodes: int = 100
    """Of each task."""
    noise: float = 0.5
    """Standard deviation, in units of half the action's range."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"episodes is {self.episodes}; it must be at least 1")
        if self.noise < 0:
            raise ValueError(f"noise is {self.noise:g}; it cannot be negative")

    def run(self) -> None:
        from sim.demonstrations import write_demonstrations
        from sim.episode import Episode
        from trajectory_store import load_contract

        if self.out.exists():
            raise UserError(f"{self.out} exists; name a new folder for the store")
        contract = load_contract(self.contract)
        for task in self.tasks:
            contract.task(task)
        successes: list[bool] = []
        total = self.episodes * len(self.tasks or contract.tasks)

        def count(episode: Episode) -> None:
            successes.append(episode.success)
            if len(successes) % max(total // 10, 1) == 0:
                _say(f"{len(successes)} of {total} episodes, {sum(successes)} successes")

        rows = write_demonstrations(
            self.out,
            contract,
            tasks=self.tasks or None,
            episodes_per_task=self.episodes,
            seed=self.seed,
            noise=self.noise,
            failures=True,
            on_episode=count,
        )
        print(f"{self.out}: {rows} ticks, {sum(successes)} successes of {total} episodes")


@dataclass(frozen=True, kw_only=True)
class D4rl:
    """Write stores as one file in D4RL's layout (.hdf5 or .npz)."""

    store: Annotated[Path, tyro.conf.Positional]
    """A store, or a folder with stores below."""
    out: Path
    """File to write; it must not exist."""
    task: str | None = None
    """Only this one."""
    reward: Literal["success", "stored"] = "success"
    """1 at the end of a success and 0 elsewhere, or the reward as it was recorded."""

    def run(self) -> None:
        from trajectory_store import FleetView
        from vla_post.convert.d4rl import from_stores

        if self.out.exists():
            raise UserError(f"{self.out} exists; name another file, nothing is overwritten")
        view = FleetView(self.store)
        if not view.stores:
            raise UserError(f"{self.store}: no store here or below")
        found = from_stores(view, task=self.task, reward=self.reward)
        found.save(self.out)
        print(
            f"{self.out}: {len(found)} transitions, {int(found.ends.sum())} episodes, "
            f"{int(found.terminals.sum())} terminals"
        )


sub = tyro.conf.subcommand
data_command = (
    Annotated[Locomotion, sub("locomotion")]
    | Annotated[Cell, sub("cell")]
    | Annotated[D4rl, sub("d4rl")]
)
