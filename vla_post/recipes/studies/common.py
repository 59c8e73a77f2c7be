"""What the studies share: cells, playing, training, and a file of results that can be resumed."""

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from sim.operator import OperatorConfig
from sim.rollout import BatchPolicy, Case, Result, rollout
from trajectory_store import ChunkBatch, Contract
from vla_post.batch import Metrics, observation_from_numpy
from vla_post.export.runtime import draw_noise
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.training.trainer import Trainer

EVALUATION_SEED = 50_000
ONLINE_SEED = 200_000


def player(policy: LeRobotPolicy) -> BatchPolicy:
    """A policy for `sim.rollout`, with noise from the scene's seed so that runs are paired."""

    def play(
        observation: Mapping[str, np.ndarray], instructions: Sequence[str], seeds: np.ndarray
    ) -> np.ndarray:
        policy.module.eval()
        wanted = {key: observation[key] for key in policy.observation_keys}
        noise = torch.from_numpy(draw_noise(seeds, policy.horizon, policy.noise_size))[:, None]
        chunk = policy.act(observation_from_numpy(wanted), list(instructions), noise=noise)
        return chunk[:, 0].numpy()

    return play


@contextmanager
def averaged(trainer: Trainer) -> Generator[LeRobotPolicy]:
    """The policy with the averaged weights, as a robot would run it."""
    last = {name: t.clone() for name, t in trainer.policy.module.state_dict().items()}
    trainer.policy.module.load_state_dict(trainer.ema.weights)
    try:
        yield trainer.policy
    finally:
        trainer.policy.module.load_state_dict(last)


def successes(
    policy: LeRobotPolicy, contract: Contract, tasks: Sequence[str], episodes: int
) -> list[bool]:
    """Outcome on each of the evaluation's scenes, task by task."""
    cases = [Case(task, EVALUATION_SEED + k) for task in tasks for k in range(episodes)]
    return [r.success for r in rollout(player(policy), contract, cases)]


def play(
    policy: LeRobotPolicy,
    contract: Contract,
    cases: Sequence[Case],
    operator: OperatorConfig,
) -> list[Result]:
    """Episodes with an operator, every row recorded."""
    return rollout(player(policy), contract, cases, operator=operator, record=True)


def train(
    trainer: Trainer,
    batches: Iterable[ChunkBatch],
    updates: int,
    rate: Callable[[float], float] = lambda progress: 1.0,
) -> Metrics:
    """So many updates; returns the last metrics. `rate` maps progress 0-1 to the rate's factor."""
    metrics: Metrics = {}
    stream = iter(batches)
    for number in range(updates):
        trainer.learner.rate_scale = rate(number / updates)
        metrics = trainer.step(next(stream))
    return metrics


class Results:
    """A JSON-lines file; a run that was cut short goes on where it stopped.

    Args:
        settings: of the whole study; each row keeps them, so that rows of others never mix in.

    Raises:
        ValueError: the file's rows were measured with other settings.
    """

    def __init__(
        self, path: Path, key: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.key, self.settings = path, tuple(key), dict(settings or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(path)
        for row in self.rows if self.settings else []:
            for name, ours in self.settings.items():
                theirs = row.get("settings", {}).get(name)
                if theirs != ours:
                    raise ValueError(
                        f"{path}: its rows have {name} {theirs}, this run has {ours}; give the "
                        "same settings, or another file as --out"
                    )

    def has(self, **values: Any) -> bool:
        return any(all(row[k] == v for k, v in values.items()) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        assert set(self.key) <= row.keys(), f"a row needs {self.key}"
        row = dict(row) | ({"settings": self.settings} if self.settings else {})
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def settings_of(study: Any, *free: str) -> dict[str, Any]:
    """Fields of a study that every row of its file shares: all but `free`, as JSON has them."""
    return json.loads(json.dumps({k: v for k, v in asdict(study).items() if k not in free}))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file of results; [] if there is none."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@contextmanager
def scratch() -> Generator[Path]:
    """A folder for stores that only this cell of the study needs."""
    with TemporaryDirectory(prefix="study_") as folder:
        yield Path(folder)
