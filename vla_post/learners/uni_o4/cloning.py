"""Stage 2: an ensemble that clones the data, each member kept away from the others.

K members, B batch. Equation U4. Differs from the paper's code: all members step together, from one
state of the ensemble, in one batched update; and the divergence that is rewarded has a ceiling,
beyond which a member gains nothing, since a Gaussian's KL has none and would outgrow the cloning.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vla_post.batch import Metrics
from vla_post.learners.uni_o4.policies import Policies, best_other
from vla_post.learners.uni_o4.samples import Samples, draw
from vla_post.learners.uni_o4.stage import EnsembleStage, MemberAdamW

LOOK_EVERY = 50
"""Updates between two looks at how far the members are apart, each a pass of the whole ensemble."""


@dataclass(frozen=True, kw_only=True)
class CloningConfig:
    updates: int = 10_000
    """The paper: 400 000."""
    batch_size: int = 256
    learning_rate: float = 3e-4
    max_grad_norm: float = 10.0
    alpha: float = 0.1
    """Weight of the disagreement; 0 is plain cloning, from different random weights."""
    disagreement: Literal["kl", "log_prob"] = "kl"
    """`kl` rewards distance from the best other member. `log_prob` is the released default, whose
    gradient is 1 + alpha times that of cloning and pushes nobody apart; for comparison."""
    ceiling: float = 1.0
    """Of the divergence that is rewarded, per number of the action."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(
                f"cloning: alpha is {self.alpha}; it must lie in [0, 1), for at 1 the members "
                "would flee each other as fast as they approach the data"
            )
        if self.updates < 1 or self.batch_size < 1 or not self.ceiling > 0:
            raise ValueError(
                f"cloning: updates {self.updates}, batch_size {self.batch_size}, ceiling "
                f"{self.ceiling}: all must be above 0"
            )


def cloning_loss(
    loss: Float[Tensor, "K B"],
    divergence: Float[Tensor, "K B"],
    *,
    alpha: float,
    disagreement: Literal["kl", "log_prob"],
    ceiling: float,
) -> Float[Tensor, " K"]:
    """U4 of each member, `loss` standing for -log pi."""
    if disagreement == "kl" or len(loss) == 1:
        return (loss - alpha * divergence.clamp(max=ceiling)).mean(dim=1)
    best = loss.detach().gather(0, best_other(loss))
    return (loss + alpha * (loss - best)).mean(dim=1)


class Cloning(EnsembleStage):
    """Fits the ensemble; a stage."""

    name = "cloning"

    def __init__(
        self, policies: Policies, samples: Samples, config: CloningConfig, seed: int = 0
    ) -> None:
        optimizer = MemberAdamW(
            list(policies.parameters()), config.learning_rate, config.max_grad_norm
        )
        super().__init__(policies, optimizer, config.updates)
        self.samples, self.config, self.seed = samples, config, seed

    def update(self) -> Metrics:
        config = self.config
        index, generator = draw(len(self.samples), config.batch_size, self.seed, self.updates)
        batch = self.samples.rows(index)
        terms = self.policies.clone(batch.state, batch.action, batch.valid, generator)
        loss = cloning_loss(
            terms.loss,
            terms.divergence,
            alpha=config.alpha,
            disagreement=config.disagreement,
            ceiling=config.ceiling * batch.action.shape[1],
        )
        metrics = self.optimizer.step(loss.sum())
        out = {
            "loss": float(loss.mean().detach()),
            "cloning/loss": float(terms.loss.mean().detach()),
            "cloning/divergence": float(terms.divergence.mean().detach()),
            "cloning/grad_norm": metrics["grad_norm"],
        }
        if self.updates % LOOK_EVERY == 0 or self.done:
            out["cloning/disagreement"] = disagreement(self.policies, batch.state, generator)
        return out


@torch.no_grad()
def disagreement(policies: Policies, state: Tensor, generator: torch.Generator) -> float:
    """Mean deviation of the members' actions from each other, in half ranges of the action."""
    if policies.members == 1:
        return 0.0
    return float(policies.act(state, generator).std(dim=0).mean())
