"""`vla-post train`: a learner that follows stores, or a fresh policy cloned from demonstrations.

`vla-post train NAME` for every algorithm of `training.algorithms`, and `vla-post train clone`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Union, cast

import tyro

from vla_post import parallel
from vla_post.cli.errors import UserError
from vla_post.training.algorithms import subcommands
from vla_post.training.learner import LearnerConfig, run_until_stopped
from vla_post.training.signals import StopRequest


@dataclass(frozen=True, kw_only=True)
class LearnerRun:
    """A learner process: follows the stores and publishes versions to the registry until it is
    stopped (SIGINT, SIGTERM), or for --max-updates.
    """

    config: Annotated[LearnerConfig, tyro.conf.arg(name="")]
    processes: int = 1
    """Train with so many processes of this machine, each on its slice of every batch. On several
    machines, start the same command with torchrun instead."""

    def run(self) -> None:
        for name in ("start", "demonstrations"):
            folder: Path = getattr(self.config, name)
            if not folder.is_dir():
                raise UserError(f"--{name} {folder}: no such folder")
        stop = StopRequest()
        stop.listen()
        stop.loading = False
        with parallel.together(self.processes):
            status = run_until_stopped(self.config, stop)
        if status:
            raise SystemExit(status)


@dataclass(frozen=True, kw_only=True)
class CloneRun:
    """Behaviour cloning: a fresh policy from scripted demonstrations, in the recipe's sizes."""

    recipe: Annotated[str, tyro.conf.Positional]
    """demo_pixels or demo_state."""
    out: Path
    """Checkpoint folder to write."""
    demonstrations: Path | None = None
    """Store of demonstrations; recorded with the simulator's scripted experts if not given."""
    updates: int | None = None
    """The recipe's number by default."""
    seed: int = 0

    def run(self) -> None:
        from tqdm import tqdm

        from vla_post.recipes import recipe
        from vla_post.recipes.pretrain import pretrain

        chosen = recipe(self.recipe)
        config = replace(chosen.pretrain, seed=self.seed)
        if self.updates is not None:
            config = replace(config, updates=self.updates)
        with tqdm(total=config.updates, unit="update") as bar:

            def show(update: int, loss: float) -> None:
                bar.update(update - bar.n)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

            contract = chosen.load_contract()
            pretrain(config, contract, self.out, demonstrations=self.demonstrations, on_update=show)
        print(self.out)


train_command = cast(Any, Union)[
    (
        *subcommands(lambda config: LearnerRun(config=config)),
        Annotated[CloneRun, tyro.conf.subcommand("clone")],
    )
]
