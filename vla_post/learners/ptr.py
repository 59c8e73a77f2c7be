"""Posterior-transition reweighting (PTR): chunks that explain the future they led to count more.

arXiv:2603.16542, section 2 of our specification. No reward, no critic: `TransitionScorer` weighs
each chunk by how well it picks out its own future among others', and any other algorithm imitates
with those weights (Eq. P10). B batch.

The base algorithm multiplies `Batch.weight` into its own weights: plain cloning by default,
HG-DAgger's class weights or ALOE's advantages by product where those are the base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from trajectory_store import Contract
from vla_post.batch import Algorithm, Batch, DataNeeds, Learner, Metrics, Policy
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.learners.transition import TransitionScorer
from vla_post.learners.transition_math import TransitionConfig
from vla_post.learners.weighting import effective_sample_size
from vla_post.sharding import Shardable, Shards


@dataclass(frozen=True, kw_only=True)
class PtrConfig(Algorithm):
    """PTR: imitate everything, weighted by how well a chunk explains what happened after it."""

    transition: TransitionConfig = field(default_factory=TransitionConfig)
    base: Algorithm = field(default_factory=lambda: HgDaggerConfig(weighting="everything"))
    """What imitates with the weights."""

    def data(self, contract: Contract) -> DataNeeds:
        steps = self.transition.future_steps(contract.control_hz, contract.chunk_horizon)
        return replace(self.base.data(contract), future_steps=steps)

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> "Ptr":
        base = self.base.build(policy, parameters, contract)
        return Ptr(base, TransitionScorer(policy, contract, self.transition))


@dataclass(frozen=True, kw_only=True)
class PtrHgDaggerConfig(PtrConfig):
    """HG-DAgger whose chunks also count by how well they explain what happened after them."""

    base: Algorithm = field(default_factory=HgDaggerConfig)


class Ptr:
    """A base learner, and a scorer that weighs its batches."""

    def __init__(self, base: Learner, scorer: TransitionScorer) -> None:
        self.base, self.scorer = base, scorer
        self.rate_scale = 1.0

    @property
    def updates(self) -> int:
        return self.base.updates

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {**self.base.modules, "transition": self.scorer}

    def adopt(self, shards: Shards) -> None:
        if not isinstance(self.base, Shardable):
            raise ValueError(
                f"PTR on {type(self.base).__name__} does not train a sharded policy; take a base "
                "of HG-DAgger or RECAP, or leave --shard out"
            )
        self.base.adopt(shards)

    def update(self, batch: Batch) -> Metrics:
        """One update of scorer and base; see `Learner`."""
        self.base.rate_scale = self.rate_scale
        weight, told = self.scorer.weigh(batch)
        combined = batch.weight * weight
        told["transition/product_effective_share"] = effective_sample_size(combined)
        return self.base.update(batch.replace(weight=combined)) | told

    def state_dict(self) -> dict[str, Any]:
        return {
            "base": self.base.state_dict(),
            "scorer_optimizer": self.scorer.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state["base"])
        self.scorer.optimizer.load_state_dict(state["scorer_optimizer"])
