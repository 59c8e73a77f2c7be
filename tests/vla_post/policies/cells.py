"""Tiny policies of every kind and batches for them, without data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trajectory_store.contract import Contract, load_contract
from vla_post.batch import Batch
from vla_post.policies.build import KINDS
from vla_post.policies.lerobot_adapter import LeRobotPolicy

SHIPPED = Path(__file__).parents[3] / "sim" / "contracts"
PIXELS = "metaworld_pixels.yaml"
CONTRACTS = dict.fromkeys(KINDS, PIXELS) | {"chunk_flow": "metaworld_state.yaml"}


def statistics(contract: Contract) -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    sizes = {key: f.shape[0] for key, f in contract.vectors.items()} | {
        "action": contract.action.size
    }
    return {
        key: {
            "mean": random.normal(size=n),
            "std": random.uniform(0.5, 2.0, size=n),
            "min": random.uniform(-4.0, -3.0, size=n),
            "max": random.uniform(3.0, 4.0, size=n),
            "q01": random.uniform(-3.0, -2.0, size=n),
            "q99": random.uniform(2.0, 3.0, size=n),
        }
        for key, n in sizes.items()
    }


def build(kind: str, contract: str | None = None, **changes: Any) -> LeRobotPolicy:
    """One of the project's kinds with random weights; `changes` go into lerobot's configuration."""
    torch.manual_seed(0)
    cell = load_contract(SHIPPED / (contract or CONTRACTS[kind]))
    config, vlm_folder = KINDS[kind](cell, "cpu")
    if kind == "act_tiny":
        changes = {"dropout": 0.0} | changes
    config = replace(config, **changes)
    policy = LeRobotPolicy.build(config, cell, statistics(cell), vlm_folder=vlm_folder)
    policy.module.eval()
    return policy


def sample(contract: Contract, size: int, seed: int = 0) -> Batch:
    """Item i has 3 * i padded steps."""
    draw = torch.Generator().manual_seed(seed)
    horizon, width = contract.chunk_horizon, contract.action.size
    observation = {
        key: torch.rand(size, f.shape[2], *f.shape[:2], generator=draw)
        if f.is_image
        else torch.randn(size, *f.shape, generator=draw)
        for key, f in contract.observations.items()
    }
    valid = torch.arange(horizon) < torch.tensor([[horizon - 3 * i] for i in range(size)])
    texts = [task.instruction for task in contract.tasks.values()]
    return Batch(
        observation=observation,
        action=torch.randn(size, horizon, width, generator=draw),
        valid=valid,
        reward=torch.zeros(size, horizon),
        source=torch.ones(size, horizon, dtype=torch.uint8),
        next_observation={},
        n=valid.sum(dim=1),
        terminated=torch.zeros(size, dtype=torch.bool),
        task=torch.zeros(size, dtype=torch.int64),
        instruction=[texts[i % len(texts)] for i in range(size)],
        weight=torch.ones(size),
    )


def draw(policy: LeRobotPolicy, batch: Batch, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (B, n, H, W) and flow time (B, n)."""
    shape = (len(batch), n, policy.horizon, policy.noise_size)
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator), torch.rand(shape[:2], generator=generator)
