"""HG-DAgger: the human decides when to take over, and only what the human did is imitated.

Kelly et al., arXiv:1810.02890, Eq. H1-H2 of our specification: the data set is every demonstration
plus the steps at which a person drove; steps that the policy drove are discarded. Differs from the
paper: trains continuously on a growing set instead of once per epoch; a policy emits chunks, so
the mask is per chunk element: a chunk that starts under the human and reaches past the hand-back
learns its first part only. B batch, H chunk length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from trajectory_store import Contract, Source
from vla_post.batch import Batch, DataNeeds, Metrics, Policy
from vla_post.learners.optimisation import GradientAlgorithm, GuardedAdamW

SUPERVISED = (Source.HUMAN, Source.SCRIPTED)
"""Who is worth imitating: a person who took over, and whoever gave the demonstrations."""


@dataclass(frozen=True, kw_only=True)
class HgDaggerConfig(GradientAlgorithm):
    """HG-DAgger: imitate demonstrations and what people did when they took over."""

    def data(self, contract: Contract) -> DataNeeds:
        return DataNeeds(sources=SUPERVISED)

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> "HgDagger":
        return HgDagger(policy, parameters, self)


def imitated_steps(
    source: Integer[Tensor, "B H"],
    valid: Bool[Tensor, "B H"],
    sources: Sequence[Source] = SUPERVISED,
) -> Bool[Tensor, "B H"]:
    """Steps that carry loss: inside the episode, and commanded by one of `sources`."""
    wanted = torch.zeros_like(valid)
    for who in sources:
        wanted |= source == int(who)
    return valid & wanted


def hg_dagger_loss(
    chunk_loss: Float[Tensor, " B"],
    imitated: Bool[Tensor, "B H"],
    weight: Float[Tensor, " B"],
) -> tuple[Float[Tensor, ""], Metrics]:
    """Weighted mean loss of the chunks that have anything to imitate; 0 when none has.

    Args:
        chunk_loss: of each item, averaged over its imitated steps.
        weight: of each item, such as its class weight; 1 is plain HG-DAgger.
    """
    effective = weight * imitated.any(dim=1)
    loss = (effective * chunk_loss).sum() / effective.sum().clamp(min=1e-8)
    return loss, {"imitated_share": float(imitated.float().mean())}


class HgDagger:
    """Owns the optimiser; borrows the policy."""

    def __init__(
        self, policy: Policy, parameters: Sequence[nn.Parameter], config: HgDaggerConfig
    ) -> None:
        self.policy, self.config = policy, config
        self.optimizer = GuardedAdamW(parameters, config)
        self.rate_scale = 1.0

    @property
    def updates(self) -> int:
        return self.optimizer.updates

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {}

    def update(self, batch: Batch) -> Metrics:
        """One optimiser step; see `Learner`."""
        imitated = imitated_steps(batch.source, batch.valid)
        chunk_loss = self.policy.chunk_loss(batch.replace(valid=imitated))
        loss, metrics = hg_dagger_loss(chunk_loss, imitated, batch.weight)
        return self.optimizer.step(loss, self.rate_scale) | metrics

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
