"""One process of a learner, for test_parallel: FOLDER of stores, file for the losses.

Everything but lerobot, whose import would take longer than the test: a linear policy, IWR, SOP's
mixture.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trajectory_store import FleetView, load_contract
from vla_post import parallel
from vla_post.batch import Batch, Observation
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.training.adaptive import AdaptiveConfig, AdaptiveSampler, LossWindows

CONTRACT = Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml"
BATCH, UPDATES = 16, 20


class Linear(nn.Module):
    """A chunk from the state and noise; its loss is the masked squared error."""

    def __init__(self, state: int, horizon: int, actions: int) -> None:
        super().__init__()
        self.horizon, self.action_size = horizon, actions
        self.layer = nn.Linear(state + 1, horizon * actions)
        self.last = torch.zeros(0)

    def chunk_loss(self, batch: Batch, **_: Any) -> Tensor:
        noise = parallel.share(lambda rows: torch.randn(rows, 1), len(batch))
        seen = torch.cat([batch.observation["observation.state"], noise], dim=1)
        chunk = self.layer(seen).view_as(batch.action)
        error = (chunk - batch.action).square().mean(dim=2)
        count = batch.valid.sum(dim=1).clamp(min=1)
        loss = torch.where(batch.valid, error, 0.0).sum(dim=1) / count
        self.last = loss.detach()
        return loss

    def act(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("nobody acts here")

    def features(self, observation: Observation, instruction: list[str]) -> Tensor:
        raise AssertionError("nobody looks here")


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    contract = load_contract(CONTRACT)
    with parallel.together():
        torch.manual_seed(0)
        sampler = AdaptiveSampler(
            FleetView(folder / "demos"),
            FleetView(folder / "online"),
            contract,
            LossWindows(AdaptiveConfig()),
            batch_size=BATCH,
            shard=(parallel.rank(), parallel.world()),
        )
        state = contract.vectors["observation.state"].shape[0]
        policy = Linear(state, contract.chunk_horizon, contract.action.size)
        config = HgDaggerConfig(weighting="iwr", learning_rate=1e-2, warmup_updates=0)
        learner = config.build(policy, list(policy.parameters()), contract)
        rows: list[dict[str, float]] = []
        for update in range(UPDATES):
            message = parallel.tell({"update": update} if parallel.rank() == 0 else None)
            assert message == {"update": update}
            chunk = next(sampler)
            assert len(chunk) == BATCH // parallel.world()
            shares = sampler.shares()
            told = learner.update(Batch.from_numpy(chunk))
            sampler.learned(chunk, policy.last.numpy(), np.ones(len(chunk), bool))
            rows.append({"loss": told["loss"], "grad_norm": told["grad_norm"]} | shares)
        if parallel.rank() == 0:
            out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
