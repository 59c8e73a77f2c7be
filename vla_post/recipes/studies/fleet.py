"""A fleet that learns together: online against batch, and 1, 2 or 4 cells, on one shared policy.

    python -m vla_post.recipes.studies.fleet --out docs/results/fleet.jsonl
    python -m vla_post.recipes.studies.fleet --out docs/results/fleet.jsonl --show

One policy for all tasks is cloned from a few demonstrations of each. Then N cells work on the
trained tasks in turn, each with an operator of its own, and one learner follows them with SOP's
mixture. The clock is simulated: an episode takes its control steps and a reset, all cells work at
the same time, and the learner makes `updates_per_s` updates of a simulated second meanwhile, on
what had been delivered before. Cells adopt the newest version between rounds of two episodes.

- `online`: as above, until the trained tasks' success reaches the target or the time is over.
- `batch`: the same time with the starting policy, then as many updates at once; their own time is
  not counted.

Every run measures the trained tasks as it goes, and all tasks at its end: those that nobody worked
on show what the others' learning cost them.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import sim
from sim.demonstrations import write_demonstrations, write_episode
from sim.operator import OperatorConfig
from sim.rollout import Case, Result
from trajectory_store import Contract, FleetView, StoreWriter, load_contract
from vla_post.batch import Algorithm
from vla_post.critics.returns import Unrewarded
from vla_post.evaluation.paired import wilson_interval
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.learners.recap import RecapConfig
from vla_post.policies.build import build_policy
from vla_post.policies.indicator import Guidance
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.recipes.studies.common import (
    ONLINE_SEED,
    Results,
    averaged,
    play,
    scratch,
    successes,
    train,
)
from vla_post.training.adaptive import AdaptiveConfig, AdaptiveSampler, LossWindows
from vla_post.training.data import statistics
from vla_post.training.trainer import TrainConfig, Trainer, cosine


@dataclass(frozen=True, kw_only=True)
class Study:
    out: Path
    """File of results; a run that is in it is not made again."""
    trained: tuple[str, ...] = ("reach", "push", "drawer-open")
    untrained: tuple[str, ...] = ("button-press", "door-open")
    demonstrations: int = 3
    """Of each task, for the start and as static data."""
    start_updates: int = 1200
    algorithms: tuple[str, ...] = ("hg-dagger", "recap")
    modes: tuple[str, ...] = ("online", "batch")
    cells: tuple[int, ...] = (4, 1, 2)
    batch_cells: tuple[int, ...] = (4,)
    """Fleets that are also run in batch mode."""
    seeds: tuple[int, ...] = (0, 1, 2)
    target: float = 0.8
    """Success over the trained tasks."""
    limit_s: float = 480.0
    """Simulated time after which a run that has not reached the target ends."""
    stop_at_target: bool = True
    """Off: go on to the limit, for whole curves."""
    reset_s: float = 3.0
    """Of a scene, between episodes."""
    round_episodes: int = 2
    updates_per_s: float = 3.0
    """Of the learner, in a simulated second."""
    evaluate_every_s: float = 60.0
    batch_size: int = 128
    learning_rate: float = 1e-3
    evaluation_episodes: int = 20
    """Scenes of each task."""
    show: bool = False
    """Print the tables of what has been measured, and measure nothing."""

    def run(self) -> None:
        torch.set_num_threads(1)
        results = Results(self.out, ("algorithm", "mode", "cells", "seed"))
        if self.show:
            print(tables(results.rows))
            return
        contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
        for seed in self.seeds:
            wanted = [run for run in self._runs() if not results.has(seed=seed, **run)]
            if not wanted:
                continue
            with scratch() as folder:
                start = Start(self, contract, seed, folder)
                if not results.has(algorithm="start", seed=seed):
                    results.add(start.row())
                for run in wanted:
                    results.add(Fleet(start, **run).run())

    def _runs(self) -> list[dict[str, Any]]:
        return [
            {"algorithm": algorithm, "mode": mode, "cells": cells}
            for algorithm in self.algorithms
            for mode in self.modes
            for cells in (self.cells if mode == "online" else self.batch_cells)
        ]


class Start:
    """Demonstrations of all tasks, and the weak policy that was cloned from them."""

    def __init__(self, study: Study, contract: Contract, seed: int, folder: Path) -> None:
        self.study, self.contract, self.seed, self.folder = study, contract, seed, folder
        self.tasks = (*study.trained, *study.untrained)
        write_demonstrations(
            folder / "demonstrations",
            contract,
            tasks=self.tasks,
            episodes_per_task=study.demonstrations,
            seed=1_000 + 100 * seed,
        )
        self.view = FleetView(folder / "demonstrations")
        torch.manual_seed(seed)
        policy = build_policy("chunk_flow", contract, statistics(self.view, contract))
        algorithm = HgDaggerConfig(learning_rate=study.learning_rate, weighting="everything")
        trainer = Trainer(
            policy, TrainConfig(algorithm=algorithm, batch_size=study.batch_size, seed=seed)
        )
        batches: Any = AdaptiveSampler(
            self.view,
            None,
            contract,
            LossWindows(AdaptiveConfig()),
            batch_size=study.batch_size,
            seed=seed,
            keys=policy.observation_keys,
        )
        train(trainer, batches, study.start_updates, lambda progress: cosine(progress, 0.1))
        with averaged(trainer) as averaged_policy:
            averaged_policy.save(folder / "start")

    def row(self) -> dict[str, Any]:
        final = self.outcomes(LeRobotPolicy.load(self.folder / "start"))
        return {"algorithm": "start", "mode": "", "cells": 0, "seed": self.seed, "final": final}

    def outcomes(self, policy: LeRobotPolicy) -> dict[str, list[bool]]:
        """Of every task, trained or not."""
        n = self.study.evaluation_episodes
        return {task: successes(policy, self.contract, [task], n) for task in self.tasks}


class Fleet:
    """One run: an algorithm, a mode and a number of cells, from one start."""

    def __init__(self, start: Start, algorithm: str, mode: str, cells: int) -> None:
        self.start, self.study = start, start.study
        self.algorithm, self.mode, self.cells = algorithm, mode, cells
        rate = self.study.learning_rate
        knobs: Algorithm = (
            HgDaggerConfig(learning_rate=rate)
            if algorithm == "hg-dagger"
            else RecapConfig(learning_rate=rate, lookahead_s=0.5, value_warmup=100)
        )
        self.trainer = Trainer(
            LeRobotPolicy.load(start.folder / "start"),
            TrainConfig(algorithm=knobs, batch_size=self.study.batch_size, seed=start.seed),
        )
        self.online = start.folder / f"{algorithm}_{mode}_{cells}"
        self.windows = LossWindows(AdaptiveConfig())
        self.clock_s = 0.0
        self.episodes = self.human_steps = self.takeovers = 0

    def run(self) -> dict[str, Any]:
        study, started = self.study, time.process_time()
        curve: list[tuple[float, float]] = []
        reached: float | None = None
        due_s, owed = study.evaluate_every_s, 0.0
        while self.clock_s < study.limit_s and (reached is None or not study.stop_at_target):
            played, passed_s = self.work()
            self.clock_s += passed_s
            owed += passed_s * study.updates_per_s
            if self.mode == "online":
                owed -= self.learn(int(owed))
            self.deliver(played)
            if self.mode == "online" and self.clock_s >= due_s:
                due_s += study.evaluate_every_s
                success = self.success()
                curve.append((round(self.clock_s, 1), success))
                print(self.algorithm, self.mode, self.cells, curve[-1], flush=True)
                if success >= study.target and reached is None:
                    reached = self.clock_s
        if self.mode == "batch":
            self.learn(int(owed))
            curve.append((round(self.clock_s, 1), self.success()))
        with averaged(self.trainer) as policy:
            final = self.start.outcomes(policy)
            guided = None
            if policy.guidance is not None:
                policy.guidance = Guidance(beta=2.0)
                guided = self.start.outcomes(policy)
                policy.guidance = Guidance()
        return {
            "algorithm": self.algorithm,
            "mode": self.mode,
            "cells": self.cells,
            "seed": self.start.seed,
            "target": study.target,
            "reached_s": reached,
            "limit_s": study.limit_s,
            "curve": curve,
            "final": final,
            "final_guided": guided,
            "clock_s": round(self.clock_s, 1),
            "updates": self.trainer.updates,
            "episodes": self.episodes,
            "takeovers": self.takeovers,
            "human_s": round(self.human_steps / self.start.contract.control_hz, 1),
            "cpu_s": round(time.process_time() - started, 1),
        }

    def work(self) -> tuple[list[Result], float]:
        """A round of all cells at the same time, and how long it took, in simulated seconds."""
        study, contract = self.study, self.start.contract
        count = self.cells * study.round_episodes
        cases = [
            Case(
                study.trained[(self.episodes + k) % len(study.trained)],
                ONLINE_SEED + 10_000 * self.start.seed + self.episodes + k,
            )
            for k in range(count)
        ]
        with averaged(self.trainer) as policy:
            played = play(policy, contract, cases, OperatorConfig())
        busy_s = [
            sum(r.steps / contract.control_hz + study.reset_s for r in played[k :: self.cells])
            for k in range(self.cells)
        ]
        return played, max(busy_s)

    def deliver(self, played: list[Result]) -> None:
        """The episodes of a round, each to the store of its cell."""
        for cell in range(self.cells):
            name = f"cell{cell}"
            contract, folder = self.start.contract, self.online / name
            with StoreWriter.create_or_open(folder, contract, writer=name) as writer:
                for result in played[cell :: self.cells]:
                    assert result.episode is not None
                    write_episode(writer, result.episode)
        self.episodes += len(played)
        self.human_steps += sum(r.human_steps for r in played)
        self.takeovers += sum(r.takeovers for r in played)

    def learn(self, updates: int) -> int:
        """So many updates, on what has been delivered; returns how many were owed. Without
        anything to learn from the learner waits, and its time is lost."""
        if not self.online.exists():
            return updates
        trainer = self.trainer
        try:
            sampler = AdaptiveSampler(
                self.start.view,
                FleetView(self.online),
                self.start.contract,
                self.windows,
                batch_size=self.study.batch_size,
                needs=trainer.config.algorithm.data(self.start.contract),
                seed=self.start.seed * 1_000_003 + trainer.updates,
                keys=trainer.policy.observation_keys,
            )
        except Unrewarded:
            return updates
        for _ in range(updates):
            chunk = next(sampler)
            trainer.step(chunk)
            losses = trainer.item_losses()
            if losses is not None:
                sampler.learned(chunk, *losses)
        sampler.close()
        return updates

    def success(self) -> float:
        """Over the trained tasks."""
        study = self.study
        with averaged(self.trainer) as policy:
            outcomes = successes(
                policy, self.start.contract, study.trained, study.evaluation_episodes
            )
        return float(np.mean(outcomes))


def tables(rows: list[dict[str, Any]]) -> str:
    """Time to the target by fleet, success at the end, and what became of untrained tasks."""
    runs: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        runs[row["algorithm"], row["mode"], row["cells"]].append(row)
    lines = [
        "| algorithm | mode | cells | seeds | simulated s to the target | episodes | human s |"
    ]
    lines.append("|---" * 7 + "|")
    for (algorithm, mode, cells), found in sorted(runs.items(), key=lambda r: r[0]):
        if mode != "online":
            continue
        times = [
            f"{row['reached_s']:.0f}" if row["reached_s"] else f"> {row['limit_s']:.0f}"
            for row in found
        ]
        episodes, human = (np.mean([row[k] for row in found]) for k in ("episodes", "human_s"))
        lines.append(
            f"| {algorithm} | {mode} | {cells} | {len(found)} | {', '.join(times)} | "
            f"{episodes:.0f} | {human:.0f} |"
        )
    tasks = list(dict.fromkeys(task for row in rows for task in row["final"]))
    lines += ["", "| run | " + " | ".join(tasks) + " | all |", "|---" * (len(tasks) + 2) + "|"]
    for (algorithm, mode, cells), found in sorted(runs.items(), key=lambda r: (r[0][2], r[0])):
        for key in ("final", "final_guided"):
            kept = [row[key] for row in found if row.get(key)]
            if not kept:
                continue
            name = f"{algorithm} {mode} {cells or ''}".strip()
            name += " (beta 2)" if key == "final_guided" else ""
            told = [_rate([o for one in kept for o in one.get(task, [])]) for task in tasks]
            every = [o for one in kept for outcomes in one.values() for o in outcomes]
            lines.append(f"| {name} | " + " | ".join(told) + f" | {_rate(every)} |")
    return "\n".join(lines)


def _rate(outcomes: list[bool]) -> str:
    if not outcomes:
        return "-"
    low, high = wilson_interval(sum(outcomes), len(outcomes))
    return f"{np.mean(outcomes):.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    tyro.cli(Study).run()
