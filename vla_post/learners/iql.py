"""IQL on action chunks: improvement that never asks for the value of an action that nobody took.

Implicit Q-learning, arXiv:2110.06169. B batch, H chunk length, K critics.

V(s) is an upper expectile of the values of the recorded chunks, Q(s, a_{t:t+h}) is regressed on
what the chunk earned and V where it led, and chunks are cloned with weight exp(A / beta) for
A = min Q - V. Between ALOE, which asks what the policy of today would do next, and AWR, which asks
what the data did next: IQL asks what the better part of the data did. Differs from the paper: h
steps at a time, bootstrapped by gamma**n and cut by a real end alone; the advantage is measured in
its running deviation unless `weights.scale` is `none`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trajectory_store import Contract
from vla_post.batch import Batch, DataNeeds, Metrics, Observation, Policy
from vla_post.critics.build import build_critic, build_encoder, longest_steps
from vla_post.critics.diagnostics import critic_metrics
from vla_post.critics.encoders import Encoder
from vla_post.critics.ensemble import aggregate, polyak_
from vla_post.critics.networks import ChunkCritic, CriticConfig, ValueNet, expectile_loss
from vla_post.critics.returns import rewards_of, td_target
from vla_post.learners.advantage_weighted import (
    AdvantageConfig,
    AdvantageWeighted,
    critic_chunk,
    filled_chunks,
)
from vla_post.learners.weighting import WeightConfig


@dataclass(frozen=True, kw_only=True)
class IqlConfig(AdvantageConfig):
    """IQL: clone what is better than most of what was done, by values of recorded actions alone."""

    weights: WeightConfig = field(
        default_factory=lambda: WeightConfig(form="clip_weight", max_weight=100.0)
    )
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(heads=2))
    chunk: int = 0
    """h, the critic's chunk in control steps; 0 takes the policy's H."""
    expectile: float = 0.7
    """tau: 0.5 is the data's average value, towards 1 the best that was done."""
    target_rate: float = 0.005
    """Of the slow copy of Q, from which V is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.expectile < 1.0 or not 0.0 < self.target_rate <= 1.0:
            raise ValueError(
                f"expectile is {self.expectile} and target_rate {self.target_rate}; expected a "
                "number in (0, 1) and a share in (0, 1]"
            )

    def data(self, contract: Contract) -> DataNeeds:
        backup = critic_chunk(self.chunk, contract)
        return replace(super().data(contract), next_observation=True, backup=backup)

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> "Iql":
        encoder = build_encoder(self.encoder, policy, contract)
        critic = build_critic(
            self.critic,
            encoder,
            contract,
            policy,
            chunk=critic_chunk(self.chunk, contract),
            returns=self.rewards.bounds(longest_steps(contract)),
        )
        value = ValueNet(encoder.size, None, width=self.critic.width, layers=self.critic.layers).to(
            critic.get_buffer("action_mean").device
        )
        return Iql(policy, parameters, critic, value, encoder, self)


class Iql(AdvantageWeighted):
    """Owns Q, its slow copy, V and the optimisers; borrows the policy."""

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[nn.Parameter],
        critic: ChunkCritic,
        value: ValueNet,
        encoder: Encoder,
        config: IqlConfig,
    ) -> None:
        super().__init__(policy, parameters, [critic, value], encoder, config)
        self.critic, self.value_net, self.config = critic, value, config
        self.target = copy.deepcopy(critic).requires_grad_(False)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"critic": self.critic, "critic_target": self.target, "value": self.value_net}

    def evaluate(self, batch: Batch) -> Metrics:
        """One step of V and Q together.

        Raises:
            NonFiniteLoss: neither has been changed.
        """
        config = self.config
        reward, ended = rewards_of(batch, config.rewards)
        seen = self.encoder(batch.observation, batch.instruction)
        action = filled_chunks(batch)
        with torch.no_grad():
            after = self.value_net(self.encoder(batch.next_observation, batch.instruction))
            target = td_target(reward, batch.n, ended, after, config.rewards.discount)
            of_data = aggregate(self.target(seen, action[:, None])[:, 0], "minimum")
        q_loss, q = self.critic.loss(seen, action, target)
        value = self.value_net(seen)
        v_loss = expectile_loss(of_data - value, config.expectile)
        step = self.critic_optimizer.step(q_loss.mean() + v_loss.mean())
        polyak_(self.target, self.critic, config.target_rate)
        return {
            "loss": step["loss"],
            "critic/loss": float(q_loss.detach().mean()),
            "value/loss": float(v_loss.detach().mean()),
            "value/mean": float(value.detach().mean()),
        } | critic_metrics(q, target, q_loss.detach(), batch, config.rewards)

    @torch.no_grad()
    def advantage(self, batch: Batch) -> Float[Tensor, " B"]:
        seen = self.encoder(batch.observation, batch.instruction)
        q = self.target(seen, filled_chunks(batch)[:, None])[:, 0]
        return aggregate(q, "minimum") - self.value_net(seen)

    @torch.no_grad()
    def value(self, observation: Observation, instruction: list[str]) -> Float[Tensor, " B"]:
        """V, an expectile of the recorded chunks' values."""
        return self.value_net(self.encoder(observation, instruction))
