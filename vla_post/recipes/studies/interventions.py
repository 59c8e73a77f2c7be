"""Which data and which weights: demonstrations against interventions at equal human minutes.

    python -m vla_post.recipes.studies.interventions --out results/interventions.jsonl
    python -m vla_post.recipes.studies.interventions --out results/interventions.jsonl --show

For each task and seed a weak policy is cloned from a few demonstrations, and then improved with the
same number of updates by each arm:

- `control`: more updates on the same demonstrations;
- `demonstrations`: further full demonstrations, as long together as a person drove in `hg-dagger`;
- `hg-dagger`, `iwr`, `sirius`, `double-buffer`: the robot works, the scripted operator corrects,
  and the policy is updated after every second episode;
- `hg-dagger-batch`: the same number of episodes, all with the starting policy, then all updates.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import sim
from sim.demonstrations import collect, write_episode
from sim.operator import OperatorConfig
from sim.rollout import Case
from trajectory_store import Contract, FleetView, StoreWriter, load_contract
from vla_post.evaluation.paired import wilson_interval
from vla_post.learners.hg_dagger import HgDaggerConfig, Weighting
from vla_post.policies.build import build_policy
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.recipes.studies.common import (
    ONLINE_SEED,
    Results,
    averaged,
    play,
    read_rows,
    scratch,
    settings_of,
    successes,
    train,
)
from vla_post.training.data import mixture, statistics
from vla_post.training.trainer import TrainConfig, Trainer, cosine

WEIGHTINGS: dict[str, Weighting] = {
    "hg-dagger": "human-only",
    "hg-dagger-batch": "human-only",
    "iwr": "iwr",
    "sirius": "sirius",
    "double-buffer": "double-buffer",
}


@dataclass(frozen=True, kw_only=True)
class Study:
    out: Path
    tasks: tuple[str, ...] = ("reach", "push", "pick-place", "peg-insert-side")
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = (
        "hg-dagger", "control", "demonstrations", "hg-dagger-batch", "iwr", "sirius"
    )  # fmt: skip
    demonstrations: dict[str, int] = field(
        default_factory=lambda: {"reach": 5, "push": 3, "pick-place": 3, "peg-insert-side": 10}
    )
    """Of the weak policy; 5 for a task that is not named."""
    start_updates: int = 600
    episodes: int = 30
    """That the robot works through."""
    round_episodes: int = 2
    updates: int = 600
    """Of each arm, after the start's."""
    batch_size: int = 128
    learning_rate: float = 1e-3
    online_share: float = 0.6
    """Of each batch, the same in every arm. Sirius needs fewer than half demonstrations, so that
    the robot's own steps can have the rest."""
    evaluation_episodes: int = 40
    show: bool = False
    """Print the tables of what has been measured, and measure nothing."""

    def run(self) -> None:
        torch.set_num_threads(1)
        if self.show:
            print(tables(read_rows(self.out)))
            return
        settings = settings_of(self, "out", "show", "tasks", "seeds", "arms")
        results = Results(self.out, ("task", "seed", "arm"), settings)
        contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
        for seed in self.seeds:
            for task in self.tasks:
                wanted = [a for a in ("start", *self.arms)]
                if all(results.has(task=task, seed=seed, arm=arm) for arm in wanted):
                    continue
                with scratch() as folder:
                    Cell(self, contract, task, seed, folder, results).run()


class Cell:
    """One task and seed: the start, then every arm from it."""

    def __init__(
        self, study: Study, contract: Contract, task: str, seed: int, folder: Path, results: Results
    ) -> None:
        self.study, self.contract, self.task, self.seed = study, contract, task, seed
        self.folder, self.results = folder, results
        self.n_demonstrations = study.demonstrations.get(task, 5)
        self.first_scene = 1_000 + 100 * seed
        demos = collect(contract, task, self.n_demonstrations, self.first_scene)
        self.demonstrations = folder / "demonstrations"
        with StoreWriter.create_or_open(self.demonstrations, contract, writer="demos") as writer:
            for episode in demos:
                write_episode(writer, episode)
        self.view = FleetView(self.demonstrations)

    def run(self) -> None:
        started = time.process_time()
        torch.manual_seed(self.seed)
        policy = build_policy("chunk_flow", self.contract, statistics(self.view, self.contract))
        trainer = self.trainer(policy, "human-only")
        # The state of this cell comes from its seed alone, so a resumed run starts from the same.
        train(trainer, self.batches(None, trainer), self.study.start_updates, _falling)
        with averaged(trainer) as start:
            start.save(self.folder / "start")
            if not self.results.has(task=self.task, seed=self.seed, arm="start"):
                self.keep("start", start, started, human_steps=0, takeovers=0)
        for arm in self.study.arms:
            if not self.results.has(task=self.task, seed=self.seed, arm=arm):
                self.arm(arm)

    def arm(self, name: str) -> None:
        started = time.process_time()
        study = self.study
        trainer = self.trainer(
            LeRobotPolicy.load(self.folder / "start"), WEIGHTINGS.get(name, "human-only")
        )
        human_steps = takeovers = 0
        if name == "control":
            train(trainer, self.batches(None, trainer), study.updates)
        elif name == "demonstrations":
            human_steps = self.more_demonstrations(trainer)
        else:
            size = study.episodes if name == "hg-dagger-batch" else study.round_episodes
            online = self.folder / name
            for first in range(0, study.episodes, size):
                cases = [
                    Case(self.task, ONLINE_SEED + 1_000 * self.seed + k)
                    for k in range(first, min(first + size, study.episodes))
                ]
                with averaged(trainer) as policy:
                    played = play(policy, self.contract, cases, OperatorConfig())
                with StoreWriter.create_or_open(online, self.contract, writer="robot") as writer:
                    for result in played:
                        assert result.episode is not None
                        write_episode(writer, result.episode)
                human_steps += sum(r.human_steps for r in played)
                takeovers += sum(r.takeovers for r in played)
                batches = self.batches(FleetView(online), trainer, WEIGHTINGS[name])
                train(trainer, batches, study.updates * len(cases) // study.episodes)
        with averaged(trainer) as policy:
            self.keep(name, policy, started, human_steps=human_steps, takeovers=takeovers)

    def more_demonstrations(self, trainer: Trainer) -> int:
        """Trains on further demonstrations, as long together as the person's time of hg-dagger."""
        budget = next(
            row["human_steps"]
            for row in self.results.rows
            if (row["task"], row["seed"], row["arm"]) == (self.task, self.seed, "hg-dagger")
        )
        spent, scene = 0, self.first_scene + 50
        more = self.folder / "more"
        with StoreWriter.create_or_open(more, self.contract, writer="demos") as writer:
            while spent < budget:
                (episode,) = collect(self.contract, self.task, 1, scene, noise=0.05)
                scene = episode.seed + 1
                spent += len(episode)
                write_episode(writer, episode)
        train(trainer, self.batches(FleetView(more), trainer), self.study.updates)
        return spent

    def trainer(self, policy: LeRobotPolicy, weighting: Weighting) -> Trainer:
        algorithm = HgDaggerConfig(learning_rate=self.study.learning_rate, weighting=weighting)
        return Trainer(
            policy,
            TrainConfig(
                algorithm=algorithm,
                batch_size=self.study.batch_size,
                seed=self.seed,
            ),
        )

    def batches(
        self, online: FleetView | None, trainer: Trainer, weighting: Weighting = "human-only"
    ) -> Any:
        return mixture(
            self.view,
            online,
            self.contract,
            batch_size=self.study.batch_size,
            online_share=self.study.online_share,
            needs=trainer.config.algorithm.data(self.contract),
            seed=self.seed * 1_000_003 + trainer.updates,
            keys=trainer.policy.observation_keys,
        )

    def keep(self, arm: str, policy: LeRobotPolicy, started: float, **told: Any) -> None:
        outcomes = successes(policy, self.contract, [self.task], self.study.evaluation_episodes)
        row = {
            "task": self.task,
            "seed": self.seed,
            "arm": arm,
            "success": float(np.mean(outcomes)),
        }
        row |= told | {"human_s": told["human_steps"] / self.contract.control_hz}
        row |= {"outcomes": outcomes, "cpu_s": round(time.process_time() - started, 1)}
        self.results.add(row)
        print({k: v for k, v in row.items() if k != "outcomes"}, flush=True)


def _falling(progress: float) -> float:
    return cosine(progress, 0.1)


def tables(rows: list[dict[str, Any]]) -> str:
    """Success by task and arm, and each arm against hg-dagger over the cells that have both."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["task"], row["arm"]].append(row)
        cells["all", row["arm"]].append(row)
    tasks = [*dict.fromkeys(row["task"] for row in rows), "all"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = ["| arm | " + " | ".join(tasks) + " | human time, s |"]
    lines.append("|---" * (len(tasks) + 2) + "|")
    for arm in arms:
        told: list[str] = []
        for task in tasks:
            outcomes = [o for row in cells[task, arm] for o in row["outcomes"]]
            if not outcomes:
                told.append("-")
                continue
            low, high = wilson_interval(sum(outcomes), len(outcomes))
            told.append(f"{np.mean(outcomes):.2f} ({low:.2f}-{high:.2f})")
        seconds = np.mean([row["human_s"] for row in cells["all", arm]])
        lines.append(f"| {arm} | " + " | ".join(told) + f" | {seconds:.0f} |")
    lines += [
        "",
        "| arm | difference to hg-dagger | 95 % over cells | cells |",
        "|---|---|---|---|",
    ]
    reference = {(r["task"], r["seed"]): r["success"] for r in rows if r["arm"] == "hg-dagger"}
    for arm in arms:
        pairs = [
            row["success"] - reference[row["task"], row["seed"]]
            for row in cells["all", arm]
            if (row["task"], row["seed"]) in reference
        ]
        if arm != "hg-dagger" and pairs:
            low, high = bootstrap(np.array(pairs))
            lines.append(
                f"| {arm} | {np.mean(pairs):+.2f} | {low:+.2f} to {high:+.2f} | {len(pairs)} |"
            )
    return "\n".join(lines)


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean over cells, by resampling them."""
    random = np.random.default_rng(0)
    means = random.choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    tyro.cli(Study).run()
