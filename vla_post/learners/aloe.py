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
from dataclasses import dataclass, field, replace
from typing import Literal

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
from vla_post.critics.returns import rewards_of, td_target
from vla_post.learners.advantage_weighted import (
    AdvantageConfig,
    AdvantageWeighted,
    critic_chunk,
    filled_chunks,
)


@dataclass(frozen=True, kw_only=True)
class AloeConfig(AdvantageConfig):
    """ALOE: evaluate the current policy on everything recorded, clone what beats it."""

    critic: CriticConfig = field(default_factory=CriticConfig)
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
    critic_updates: int = 1
    """Per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_samples", "value_samples", "critic_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.target_rate <= 1.0:
            raise ValueError(f"target_rate is {self.target_rate}; expected a share in (0, 1]")

    def data(self, contract: Contract) -> DataNeeds:
        backup = critic_chunk(self.chunk, contract)
        return replace(super().data(contract), next_observation=True, backup=backup)

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
            chunk=critic_chunk(self.chunk, contract),
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


class Aloe(AdvantageWeighted):
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
        super().__init__(policy, parameters, [critic], encoder, config)
        self.critic, self.config = critic, config
        stored = config.rewards.source == "stored"
        self.returns = returns if config.clip_target and not stored else (-math.inf, math.inf)
        """What targets are kept within."""
        self.target = copy.deepcopy(critic).requires_grad_(False)
        self.judged: Policy = policy
        """The policy whose chunks make V."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"critic": self.critic, "critic_target": self.target}

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
        action = filled_chunks(batch)
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

    @torch.no_grad()
    def advantage(self, batch: Batch) -> Float[Tensor, " B"]:
        """A of the recorded chunks (Eq. A6)."""
        seen = self.encoder(batch.observation, batch.instruction)
        action = filled_chunks(batch)
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
