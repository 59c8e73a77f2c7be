"""Which algorithms `vla-post train` offers, and the learner process of each as a command.

A learner's file may be deleted: its name then disappears from here, and everything else works.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import tyro

from vla_post.batch import Algorithm
from vla_post.training.learner import LearnerConfig
from vla_post.training.trainer import TrainConfig

ALGORITHMS = {
    "hg-dagger": "vla_post.learners.hg_dagger:HgDaggerConfig",
    "aloe": "vla_post.learners.aloe:AloeConfig",
    "awr": "vla_post.learners.awr:AwrConfig",
    "uni-o4": "vla_post.learners.uni_o4.chunk:UniO4ChunkConfig",
    "recap": "vla_post.learners.recap:RecapConfig",
    "iql": "vla_post.learners.iql:IqlConfig",
    "ptr": "vla_post.learners.ptr:PtrConfig",
    "ptr-hg-dagger": "vla_post.learners.ptr:PtrHgDaggerConfig",
}
"""Name on the command line -> module:class, a subclass of `Algorithm`."""


def algorithms() -> dict[str, type[Algorithm]]:
    """The algorithms that are there, by name."""
    places = {name: place.split(":") for name, place in ALGORITHMS.items()}
    return {
        name: getattr(import_module(module), attribute)
        for name, (module, attribute) in places.items()
        if find_spec(module) is not None
    }


def subcommands(wrap: Callable[[LearnerConfig], Any]) -> tuple[Any, ...]:
    """For tyro: one subcommand per algorithm, each of the type that `wrap` returns."""
    missing: Any = tyro.MISSING
    paths: dict[str, Any] = dict.fromkeys(("start", "demonstrations", "registry", "run"), missing)
    commands: list[Any] = []
    for name, kind in algorithms().items():
        config = wrap(LearnerConfig(**paths, train=TrainConfig(algorithm=kind())))
        subcommand = tyro.conf.subcommand(name, default=config, description=kind.__doc__)
        commands.append(Annotated[type(config), subcommand])
    return tuple(commands)
