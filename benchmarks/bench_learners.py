"""Speed of the learners on a CPU, as CPU time. `python benchmarks/bench_learners.py [--quick]`.

One thread. CPU time and not wall time, so that a busy machine changes little; `waiting` is the
share of it that sampling takes. State: the critic sees vectors. Cached features: it sees
`--tokens` x `--features` numbers an item, as a frozen vision-language encoder would leave in the
feature cache, through the transformer.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import sim
from sim.demonstrations import write_demonstrations
from trajectory_store import ChunkSampler, FleetView
from trajectory_store.contract import load_contract
from vla_post.batch import Batch
from vla_post.critics import ChunkCritic, CriticConfig, CriticInput
from vla_post.critics.networks import InputSize
from vla_post.learners.aloe import AloeConfig
from vla_post.learners.awr import AwrConfig
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.policies.build import build_policy
from vla_post.training.data import statistics


def cpu_ms(call: Callable[[], object], updates: int) -> float:
    """CPU milliseconds of a call, the median of `updates`."""
    call()
    times: list[float] = []
    for _ in range(updates):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return 1e3 * float(np.median(times))


def bench_state(view: FleetView, updates: int) -> dict[str, float]:
    """Whole updates of each learner on a state cell, sampling included."""
    contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    policy = build_policy("chunk_flow", contract, statistics(view, contract))
    found: dict[str, float] = {}

    def measure(name: str, config: HgDaggerConfig | AwrConfig | AloeConfig, batch: int) -> None:
        learner = config.build(policy, list(policy.parameters()), contract)
        needs = config.data(contract)
        sampler = ChunkSampler(
            view,
            horizon=contract.chunk_horizon,
            batch_size=batch,
            next_observation=needs.next_observation,
            backup=needs.backup,
        )
        one = Batch.from_numpy(next(sampler))
        loading = cpu_ms(lambda: Batch.from_numpy(next(sampler)), updates)
        learning = cpu_ms(lambda: learner.update(one), updates)
        found[f"{name} ms"] = loading + learning
        found[f"{name} waiting"] = loading / (loading + learning)

    measure("hg-dagger b64", HgDaggerConfig(), 64)
    measure("awr b64", AwrConfig(critic_warmup=0), 64)
    plain = AloeConfig(critic_warmup=0)
    measure("aloe b64", plain, 64)
    for batch in (128, 256):
        measure(f"aloe b{batch}", plain, batch)
    for heads in (1, 2, 8):
        critic = replace(plain.critic, heads=heads)
        measure(f"aloe b64 K={heads}", replace(plain, critic=critic), 64)
    for chunk in (1, 4):
        measure(f"aloe b64 h={chunk}", replace(plain, chunk=chunk), 64)
    for samples in (4,):
        measure(f"aloe b64 S={samples}", replace(plain, value_samples=samples), 64)
    return found


def bench_features(tokens: int, features: int, updates: int) -> dict[str, float]:
    """Forward and backward of the transformer critic on cached features, one policy chunk each."""
    found: dict[str, float] = {}
    size = InputSize(tokens=tokens, features=features, proprioception=7)
    for heads, chunk, batch in ((4, 16, 32), (1, 16, 32), (8, 16, 32), (4, 50, 32), (4, 16, 64)):
        config = CriticConfig(trunk="transformer", heads=heads, width=256, layers=6)
        config = replace(config, attention_heads=8)
        critic = ChunkCritic(
            config, size, chunk=chunk, action_mean=torch.zeros(7), action_std=torch.ones(7)
        )
        seen = CriticInput(
            features=torch.randn(batch, tokens, features), proprioception=torch.randn(batch, 7)
        )
        action, target = torch.randn(batch, chunk, 7), torch.rand(batch)

        def update(
            critic: ChunkCritic = critic,
            seen: CriticInput = seen,
            action: torch.Tensor = action,
            target: torch.Tensor = target,
        ) -> None:
            with torch.no_grad():
                critic(seen, action[:, None])
            loss, _ = critic.loss(seen, action, target)
            critic.zero_grad()
            loss.mean().backward()

        name = f"features K={heads} h={chunk} b{batch}"
        found[f"{name} ms"] = cpu_ms(update, max(updates // 4, 2))
    found["features critic parameters"] = sum(p.numel() for p in critic.parameters())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few updates per figure")
    parser.add_argument("--tokens", type=int, default=16, help="feature tokens of an item")
    parser.add_argument("--features", type=int, default=256, help="size of a token")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    updates = 5 if arguments.quick else 30
    folder = Path(tempfile.mkdtemp())
    try:
        contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
        write_demonstrations(folder / "s", contract, tasks=["reach"], episodes_per_task=5)
        found = bench_state(FleetView(folder / "s"), updates)
    finally:
        shutil.rmtree(folder)
    found |= bench_features(arguments.tokens, arguments.features, updates)
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["load"] = os.getloadavg()[0]
    print(
        json.dumps(
            {k: round(v, 3) for k, v in found.items()} | {"python": platform.python_version()},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
