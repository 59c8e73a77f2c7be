"""Uni-O4's objective on the flow policies of a cell: SmolVLA, pi, chunk_flow and their like.

B batch, H chunk, W width of the noise, T denoising steps, K critics. Chunk form of Equations U3, U5
to U8, U10 and U11, after RL-100 (arXiv:2510.14830): an Euler step of the flow, with noise of fixed
size added, is a Gaussian inner step with an exact likelihood, and each gets the advantage of the
chunk. Values are IQL's, on whatever the cell's critics see.

Against the stages of this package: one policy; critic and policy learn side by side, as stores
grow; and the gate values the old and the new policy by Q at recorded observations, which is AM-Q
with H = 1, for a model of camera pictures is not learned here.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trajectory_store import Contract
from vla_post.batch import Batch, DataNeeds, Metrics, NonFiniteLoss, Observation, Policy
from vla_post.critics.build import build_critic, build_encoder, longest_steps
from vla_post.critics.diagnostics import critic_metrics
from vla_post.critics.encoders import Encoder
from vla_post.critics.ensemble import polyak_
from vla_post.critics.networks import ChunkCritic, CriticConfig, ValueNet, expectile_loss
from vla_post.critics.returns import RewardConfig, fill_past_end, rewards_of, td_target
from vla_post.critics.saved import card_of
from vla_post.learners.optimisation import GradientAlgorithm, GuardedAdamW
from vla_post.learners.uni_o4.amq import accepted
from vla_post.learners.uni_o4.policies import normal_log_density
from vla_post.learners.uni_o4.ppo import ppo_metrics, ppo_terms, shaped_advantage


class NoFlow(ValueError):
    """The policy has no flow to denoise, so its chunks have no likelihood here."""


@runtime_checkable
class Flow(Protocol):
    """A head that predicts velocities, noise at 0 and data at 1; see `policies.heads.FlowHead`."""

    denoising_steps: int

    def velocity(self, context: Any, x: Tensor, time: Tensor) -> Tensor: ...


class FlowPolicy(Protocol):
    """The part of `policies.lerobot_adapter.LeRobotPolicy` that is used beside `Policy`."""

    horizon: int
    action_size: int
    head: Any
    module: nn.Module

    @property
    def noise_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, observation: Observation, instruction: list[str]) -> Any: ...

    def unnormalise(self, action: Tensor) -> Tensor: ...

    def act(
        self,
        observation: Observation,
        instruction: list[str],
        n_samples: int = 1,
        *,
        noise: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class UniO4ChunkConfig(GradientAlgorithm):
    """Uni-O4 on chunks: clipped steps on recorded observations, behind a gate of its critic."""

    learning_rate: float = 1e-5
    max_grad_norm: float = 0.5
    weight_decay: float = 0.0
    rewards: RewardConfig = field(default_factory=RewardConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    encoder: Literal["auto", "state", "policy"] = "auto"
    """What the critic sees: the contract's vectors, or a frozen copy of the policy's features."""
    expectile: float = 0.7
    target_rate: float = 0.005
    critic_learning_rate: float = 1e-3
    critic_warmup: int = 1000
    """First updates, which train the critic alone."""
    clip: float = 0.1
    noise: float = 0.1
    """Deviation of each denoising step, in units of the normalised action."""
    inner_discount: float = 1.0
    """gamma_den of DPPO."""
    gate_every: int = 50
    """Updates of the policy between two looks: may it take the place of the policy that samples?"""
    gate_margin: float = 0.0
    """Share by which its value must be higher; RL-100 has 0.05."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise > 0 or not 0.0 < self.clip < 1.0 or not 0.0 < self.expectile < 1.0:
            raise ValueError(
                f"noise {self.noise}, clip {self.clip}, expectile {self.expectile}: the first must "
                "be above 0, the others inside (0, 1)"
            )
        if self.gate_every < 1 or self.gate_margin < 0 or self.critic_warmup < 0:
            raise ValueError(
                f"gate_every {self.gate_every}, gate_margin {self.gate_margin}, critic_warmup "
                f"{self.critic_warmup}: the first must be at least 1, the others not negative"
            )

    def data(self, contract: Contract) -> DataNeeds:
        return DataNeeds(next_observation=True, outcomes=True)

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> "UniO4Chunk":
        encoder = build_encoder(self.encoder, policy, contract)
        critic = build_critic(
            self.critic,
            encoder,
            contract,
            policy,
            chunk=contract.chunk_horizon,
            returns=self.rewards.bounds(longest_steps(contract)),
        )
        return UniO4Chunk(policy, parameters, critic, encoder, self)


def sample_chain(
    flow: Flow, context: Any, start: Float[Tensor, "B H W"], noise: float, generator: Any = None
) -> Float[Tensor, "B U H W"]:
    """x_0 to x_T, U = T + 1 points, each Euler step with Gaussian noise."""
    chain = [start]
    for step in range(flow.denoising_steps):
        mean = chain_mean(flow, context, chain[-1], step)
        drawn = torch.randn(mean.shape, generator=generator, device=mean.device)
        chain.append(mean + noise * drawn)
    return torch.stack(chain, dim=1)


def chain_mean(flow: Flow, context: Any, x: Float[Tensor, "B H W"], step: int) -> Tensor:
    """Where an Euler step leads without noise."""
    time = torch.full_like(x[:, 0, 0], step / flow.denoising_steps)
    return x + flow.velocity(context, x, time).float() / flow.denoising_steps


def chain_log_prob(
    flow: Flow, context: Any, chain: Float[Tensor, "B U H W"], noise: float
) -> Float[Tensor, "B T"]:
    """Log density of each inner step, summed over the chunk."""
    spread = chain.new_tensor(noise).log()
    steps = [
        normal_log_density(
            chain[:, step + 1], chain_mean(flow, context, chain[:, step], step), spread
        ).sum(dim=(1, 2))
        for step in range(flow.denoising_steps)
    ]
    return torch.stack(steps, dim=1)


class UniO4Chunk:
    """Owns critic, V, the gated old policy and three optimisers; borrows the policy."""

    def __init__(
        self,
        policy: Any,
        parameters: Sequence[nn.Parameter],
        critic: ChunkCritic,
        encoder: Encoder,
        config: UniO4ChunkConfig,
    ) -> None:
        if not isinstance(getattr(policy, "head", None), Flow):
            kind = getattr(policy, "kind", type(policy).__name__)
            raise NoFlow(
                f"{kind} denoises no flow, so uni-o4 knows no likelihood of its chunks; take "
                "chunk_flow, smolvla, pi0 or pi05, or train with aloe"
            )
        self.policy: FlowPolicy = policy
        self.critic, self.encoder, self.config = critic, encoder, config
        critic.card = card_of(critic, encoder)
        self.target = copy.deepcopy(critic).requires_grad_(False)
        self.value = ValueNet(encoder.size, critic.bins, width=config.critic.width).to(
            next(critic.parameters()).device
        )
        self.old: FlowPolicy = copy.deepcopy(policy)
        """The policy that samples; replaced only through the gate."""
        self.old.module.requires_grad_(False)
        self.optimizer = GuardedAdamW(parameters, config)
        self.critic_optimizer, self.value_optimizer = (
            GuardedAdamW(
                list(net.parameters()), GradientAlgorithm(learning_rate=config.critic_learning_rate)
            )
            for net in (critic, self.value)
        )
        self.rate_scale = 1.0
        self.looks = self.takes = 0
        """Of the gate."""

    @property
    def updates(self) -> int:
        return self.critic_optimizer.updates

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"critic": self.critic, "critic_target": self.target, "value": self.value}

    def update(self, batch: Batch) -> Metrics:
        """Critic and, once that is warm, policy on one batch; see `Learner`."""
        if self.updates < self.config.critic_warmup:
            return self.evaluate(batch)
        # The policy first: should its loss not be finite, nothing has changed yet.
        metrics = self.improve(batch)
        return self.evaluate(batch) | metrics

    def evaluate(self, batch: Batch) -> Metrics:
        """One step of U3 on chunks: V by expectile, y = R + gamma**n V(s_{t+n})."""
        config = self.config
        reward, ended = rewards_of(batch, config.rewards)
        action = fill_past_end(batch.action, batch.n if batch.left is None else batch.left)
        seen = self.encoder(batch.observation, batch.instruction)
        after = self.encoder(batch.next_observation, batch.instruction)
        with torch.no_grad():
            q_slow = self.target(seen, action[:, None])[:, 0].amin(dim=1)
            target = td_target(reward, batch.n, ended, self.value(after), config.rewards.discount)
        value_loss = expectile_loss(q_slow - self.value(seen), config.expectile).mean()
        loss, q = self.critic.loss(seen, action, target)
        value = self.value_optimizer.step(value_loss)
        step = self.critic_optimizer.step(loss.mean())
        polyak_(self.target, self.critic, config.target_rate)
        return {
            "loss": step["loss"],
            "critic/loss": step["loss"],
            "critic/value_loss": value["loss"],
        } | critic_metrics(q, target, loss.detach(), batch, config.rewards)

    def improve(self, batch: Batch) -> Metrics:
        """One clipped step on the batch's observations (U5-U8, U11).

        Raises:
            NonFiniteLoss: the policy has not been changed.
        """
        config, observation, said = self.config, batch.observation, batch.instruction
        with torch.no_grad():
            shape = (len(batch), self.policy.horizon, self.policy.noise_size)
            start = torch.randn(shape, device=self.policy.device)
            context = self.old.encode(observation, said)
            chain = sample_chain(self.old.head, context, start, config.noise)
            old_log_prob = chain_log_prob(self.old.head, context, chain, config.noise)
            seen = self.encoder(observation, said)
            chunk = self.policy.unnormalise(chain[:, -1, :, : self.policy.action_size])
            advantage = self.critic(seen, chunk[:, None])[:, 0].amin(dim=1) - self.value(seen)
        if not bool(torch.isfinite(advantage).all()):
            raise NonFiniteLoss("the policy samples chunks that are NaN or infinite")
        context = self.policy.encode(observation, said)
        log_prob = chain_log_prob(self.policy.head, context, chain, config.noise)
        terms = ppo_terms(
            log_prob[None],
            old_log_prob[None],
            shaped_advantage(advantage[None], None),
            clip=config.clip,
            inner_discount=config.inner_discount,
        )
        step = self.optimizer.step(terms.loss.sum(), self.rate_scale)
        metrics = ppo_metrics(terms, "uni_o4") | {
            "uni_o4/grad_norm": step["grad_norm"],
            "uni_o4/advantage_std": float(advantage.std()),
        }
        if self.optimizer.updates % config.gate_every == 0:
            metrics |= self.look(batch)
        return metrics | {"loss": float(terms.loss.mean().detach())}

    @torch.no_grad()
    def look(self, batch: Batch) -> Metrics:
        """U10: the policy takes the old one's place if Q values it higher, by `gate_margin`."""
        noise = torch.randn(
            (len(batch), 1, self.policy.horizon, self.policy.noise_size), device=self.policy.device
        )
        new, old = (self.judge(p, batch, noise).mean()[None] for p in (self.policy, self.old))
        taken = bool(accepted(new, old, self.config.gate_margin))
        self.looks += 1
        if taken:
            self.old.module.load_state_dict(self.policy.module.state_dict())
            self.takes += 1
        return {
            "gate/score": float(new),
            "gate/old": float(old),
            "gate/accepted": float(taken),
            "gate/accepted_share": self.takes / self.looks,
        }

    @torch.no_grad()
    def judge(
        self, policy: Any, batch: Batch, noise: Float[Tensor, "B S H W"]
    ) -> Float[Tensor, " B"]:
        """Pessimistic Q of the chunks that a policy makes of `noise`, without inner noise; for
        the gate here and the registry's."""
        seen = self.encoder(batch.observation, batch.instruction)
        chunks = policy.act(batch.observation, batch.instruction, noise.shape[1], noise=noise)
        return self.critic(seen, chunks).amin(dim=2).mean(dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.optimizer.state_dict(),
            "critic": self.critic_optimizer.state_dict(),
            "value": self.value_optimizer.state_dict(),
            "old": {k: v.clone() for k, v in self.old.module.state_dict().items()},
            "gate": {"looks": self.looks, "takes": self.takes},
            "encoder": self.encoder.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["policy"])
        self.critic_optimizer.load_state_dict(state["critic"])
        self.value_optimizer.load_state_dict(state["value"])
        self.old.module.load_state_dict(state["old"])
        self.looks, self.takes = (int(state["gate"][name]) for name in ("looks", "takes"))
        self.encoder.load_state_dict(state["encoder"])
        self.critic.card = card_of(self.critic, self.encoder)
