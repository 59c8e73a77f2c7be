"""The weak policy that a run starts from: cloned from a few scripted demonstrations.

python -m vla_post.recipes.pretrain demo_pixels --out vla_post/recipes/assets/demo_pixels
"""

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trajectory_store import FleetView
from trajectory_store.contract import Contract, Task
from vla_post.training.trainer import TrainConfig

log = logging.getLogger("vla_post.pretrain")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Behaviour cloning on scripted demonstrations."""

    kind: str
    """`smolvla_tiny` or `chunk_flow`."""
    updates: int
    tasks: tuple[str, ...] = ()
    """Of the contract; empty means all."""
    demonstrations: int = 3
    """Per task."""
    other_tasks: tuple[tuple[str, str], ...] = ()
    """(task, instruction) pairs beside the contract's, which make the network see the world."""
    other_demonstrations: int = 12
    noise: float = 0.0
    """Of the demonstrator's hand, in units of half the action's range."""
    final_rate: float = 0.1
    """The learning rate falls along a cosine to this share of its peak."""
    train: TrainConfig
    seed: int = 0


def pretrain(
    config: PretrainConfig,
    contract: Contract,
    out: Path,
    *,
    demonstrations: Path | None = None,
    on_update: Callable[[int, float], None] | None = None,
) -> Path:
    """Records demonstrations, clones them and writes the checkpoint.

    Args:
        demonstrations: existing store of demonstrations of the contract's tasks; recorded if None.
        on_update: called with the number of updates and the loss.

    Returns:
        `out`.
    """
    import torch

    from sim.demonstrations import write_demonstrations
    from vla_post.policies.build import build_policy
    from vla_post.training.data import mixture, statistics
    from vla_post.training.trainer import Trainer, cosine

    # Two threads that wait for each other on busy cores were measured 30 times slower than one.
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="pretrain_"))
    try:
        folders = [demonstrations or scratch / "demonstrations"]
        if demonstrations is None:
            write_demonstrations(
                folders[0],
                contract,
                tasks=config.tasks or None,
                episodes_per_task=config.demonstrations,
                seed=demonstration_seed(config.seed),
                noise=config.noise,
            )
        if config.other_tasks:
            folders.append(scratch / "others")
            others = {
                name: Task(instruction=text, time_limit_s=5.0) for name, text in config.other_tasks
            }
            write_demonstrations(
                folders[1],
                contract.model_copy(update={"tasks": others}),
                episodes_per_task=config.other_demonstrations,
                seed=demonstration_seed(config.seed),
                noise=config.noise,
            )
        view = FleetView(folders)
        torch.manual_seed(config.train.seed)
        policy = build_policy(config.kind, contract, statistics(view, contract))
        trainer = Trainer(policy, config.train)
        sampler = mixture(
            view,
            None,
            contract,
            batch_size=config.train.batch_size,
            online_share=0.5,
            seed=config.train.seed,
            keys=policy.observation_keys,
        )
        for number in range(config.updates):
            trainer.learner.rate_scale = cosine(number / config.updates, config.final_rate)
            metrics = trainer.step(next(sampler))
            if on_update is not None:
                on_update(number + 1, metrics["loss"])
        return trainer.save_policy(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def demonstration_seed(seed: int) -> int:
    """First scene of the demonstrations: away from those of runs and evaluations."""
    return 1_000 + 100 * seed


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    import tyro

    from vla_post.recipes import recipe

    @dataclass(frozen=True)
    class Arguments:
        name: tyro.conf.Positional[str]
        """Of the recipe."""
        out: Path

    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    chosen = recipe(arguments.name)
    started = time.monotonic()

    def say(update: int, loss: float) -> None:
        if update % 100 == 0:
            seconds = time.monotonic() - started
            log.info("update %d, loss %.3f, %.0f s", update, loss, seconds)

    pretrain(chosen.pretrain, chosen.load_contract(), arguments.out, on_update=say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
