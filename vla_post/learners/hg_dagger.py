"""HG-DAgger: the human decides when to take over, and only what the human did is imitated.

Kelly et al., arXiv:1810.02890, Eq. H1-H2 of our specification: the data set is every demonstration
plus the steps at which a person drove; steps that the policy drove are discarded. Differs from the
paper: trains continuously on a growing set instead of once per epoch; a policy emits chunks, so
the mask is per chunk element: a chunk that starts under the human and reaches past the hand-back
learns its first part only. B batch, H chunk length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from trajectory_store import Source
from vla_post.batch import Batch, Metrics, Policy

SUPERVISED = (Source.HUMAN, Source.SCRIPTED)
"""Who is worth imitating: a person who took over, and whoever gave the demonstrations."""


@dataclass(frozen=True, kw_only=True)
class HgDaggerConfig:
    learning_rate: float = 5e-4
    """Of AdamW, after the warm-up. Constant: nobody knows when an online run ends."""
    warmup_updates: int = 50
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 10.0
    """Longer gradients are scaled down to this length."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.warmup_updates < 0 or self.weight_decay < 0 or self.max_grad_norm <= 0:
            raise ValueError(
                f"warmup_updates {self.warmup_updates}, weight_decay {self.weight_decay}, "
                f"max_grad_norm {self.max_grad_norm}: the first two must not be negative, the last "
                "must be above 0"
            )


def imitated_steps(
    source: Integer[Tensor, "B H"],
    valid: Bool[Tensor, "B H"],
    sources: Sequence[Source] = SUPERVISED,
) -> Bool[Tensor, "B H"]:
    """Steps that carry loss: inside the episode, and commanded by one of `sources`."""
    wanted = torch.zeros_like(valid)
    for who in sources:
        wanted |= source == int(who)
    return valid & wanted


def hg_dagger_loss(
    chunk_loss: Float[Tensor, " B"],
    imitated: Bool[Tensor, "B H"],
    weight: Float[Tensor, " B"],
) -> tuple[Float[Tensor, ""], Metrics]:
    """Weighted mean loss of the chunks that have anything to imitate; 0 when none has.

    Args:
        chunk_loss: of each item, averaged over its imitated steps.
        weight: of each item, such as its class weight; 1 is plain HG-DAgger.
    """
    effective = weight * imitated.any(dim=1)
    loss = (effective * chunk_loss).sum() / effective.sum().clamp(min=1e-8)
    return loss, {
        "loss": float(loss.detach()),
        "imitated_share": float(imitated.float().mean()),
    }


class HgDagger:
    """Owns the optimiser; borrows the policy."""

    def __init__(
        self, policy: Policy, parameters: Sequence[nn.Parameter], config: HgDaggerConfig
    ) -> None:
        self.policy, self.config = policy, config
        self.parameters = list(parameters)
        self.updates = 0
        self.rate_scale = 1.0
        """Factor on the learning rate, for runs whose end is known."""
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def update(self, batch: Batch) -> Metrics:
        """One optimiser step.

        Raises:
            NonFiniteLoss: loss or gradient is NaN or infinite; nothing has been changed.
        """
        imitated = imitated_steps(batch.source, batch.valid)
        chunk_loss = self.policy.chunk_loss(batch.replace(valid=imitated))
        loss, metrics = hg_dagger_loss(chunk_loss, imitated, batch.weight)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise NonFiniteLoss(
                f"loss {loss.item()} and gradient norm {norm.item()} at update {self.updates}; the "
                "weights are untouched. Look for NaN or huge values in the saved batch"
            )
        self.updates += 1
        rate = min(1.0, self.updates / max(self.config.warmup_updates, 1))
        rate *= self.config.learning_rate * self.rate_scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return metrics | {
            "grad_norm": float(norm),
            "learning_rate": rate,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.optimizer.load_state_dict(state["optimizer"])


class NonFiniteLoss(RuntimeError):
    """Raised before the optimiser steps, so the last weights are good."""
