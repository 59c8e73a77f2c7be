"""HG-DAgger: the human decides when to take over; what the human did is imitated.

Kelly et al., arXiv:1810.02890, Eq. H1-H8 of our specification. `weighting` names what else is:

- `human-only`, the paper: demonstrations and the steps that a person drove. The robot's own steps
  are discarded.
- `everything`: every step alike, whoever drove; plain cloning.
- `iwr` (arXiv:2012.06733): every step, with weights that give interventions half of the loss.
- `sirius` (arXiv:2211.08416): also half for interventions, demonstrations as they are drawn, the
  robot's own steps the rest, and nothing for the moments before a takeover.
- `double-buffer`: every step; half of each batch is drawn from demonstrations and interventions,
  half from all that robots recorded, as HIL-SERL does (arXiv:2410.21845).

Differs from the papers: trains continuously on a growing set instead of once per epoch; a policy
emits chunks, so masks are per chunk element: a chunk that starts under the human and reaches past
the hand-back learns its first part only, and so does one that runs into the moments before a
takeover. B batch, H chunk length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from trajectory_store import NO_TAKEOVER, Contract, Source
from vla_post import parallel
from vla_post.batch import Batch, DataNeeds, Metrics, Policy
from vla_post.learners.class_weights import (
    RunningShares,
    Segment,
    class_weights,
    iwr_target,
    segments,
    sirius_target,
)
from vla_post.learners.optimisation import GradientAlgorithm, GuardedAdamW
from vla_post.learners.weighting import effective_sample_size
from vla_post.sharding import Shards

SUPERVISED = (Source.HUMAN, Source.SCRIPTED)
"""Who is worth imitating: a person who took over, and whoever gave the demonstrations."""


Weighting = Literal["human-only", "everything", "iwr", "sirius", "double-buffer"]


@dataclass(frozen=True, kw_only=True)
class HgDaggerConfig(GradientAlgorithm):
    """HG-DAgger: imitate demonstrations and what people did when they took over."""

    weighting: Weighting = "human-only"
    """What is imitated beside demonstrations, and how much it counts: see learners/hg_dagger.py."""
    pre_intervention_s: float = 0.75
    """`sirius`: so long before a takeover the robot's steps are not imitated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pre_intervention_s < 0:
            raise ValueError(
                f"pre_intervention_s is {self.pre_intervention_s}; expected seconds, at least 0"
            )

    def data(self, contract: Contract) -> DataNeeds:
        return DataNeeds(
            sources=SUPERVISED if self.weighting == "human-only" else None,
            takeovers=self.weighting == "sirius",
            double_buffer=self.weighting == "double-buffer",
        )

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> "HgDagger":
        return HgDagger(policy, parameters, self, control_hz=contract.control_hz)


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
    loss = (effective * chunk_loss).sum() / parallel.mean(effective.sum()).clamp(min=1e-8)
    return loss, {
        "imitated_share": float(imitated.float().mean()),
        "effective_share": effective_sample_size(effective),
    }


class HgDagger:
    """Owns the optimiser; borrows the policy."""

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[nn.Parameter],
        config: HgDaggerConfig,
        *,
        control_hz: float,
    ) -> None:
        self.policy, self.config = policy, config
        self.optimizer = GuardedAdamW(parameters, config)
        self.shares = RunningShares()
        self.window = round(config.pre_intervention_s * control_hz)
        """Steps before a takeover that are not imitated."""
        self.rate_scale = 1.0

    @property
    def updates(self) -> int:
        return self.optimizer.updates

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {}

    def adopt(self, shards: Shards) -> None:
        self.optimizer.adopt(shards)

    def update(self, batch: Batch) -> Metrics:
        """One optimiser step; see `Learner`."""
        imitated, weight, told = self.choose(batch)
        chunk_loss = self.policy.chunk_loss(batch.replace(valid=imitated))
        loss, metrics = hg_dagger_loss(chunk_loss, imitated, batch.weight * weight)
        return self.optimizer.step(loss, self.rate_scale) | metrics | told

    def choose(self, batch: Batch) -> tuple[Bool[Tensor, "B H"], Float[Tensor, " B"], Metrics]:
        """Steps that carry loss, and what each item counts."""
        weighting = self.config.weighting
        one = torch.ones_like(batch.weight)
        if weighting == "human-only":
            return imitated_steps(batch.source, batch.valid), one, {}
        if weighting in ("everything", "double-buffer"):
            return batch.valid, one, {}
        never = torch.full_like(batch.source, NO_TAKEOVER, dtype=torch.int64)
        segment = segments(
            batch.source,
            torch.zeros_like(batch.valid[:, 0]) if batch.part is None else batch.part == 0,
            never if batch.to_takeover is None else batch.to_takeover,
            window=self.window,
        )
        imitated = batch.valid & (segment != Segment.PRE_INTERVENTION)
        # An item counts as what its first imitated step is.
        item = segment.gather(1, imitated.int().argmax(dim=1, keepdim=True))[:, 0]
        share = self.shares.update(item[imitated.any(dim=1)])
        target = iwr_target(share) if weighting == "iwr" else sirius_target(share)
        weight = class_weights(share, target).to(one)[item]
        told = {f"share_{s.name.lower()}": float(share[s]) for s in Segment}
        return imitated, weight, told

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict() | {"shares": self.shares.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        self.shares.load_state_dict(state["shares"])
