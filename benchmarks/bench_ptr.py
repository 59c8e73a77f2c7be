"""What PTR's scorer and pool add to a training step at batch 128, as a ratio within one run.

python benchmarks/bench_ptr.py [chunk_flow] [smolvla_tiny]
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

import sim
from trajectory_store import Contract, load_contract
from vla_post.batch import Batch
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.learners.ptr import Ptr, PtrConfig
from vla_post.policies.build import build_policy

BATCH = 128
CONTRACTS = {"chunk_flow": "metaworld_state.yaml", "smolvla_tiny": "metaworld_pixels.yaml"}


def batch_of(contract: Contract) -> Batch:
    random = torch.Generator().manual_seed(0)

    def observation() -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for key, feature in contract.observations.items():
            shape = feature.shape
            if feature.is_image:
                shape = (shape[2], shape[0], shape[1])
            out[key] = torch.rand(BATCH, *shape, generator=random)
        return out

    horizon = contract.chunk_horizon
    texts = [task.instruction for task in contract.tasks.values()]
    task = torch.arange(BATCH) % len(texts)
    return Batch(
        observation=observation(),
        action=torch.rand(BATCH, horizon, contract.action.size, generator=random),
        valid=torch.ones(BATCH, horizon, dtype=torch.bool),
        reward=torch.zeros(BATCH, horizon),
        source=torch.ones(BATCH, horizon, dtype=torch.uint8),
        next_observation={},
        n=torch.full((BATCH,), horizon),
        terminated=torch.zeros(BATCH, dtype=torch.bool),
        task=task,
        instruction=[texts[int(k)] for k in task],
        weight=torch.ones(BATCH),
        episode=torch.arange(BATCH) % 40,
        future_observation=observation(),
        has_future=torch.ones(BATCH, dtype=torch.bool),
    )


def cpu_ms(call: Callable[[], object], count: int) -> float:
    """CPU time of this process, which other work on the machine disturbs less than wall time."""
    started = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - started) / count * 1e3


def measure(kind: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    contract = load_contract(sim.CONTRACTS / CONTRACTS[kind])
    shapes = {key: f.shape for key, f in contract.vectors.items()}
    shapes["action"] = (contract.action.size,)
    numbers = {
        key: {
            "mean": np.zeros(shape),
            "std": np.ones(shape),
            "min": -np.ones(shape),
            "max": np.ones(shape),
        }
        for key, shape in shapes.items()
    }
    policy = build_policy(kind, contract, numbers)
    config = PtrConfig(base=HgDaggerConfig(weighting="everything"))
    learner = config.build(policy, list(policy.parameters()), contract)
    assert isinstance(learner, Ptr)
    batch = batch_of(contract)
    # Whole rounds of `lesson_every` batches, after the warm-up.
    count = config.transition.lesson_every * (1 if kind == "smolvla_tiny" else 4)
    for _ in range(3):
        learner.update(batch)
    learner.scorer.get_buffer("updates").fill_(config.transition.warmup_updates)
    learner.scorer.get_buffer("control")[2] = 0.5  # half of the queue's draws are hard negatives
    pairs = [
        (
            cpu_ms(lambda: learner.base.update(batch), count),
            cpu_ms(lambda: learner.scorer.weigh(batch), count),
        )
        for _ in range(3)
    ]
    step, added = np.median(np.array(pairs), axis=0)
    print(f"| {kind} | {step:.1f} | {added:.1f} | {added / step:+.0%} |")


if __name__ == "__main__":
    print(f"CPU milliseconds of one thread an update of {BATCH} chunks, medians of 3\n")
    print(
        "| policy | its own step | scorer, pool, both encoder passes | added |\n|---|---|---|---|"
    )
    for name in sys.argv[1:] or list(CONTRACTS):
        measure(name)
