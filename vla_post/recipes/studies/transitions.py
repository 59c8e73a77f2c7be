"""Does reweighting by transitions help on imperfect data, and does it see what is wrong with it?

    python -m vla_post.recipes.studies.transitions --out results/transitions.jsonl
    python -m vla_post.recipes.studies.transitions --out results/transitions.jsonl --show

One policy for all tasks, from scripted demonstrations in one of these states:

- `clean`: experts;
- `corrupted`: experts, with the paper's mix on top: 25 % of the episodes cut to 40-70 % of their
  length, 20 % filed under another task, noise of 0.1 on the recorded actions of 30 %;
- `mismatched`: experts, but recorded actions are often not those that moved the robot: noise of 0.5
  on 30 % of the episodes, the actions of another episode in 30 %;
- `mixed`: a third experts, the rest of another style, noisy, hesitating, or wrong about the goal.

Arms: `cloning`; `ptr`, our defaults; `ptr-paper`, the paper's score (the future itself, from a
scorer that was taught by what it judges) and weight (not relative); `ptr-no-clip`; `ptr-frozen`,
whose target encoder stays as it was at the start; `filtered`, cloning that leaves out the ticks
that are bad; `unspoiled`, cloning of the same demonstrations before they were spoiled: what knowing
everything would give.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy.stats import mannwhitneyu

import sim
from sim.corruptions import (
    Marked,
    action_noise,
    behave,
    misjoined,
    mislabelled,
    spoil_some,
    truncation,
)
from sim.demonstrations import write_episode
from trajectory_store import (
    ChunkSampler,
    Contract,
    Episode,
    FleetView,
    Part,
    StoreWriter,
    load_contract,
)
from vla_post.batch import Algorithm, Batch
from vla_post.evaluation.paired import wilson_interval
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.learners.ptr import Ptr, PtrConfig
from vla_post.learners.transition_math import TransitionConfig
from vla_post.policies.build import build_policy
from vla_post.recipes.studies.common import (
    Results,
    averaged,
    read_rows,
    scratch,
    settings_of,
    successes,
    train,
)
from vla_post.recipes.studies.interventions import bootstrap
from vla_post.training.data import statistics
from vla_post.training.trainer import TrainConfig, Trainer, cosine

MIXED = {"expert": 4, "gentle": 2, "noisy": 2, "hesitating": 2, "wrong-goal": 2}
"""Episodes of each demonstrator in twelve."""


@dataclass(frozen=True, kw_only=True)
class Study:
    out: Path
    contract: str = "metaworld_state"
    policy: str = "chunk_flow"
    tasks: tuple[str, ...] = ("reach", "push", "pick-place")
    seeds: tuple[int, ...] = (0, 1, 2)
    data: tuple[str, ...] = ("mismatched", "corrupted", "clean", "mixed")
    arms: tuple[str, ...] = (
        "cloning", "ptr", "unspoiled", "ptr-paper", "filtered", "ptr-no-clip", "ptr-frozen"
    )  # fmt: skip
    demonstrations: int = 12
    """Per task."""
    updates: int = 1500
    batch_size: int = 128
    learning_rate: float = 1e-3
    evaluation_episodes: int = 25
    """Per task."""
    show: bool = False

    def run(self) -> None:
        torch.set_num_threads(1)
        if self.show:
            print(tables(read_rows(self.out)))
            return
        settings = settings_of(self, "out", "show", "seeds", "data", "arms")
        results = Results(self.out, ("data", "seed", "arm"), settings)
        contract = load_contract(sim.CONTRACTS / f"{self.contract}.yaml")
        for seed in self.seeds:
            for data in self.data:
                done = [results.has(data=data, seed=seed, arm=arm) for arm in self.arms]
                if not all(done):
                    with scratch() as folder:
                        Cell(self, contract, data, seed, folder, results).run()


class Cell:
    """One state of the data and one seed: a store, and every arm on it."""

    def __init__(
        self, study: Study, contract: Contract, data: str, seed: int, folder: Path, results: Results
    ) -> None:
        self.study, self.contract, self.data, self.seed = study, contract, data, seed
        self.results = results
        self.bad: dict[str, np.ndarray] = {}
        self.kind: dict[str, str] = {}
        self.folder = folder
        self.view = self.record(data)

    def record(self, data: str) -> FleetView:
        study, store = self.study, self.folder / data
        episodes = demonstrations(self.contract, study.tasks, study.demonstrations, data, self.seed)
        with StoreWriter.create_or_open(store, self.contract, writer="mixed") as writer:
            for marked in episodes:
                uuid = write_episode(writer, marked.episode, operator=marked.kind)
                self.bad[uuid], self.kind[uuid] = marked.bad, marked.kind
        return FleetView(store)

    def run(self) -> None:
        for arm in self.study.arms:
            if not self.results.has(data=self.data, seed=self.seed, arm=arm):
                self.arm(arm)

    def arm(self, name: str) -> None:
        started = time.process_time()
        study = self.study
        torch.manual_seed(self.seed)
        view = self.record("clean") if name == "unspoiled" else self.view
        policy = build_policy(study.policy, self.contract, statistics(view, self.contract))
        algorithm = algorithm_of(name, study.learning_rate)
        trainer = Trainer(
            policy,
            TrainConfig(algorithm=algorithm, batch_size=study.batch_size, seed=self.seed),
        )
        sampler = self.sampler(trainer, view, filtered=name == "filtered")
        metrics = train(trainer, sampler, study.updates, lambda progress: cosine(progress, 0.1))
        trained = time.process_time()
        told: dict[str, Any] = {}
        if isinstance(trainer.learner, Ptr):
            told = self.seen(trainer, trainer.learner)
            told |= {k: v for k, v in metrics.items() if k.startswith("transition/")}
        with averaged(trainer) as final:
            outcomes = successes(final, self.contract, study.tasks, study.evaluation_episodes)
        row: dict[str, Any] = {"data": self.data, "seed": self.seed, "arm": name}
        row |= {"success": float(np.mean(outcomes)), "outcomes": outcomes} | told
        row |= {"train_cpu_s": round(trained - started, 1)}
        self.results.add(row)
        print({k: row[k] for k in ("data", "seed", "arm", "success", "train_cpu_s")}, flush=True)

    def sampler(self, trainer: Trainer, view: FleetView, *, filtered: bool) -> ChunkSampler:
        def good(episode: Episode) -> np.ndarray:
            return (~self.bad[episode.uuid]).astype(np.float64)

        part = Part(data=view, balance_tasks=True)
        return ChunkSampler(
            [replace(part, item_weights=good) if filtered else part],
            horizon=self.contract.chunk_horizon,
            batch_size=self.study.batch_size,
            seed=self.seed,
            keys=trainer.policy.observation_keys,
            next_observation=False,
            future=trainer.config.algorithm.data(self.contract).future_steps,
        )

    def seen(self, trainer: Trainer, learner: Ptr) -> dict[str, Any]:
        """Scores of clean against bad ticks: AUROC of each kind of fault, and mean weights."""
        sampler = self.sampler(trainer, self.view, filtered=False)
        scores: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        kinds: list[str] = []
        learner.scorer.eval()
        for _ in range(2000 // self.study.batch_size + 1):
            chunk = next(sampler)
            got = learner.scorer.scores(Batch.from_numpy(chunk))
            known = got.has_future.numpy()
            scores.append(got.score.numpy()[known])
            weights.append(got.weight.numpy()[known])
            place = chunk.provenance
            for k in np.flatnonzero(known).tolist():
                uuid, tick = place.uuids[int(place.episode[k])], int(place.tick[k])
                kinds.append(self.kind[uuid] if self.bad[uuid][tick] else "clean")
        score, weight, kind = np.concatenate(scores), np.concatenate(weights), np.array(kinds)
        clean = kind == "clean"
        told: dict[str, Any] = {"weight_clean": float(weight[clean].mean())}
        for name in sorted(set(kinds) - {"clean"}):
            told[f"auroc_{name}"] = auroc(score[clean], score[kind == name])
            told[f"weight_{name}"] = float(weight[kind == name].mean())
        if not clean.all():
            told["auroc"] = auroc(score[clean], score[~clean])
        return told


def algorithm_of(arm: str, learning_rate: float) -> Algorithm:
    base = HgDaggerConfig(weighting="everything", learning_rate=learning_rate)
    settings = {
        "ptr": TransitionConfig(),
        "ptr-no-clip": TransitionConfig(clip=False),
        "ptr-frozen": TransitionConfig(ema_decay=1.0),
        "ptr-paper": TransitionConfig(target="future", held_out=False, relative=False),
    }
    return PtrConfig(base=base, transition=settings[arm]) if arm in settings else base


def demonstrations(
    contract: Contract, tasks: Sequence[str], n: int, data: str, seed: int
) -> list[Marked]:
    """`n` episodes a task in one of the states that the module's docstring lists."""
    first = 1_000 + 100 * seed
    if data == "mixed":
        scale = n / sum(MIXED.values())
        return [
            marked
            for task in tasks
            for k, (kind, count) in enumerate(MIXED.items())
            for marked in behave(contract, task, kind, round(count * scale), first + 5_000 * k)
        ]
    experts = [m for task in tasks for m in behave(contract, task, "expert", n, first)]
    if data == "clean":
        return experts
    if data == "corrupted":
        mix = [
            (truncation(), 0.25),
            (mislabelled(contract, tasks), 0.20),
            (action_noise(contract), 0.30),
        ]
    elif data == "mismatched":
        mix = [(action_noise(contract, 0.5), 0.30), (misjoined(experts), 0.30)]
    else:
        raise ValueError(f"no data {data!r}; there are clean, corrupted, mismatched, mixed")
    return spoil_some(experts, mix, seed)


def auroc(better: np.ndarray, worse: np.ndarray) -> float:
    """How often a clean chunk scores above a bad one; ties count half."""
    found: Any = mannwhitneyu(better, worse)
    return float(found.statistic / (len(better) * len(worse)))


def tables(rows: list[dict[str, Any]]) -> str:
    """Success and paired differences by state of the data; AUROC by kind of fault."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["data"], row["arm"]].append(row)
    lines = ["| data | arm | success | minus cloning (95 % over seeds) | AUROC by fault |"]
    lines.append("|---|---|---|---|---|")
    for (data, arm), found in cells.items():
        outcomes = [o for row in found for o in row["outcomes"]]
        low, high = wilson_interval(sum(outcomes), len(outcomes))
        plain = {row["seed"]: row["success"] for row in cells[data, "cloning"]}
        pairs = [row["success"] - plain[row["seed"]] for row in found if row["seed"] in plain]
        gap = "-"
        if arm != "cloning" and pairs:
            a, b = bootstrap(np.array(pairs))
            gap = f"{np.mean(pairs):+.2f} ({a:+.2f} to {b:+.2f})"
        names = sorted({k for row in found for k in row if k.startswith("auroc")})
        faults = ", ".join(
            f"{n.removeprefix('auroc').lstrip('_') or 'all'} {np.mean([r[n] for r in found]):.2f}"
            for n in names
        )
        rate = f"{np.mean(outcomes):.2f} ({low:.2f}-{high:.2f})"
        lines.append(f"| {data} | {arm} | {rate} | {gap} | {faults} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(Study).run()
