"""What one chunk and one update cost, family by family, against lerobot called plainly.

python benchmarks/bench_policies.py            one JSON line per kind, at tiny size

`act`: 1 and 8 chunks of one observation. lerobot plainly: the observation 8 times in a batch, hence
8 encoder passes. `update`: loss, gradient and AdamW on 16 items with 4 draws of noise and time;
lerobot plainly: its own `forward` on the 16 items 4 times over. Medians of CPU time of one thread,
the two ways in turn, so that other load hits both alike.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import tyro

import sim
from trajectory_store.contract import Contract, load_contract
from vla_post.batch import Batch
from vla_post.policies.build import KINDS, build_policy
from vla_post.policies.lerobot_adapter import LeRobotPolicy

SAMPLES, ITEMS, DRAWS = 8, 16, 4


@dataclass(frozen=True, kw_only=True)
class Bench:
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    repeats: int = 7


def main(bench: Bench) -> None:
    torch.set_num_threads(1)
    for kind in bench.kinds:
        cell = "metaworld_state" if kind == "chunk_flow" else "metaworld_pixels"
        contract = load_contract(sim.CONTRACTS / f"{cell}.yaml")
        policy = build_policy(kind, contract, unit_statistics(contract))
        print(json.dumps({"kind": kind, **measure(policy, bench.repeats)}), flush=True)


def measure(policy: LeRobotPolicy, repeats: int) -> dict[str, float]:
    one, many = batch_of(policy, 1), batch_of(policy, ITEMS)
    inputs = plain(policy, one, SAMPLES)
    training = plain(policy, many, DRAWS)
    noise = torch.randn(SAMPLES, policy.horizon, policy.noise_size)
    module: Any = policy.module
    flow = policy.kind != "act"
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    policy.flow_samples = DRAWS

    def act(n: int) -> None:
        policy.act(one.observation, one.instruction, n, noise=noise[None, :n])

    def lerobot_act() -> None:
        module.predict_action_chunk(dict(inputs), **({"noise": noise} if flow else {}))

    def update(loss: Callable[[], torch.Tensor]) -> None:
        module.train()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        module.eval()

    module.eval()
    times = in_turn(
        {
            "act_1_ms": lambda: act(1),
            "act_8_ms": lambda: act(SAMPLES),
            "lerobot_act_8_ms": lerobot_act,
            "update_ms": lambda: update(lambda: policy.chunk_loss(many).mean()),
            "lerobot_update_ms": lambda: update(lambda: module(dict(training))[0]),
        },
        repeats,
    )
    times["act_8_speedup"] = times["lerobot_act_8_ms"] / times["act_8_ms"]
    times["update_speedup"] = times["lerobot_update_ms"] / times["update_ms"]
    return {name: round(value, 2) for name, value in times.items()}


def in_turn(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median CPU milliseconds of each; the first round warms up and does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if number:
                taken[name].append(1e3 * (time.process_time() - started))
    return {name: float(np.median(values)) for name, values in taken.items()}


def plain(policy: LeRobotPolicy, batch: Batch, times: int) -> dict[str, Any]:
    """lerobot's preprocessed inputs with each item repeated."""
    raw: dict[str, Any] = {
        key: value.repeat_interleave(times, dim=0) for key, value in batch.observation.items()
    }
    raw["action"] = batch.action.repeat_interleave(times, dim=0)
    raw["task"] = [text for text in batch.instruction for _ in range(times)]
    inputs = policy.preprocess(raw)
    inputs["action_is_pad"] = ~batch.valid.repeat_interleave(times, dim=0)
    if policy.kind == "diffusion":
        inputs["observation.state"] = inputs["observation.state"][:, None]
    return inputs


def batch_of(policy: LeRobotPolicy, size: int) -> Batch:
    contract = policy.contract
    observation = {
        key: torch.rand(size, f.shape[2], *f.shape[:2])
        if f.is_image
        else torch.randn(size, *f.shape)
        for key, f in contract.observations.items()
    }
    text = next(iter(contract.tasks.values())).instruction
    return Batch(
        observation=observation,
        action=torch.randn(size, policy.horizon, policy.action_size),
        valid=torch.ones(size, policy.horizon, dtype=torch.bool),
        reward=torch.zeros(size, policy.horizon),
        source=torch.ones(size, policy.horizon, dtype=torch.uint8),
        next_observation={},
        n=torch.full((size,), policy.horizon),
        terminated=torch.zeros(size, dtype=torch.bool),
        task=torch.zeros(size, dtype=torch.int64),
        instruction=[text] * size,
        weight=torch.ones(size),
    )


def unit_statistics(contract: Contract) -> dict[str, dict[str, np.ndarray]]:
    sizes = {key: f.shape[0] for key, f in contract.vectors.items()}
    sizes["action"] = contract.action.size
    values = {"mean": 0.0, "std": 1.0, "min": -3.0, "max": 3.0, "q01": -2.0, "q99": 2.0}
    return {key: {k: np.full(n, v) for k, v in values.items()} for key, n in sizes.items()}


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
