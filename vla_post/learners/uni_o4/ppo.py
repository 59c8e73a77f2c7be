"""The one objective of both phases: clipped policy improvement over a policy's inner steps.

K members, B samples, T inner steps (1 for a Gaussian; the denoising steps of a flow policy),
Equations U5-U8 and U11 of our specification; PPO is arXiv:1707.06347, GAE arXiv:1506.02438.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vla_post.batch import Metrics


@dataclass(frozen=True, kw_only=True)
class PpoTerms:
    """What one evaluation of the objective gives."""

    loss: Float[Tensor, " K"]
    clipped: Float[Tensor, " K"]
    """Share of the ratios that the clip has cut off from the gradient."""
    kl: Float[Tensor, " K"]
    """Of old to new, per inner step: the estimate rho - 1 - log rho, which is never negative."""


def ppo_terms(
    log_prob: Float[Tensor, "K B T"],
    old_log_prob: Float[Tensor, "K B T"],
    advantage: Float[Tensor, "K B"],
    *,
    clip: float,
    inner_discount: float = 1.0,
) -> PpoTerms:
    """L = - mean_b sum_t w_t min(rho A, clip(rho, 1 - c, 1 + c) A) (U8, U11).

    Every inner step gets the advantage of the whole action.

    Args:
        log_prob: of each inner step, summed over its dimensions.
        clip: c.
        inner_discount: gamma_den of DPPO (arXiv:2409.00588): w_t = gamma_den**(T - 1 - t), so that
            the last, cleanest step counts fully.
    """
    inner = log_prob.shape[-1]
    weight = inner_discount ** torch.arange(inner - 1, -1, -1, device=log_prob.device)
    log_ratio = log_prob - old_log_prob.detach()
    ratio, gain = log_ratio.exp(), advantage.detach()[..., None]
    bounded = ratio.clamp(1.0 - clip, 1.0 + clip)
    gained = torch.minimum(ratio * gain, bounded * gain)
    cut = (ratio - bounded).abs() > 0
    active = cut & (bounded * gain < ratio * gain)
    return PpoTerms(
        loss=-(gained * weight).sum(dim=-1).mean(dim=-1),
        clipped=active.float().mean(dim=(1, 2)).detach(),
        kl=(ratio - 1.0 - log_ratio).mean(dim=(1, 2)).detach(),
    )


def clip_at(step: int, base: float, *, total: int = 10_000, until: int = 200) -> float:
    """c of an offline step: falls linearly towards `total`, and stays where it is at `until`."""
    return base * (1.0 - min(step, until) / total)


def shaped_advantage(
    advantage: Float[Tensor, "K B"], omega: float | None, *, normalise: bool = True
) -> Float[Tensor, "K B"]:
    """U6: per member to mean 0 and deviation 1; then omega for gains and 1 - omega for losses.

    With omega = 0.5 both sides would only be halved, and the released code leaves them alone; so
    does None.
    """
    if normalise:
        mean = advantage.mean(dim=1, keepdim=True)
        advantage = (advantage - mean) / (advantage.std(dim=1, keepdim=True) + 1e-10)
    if omega is None or omega == 0.5:
        return advantage
    return torch.where(advantage > 0, omega, 1.0 - omega) * advantage


def gae(
    reward: Float[Tensor, "T E"],
    value: Float[Tensor, "T E"],
    next_value: Float[Tensor, "T E"],
    terminated: Bool[Tensor, "T E"],
    ended: Bool[Tensor, "T E"],
    *,
    discount: float,
    trace: float,
) -> Float[Tensor, "T E"]:
    """Generalised advantage of T steps in E environments.

    Args:
        next_value: of what each step led to, before any reset.
        terminated: a real end, which cuts the bootstrap.
        ended: an end of any kind, which cuts the trace: the next row is another episode.
        trace: lambda.
    """
    delta = reward + discount * torch.where(terminated, 0.0, next_value) - value
    advantage, later = torch.empty_like(delta), torch.zeros_like(delta[0])
    # A recursion over time, not over the batch.
    for row in range(len(delta) - 1, -1, -1):
        later = delta[row] + discount * trace * torch.where(ended[row], 0.0, later)
        advantage[row] = later
    return advantage


def ppo_metrics(terms: PpoTerms, prefix: str = "ppo") -> Metrics:
    """Of the whole ensemble; a KL that jumps or a clip fraction near 1 asks for smaller steps."""
    return {
        f"{prefix}/loss": float(terms.loss.mean().detach()),
        f"{prefix}/clip_fraction": float(terms.clipped.mean()),
        f"{prefix}/kl": float(terms.kl.mean()),
        f"{prefix}/kl_max": float(terms.kl.max()),
    }
