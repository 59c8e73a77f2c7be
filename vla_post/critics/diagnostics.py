"""Does a critic say what the robot then gets? Figures for logs, reports and refusals.

B batch, K critics.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from trajectory_store import Source
from vla_post.batch import Batch, Metrics
from vla_post.critics.returns import RewardConfig, monte_carlo_return


def critic_metrics(
    q: Float[Tensor, "B K"],
    target: Float[Tensor, " B"],
    loss: Float[Tensor, " B"],
    batch: Batch,
    rewards: RewardConfig,
) -> Metrics:
    """Of one critic update: values, disagreement, loss by who drove, and Q against returns.

    `critic/over_returns` is mean Q less the mean return that the data went on to get. It is no
    error by itself where the current policy differs from who drove; far above 0 and growing, it is
    the sign of overestimation.
    """
    mean = q.mean(dim=1)
    metrics = {
        "critic/q_mean": float(mean.mean()),
        "critic/q_std": float(mean.std(correction=0)),
        "critic/disagreement": float(q.std(dim=1, correction=0).mean()),
        "critic/target_mean": float(target.mean()),
    }
    for source in (Source.POLICY, Source.HUMAN, Source.SCRIPTED):
        mine = batch.source[:, 0] == int(source)
        if bool(mine.any()):
            metrics[f"critic/loss_{source.name.lower()}"] = float(loss[mine].mean())
    if batch.left is not None and batch.outcome is not None:
        realised = monte_carlo_return(batch.left, batch.outcome, rewards)
        metrics["critic/return_mean"] = float(realised.mean())
        metrics["critic/over_returns"] = float((mean - realised).mean())
        metrics["critic/return_correlation"] = correlation(mean, realised)
    return metrics


def correlation(a: Float[Tensor, " B"], b: Float[Tensor, " B"]) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return float((a * b).sum() / scale) if float(scale) > 1e-9 else 0.0


def calibration(
    value: Float[Tensor, " B"], realised: Float[Tensor, " B"], bins: int = 8
) -> list[tuple[float, float, int]]:
    """(mean value, mean realised return, count) of equally filled bins of the value.

    A calibrated critic lies on the diagonal.
    """
    order = value.argsort()
    groups = [g for g in torch.tensor_split(order, min(bins, len(order))) if len(g)]
    return [(float(value[g].mean()), float(realised[g].mean()), len(g)) for g in groups]
