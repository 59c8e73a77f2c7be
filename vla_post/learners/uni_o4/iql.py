"""IQL (arXiv:2110.06169), the baseline: clone the data's better actions, offline and then online.

B batch. Values come from `ValueFit` with `kind="iql"`; the policy clones with weights
min(exp(beta A), 100). Online the same two updates go on, over the data and what was collected.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vla_post.batch import Metrics
from vla_post.learners.uni_o4.policies import Policies
from vla_post.learners.uni_o4.samples import Samples, draw
from vla_post.learners.uni_o4.stage import MemberAdamW
from vla_post.learners.uni_o4.values import Values


@dataclass(frozen=True, kw_only=True)
class IqlPolicyConfig:
    updates: int = 10_000
    batch_size: int = 256
    learning_rate: float = 3e-4
    beta: float = 3.0
    """Inverse temperature, in IQL's unit of the reward: 1000 / (best less worst return)."""
    max_weight: float = 100.0


class IqlPolicy:
    """Weighted cloning; a stage.

    Args:
        unit: what an advantage of 1 is in IQL's unit of the reward.
    """

    name = "iql-policy"

    def __init__(
        self,
        policies: Policies,
        values: Values,
        samples: Samples,
        config: IqlPolicyConfig,
        *,
        unit: float,
        seed: int = 0,
    ) -> None:
        self.policies, self.values, self.samples = policies, values, samples
        self.config, self.unit, self.seed = config, unit, seed
        self.optimizer = MemberAdamW(list(policies.parameters()), config.learning_rate, 1e6)

    @property
    def updates(self) -> int:
        return self.optimizer.updates

    @property
    def done(self) -> bool:
        return self.updates >= self.config.updates

    def update(self) -> Metrics:
        config = self.config
        index, generator = draw(len(self.samples), config.batch_size, self.seed, self.updates)
        batch = self.samples.rows(index)
        advantage = self.values.advantage(batch.state, batch.action[:, None])[:, 0]
        weight = (config.beta * self.unit * advantage).exp().clamp(max=config.max_weight)
        loss = self.policies.clone(batch.state, batch.action, batch.valid, generator).loss
        metrics = self.optimizer.step((weight * loss).mean(dim=1).sum())
        return {
            "loss": metrics["loss"],
            "iql/weight_mean": float(weight.mean()),
            "iql/advantage_std": float(advantage.std()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"policies": self.policies.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policies.load_state_dict(state["policies"])
        self.optimizer.load_state_dict(state["optimizer"])


def append(samples: Samples, more: Samples) -> Samples:
    """Two data sets as one; rows keep pointing to their own followers."""
    merged = {
        name: torch.cat([value, getattr(more, name)]) for name, value in vars(samples).items()
    }
    size = len(samples)
    following = torch.where(more.following >= 0, more.following + size, -1)
    merged["following"] = torch.cat([samples.following, following])
    merged["last"] = torch.cat([samples.last, more.last + size])
    return Samples(**merged)
