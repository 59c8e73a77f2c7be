"""Stage 5: the same objective with fresh data: PPO with GAE from the chosen member.

T steps of E environments, S state size, D numbers of a chunk. Normalisation of states, actions and
rewards stays that of the offline phase, and V starts from the offline V, so that the switch changes
nothing by itself. From random weights this is plain PPO, the baseline.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vla_post.batch import Metrics
from vla_post.critics.networks import ValueNet
from vla_post.learners.uni_o4.policies import Policies
from vla_post.learners.uni_o4.ppo import PpoTerms, gae, ppo_metrics, ppo_terms
from vla_post.learners.uni_o4.rollouts import (
    VectorEnvironment,
    commands,
    final_observation,
    require_same_step,
    states,
)
from vla_post.learners.uni_o4.samples import Scales
from vla_post.learners.uni_o4.stage import MemberAdamW, adamw
from vla_post.learners.uni_o4.values import seen


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    steps: int = 100_000
    """Of all environments together (chunks, where the policy emits chunks)."""
    batch_steps: int = 2048
    """Collected between two improvements."""
    minibatch_size: int = 128
    epochs: int = 10
    learning_rate: float = 3e-5
    """Of the policy; both rates fall linearly to 0 at `steps`."""
    value_learning_rate: float = 2e-4
    anneal: bool = True
    trace: float = 0.95
    """lambda of GAE."""
    clip: float = 0.05
    value_clip: float = 0.2
    """In units of `Scales.reward`; 0 for none."""
    entropy: float = 0.0
    """Weight of the entropy; the paper has 0.01, of policies with more room to be certain."""
    max_grad_norm: float = 0.5
    target_kl: float = 0.02
    """The epochs of a batch end when the policy has moved this far; 0 for no such limit."""
    inner_discount: float = 1.0
    """gamma_den, for flow policies."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_steps", "minibatch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"online: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.clip < 1.0 or not 0.0 <= self.trace <= 1.0:
            raise ValueError(
                f"online: clip {self.clip} and trace {self.trace}; the first must lie inside "
                "(0, 1), the second in [0, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """T steps of E environments, in the networks' units."""

    state: Float[Tensor, "T E S"]
    chain: Float[Tensor, "T E U D"]
    reward: Float[Tensor, "T E"]
    next_state: Float[Tensor, "T E S"]
    terminated: Bool[Tensor, "T E"]
    ended: Bool[Tensor, "T E"]


class OnlinePpo:
    """Collects and improves; a stage. One update is one batch of `batch_steps`.

    What the environments are in the middle of is not saved: a resumed run resets them.

    Args:
        policy: one member.
        value: V, which goes on learning.
    """

    name = "online"

    def __init__(
        self,
        policy: Policies,
        value: ValueNet,
        scales: Scales,
        env: VectorEnvironment,
        config: OnlineConfig,
        seed: int = 0,
    ) -> None:
        require_same_step(env)
        if policy.members != 1:
            raise ValueError(f"{policy.members} members; go online with one (`policies.member(i)`)")
        self.policy, self.value, self.scales = policy, value, scales
        self.env, self.config, self.seed = env, config, seed
        self.optimizer = MemberAdamW(
            list(policy.parameters()), config.learning_rate, config.max_grad_norm
        )
        self.value_optimizer = adamw(list(value.parameters()), config.value_learning_rate)
        self.updates = 0
        self.steps = 0
        """Environment steps so far."""
        self.observation: Any = None
        self.running = np.zeros(env.num_envs)
        self.finished: list[float] = []
        """Returns of the episodes that ended in the last update, in the data's unit."""

    @property
    def done(self) -> bool:
        return self.steps >= self.config.steps

    def update(self) -> Metrics:
        generator = torch.Generator().manual_seed((self.seed + 1) * 900_001 + self.updates)
        rollout = self.collect(generator)
        metrics = self.improve(rollout, generator)
        self.updates += 1
        if self.finished:
            metrics["online/return"] = float(np.mean(self.finished))
            metrics["online/episodes"] = float(len(self.finished))
        return metrics | {"online/steps": float(self.steps)}

    @torch.no_grad()
    def collect(self, generator: torch.Generator) -> Rollout:
        """`batch_steps` of the current policy, rounded up to a whole number per environment."""
        size = self.env.num_envs
        if self.observation is None:
            self.observation, _ = self.env.reset(seed=self.seed * 10_007 + self.updates)
        self.finished = []
        state, chain, reward, reached, terminated, ended = ([] for _ in range(6))
        now = states(self.scales, self.observation)
        for _ in range(-(-self.config.batch_steps // size)):
            drawn = self.policy.sample(now, generator)[0]
            following, gained, real, cut, info = self.env.step(commands(self.scales, drawn[:, -1]))
            over = np.asarray(real) | np.asarray(cut)
            state.append(now)
            chain.append(drawn)
            reward.append(gained)
            terminated.append(real)
            ended.append(over)
            after = states(self.scales, following)
            reached.append(
                states(self.scales, final_observation(following, over, info))
                if over.any()
                else after
            )
            self.running += gained
            self.finished += self.running[over].tolist()
            self.running[over] = 0.0
            self.observation, now = following, after
        self.steps += size * len(state)

        def put(rows: list[Any], kind: Any) -> Tensor:
            return torch.from_numpy(np.asarray(rows, kind))

        return Rollout(
            state=torch.stack(state),
            chain=torch.stack(chain),
            reward=put(reward, np.float32) / self.scales.reward,
            next_state=torch.stack(reached),
            terminated=put(terminated, np.bool_),
            ended=put(ended, np.bool_),
        )

    @torch.no_grad()
    def judge(self, rollout: Rollout) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        """(advantage, value) of every step."""
        value = self.value(seen(rollout.state.flatten(0, 1))).view_as(rollout.reward)
        # V of the next row, except where an episode or the batch ended.
        border = rollout.ended.clone()
        border[-1] = True
        following = torch.cat([value[1:], value[-1:]])
        following[border] = self.value(seen(rollout.next_state[border]))
        advantage = gae(
            rollout.reward,
            value,
            following,
            rollout.terminated,
            rollout.ended,
            discount=self.scales.discount**self.scales.horizon,
            trace=self.config.trace,
        )
        return advantage, value

    def improve(self, rollout: Rollout, generator: torch.Generator) -> Metrics:
        """Epochs of clipped steps on one batch."""
        config = self.config
        gained, judged = self.judge(rollout)
        state = rollout.state.flatten(0, 1)
        chain = rollout.chain.flatten(0, 1)[None]
        advantage, value = gained.flatten(), judged.flatten()
        aim = advantage + value
        with torch.no_grad():
            old_log_prob = self.policy.log_prob(state, chain)
        rate = 1.0
        if config.anneal:
            rate = max(1.0 - (self.steps - len(state)) / config.steps, 0.0)
        seen_terms: list[PpoTerms] = []
        value_losses: list[float] = []
        entropy = torch.zeros(())
        moved = False
        for _ in range(config.epochs):
            order = torch.randperm(len(state), generator=generator)
            for rows in order.split(config.minibatch_size):
                if len(rows) < 2:
                    continue
                mine = advantage[rows]
                mine = (mine - mine.mean()) / (mine.std() + 1e-8)
                terms = ppo_terms(
                    self.policy.log_prob(state[rows], chain[:, rows]),
                    old_log_prob[:, rows],
                    mine[None],
                    clip=config.clip,
                    inner_discount=config.inner_discount,
                )
                if config.target_kl and float(terms.kl[0]) > 1.5 * config.target_kl:
                    moved = True
                    break
                loss = terms.loss.sum()
                if config.entropy:
                    entropy = self.policy.entropy(state[rows], chain[:, rows]).mean()
                    loss = loss - config.entropy * entropy
                self.optimizer.step(loss, rate)
                value_losses.append(self._fit_value(state[rows], value[rows], aim[rows], rate))
                seen_terms.append(terms)
            if moved:
                break
        # V goes on over the whole batch where the policy had to stop early.
        for rows in torch.randperm(len(state), generator=generator).split(config.minibatch_size):
            if moved:
                value_losses.append(self._fit_value(state[rows], value[rows], aim[rows], rate))
        explained = 1.0 - float((aim - value).var() / aim.var().clamp(min=1e-8))
        return ppo_metrics(_mean(seen_terms), "online") | {
            "loss": float(np.mean(value_losses)),
            "online/value_loss": float(np.mean(value_losses)),
            "online/explained_variance": explained,
            "online/entropy": float(entropy.detach()),
            "online/minibatches": float(len(seen_terms)),
            "online/advantage_std": float(advantage.std()),
        }

    def _fit_value(self, state: Tensor, before: Tensor, aim: Tensor, rate: float) -> float:
        value, clip = self.value(seen(state)), self.config.value_clip
        loss = (value - aim).square()
        if clip:
            near = before + (value - before).clamp(-clip, clip)
            loss = torch.maximum(loss, (near - aim).square())
        return self.value_optimizer.step(loss.mean(), rate)["loss"]

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "value": self.value.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
            "updates": self.updates,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.value.load_state_dict(state["value"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.updates, self.steps = int(state["updates"]), int(state["steps"])
        self.observation, self.running = None, np.zeros(self.env.num_envs)


def _mean(terms: list[PpoTerms]) -> PpoTerms:
    return PpoTerms(
        **{
            name: torch.stack([getattr(t, name).detach() for t in terms]).mean(dim=0)
            for name in ("loss", "clipped", "kl")
        }
    )
