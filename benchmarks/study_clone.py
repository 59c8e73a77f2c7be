"""How well a kind of policy clones scripted demonstrations: closed-loop success, and minutes.

python benchmarks/study_clone.py --kind chunk_flow --cell metaworld_state --tasks door-open \
    drawer-open --demonstrations 10 --updates 1500 --seeds 0 1 2

One JSON line per task and seed: demonstrations, training and rollouts differ in seed.
"""

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

import sim
from sim.demonstrations import write_demonstrations
from sim.rollout import Case, rollout
from trajectory_store.contract import load_contract
from vla_post.evaluation.paired import wilson_interval
from vla_post.export.runtime import TorchPolicy
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.recipes.pretrain import PretrainConfig, demonstration_seed, pretrain
from vla_post.training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Study:
    kind: str = "chunk_flow"
    cell: str = "metaworld_state"
    """A contract of `sim/contracts`."""
    tasks: list[str] = field(default_factory=lambda: ["door-open", "drawer-open"])
    together: bool = False
    """One policy for all tasks instead of one each."""
    demonstrations: int = 10
    noise: float = 0.0
    """Of the demonstrator's hand, in units of half the action's range."""
    updates: int = 1500
    batch_size: int = 256
    learning_rate: float = 1e-3
    image_shift: int = 0
    episodes: int = 50
    """Rollouts per task and seed, on scenes that no demonstration has seen."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])


def main(study: Study) -> None:
    import torch

    torch.set_num_threads(1)
    contract = load_contract(sim.CONTRACTS / f"{study.cell}.yaml")
    groups = [study.tasks] if study.together else [[task] for task in study.tasks]
    for group in groups:
        for seed in study.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                run(study, contract, group, seed, Path(scratch))


def run(study: Study, contract, tasks: list[str], seed: int, scratch: Path) -> None:
    started = time.perf_counter()
    store = scratch / "demonstrations"
    write_demonstrations(
        store,
        contract,
        tasks=tasks,
        episodes_per_task=study.demonstrations,
        seed=demonstration_seed(seed),
        noise=study.noise,
    )
    recorded = time.perf_counter()
    train = TrainConfig(
        algorithm=HgDaggerConfig(learning_rate=study.learning_rate),
        batch_size=study.batch_size,
        image_shift=study.image_shift,
        seed=seed,
    )
    config = PretrainConfig(
        kind=study.kind, updates=study.updates, tasks=tuple(tasks), train=train, seed=seed
    )
    cpu = time.process_time()
    losses: list[float] = []
    checkpoint = pretrain(
        config,
        contract,
        scratch / "policy",
        demonstrations=store,
        on_update=lambda _, loss: losses.append(loss),
    )
    trained, cpu = time.perf_counter(), time.process_time() - cpu
    policy = TorchPolicy(checkpoint)
    cases = [Case(task, 70_000 + 1_000 * seed + i) for task in tasks for i in range(study.episodes)]
    results = rollout(policy.act_batch, contract, cases)
    for task in tasks:
        wins = sum(r.success for r in results if r.case.task == task)
        low, high = wilson_interval(wins, study.episodes)
        line = {
            "kind": study.kind,
            "task": task,
            "seed": seed,
            "demonstrations": study.demonstrations,
            "updates": study.updates,
            "success": wins / study.episodes,
            "interval": [round(low, 3), round(high, 3)],
            "loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
            "record_s": round(recorded - started, 1),
            "train_s": round(trained - recorded, 1),
            "train_cpu_s": round(cpu, 1),
            "rollout_s": round(time.perf_counter() - trained, 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
