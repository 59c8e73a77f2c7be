"""AWR with a distributional Monte-Carlo value: the baseline that ALOE is compared with.

Advantage-weighted regression, arXiv:1910.00177, on action chunks: V(s) is a categorical
distribution over `bins` returns fitted to what the *data* went on to get, and A = G - V. Its value
is therefore that of the buffer's mixture of people and old policies, not of the current policy.
B batch, H chunk length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trajectory_store import Contract
from vla_post.batch import Batch, DataNeeds, Metrics, Policy
from vla_post.critics.bins import Bins
from vla_post.critics.build import build_encoder, longest_steps
from vla_post.critics.encoders import Encoder
from vla_post.critics.networks import ValueNet
from vla_post.critics.returns import RewardConfig, Unrewarded, monte_carlo_return, outcomes_of
from vla_post.learners.optimisation import GradientAlgorithm, GuardedAdamW
from vla_post.learners.weighting import (
    RunningScale,
    WeightConfig,
    advantage_weight,
    commanded_steps,
    weight_metrics,
    weighted_flow_loss,
)


@dataclass(frozen=True, kw_only=True)
class AwrConfig(GradientAlgorithm):
    """AWR: clone what did better than the data's average from the same state."""

    rewards: RewardConfig = field(default_factory=RewardConfig)
    weights: WeightConfig = field(default_factory=WeightConfig)
    encoder: Literal["auto", "state", "policy"] = "auto"
    bins: int = 256
    width: int = 128
    layers: int = 2
    value_learning_rate: float = 1e-3
    value_warmup: int = 200
    """First updates, which train the value alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rewards.source != "outcome":
            raise Unrewarded(
                "AWR needs the return to the end of the episode, which chunks of stored rewards "
                "do not hold; use rewards of source `outcome`"
            )

    def data(self, contract: Contract) -> DataNeeds:
        return DataNeeds(outcomes=True)

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> "Awr":
        encoder = build_encoder(self.encoder, policy, contract)
        low, high = self.rewards.bounds(longest_steps(contract))
        bins = Bins(low=low, high=high, count=self.bins, labels="hl_gauss")
        value = ValueNet(encoder.size, bins, width=self.width, layers=self.layers)
        return Awr(policy, parameters, value, encoder, self)


def awr_advantage(realised: Float[Tensor, " B"], value: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """What the episode went on to get, over what the data gets from such states on average."""
    return realised - value


class Awr:
    """Owns the value and both optimisers; borrows the policy."""

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[nn.Parameter],
        value: ValueNet,
        encoder: Encoder,
        config: AwrConfig,
    ) -> None:
        self.policy, self.value, self.encoder, self.config = policy, value, encoder, config
        self.optimizer = GuardedAdamW(parameters, config)
        self.value_optimizer = GuardedAdamW(
            list(value.parameters()), GradientAlgorithm(learning_rate=config.value_learning_rate)
        )
        self.scale = RunningScale()
        self.rate_scale = 1.0
        self.value_only = 0

    @property
    def updates(self) -> int:
        return self.optimizer.updates + self.value_only

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"value": self.value}

    def update(self, batch: Batch) -> Metrics:
        """Value and policy on one batch; see `Learner`."""
        if self.updates < self.config.value_warmup:
            self.value_only += 1
            return self.evaluate(batch)
        metrics = self.improve(batch)
        return self.evaluate(batch) | metrics

    def evaluate(self, batch: Batch) -> Metrics:
        """One step of the value towards the returns of the data."""
        realised = monte_carlo_return(*outcomes_of(batch), self.config.rewards)
        seen = self.encoder(batch.observation, batch.instruction)
        step = self.value_optimizer.step(self.value.loss(seen, realised).mean())
        return {"loss": step["loss"], "value/loss": step["loss"]}

    def improve(self, batch: Batch) -> Metrics:
        """One step of weighted cloning."""
        advantage = self.advantage(batch)
        scale = self.scale.update(advantage) if self.config.weights.scale == "std" else 1.0
        weight = advantage_weight(advantage, self.config.weights, scale=scale)
        steps = commanded_steps(batch.source, batch.valid)
        chunk_loss = self.policy.chunk_loss(batch.replace(valid=steps))
        loss = weighted_flow_loss(chunk_loss, weight * batch.weight, steps.any(dim=1))
        metrics = self.optimizer.step(loss, self.rate_scale)
        return metrics | weight_metrics(advantage, weight, self.config.weights, scale)

    @torch.no_grad()
    def advantage(self, batch: Batch) -> Float[Tensor, " B"]:
        realised = monte_carlo_return(*outcomes_of(batch), self.config.rewards)
        return awr_advantage(
            realised, self.value(self.encoder(batch.observation, batch.instruction))
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.optimizer.state_dict(),
            "value": self.value_optimizer.state_dict(),
            "scale": {"square": self.scale.square, "seen": self.scale.seen},
            "value_only": self.value_only,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["policy"])
        self.value_optimizer.load_state_dict(state["value"])
        self.scale.square = float(state["scale"]["square"])
        self.scale.seen = int(state["scale"]["seen"])
        self.value_only = int(state["value_only"])
