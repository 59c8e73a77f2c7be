"""AM-Q: what a policy is worth, by an approximate model and Q, without touching the robot.

K policies, N starts, S state size. Equations U9 and U10.
"""

from dataclasses import dataclass, field
from statistics import StatisticsError, correlation
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vla_post.batch import Metrics
from vla_post.learners.uni_o4.dynamics import DynamicsDiverged, Termination
from vla_post.learners.uni_o4.policies import Policies
from vla_post.learners.uni_o4.samples import Scales


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How policies are compared before one replaces the policy that acts."""

    every: int = 100
    """Offline steps between two looks."""
    horizon: int = 100
    """H, model steps (of a chunk each). The paper: 1000 in locomotion, 2-200 elsewhere."""
    starts: int = 256
    """States of the data that the roll-outs start from."""
    form: Literal["mean", "sum"] = "mean"
    """`mean` over the visited states, as in the released code; `sum` over the steps of a roll-out,
    as in the paper's text, where falling early costs what is missed."""
    margin: float = 0.0
    """A candidate must be better than the best so far by this share of it; RL-100 takes 0.05. 0:
    strictly better."""
    same_starts: bool = True
    """Compare all candidates from the same states with the same noise."""
    max_left: float = 0.5
    """Share of the roll-outs that may leave the data's range before the model counts as broken."""
    range_margin: float = 2.0
    """How far beyond the data's range a state may lie, in ranges."""

    def __post_init__(self) -> None:
        for name in ("every", "horizon", "starts"):
            if getattr(self, name) < 1:
                raise ValueError(f"gate: {name} is {getattr(self, name)}; it must be at least 1")
        if self.margin < 0 or not 0 < self.max_left <= 1 or self.range_margin < 0:
            raise ValueError(
                f"gate: margin {self.margin}, max_left {self.max_left}, range_margin "
                f"{self.range_margin}: expected not negative, a share in (0, 1], not negative"
            )


@runtime_checkable
class QFunction(Protocol):
    def q(self, state: Tensor, action: Tensor) -> Tensor:
        """(B, n) of states (B, S) and actions (B, n, D)."""
        ...


@runtime_checkable
class Model(Protocol):
    def step(
        self, state: Tensor, action: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Next states, rewards, probabilities of an end."""
        ...


@dataclass(frozen=True, kw_only=True)
class AmQ:
    """Scores of K policies."""

    score: Float[Tensor, " K"]
    visited: Float[Tensor, " K"]
    """Mean length of the roll-outs, in model steps."""
    left: Float[Tensor, " K"]
    """Share of the roll-outs that left the data's range."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where the model may be believed: the data's range and a margin around it."""

    low: Float[Tensor, " S"]
    high: Float[Tensor, " S"]
    names: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, state: Float[Tensor, "N S"], margin: float) -> "Range":
        low, high = state.amin(dim=0), state.amax(dim=0)
        width = (high - low).clamp(min=1e-3)
        return cls(low=low - margin * width, high=high + margin * width)


@torch.no_grad()
def amq(
    policies: Policies,
    values: QFunction,
    model: Model,
    starts: Float[Tensor, "N S"],
    config: GateConfig,
    generator: torch.Generator,
    *,
    inside: Range | None = None,
    scales: Scales | None = None,
    termination: Termination | None = None,
) -> AmQ:
    """J of each policy: Q(s, mu(s)) along model roll-outs (U9).

    A roll-out that ends, or leaves `inside`, visits no further state.

    Args:
        scales: for `termination`, which speaks the data's units; without a rule, the model's own
            probability above 0.5 is an end.

    Raises:
        DynamicsDiverged: more than `config.max_left` of the roll-outs left the data's range.
    """
    members, size = policies.members, len(starts)
    state = starts.expand(members, *starts.shape).clone()
    alive = torch.ones(members, size, dtype=torch.bool)
    total, count, left = torch.zeros(3, members)
    blame = torch.zeros(starts.shape[1])
    for step in range(config.horizon):
        action = policies.act(state, generator)
        q = values.q(state.flatten(0, 1), action.flatten(0, 1)[:, None])[:, 0].view(members, size)
        total += torch.where(alive, q, 0.0).sum(dim=1)
        count += alive.sum(dim=1)
        if step + 1 == config.horizon:
            break
        following, _, end = model.step(state.flatten(0, 1), action.flatten(0, 1), generator)
        if termination is not None and scales is not None:
            ended = termination(scales.raw_state(following))
        else:
            ended = end > 0.5
        if inside is not None:
            # Not-a-number lies outside as well.
            outside = ~((following >= inside.low) & (following <= inside.high))
            gone = outside.any(dim=1) & ~ended & alive.flatten()
            left += gone.view(members, size).sum(dim=1)
            blame += outside[gone].sum(dim=0)
            ended = ended | gone
            if float(left.sum()) > config.max_left * members * size:
                number = int(blame.argmax())
                raise DynamicsDiverged(
                    f"{float(left.sum() / (members * size)):.0%} of the model's roll-outs left the "
                    f"data's range within {step + 1} steps, most in state number {number}. Shorten "
                    "the gate's horizon, train the dynamics longer, or take policies nearer to the "
                    "data"
                )
        alive = alive & ~ended.view(members, size)
        if not bool(alive.any()):
            break
        # A roll-out that is over stays where it was, so that nothing it does grows.
        state = torch.where(alive[..., None], following.view_as(state), state)
    score = total / count if config.form == "mean" else total / size
    return AmQ(score=score, visited=count / size, left=left / size)


def accepted(
    score: Float[Tensor, " K"], best: Float[Tensor, " K"], margin: float = 0.0
) -> Bool[Tensor, " K"]:
    """U10: strictly better, by `margin` of the best so far. NaN is never better."""
    better = score > best
    return better & (score - best >= margin * best.abs()) if margin else better


def rank_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's; 0 where there is none: fewer than two values, or all of them alike."""
    try:
        # Typed as Any: the type checker's view of it lags behind Python 3.12.
        ranked: Any = correlation
        return float(ranked(a.tolist(), b.tolist(), method="ranked"))
    except StatisticsError:
        return 0.0


def gate_metrics(result: AmQ, best: Float[Tensor, " K"], taken: Bool[Tensor, " K"]) -> Metrics:
    return {
        "gate/score": float(result.score.mean()),
        "gate/best": float(best.max()),
        "gate/accepted": float(taken.float().mean()),
        "gate/visited": float(result.visited.mean()),
        "gate/left_range": float(result.left.mean()),
    }
