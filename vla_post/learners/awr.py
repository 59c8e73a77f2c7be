"""AWR with a distributional Monte-Carlo value: the baseline that ALOE is compared with.

Advantage-weighted regression, arXiv:1910.00177, on action chunks: V(s) is a categorical
distribution over `bins` returns fitted to what the *data* went on to get, and A = G - V. Its value
is therefore that of the buffer's mixture of people and old policies, not of the current policy.
B batch, H chunk length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trajectory_store import Contract
from vla_post.batch import Batch, Metrics, Policy
from vla_post.critics.bins import Bins
from vla_post.critics.build import build_encoder, longest_steps
from vla_post.critics.encoders import Encoder
from vla_post.critics.networks import ValueNet
from vla_post.critics.returns import Unrewarded, monte_carlo_return, outcomes_of
from vla_post.learners.advantage_weighted import AdvantageConfig, AdvantageWeighted


@dataclass(frozen=True, kw_only=True)
class AwrConfig(AdvantageConfig):
    """AWR: clone what did better than the data's average from the same state."""

    bins: int = 256
    width: int = 128
    layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rewards.source != "outcome":
            raise Unrewarded(
                "AWR needs the return to the end of the episode, which chunks of stored rewards "
                "do not hold; use rewards of source `outcome`"
            )

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


class Awr(AdvantageWeighted):
    """Owns the value and both optimisers; borrows the policy."""

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[nn.Parameter],
        value: ValueNet,
        encoder: Encoder,
        config: AwrConfig,
    ) -> None:
        super().__init__(policy, parameters, [value], encoder, config)
        self.value, self.config = value, config

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"value": self.value}

    def evaluate(self, batch: Batch) -> Metrics:
        """One step of the value towards the returns of the data."""
        realised = monte_carlo_return(*outcomes_of(batch), self.config.rewards)
        seen = self.encoder(batch.observation, batch.instruction)
        step = self.critic_optimizer.step(self.value.loss(seen, realised).mean())
        return {"loss": step["loss"], "value/loss": step["loss"]}

    @torch.no_grad()
    def advantage(self, batch: Batch) -> Float[Tensor, " B"]:
        realised = monte_carlo_return(*outcomes_of(batch), self.config.rewards)
        return awr_advantage(
            realised, self.value(self.encoder(batch.observation, batch.instruction))
        )
