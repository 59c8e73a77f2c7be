"""Advantage-weighted flow matching, shared by ALOE and AWR: advantages to weights to a loss.

B batch, H chunk length.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from trajectory_store import Source
from vla_post import parallel
from vla_post.batch import Metrics


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """How an advantage becomes a weight."""

    beta: float = 1.0
    """Temperature: divides the advantage; a smaller one copies the best chunks more greedily."""
    scale: Literal["std", "none"] = "std"
    """`std` measures advantages in units of their running standard deviation, so that one beta
    serves every task, reward and chunk length; `none` takes them as they are (Eq. A7)."""
    form: Literal["clip_advantage", "clip_weight"] = "clip_advantage"
    """exp(clip(A / beta, -c, c)) of Eq. A7, or clip(exp(A / beta), 0, max_weight). Equal inside."""
    clip: float = 3.0
    """c."""
    max_weight: float = 20.0

    def __post_init__(self) -> None:
        for name in ("beta", "clip", "max_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


def advantage_weight(
    advantage: Float[Tensor, " B"], config: WeightConfig, *, scale: float = 1.0
) -> Float[Tensor, " B"]:
    """Weight of each chunk, detached: no gradient of a critic reaches the policy (Eq. A7).

    Args:
        scale: what the advantage is measured in.
    """
    exponent = advantage.detach() / (config.beta * scale)
    if config.form == "clip_advantage":
        return exponent.clamp(-config.clip, config.clip).exp()
    return exponent.exp().clamp(max=config.max_weight)


def clipped_share(
    advantage: Float[Tensor, " B"], config: WeightConfig, *, scale: float = 1.0
) -> float:
    """Share of the weights that the clip has changed."""
    exponent = advantage / (config.beta * scale)
    if config.form == "clip_advantage":
        changed = exponent.abs() > config.clip
    else:
        changed = exponent.exp() > config.max_weight
    return float(changed.float().mean())


def weighted_flow_loss(
    chunk_loss: Float[Tensor, " B"], weight: Float[Tensor, " B"], real: Bool[Tensor, " B"]
) -> Float[Tensor, ""]:
    """Mean of weight times loss over the items with any step to imitate (Eq. A8).

    Divided by their number and not by the sum of the weights, so that weights of 1 are plain
    cloning; the mean weight then scales the step, which AdamW undoes, and is logged.
    """
    count = parallel.mean(real.float().sum())
    return (torch.where(real, weight * chunk_loss, 0.0)).sum() / count.clamp(min=1e-8)


def commanded_steps(
    source: Integer[Tensor, "B H"], valid: Bool[Tensor, "B H"]
) -> Bool[Tensor, "B H"]:
    """Steps inside the episode that somebody commanded; a robot on hold teaches nothing."""
    return valid & (source != int(Source.HOLD))


def effective_sample_size(weight: Float[Tensor, " B"]) -> float:
    """(sum w)^2 / sum w^2 as a share of the batch: 1 for equal weights, 1/B if one owns it all."""
    square = weight.square().sum().clamp(min=1e-12)
    return float(weight.sum().square() / square / len(weight))


class RunningScale:
    """Running standard deviation of the advantages about their mean; what `scale` is."""

    def __init__(self, keep: float = 0.98) -> None:
        self.keep = keep
        self.square = 0.0
        self.seen = 0

    def update(self, advantage: Float[Tensor, " B"]) -> float:
        """Takes in a batch and returns the scale; the first batches count fully."""
        self.seen += 1
        advantage = parallel.gather(advantage)
        keep = min(self.keep, 1.0 - 1.0 / self.seen)
        self.square = keep * self.square + (1.0 - keep) * float(advantage.var(correction=0))
        return max(self.square**0.5, 1e-6)


def weight_metrics(
    advantage: Float[Tensor, " B"],
    weight: Float[Tensor, " B"],
    config: WeightConfig,
    scale: float,
) -> Metrics:
    """What the weights do to a batch: quantiles and a histogram of advantages, effective size."""
    exponent = (advantage / (config.beta * scale)).clamp(-config.clip, config.clip)
    counts = torch.histc(exponent.float().cpu(), bins=9, min=-config.clip, max=config.clip)
    low, middle, high = torch.quantile(advantage, torch.tensor([0.05, 0.5, 0.95]).to(advantage))
    histogram = {
        f"advantage/bin_{place}": float(count) / len(advantage)
        for place, count in enumerate(counts.tolist())
    }
    return {
        "advantage/mean": float(advantage.mean()),
        "advantage/std": float(advantage.std(correction=0)),
        "advantage/p05": float(low),
        "advantage/p50": float(middle),
        "advantage/p95": float(high),
        "advantage/scale": scale,
        "weight/mean": float(weight.mean()),
        "weight/max": float(weight.max()),
        "weight/effective_share": effective_sample_size(weight),
        "weight/clipped_share": clipped_share(advantage, config, scale=scale),
    } | histogram
