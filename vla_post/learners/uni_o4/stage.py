"""What the stages share: a number of updates, a state that resumes, an optimiser per member."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_post.batch import Metrics
from vla_post.learners.optimisation import GradientAlgorithm, GuardedAdamW
from vla_post.learners.uni_o4.policies import Policies


@runtime_checkable
class Stage(Protocol):
    """A part of the run that ends. `training.uni_o4` saves it, resumes it and logs its metrics."""

    name: str

    @property
    def updates(self) -> int:
        """So far."""
        ...

    @property
    def done(self) -> bool: ...

    def update(self) -> Metrics:
        """One update.

        Raises:
            NonFiniteLoss: nothing has been changed.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `update` depends on, and what later stages need."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EnsembleStage:
    """What the stages share that train an ensemble for a fixed number of updates."""

    def __init__(self, policies: Policies, optimizer: "MemberAdamW", planned: int) -> None:
        self.policies, self.optimizer, self.planned = policies, optimizer, planned

    @property
    def updates(self) -> int:
        return self.optimizer.updates

    @property
    def done(self) -> bool:
        return self.updates >= self.planned

    def state_dict(self) -> dict[str, Any]:
        return {"policies": self.policies.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policies.load_state_dict(state["policies"])
        self.optimizer.load_state_dict(state["optimizer"])


def adamw(parameters: Sequence[nn.Parameter], rate: float, decay: float = 0.0) -> GuardedAdamW:
    """One optimiser for a network whose gradient is not shortened."""
    return GuardedAdamW(parameters, _knobs(rate, decay, 1e6))


class MemberAdamW(GuardedAdamW):
    """AdamW over stacked members (K, ...), the gradient of each shortened by its own length, so
    that a stack of K trains as K members with an optimiser each."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], rate: float, max_grad_norm: float
    ) -> None:
        super().__init__(parameters, _knobs(rate, 0.0, max_grad_norm))

    @torch.no_grad()
    def clip(self) -> Float[Tensor, ""]:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack([g.flatten(1).square().sum(dim=1) for g in grads]).sum(dim=0).sqrt()
        factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor.view(-1, *[1] * (grad.ndim - 1)))
        return norm.max()


def _knobs(rate: float, decay: float, max_grad_norm: float) -> GradientAlgorithm:
    return GradientAlgorithm(
        learning_rate=rate,
        warmup_updates=0,
        weight_decay=decay,
        betas=(0.9, 0.999),
        max_grad_norm=max_grad_norm,
    )
