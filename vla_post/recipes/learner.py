"""The learner process of a demonstration run, with the recipe's settings and the run's folders.

    python -m vla_post.recipes.learner demo_pixels --start CHECKPOINT --run runs/RUN --seed 0

A run folder holds `stores/demonstrations`, `stores/online`, `registry` and `metrics.jsonl`.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from vla_post.training.signals import StopRequest


@dataclass(frozen=True)
class Arguments:
    recipe: tyro.conf.Positional[str]
    start: Path
    """Checkpoint to start from."""
    run: Path
    """The run folder."""
    seed: int = 0
    resume: bool = False


def main(stop: StopRequest, argv: list[str] | None = None) -> int:
    """Runs until SIGINT or SIGTERM. Returns the exit status."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    from vla_post.recipes import recipe
    from vla_post.training.learner import LearnerConfig, run_until_stopped

    chosen = recipe(arguments.recipe)
    config = LearnerConfig(
        start=arguments.start,
        demonstrations=arguments.run / "stores" / "demonstrations",
        online=arguments.run / "stores" / "online",
        registry=arguments.run / "registry",
        run=arguments.run,
        train=replace(chosen.train, seed=arguments.seed),
        online_share=chosen.online_share,
        publish_s=chosen.publish_s,
        publish_updates=chosen.publish_updates,
        max_reuse=chosen.max_reuse,
        resume=arguments.resume,
    )
    stop.loading = False
    return run_until_stopped(config, stop)


if __name__ == "__main__":
    request = StopRequest()
    request.listen()  # before the imports, which take seconds in which a signal may come
    sys.exit(main(request))
