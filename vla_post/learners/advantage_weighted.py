"""Judge every recorded chunk, then clone it as much as it was better: the base of ALOE, AWR, IQL.

B batch. An algorithm says how its critics learn (`evaluate`) and what a chunk's advantage is
(`advantage`); weights, the policy's step, the order of both and the state on disk are here. No
gradient of a critic reaches the policy.

Two modes. Continuous, `update`: each batch trains critic and policy, the first few the critic
alone. Staged, as the papers do: `evaluate` many times, `begin_improvement`, then `improve`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from trajectory_store import Contract
from vla_post.batch import Batch, DataNeeds, Metrics, Policy
from vla_post.critics.encoders import Encoder
from vla_post.critics.networks import ChunkCritic
from vla_post.critics.returns import RewardConfig, fill_past_end
from vla_post.critics.saved import card_of
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
class AdvantageConfig(GradientAlgorithm):
    """Knobs that every algorithm of this family has."""

    rewards: RewardConfig = field(default_factory=RewardConfig)
    weights: WeightConfig = field(default_factory=WeightConfig)
    encoder: Literal["auto", "state", "policy"] = "auto"
    """What the critic sees: the contract's vectors, or a frozen copy of the policy's features."""
    double_buffer: bool = False
    """Half of each batch is what people showed, demonstrations and interventions, and half is all
    that robots recorded (HIL-SERL, arXiv:2410.21845). Corrections are few among the robot's own
    chunks, whose weights are about 1 whatever the policy is worth."""
    critic_learning_rate: float = 1e-3
    critic_warmup: int = 200
    """First updates, which train the critic alone; weights from a fresh critic are noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.critic_learning_rate > 0 or self.critic_warmup < 0:
            raise ValueError(
                f"critic_learning_rate is {self.critic_learning_rate} and critic_warmup "
                f"{self.critic_warmup}; expected a number above 0 and updates, at least 0"
            )

    def data(self, contract: Contract) -> DataNeeds:
        stored = self.rewards.source == "stored"
        return DataNeeds(outcomes=not stored, rewards=stored, double_buffer=self.double_buffer)

    @property
    def critic_optimisation(self) -> GradientAlgorithm:
        """How critics are optimised: as the policy, at their own rate."""
        return GradientAlgorithm(
            learning_rate=self.critic_learning_rate,
            warmup_updates=self.warmup_updates,
            weight_decay=self.weight_decay,
            betas=self.betas,
            max_grad_norm=self.max_grad_norm,
        )


class AdvantageWeighted(ABC):
    """Owns critics and optimisers; borrows the policy.

    Args:
        critics: that learn, all with one optimiser.
    """

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[nn.Parameter],
        critics: Sequence[nn.Module],
        encoder: Encoder,
        config: AdvantageConfig,
    ) -> None:
        self.policy, self.encoder = policy, encoder
        self.weights = config.weights
        self.critic_warmup = config.critic_warmup
        self.optimizer = GuardedAdamW(parameters, config)
        self.critic_optimizer = GuardedAdamW(
            [p for critic in critics for p in critic.parameters()], config.critic_optimisation
        )
        self.scale = RunningScale()
        self.rate_scale = 1.0
        self.critic_only = 0
        """Batches that trained the critics alone."""
        self._chunk_critics = [c for c in critics if isinstance(c, ChunkCritic)]
        self._label()

    @property
    @abstractmethod
    def modules(self) -> Mapping[str, nn.Module]: ...

    @abstractmethod
    def evaluate(self, batch: Batch) -> Metrics:
        """One update of the critics.

        Raises:
            NonFiniteLoss: no critic has been changed.
        """

    @abstractmethod
    def advantage(self, batch: Batch) -> Float[Tensor, " B"]:
        """Of the recorded chunks, without gradient."""

    def begin_improvement(self) -> None:  # noqa: B027 (nothing to do, for most)
        """Staged mode: the critics now stay as they are."""

    @property
    def updates(self) -> int:
        return self.optimizer.updates + self.critic_only

    def update(self, batch: Batch) -> Metrics:
        """Continuous mode: critics and policy on one batch; see `Learner`."""
        if self.updates < self.critic_warmup:
            self.critic_only += 1
            return self.evaluate(batch)
        # The policy first: should its loss not be finite, nothing has changed yet.
        metrics = self.improve(batch)
        return self.evaluate(batch) | metrics

    def improve(self, batch: Batch) -> Metrics:
        """One step of weighted cloning (Eq. A7 and A8 of our specification).

        Raises:
            NonFiniteLoss: the policy has not been changed.
        """
        advantage = self.advantage(batch)
        scale = self.scale.update(advantage) if self.weights.scale == "std" else 1.0
        weight = advantage_weight(advantage, self.weights, scale=scale)
        steps = commanded_steps(batch.source, batch.valid)
        chunk_loss = self.policy.chunk_loss(batch.replace(valid=steps))
        loss = weighted_flow_loss(chunk_loss, weight * batch.weight, steps.any(dim=1))
        metrics = self.optimizer.step(loss, self.rate_scale)
        return metrics | weight_metrics(advantage, weight * batch.weight, self.weights, scale)

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.optimizer.state_dict(),
            "critic": self.critic_optimizer.state_dict(),
            "scale": {"square": self.scale.square, "seen": self.scale.seen},
            "critic_only": self.critic_only,
            "encoder": self.encoder.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["policy"])
        self.critic_optimizer.load_state_dict(state["critic"])
        self.scale.square = float(state["scale"]["square"])
        self.scale.seen = int(state["scale"]["seen"])
        self.critic_only = int(state["critic_only"])
        self.encoder.load_state_dict(state["encoder"])
        self._label()

    def _label(self) -> None:
        """What a published critic says of itself, so that it can be loaded again."""
        for critic in self._chunk_critics:
            critic.card = card_of(critic, self.encoder)


def filled_chunks(batch: Batch) -> Float[Tensor, "B H A"]:
    """The recorded chunks as a critic reads them. Nothing commanded past an end matters, and the
    padding would tell the critic that an end is near. Without `left`, what is valid ends there."""
    return fill_past_end(batch.action, batch.n if batch.left is None else batch.left)


def critic_chunk(chunk: int, contract: Contract) -> int:
    """h, the critic's chunk in control steps; 0 is the policy's.

    Raises:
        ValueError: longer than the chunks that the policy emits.
    """
    if not 0 <= chunk <= contract.chunk_horizon:
        raise ValueError(
            f"chunk is {chunk}; cell {contract.cell!r} has policies of {contract.chunk_horizon} "
            "steps, so the critic's must be from 1 to that, or 0 for all of it"
        )
    return chunk or contract.chunk_horizon
