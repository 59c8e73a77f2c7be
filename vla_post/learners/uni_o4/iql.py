"""IQL (arXiv:2110.06169), the baseline: clone the data's better actions, offline and then online.

B batch. Values come from `ValueFit` with `kind="iql"`; the policy clones with weights
min(exp(beta A), 100). Online the same two updates go on, over the data and what was collected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vla_post.batch import Metrics
from vla_post.learners.uni_o4.online import OnlineConfig, OnlinePpo, Rollout
from vla_post.learners.uni_o4.policies import Policies
from vla_post.learners.uni_o4.rollouts import VectorEnvironment
from vla_post.learners.uni_o4.samples import Samples, Scales, draw
from vla_post.learners.uni_o4.stage import EnsembleStage, MemberAdamW
from vla_post.learners.uni_o4.values import ValueFit, Values


@dataclass(frozen=True, kw_only=True)
class IqlPolicyConfig:
    updates: int = 10_000
    batch_size: int = 256
    learning_rate: float = 3e-4
    beta: float = 3.0
    """Inverse temperature, in IQL's unit of the reward: 1000 / (best less worst return)."""
    max_weight: float = 100.0


class IqlPolicy(EnsembleStage):
    """Weighted cloning; a stage.

    Args:
        unit: what an advantage of 1 is in IQL's unit of the reward.
    """

    name = "iql-policy"

    def __init__(
        self,
        policies: Policies,
        values: Values,
        samples: Samples,
        config: IqlPolicyConfig,
        *,
        unit: float,
        seed: int = 0,
    ) -> None:
        optimizer = MemberAdamW(list(policies.parameters()), config.learning_rate, 1e6)
        super().__init__(policies, optimizer, config.updates)
        self.values, self.samples = values, samples
        self.config, self.unit, self.seed = config, unit, seed

    def update(self) -> Metrics:
        config = self.config
        index, generator = draw(len(self.samples), config.batch_size, self.seed, self.updates)
        batch = self.samples.rows(index)
        advantage = self.values.advantage(batch.state, batch.action[:, None])[:, 0]
        weight = (config.beta * self.unit * advantage).exp().clamp(max=config.max_weight)
        loss = self.policies.clone(batch.state, batch.action, batch.valid, generator).loss
        metrics = self.optimizer.step((weight * loss).mean(dim=1).sum())
        return {
            "loss": metrics["loss"],
            "iql/weight_mean": float(weight.mean()),
            "iql/advantage_std": float(advantage.std()),
        }


@dataclass(frozen=True, kw_only=True)
class IqlOnlineConfig:
    steps: int = 100_000
    """Of all environments together."""
    batch_steps: int = 1000
    """Collected between two rounds of updates."""
    updates_per_step: float = 0.25
    """Of values and policy, for each step that was collected; IQL's authors have 1."""


class IqlOnline:
    """Fine-tuning: collect, add to the data, go on with both updates; a stage.

    Args:
        fit: whose samples are the data so far; `extraction` shares them.
    """

    name = "iql-online"

    def __init__(
        self,
        fit: ValueFit,
        extraction: IqlPolicy,
        scales: Scales,
        env: VectorEnvironment,
        config: IqlOnlineConfig,
        seed: int = 0,
    ) -> None:
        self.fit, self.extraction, self.config = fit, extraction, config
        self.collector = OnlinePpo(
            extraction.policies,
            fit.values.value,
            scales,
            env,
            OnlineConfig(steps=config.steps, batch_steps=config.batch_steps),
            seed,
        )
        self.updates = 0

    @property
    def steps(self) -> int:
        return self.collector.steps

    @property
    def done(self) -> bool:
        return self.steps >= self.config.steps

    def update(self) -> Metrics:
        generator = torch.Generator().manual_seed(
            (self.collector.seed + 1) * 800_003 + self.updates
        )
        rollout = self.collector.collect(generator)
        merged = append(self.fit.samples, as_samples(rollout, self.collector.scales))
        self.fit.samples = self.extraction.samples = merged
        metrics: Metrics = {}
        for _ in range(int(rollout.reward.numel() * self.config.updates_per_step)):
            metrics = self.fit.update() | self.extraction.update()
        self.updates += 1
        return metrics | {"iql/rows": float(len(merged)), "iql/steps": float(self.steps)}


def as_samples(rollout: Rollout, scales: Scales) -> Samples:
    """What was collected, environment by environment. Returns are not known and stay 0: IQL asks
    for none."""
    steps, envs = rollout.reward.shape

    def rows(value: Tensor) -> Tensor:
        return value.transpose(0, 1).flatten(0, 1)

    size = steps * envs
    over = rows(rollout.ended).clone()
    over[steps - 1 :: steps] = True
    action = rows(rollout.chain)[:, -1].clamp(-1.0, 1.0)
    place = torch.arange(size)
    return Samples(
        state=rows(rollout.state),
        action=action,
        valid=torch.ones_like(action, dtype=torch.bool),
        reward=rows(rollout.reward),
        discount=torch.full((size,), scales.discount**scales.horizon),
        terminated=rows(rollout.terminated),
        next_state=rows(rollout.next_state),
        following=torch.where(over, -1, place + 1),
        returns=torch.zeros(size),
        last=place,
        tail_discount=torch.zeros(size),
    )


def append(samples: Samples, more: Samples) -> Samples:
    """Two data sets as one; rows keep pointing to their own followers."""
    merged = {
        name: torch.cat([value, getattr(more, name)]) for name, value in vars(samples).items()
    }
    size = len(samples)
    following = torch.where(more.following >= 0, more.following + size, -1)
    merged["following"] = torch.cat([samples.following, following])
    merged["last"] = torch.cat([samples.last, more.last + size])
    return Samples(**merged)
