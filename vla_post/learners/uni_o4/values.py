"""Stage 1: what the data's own behaviour is worth. V and Q, fitted once and then frozen.

B batch, n actions per state, D numbers of an action chunk, K critics. Equations U1-U3. All values
are in units of `Scales.reward`.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vla_post.batch import Metrics
from vla_post.critics.diagnostics import correlation
from vla_post.critics.ensemble import polyak_
from vla_post.critics.networks import (
    ChunkCritic,
    CriticConfig,
    CriticInput,
    InputSize,
    ValueNet,
    expectile_loss,
)
from vla_post.learners.uni_o4.samples import Samples, draw
from vla_post.learners.uni_o4.stage import adamw


@dataclass(frozen=True, kw_only=True)
class ValueConfig:
    kind: Literal["sarsa", "iql"] = "sarsa"
    """`sarsa`: V from Monte-Carlo returns, Q from the data's next action. `iql`: expectiles
    (arXiv:2110.06169), which value the better part of the data's actions."""
    updates: int = 20_000
    """The paper: 2 million, of networks four times as wide."""
    batch_size: int = 256
    width: int = 256
    layers: int = 2
    heads: int = 2
    """K critics: averaged for `sarsa`, their minimum for `iql`."""
    learning_rate: float = 3e-4
    target_rate: float = 0.005
    expectile: float = 0.7
    bootstrap_timeouts: bool = True
    """An episode that the clock ended has a value left: V of its last observation. Otherwise its
    returns stop there, as in the released code."""

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"values: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.expectile < 1.0:
            raise ValueError(f"values: expectile is {self.expectile}; it must lie inside (0, 1)")


class Values:
    """V(s) and Q(s, a)."""

    def __init__(self, state_size: int, action_size: int, config: ValueConfig) -> None:
        self.config = config
        size = InputSize(tokens=0, features=0, proprioception=state_size)
        critic = CriticConfig(heads=config.heads, width=config.width, layers=config.layers)
        self.critic = ChunkCritic(
            critic,
            size,
            chunk=1,
            action_mean=torch.zeros(action_size),
            action_std=torch.ones(action_size),
        )
        self.value = ValueNet(size, None, width=config.width, layers=config.layers)

    def q(self, state: Float[Tensor, "B S"], action: Float[Tensor, "B n D"]) -> Tensor:
        """(B, n): one number from the critics. Actions count as the robot would execute them."""
        return self.combine(self.critic(seen(state), action.clamp(-1.0, 1.0)[:, :, None]))

    def v(self, state: Float[Tensor, "B S"]) -> Float[Tensor, " B"]:
        return self.value(seen(state))

    def combine(self, q: Float[Tensor, "*b K"]) -> Float[Tensor, "*b"]:
        return q.amin(dim=-1) if self.config.kind == "iql" else q.mean(dim=-1)

    @torch.no_grad()
    def advantage(
        self, state: Float[Tensor, "B S"], action: Float[Tensor, "B n D"]
    ) -> Float[Tensor, "B n"]:
        """A = Q(s, a) - V(s) (U5)."""
        return self.q(state, action) - self.v(state)[:, None]

    def state_dict(self) -> dict[str, Any]:
        return {"critic": self.critic.state_dict(), "value": self.value.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state["critic"])
        self.value.load_state_dict(state["value"])


def seen(state: Float[Tensor, "B S"]) -> CriticInput:
    """A state as the project's critics take it: no features, all proprioception."""
    return CriticInput(features=state.new_zeros(len(state), 0, 0), proprioception=state)


class ValueFit:
    """Fits `Values`; a stage."""

    name = "values"

    def __init__(self, values: Values, samples: Samples, seed: int = 0) -> None:
        self.values, self.samples, self.seed = values, samples, seed
        self.config = values.config
        self.target = copy.deepcopy(values.critic).requires_grad_(False)
        self.slow_value = copy.deepcopy(values.value).requires_grad_(False)
        self.critic_optimizer = adamw(list(values.critic.parameters()), self.config.learning_rate)
        self.value_optimizer = adamw(list(values.value.parameters()), self.config.learning_rate)

    @property
    def updates(self) -> int:
        return self.critic_optimizer.updates

    @property
    def done(self) -> bool:
        return self.updates >= self.config.updates

    def update(self) -> Metrics:
        index, _ = draw(len(self.samples), self.config.batch_size, self.seed, self.updates)
        batch = self.samples.rows(index)
        iql = self.config.kind == "iql"
        value_loss = self.expectile_loss(batch) if iql else self.return_loss(batch)
        target = self.iql_target(batch) if iql else self.sarsa_target(batch)
        critic_loss, q = self.values.critic.loss(seen(batch.state), batch.action[:, None], target)
        value = self.value_optimizer.step(value_loss.mean())
        critic = self.critic_optimizer.step(critic_loss.mean())
        polyak_(self.target, self.values.critic, self.config.target_rate)
        polyak_(self.slow_value, self.values.value, self.config.target_rate)
        with torch.no_grad():
            v = self.values.v(batch.state)
        return {
            "loss": critic["loss"] + value["loss"],
            "values/q_loss": critic["loss"],
            "values/v_loss": value["loss"],
            "values/q_mean": float(q.mean()),
            "values/v_mean": float(v.mean()),
            "values/return_mean": float(batch.returns.mean()),
            "values/v_correlation": correlation(v, batch.returns),
            "values/q_disagreement": float(q.std(dim=1, correction=0).mean()),
            "values/advantage_std": float((q.mean(dim=1) - v).std(correction=0)),
        }

    def return_loss(self, batch: Samples) -> Float[Tensor, " B"]:
        """U1."""
        target = batch.returns
        if self.config.bootstrap_timeouts:
            with torch.no_grad():
                end = self.slow_value(seen(self.samples.next_state[batch.last]))
            target = target + batch.tail_discount * end
        return self.values.value.loss(seen(batch.state), target)

    @torch.no_grad()
    def sarsa_target(self, batch: Samples) -> Float[Tensor, " B"]:
        """U2; where the clock ended the episode there is no next action, and V stands in."""
        after = seen(batch.next_state)
        action = self.samples.action[batch.following.clamp(min=0)]
        q = self.target(after, action[:, None, None]).mean(dim=-1)[:, 0]
        cut = self.slow_value(after) if self.config.bootstrap_timeouts else torch.zeros_like(q)
        later = torch.where(batch.following >= 0, q, cut)
        return batch.reward + batch.discount * torch.where(batch.terminated, 0.0, later)

    def expectile_loss(self, batch: Samples) -> Float[Tensor, " B"]:
        """The V of U3."""
        with torch.no_grad():
            q = self.target(seen(batch.state), batch.action[:, None, None]).amin(dim=-1)[:, 0]
        return expectile_loss(q - self.values.v(batch.state), self.config.expectile)

    @torch.no_grad()
    def iql_target(self, batch: Samples) -> Float[Tensor, " B"]:
        """The y of U3."""
        later = torch.where(batch.terminated, 0.0, self.values.v(batch.next_state))
        return batch.reward + batch.discount * later

    def state_dict(self) -> dict[str, Any]:
        return self.values.state_dict() | {
            "target": self.target.state_dict(),
            "slow_value": self.slow_value.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values.load_state_dict(state)
        self.target.load_state_dict(state["target"])
        self.slow_value.load_state_dict(state["slow_value"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
