"""ALOE: off-policy evaluation of the current policy at chunk level, then weighted cloning.

"Action-Level Off-Policy Evaluation for Vision-Language-Action Model Post-Training",
arXiv:2602.12691; Eq. A1-A8 of our specification. B batch, S sampled chunks, H the policy's chunk,
h <= H the critic's, A action size, K critics.

Evaluation: Q(s, a_{t:t+h}) is regressed on the h-step target whose tail is the value of chunks that
the *current* policy would sample at s_{t+h}. Whoever acted in the data, demonstrator, old policy or
the person who took over, is ordinary experience: a chunk is judged by where it led, and what comes
after it by what the policy of today would do there. A policy's mistake that a person repaired is
therefore a mistake, although its episode ended in success; that is what separates ALOE from AWR.

Improvement: the data's chunks are cloned by flow matching, each weighted by the exponential of its
advantage over the policy's own chunks. No gradient of Q reaches the policy.

Differs from the paper: the bootstrap is gamma**n with n the steps that were there, cut by a real
end and not by the clock; constants that the paper does not state are named options, and their
defaults are those of docs/experiments.md. Past an end, the rest of a chunk is filled with another
item's commands: nothing commanded there matters, and the padding would otherwise tell the critic
that an end is near.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from trajectory_store import Contract
from vla_post.batch import Batch, DataNeeds, Metrics, NonFiniteLoss, Observation, Policy
from vla_post.critics.build import build_critic, build_encoder, longest_steps
from vla_post.critics.diagnostics import critic_metrics
from vla_post.critics.encoders import Encoder
from vla_post.critics.ensemble import Aggregation, aggregate, polyak_
from vla_post.critics.networks import ChunkCritic, CriticConfig, CriticInput
from vla_post.critics.returns import RewardConfig, fill_past_end, rewards_of, td_target
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
class AloeConfig(GradientAlgorithm):
    """ALOE: evaluate the current policy on everything recorded, clone what beats it."""

    rewards: RewardConfig = field(default_factory=RewardConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    weights: WeightConfig = field(default_factory=WeightConfig)
    encoder: Literal["auto", "state", "policy"] = "auto"
    """What the critic sees: the contract's vectors, or a frozen copy of the policy's features."""
    chunk: int = 0
    """h, the critic's chunk in control steps; 0 takes the policy's H. Between what the robot
    executes per inference and H."""
    target: Aggregation = "minimum"
    """Of the target ensemble, in Eq. A1."""
    pessimism: Aggregation = "minimum"
    """Of the ensemble, in Eq. A4."""
    target_samples: int = 1
    """Chunks of the policy at the next observation, averaged in Eq. A1."""
    value_samples: int = 1
    """S of Eq. A5."""
    value_policy: Literal["current", "frozen"] = "current"
    """Whose chunks make V while the policy improves: its own, or those of the policy that the last
    evaluation judged (staged mode)."""
    bootstrap: Literal["steps", "whole_chunks"] = "steps"
    """`steps`: gamma**n after n steps, also where the clock cut the chunk short. `whole_chunks`
    treats such a chunk as an end, which biases values downwards; for comparison."""
    done_factor: bool = True
    """Cut the bootstrap at a real end. The paper prints its chunk target without; for
    comparison."""
    clip_target: bool = True
    """Keep targets within what an episode can earn, where outcomes make the rewards: with a
    minimum over heads, errors below the smallest return would feed on themselves."""
    target_rate: float = 0.005
    """rho of Eq. A3."""
    critic_learning_rate: float = 1e-3
    critic_updates: int = 1
    """Per batch."""
    critic_warmup: int = 200
    """First updates, which train the critic alone; weights from a fresh critic are noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_samples", "value_samples", "critic_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.target_rate <= 1.0 or not self.critic_learning_rate > 0:
            raise ValueError(
                f"target_rate is {self.target_rate} and critic_learning_rate "
                f"{self.critic_learning_rate}; expected a share in (0, 1] and a number above 0"
            )

    def critic_chunk(self, contract: Contract) -> int:
        """h.

        Raises:
            ValueError: longer than the chunks that the policy emits.
        """
        chunk = self.chunk or contract.chunk_horizon
        if not 1 <= chunk <= contract.chunk_horizon:
            raise ValueError(
                f"chunk is {self.chunk}; cell {contract.cell!r} has policies of "
                f"{contract.chunk_horizon} steps, so the critic's must be from 1 to that"
            )
        return chunk

    def data(self, contract: Contract) -> DataNeeds:
        return DataNeeds(next_observation=True, backup=self.critic_chunk(contract), outcomes=True)

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> "Aloe":
        encoder = build_encoder(self.encoder, policy, contract)
        returns = self.rewards.bounds(longest_steps(contract))
        critic = build_critic(
            self.critic,
            encoder,
            contract,
            policy,
            chunk=self.critic_chunk(contract),
            returns=returns,
        )
        return Aloe(policy, parameters, critic, encoder, self, returns=returns)


def aloe_target(
    reward: Float[Tensor, "B H"],
    n: Integer[Tensor, " B"],
    ended: Bool[Tensor, " B"],
    next_q: Float[Tensor, "B S K"],
    *,
    discount: float,
    how: Aggregation = "minimum",
) -> Float[Tensor, " B"]:
    """y of Eq. A1 from the target ensemble's values of S chunks that the current policy samples."""
    return td_target(reward, n, ended, aggregate(next_q, how).mean(dim=1), discount)


def aloe_advantage(
    data_q: Float[Tensor, "B K"],
    policy_q: Float[Tensor, "B S K"],
    how: Aggregation = "minimum",
) -> Float[Tensor, " B"]:
    """A of Eq. A4-A6: the recorded chunk's pessimistic value over that of the policy's chunks."""
    return aggregate(data_q, how) - aggregate(policy_q, how).mean(dim=1)


class Aloe:
    """Owns critic, target and both optimisers; borrows the policy."""

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[nn.Parameter],
        critic: ChunkCritic,
        encoder: Encoder,
        config: AloeConfig,
        *,
        returns: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        self.policy, self.critic, self.encoder, self.config = policy, critic, encoder, config
        stored = config.rewards.source == "stored"
        self.returns = returns if config.clip_target and not stored else (-math.inf, math.inf)
        """What targets are kept within."""
        critic.card = card_of(critic, encoder)
        self.target = copy.deepcopy(critic).requires_grad_(False)
        self.judged: Policy = policy
        """The policy whose chunks make V."""
        self.optimizer = GuardedAdamW(parameters, config)
        self.critic_optimizer = GuardedAdamW(
            list(critic.parameters()),
            GradientAlgorithm(
                learning_rate=config.critic_learning_rate,
                warmup_updates=config.warmup_updates,
                weight_decay=config.weight_decay,
                betas=config.betas,
                max_grad_norm=config.max_grad_norm,
            ),
        )
        self.scale = RunningScale()
        self.rate_scale = 1.0
        self.critic_only = 0
        """Batches that trained the critic alone."""

    @property
    def updates(self) -> int:
        return self.optimizer.updates + self.critic_only

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"critic": self.critic, "critic_target": self.target}

    def update(self, batch: Batch) -> Metrics:
        """Continuous mode: critic and policy on one batch; see `Learner`."""
        if self.updates < self.config.critic_warmup:
            self.critic_only += 1
            return self.evaluate(batch)
        # The policy first: should its loss not be finite, nothing has changed yet.
        metrics = self.improve(batch)
        return self.evaluate(batch) | metrics

    def begin_improvement(self) -> None:
        """Staged mode: the critic now stays as it is, and judges the policy of this moment."""
        if self.config.value_policy == "frozen":
            self.judged = copy.deepcopy(self.policy)

    def evaluate(self, batch: Batch) -> Metrics:
        """Off-policy evaluation: `critic_updates` steps of Eq. A1-A3.

        Raises:
            NonFiniteLoss: the critic has not been changed.
        """
        config = self.config
        reward, ended = rewards_of(batch, config.rewards)
        if config.bootstrap == "whole_chunks":
            ended = ended | (batch.n < self.critic.chunk)
        if not config.done_factor:
            ended = torch.zeros_like(ended)
        action = fill_past_end(batch.action, self._left(batch))
        seen = self.encoder(batch.observation, batch.instruction)
        after = self.encoder(batch.next_observation, batch.instruction)
        metrics: Metrics = {}
        for _ in range(config.critic_updates):
            with torch.no_grad():
                sampled = self._sample(
                    self.policy, batch.next_observation, batch.instruction, config.target_samples
                )
                target = aloe_target(
                    reward,
                    batch.n,
                    ended,
                    self.target(after, sampled),
                    discount=config.rewards.discount,
                    how=config.target,
                ).clamp(*self.returns)
            loss, q = self.critic.loss(seen, action, target)
            step = self.critic_optimizer.step(loss.mean())
            polyak_(self.target, self.critic, config.target_rate)
            metrics = {
                "loss": step["loss"],
                "critic/loss": step["loss"],
                "critic/grad_norm": step["grad_norm"],
            } | critic_metrics(q, target, loss.detach(), batch, config.rewards)
        return metrics

    def improve(self, batch: Batch) -> Metrics:
        """Policy improvement: one step of Eq. A4-A8.

        Raises:
            NonFiniteLoss: the policy has not been changed.
        """
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
        """A of the recorded chunks (Eq. A6)."""
        seen = self.encoder(batch.observation, batch.instruction)
        action = fill_past_end(batch.action, self._left(batch))
        data_q = self.critic(seen, action[:, None])[:, 0]
        return aloe_advantage(data_q, self._policy_q(seen, batch), self.config.pessimism)

    @torch.no_grad()
    def value(self, observation: Observation, instruction: list[str]) -> Float[Tensor, " B"]:
        """V of Eq. A5."""
        seen = self.encoder(observation, instruction)
        sampled = self._sample(self.judged, observation, instruction, self.config.value_samples)
        return aggregate(self.critic(seen, sampled), self.config.pessimism).mean(dim=1)

    @torch.no_grad()
    def judge(
        self, policy: Policy, batch: Batch, noise: Float[Tensor, "B S H W"]
    ) -> Float[Tensor, " B"]:
        """Pessimistic Q of the chunks that a policy makes of `noise`, for the registry's gate."""
        seen = self.encoder(batch.observation, batch.instruction)
        chunks = policy.act(batch.observation, batch.instruction, noise.shape[1], noise=noise)
        return aggregate(self.critic(seen, chunks), self.config.pessimism).mean(dim=1)

    def _policy_q(self, seen: CriticInput, batch: Batch) -> Float[Tensor, "B S K"]:
        sampled = self._sample(
            self.judged, batch.observation, batch.instruction, self.config.value_samples
        )
        return self.critic(seen, sampled)

    def _sample(
        self, policy: Policy, observation: Observation, instruction: list[str], n: int
    ) -> Float[Tensor, "B S H A"]:
        chunks = policy.act(observation, instruction, n)
        if not bool(torch.isfinite(chunks).all()):
            raise NonFiniteLoss("the policy samples chunks that are NaN or infinite")
        return chunks

    def _left(self, batch: Batch) -> Integer[Tensor, " B"]:
        """Steps until the end of the episode; without them, until the end of what is valid."""
        return batch.n if batch.left is None else batch.left

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
        self.critic.card = card_of(self.critic, self.encoder)
