"""One of several processes that run learners one after the other, for test_sharding.

FOLDER of a cell's stores; the runs as a JSON list, as `learn` takes them. RANK and WORLD_SIZE are
torch's.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vla_post import parallel
from vla_post.learners.transition_math import TransitionConfig
from vla_post.training.algorithms import algorithms
from vla_post.training.learner import LearnerConfig, LearnerProcess
from vla_post.training.trainer import TrainConfig

KNOBS: dict[str, dict[str, Any]] = {
    "hg-dagger": {"learning_rate": 5e-4, "warmup_updates": 0},
    "recap": {"value_warmup": 2},
    "ptr": {"transition": TransitionConfig(warmup_updates=2)},
    "ptr-hg-dagger": {"transition": TransitionConfig(warmup_updates=2)},
}


def learn(
    folder: Path, *, name: str, updates: int, algorithm: str, shard: bool = False, resume: str = ""
) -> None:
    """A run under `folder / name`, to so many updates.

    Args:
        resume: whose state it continues; copied, if that is another run.
    """
    run = folder / name
    if resume not in ("", name) and parallel.rank() == 0:
        shutil.copytree(folder / resume, run)
    if parallel.world() > 1:
        dist.barrier()
    config = LearnerConfig(
        start=folder / "start",
        demonstrations=folder / "demos",
        online=folder / "online",
        registry=run / "registry",
        run=run,
        train=TrainConfig(algorithm=algorithms()[algorithm](**KNOBS[algorithm]), batch_size=8),
        max_reuse=1e9,
        max_updates=updates,
        shard=shard,
        resume=bool(resume),
        mirror=False,
    )
    LearnerProcess(config).run()


if __name__ == "__main__":
    with parallel.together():
        for one in json.loads(sys.argv[2]):
            learn(Path(sys.argv[1]), **one)
