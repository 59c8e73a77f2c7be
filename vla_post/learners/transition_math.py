"""The mathematics of PTR: candidates, scores, weights, belief tokens, the controller.

arXiv:2603.16542, Eq. P2-P11 of our specification; pure functions of tensors, and their knobs. B
batch, D embedding size, N candidates beside the own one, M belief tokens, T positions in time.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

SAME = 1.0 - 1e-5
"""Cosine above which two targets are the same one: a future is no alternative to itself."""


@dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """The scorer, its pool, and how a score becomes a weight. Defaults are the paper's."""

    future_s: float = 0.0
    """From a chunk's start to the future that it must explain; 0: the chunk's own length."""
    target: Literal["change", "future"] = "change"
    """What is to be recognised: how the features change, or, as in the paper, the future's own
    features. These look so much like the present's that the chunk hardly matters."""
    held_out: bool = True
    """Two scorers, each taught by half of the episodes; a chunk is judged by the one that has never
    seen its episode. A scorer that has seen it knows its future by heart, whatever the chunk."""
    relative: bool = True
    """Measure scores from the running level whose weight is the mean of all weights: the average
    chunk counts 1, as does one of unknown future, and both ends of the clip are in use. Off: Eq. P9
    as printed, by which in time nearly all weights are `max_weight` and the last chunks of every
    episode, whose future is unknown, count a quarter of the others."""
    embedding: int = 64
    """D: features are projected to so many numbers, by a fixed random map that keeps angles, so
    that the pool costs the same whatever the encoder's width."""
    width: int = 64
    """Of the scorer's layers."""
    learning_rate: float = 1e-3
    """Of the scorer's own AdamW."""
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    """mu of the target encoder; 1 freezes it as it is at the start."""
    queue: int = 1024
    """Past targets that are kept, on the device."""
    queue_draws: int = 64
    """Of them in each item's pool."""
    temperature: float = 0.12
    """tau: the start of the scorer's temperature."""
    beta: float = 1.5
    """The start of the score's temperature."""
    adaptive: bool = True
    """Move both temperatures and the share of hard negatives by the controller."""
    control_every: int = 50
    """Lessons between steps of the controller."""
    lesson_every: int = 16
    """After the warm-up the scorer learns from every so many batches; it judges all of them."""
    min_weight: float = 0.25
    max_weight: float = 4.0
    clip: bool = True
    """Off: weights are exp(T / beta) whatever comes of it; for studies."""
    alpha: float = 1.0
    """Share of the weight in the loss; 0 is plain cloning."""
    warmup_updates: int = 300
    """First updates, in which the scorer learns and every weight is 1."""
    id_weight: float = 0.05
    """lambda_id."""
    rank_weight: float = 0.25
    """lambda_rank."""
    belief_tokens: int = 0
    """M: learned slots that summarise the chunk over time; 0 reads it as one vector."""
    token_entropy_weight: float = 1e-3
    token_diversity_weight: float = 1e-3
    token_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ema_decay <= 1.0 or not 0.0 <= self.alpha <= 1.0:
            raise ValueError(
                f"ema_decay {self.ema_decay}, alpha {self.alpha}: expected shares in [0, 1]"
            )
        if not 0.0 < self.min_weight <= 1.0 <= self.max_weight:
            raise ValueError(
                f"min_weight {self.min_weight}, max_weight {self.max_weight}: expected a range "
                "around 1 above 0, so that a chunk of unknown worth can count 1"
            )
        if self.embedding < 2:
            raise ValueError(f"embedding is {self.embedding}; it must be at least 2")
        if min(self.queue_draws, self.belief_tokens, self.warmup_updates) < 0 or self.queue < 1:
            raise ValueError("queue must be at least 1; draws, tokens and warm-up not negative")
        if self.lesson_every < 1 or self.control_every < 1:
            raise ValueError("lesson_every and control_every must be at least 1")
        if self.future_s < 0 or not (self.temperature > 0 and self.beta > 0):
            raise ValueError("future_s must not be negative; temperature and beta must be above 0")

    def future_steps(self, control_hz: float, horizon: int) -> int:
        """Control steps to the future."""
        return max(1, round(self.future_s * control_hz)) if self.future_s else horizon


def candidate_logits(
    guess: Float[Tensor, "B D"],
    own: Float[Tensor, "B D"],
    others: Float[Tensor, "N D"],
    present: Bool[Tensor, "B N"],
    temperature: Float[Tensor, ""] | float,
) -> Float[Tensor, "B C"]:
    """Eq. P4: index 0 is the own target; -inf marks candidates that are not in an item's pool.

    Left out: candidates that are not `present`, and those equal to the own target, which are no
    alternative to it (another copy of the item, or a scene in which nothing moves).

    Args:
        guess, own, others: unit vectors, or zero vectors.
    """
    mine, said = (guess * own).sum(dim=1, keepdim=True), guess @ others.T
    logits = (torch.cat([mine, said], dim=1) / temperature).clamp(-20.0, 20.0)
    logits[:, 1:].masked_fill_(~present | (own @ others.T >= SAME), -torch.inf)
    return logits


def transition_score(
    logits: Float[Tensor, "B C"],
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """(T, log p_0) of Eq. P5-P8: how much better than chance the own future is recognised.

    Alone in its pool, a target is recognised for sure and by chance alike: T = 0.
    """
    log_p = logits.log_softmax(dim=1)[:, 0]
    return log_p + pool_size(logits).to(log_p).log(), log_p


def pool_size(logits: Float[Tensor, "B C"]) -> Integer[Tensor, " B"]:
    """Candidates of each item, the own one included."""
    return (logits > -torch.inf).sum(dim=1)


def transition_weight(
    score: Float[Tensor, " B"],
    has_future: Bool[Tensor, " B"],
    *,
    beta: float,
    config: TransitionConfig,
    centre: float = 0.0,
) -> Float[Tensor, " B"]:
    """Eq. P9, detached; 1 where the future is not known.

    Args:
        centre: the score that counts 1; the paper's is 0.
    """
    raw = ((score.detach() - centre) / beta).clamp(max=30.0).exp()
    if config.clip:
        raw = raw.clamp(config.min_weight, config.max_weight)
    mixed = 1.0 + config.alpha * (raw - 1.0)
    return torch.where(has_future, mixed, 1.0)


def score_level(score: Float[Tensor, " B"], sure: Bool[Tensor, " B"], *, beta: float) -> float:
    """beta log mean exp(T / beta) over the chunks that are judged; 0 where there are none."""
    mean = float((score / beta).exp()[sure].mean())
    return beta * math.log(mean) if mean > 0 else 0.0


def rank_loss(matched: Float[Tensor, " B"], permuted: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Eq. P7: the own chunk should explain the future better than another item's chunk."""
    return nn.functional.softplus(permuted - matched)


def belief_assignment(
    score: Float[Tensor, "B T M"], temperature: float
) -> tuple[Float[Tensor, "B T M"], Float[Tensor, ""], Float[Tensor, ""]]:
    """(assignment, mean entropy of a slot over time, |Pi^T Pi - I|^2) of Eq. P2; each slot's
    assignment sums to 1 over time."""
    assignment = (score / temperature).softmax(dim=1)
    entropy = -(assignment * assignment.clamp(min=1e-12).log()).sum(dim=1).mean()
    gram = assignment.transpose(1, 2) @ assignment
    identity = torch.eye(gram.shape[-1], device=gram.device)
    return assignment, entropy, (gram - identity).square().sum(dim=(1, 2)).mean()


def controlled(
    temperature: float, beta: float, *, score: float, margin: float
) -> tuple[float, float, float]:
    """One step of the controller: (temperature, beta, share of hard negatives)."""
    if score < 0.05:
        temperature, beta = temperature * 1.01, beta * 1.01
    elif score > 0.35 and margin > 0.10:
        temperature, beta = temperature * 0.995, beta * 0.995
    hard = 0.5 * min(max((score - 0.10) / 0.40, 0.0), 1.0)
    return min(max(temperature, 0.03), 0.20), min(max(beta, 0.5), 3.0), hard


def unit(vector: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Scaled to length 1; what is shorter than 1e-6 stays as short as it is."""
    return vector / vector.norm(dim=-1, keepdim=True).clamp(min=1e-6)


@torch.no_grad()
def gathered(target: Float[Tensor, "B D"], known: Bool[Tensor, " B"]) -> tuple[Tensor, Tensor]:
    """Targets of the other ranks, (R, D) and (R,); empty without torch.distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return target[:0], known[:0]
    world, rank = distributed.get_world_size(), distributed.get_rank()
    targets = [torch.empty_like(target) for _ in range(world)]
    flags = [torch.empty_like(known) for _ in range(world)]
    distributed.all_gather(targets, target.contiguous())
    distributed.all_gather(flags, known.contiguous())
    others = [k for k in range(world) if k != rank]
    return (
        torch.cat([target[:0], *(targets[k] for k in others)]),
        torch.cat([known[:0], *(flags[k] for k in others)]),
    )
