"""Stage 4: offline improvement by clipped steps on states of the data, old policies gated by AM-Q.

K members, B states. Equations U5-U10. With one member and alpha 0 in the cloning this is BPPO
(arXiv:2302.11312) with AM-Q in the place of its online evaluation.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vla_post.batch import Metrics
from vla_post.learners.uni_o4.amq import (
    AmQ,
    GateConfig,
    Model,
    Range,
    accepted,
    amq,
    gate_metrics,
    rank_correlation,
)
from vla_post.learners.uni_o4.cloning import disagreement
from vla_post.learners.uni_o4.dynamics import Termination
from vla_post.learners.uni_o4.policies import Policies
from vla_post.learners.uni_o4.ppo import clip_at, ppo_metrics, ppo_terms, shaped_advantage
from vla_post.learners.uni_o4.samples import Samples, Scales, draw
from vla_post.learners.uni_o4.stage import EnsembleStage, MemberAdamW
from vla_post.learners.uni_o4.values import Values

TrueReturns = Callable[[Policies], Float[Tensor, " K"]]
"""Mean return of each member in a simulator."""


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    updates: int = 3000
    """The paper: 10 000."""
    batch_size: int = 512
    learning_rate: float = 1e-4
    """Falls linearly to 0."""
    max_grad_norm: float = 0.5
    clip: float = 0.25
    clip_total: int = 10_000
    """Steps over which the clip would fall to 0; it stays where it is at step `clip_until`."""
    clip_until: int = 200
    omega: float = 0.7
    """Weight of gains, 1 - omega that of losses; 0.5 and IQL values leave both alone."""
    inner_discount: float = 1.0
    """gamma_den, for flow policies."""
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        if self.updates < 1 or self.batch_size < 2:
            raise ValueError(
                f"offline: updates {self.updates} and batch_size {self.batch_size}; the first must "
                "be at least 1, the second at least 2"
            )
        if not 0.0 < self.clip < 1.0 or not 0.0 < self.omega < 1.0:
            raise ValueError(
                f"offline: clip {self.clip} and omega {self.omega}; both must lie inside (0, 1)"
            )


class OfflinePpo(EnsembleStage):
    """Improves the ensemble; a stage. `policies` are pi, `old` the gated policies that act."""

    name = "offline"

    def __init__(
        self,
        policies: Policies,
        values: Values,
        model: Model,
        samples: Samples,
        scales: Scales,
        config: OfflineConfig,
        *,
        seed: int = 0,
        termination: Termination | None = None,
        true_returns: TrueReturns | None = None,
    ) -> None:
        optimizer = MemberAdamW(
            list(policies.parameters()), config.learning_rate, config.max_grad_norm
        )
        super().__init__(policies, optimizer, config.updates)
        self.values, self.model = values, model
        self.samples, self.scales, self.config, self.seed = samples, scales, config, seed
        self.termination, self.true_returns = termination, true_returns
        self.old = copy.deepcopy(policies).requires_grad_(False)
        self.inside = Range.of(samples.state, config.gate.range_margin)
        self.best: Tensor | None = None
        """AM-Q of each member's old policy; the cloned policy's, to begin with."""
        self.best_true: Tensor | None = None
        self.looks: list[dict[str, Any]] = []
        """Of every look of the gate: step, and by member score, accepted and, where there is a
        simulator, true return and that of the policy it would replace."""

    def update(self) -> Metrics:
        """One step of U5-U8 for every member, and a look of the gate when one is due."""
        config = self.config
        if self.best is None:
            self._begin()
        index, generator = draw(len(self.samples), config.batch_size, self.seed, self.updates)
        state = self.samples.state[index]
        with torch.no_grad():
            chain, old_log_prob = self.old.sample_scored(state, generator)
            raw = self.values.advantage(state, chain[:, :, -1].transpose(0, 1)).T
        omega = None if self.values.config.kind == "iql" else config.omega
        advantage = shaped_advantage(raw, omega)
        clip = clip_at(self.updates, config.clip, total=config.clip_total, until=config.clip_until)
        terms = ppo_terms(
            self.policies.log_prob(state, chain),
            old_log_prob,
            advantage,
            clip=clip,
            inner_discount=config.inner_discount,
        )
        step = self.optimizer.step(terms.loss.sum(), 1.0 - self.updates / config.updates)
        metrics = ppo_metrics(terms, "offline") | {
            "loss": float(terms.loss.mean().detach()),
            "offline/clip": clip,
            "offline/grad_norm": step["grad_norm"],
            "offline/advantage_mean": float(raw.mean()),
            "offline/advantage_std": float(raw.std()),
        }
        if self.updates % config.gate.every == 0:
            metrics |= self.look(generator)
            metrics["offline/disagreement"] = disagreement(self.policies, state, generator)
        return metrics

    def score(self, policies: Policies) -> AmQ:
        """AM-Q of an ensemble by this stage's critics and model."""
        config = self.config.gate
        seed = self.seed if config.same_starts else self.seed + self.updates
        generator = torch.Generator().manual_seed(seed * 7919 + 11)
        index = torch.randint(len(self.samples), (config.starts,), generator=generator)
        return amq(
            policies,
            self.values,
            self.model,
            self.samples.state[index],
            config,
            generator,
            inside=self.inside,
            scales=self.scales,
            termination=self.termination,
        )

    def look(self, generator: torch.Generator) -> Metrics:
        """U10: each member's policy takes the old one's place if its AM-Q beats the best so far."""
        assert self.best is not None
        result = self.score(self.policies)
        taken = accepted(result.score, self.best, self.config.gate.margin)
        row: dict[str, Any] = {
            "step": self.updates,
            "score": result.score.tolist(),
            "accepted": taken.tolist(),
        }
        if self.true_returns is not None and self.best_true is not None:
            true = self.true_returns(self.policies)
            row |= {"true": true.tolist(), "true_before": self.best_true.tolist()}
            self.best_true = torch.where(taken, true, self.best_true)
        self.best = torch.where(taken, result.score, self.best)
        self.old.take(self.policies, taken)
        self.looks.append(row)
        return gate_metrics(result, self.best, taken) | gate_summary(self.looks)

    def _begin(self) -> None:
        result = self.score(self.old)
        self.best = result.score
        row: dict[str, Any] = {
            "step": 0,
            "score": result.score.tolist(),
            "accepted": [False] * self.old.members,
        }
        if self.true_returns is not None:
            self.best_true = self.true_returns(self.old)
            row |= {"true": self.best_true.tolist(), "true_before": self.best_true.tolist()}
        self.looks.append(row)

    def select(self, *, among: int = 3) -> int:
        """The member to go on with: of the `among` with the best AM-Q the one with the best true
        return, or simply the best AM-Q where there is no simulator. Its policy is `old`."""
        assert self.best is not None, "select after the first update"
        order = self.best.argsort(descending=True)
        if self.true_returns is None:
            return int(order[0])
        true = self.true_returns(self.old)
        order = order[:among]
        return int(order[true[order].argmax()])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "old": self.old.state_dict(),
            "best": self.best,
            "best_true": self.best_true,
            "looks": self.looks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.old.load_state_dict(state["old"])
        self.best, self.best_true = state["best"], state["best_true"]
        self.looks = list(state["looks"])


def gate_summary(looks: Sequence[dict[str, Any]]) -> Metrics:
    """Does AM-Q tell the truth? Over all looks and members with a true return: rank correlation of
    score and return, and the share of accepted candidates that were better than what they replaced.
    {} without a simulator."""
    if not looks or "true" not in looks[0]:
        return {}
    score = torch.tensor([row["score"] for row in looks])
    true = torch.tensor([row["true"] for row in looks])
    before = torch.tensor([row["true_before"] for row in looks])
    taken = torch.tensor([row["accepted"] for row in looks])
    metrics: Metrics = {
        "gate/rank_correlation": rank_correlation(score.flatten(), true.flatten()),
        "gate/true_mean": float(true[-1].mean()),
        "gate/accepted_count": float(taken.sum()),
    }
    if bool(taken.any()):
        metrics["gate/accepted_rose"] = float((true > before)[taken].float().mean())
    return metrics
