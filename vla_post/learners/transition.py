"""How well an action chunk explains the future that was seen: PTR's scorer and its candidate pool.

arXiv:2603.16542, Eq. P2-P11 of our specification. B batch, H chunk length, A action size, F feature
size, D embedding size, N candidates beside the own one, M belief tokens, T positions in time.

The scorer looks at the observation and the chunk and says what the future looks like; among the
futures of other chunks it should pick its own. Where it cannot, the chunk does not explain what
happened, and counts less. Nothing here touches the policy: the result is a weight for `chunk_loss`,
so any chunk head will do.

Differs from the paper: observation and future both go through the averaged copy of the policy's
encoder, in one pass without gradients, and the scorer has an encoder of the chunk and an optimiser
of its own, so its losses never reach the policy. Chunks are drawn at random, so belief tokens
summarise their own chunk and are not carried to the next. The queue's share of the pool is drawn
once per batch.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from trajectory_store import Contract
from vla_post import parallel
from vla_post.batch import Batch, Metrics, NonFiniteLoss, Observation, Policy
from vla_post.learners.weighting import effective_sample_size

SAME = 1.0 - 1e-5
"""Cosine above which two targets are the same one: a future is no alternative to itself."""


@dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """The scorer, its pool, and how a score becomes a weight. Defaults are the paper's."""

    future_s: float = 0.0
    """From a chunk's start to the future that it must explain; 0: the chunk's own length."""
    target: Literal["future", "change"] = "future"
    """What is to be recognised: the future's features, or how they differ from the present's."""
    embedding: int = 64
    """D: features are projected to so many numbers, by a fixed random map that keeps angles, so
    that the pool costs the same whatever the encoder's width."""
    width: int = 128
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
    """Updates between steps of the controller."""
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
        if self.future_s < 0 or not (self.temperature > 0 and self.beta > 0):
            raise ValueError("future_s must not be negative; temperature and beta must be above 0")

    def future_steps(self, control_hz: float, horizon: int) -> int:
        """Control steps to the future."""
        return max(1, round(self.future_s * control_hz)) if self.future_s else horizon


# The mathematics -------------------------------------------------------------------------------


def candidate_logits(
    guess: Float[Tensor, "B D"],
    own: Float[Tensor, "B D"],
    others: Float[Tensor, "B N D"] | Float[Tensor, "N D"],
    present: Bool[Tensor, "B N"],
    temperature: Float[Tensor, ""] | float,
) -> Float[Tensor, "B C"]:
    """Eq. P4: index 0 is the own target; -inf marks candidates that are not in an item's pool.

    Left out: candidates that are not `present`, and those equal to the own target, which are no
    alternative to it (another copy of the item, or a scene in which nothing moves).

    Args:
        guess, own, others: unit vectors, or zero vectors.
    """
    one_pool = others.ndim == 2
    said = guess @ others.T if one_pool else torch.einsum("bd,bnd->bn", guess, others)
    alike = own @ others.T if one_pool else torch.einsum("bd,bnd->bn", own, others)
    mine = (guess * own).sum(dim=1, keepdim=True)
    logits = (torch.cat([mine, said], dim=1) / temperature).clamp(-20.0, 20.0)
    keep = torch.cat([torch.ones_like(present[:, :1]), present & (alike < SAME)], dim=1)
    return logits.masked_fill(~keep, -torch.inf)


def transition_score(
    logits: Float[Tensor, "B C"],
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """(T, log p_0) of Eq. P5-P8: how much better than chance the own future is recognised.

    Alone in its pool, a target is recognised for sure and by chance alike: T = 0.
    """
    log_p = logits.log_softmax(dim=1)[:, 0]
    size = logits.isfinite().sum(dim=1)
    return log_p + size.to(log_p).log(), log_p


def transition_weight(
    score: Float[Tensor, " B"],
    has_future: Bool[Tensor, " B"],
    *,
    beta: float,
    config: TransitionConfig,
) -> Float[Tensor, " B"]:
    """Eq. P9, detached; 1 where the future is not known."""
    raw = (score.detach() / beta).clamp(max=30.0).exp()
    if config.clip:
        raw = raw.clamp(config.min_weight, config.max_weight)
    mixed = 1.0 + config.alpha * (raw - 1.0)
    return torch.where(has_future, mixed, 1.0)


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


# The networks ----------------------------------------------------------------------------------


@runtime_checkable
class HasEncoder(Protocol):
    """A policy that lends its encoder; `vla_post.policies.encoder`."""

    def observation_encoder(self) -> Any: ...


class ScorerNet(nn.Module):
    """What the future looks like, from the present's features and the chunk."""

    def __init__(self, features: int, horizon: int, action: int, config: TransitionConfig) -> None:
        super().__init__()
        self.config = config
        width, tokens = config.width, config.belief_tokens
        self.normal = nn.LayerNorm(features)
        if tokens:
            self.step = nn.Sequential(nn.Linear(action, width), nn.GELU())
            self.order = nn.Parameter(0.02 * torch.randn(horizon, width))
            self.fuse = nn.Linear(features + width, width)
            self.slots = nn.Linear(width, tokens, bias=False)
        else:
            self.whole = nn.Sequential(nn.Linear(horizon * action, width), nn.GELU())
        summary = width * max(tokens, 1)
        self.head = nn.Sequential(
            nn.Linear(features + summary, width), nn.GELU(), nn.Linear(width, features)
        )

    def summarise(
        self, features: Float[Tensor, "B F"], action: Float[Tensor, "B H A"]
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, ""]]:
        """(summary e of the chunk, regulariser of the belief tokens)."""
        config = self.config
        if not config.belief_tokens:
            return self.whole(action.flatten(1)), action.new_zeros(())
        steps = self.step(action) + self.order
        context = self.normal(features)[:, None].expand(-1, steps.shape[1], -1)
        fused = torch.tanh(self.fuse(torch.cat([context, steps], dim=2)))
        assignment, entropy, crowding = belief_assignment(
            self.slots(fused), config.token_temperature
        )
        tokens = assignment.transpose(1, 2) @ fused
        loss = config.token_entropy_weight * entropy + config.token_diversity_weight * crowding
        return tokens.flatten(1), loss

    def guess(
        self, features: Float[Tensor, "B F"], summary: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B F"]:
        return unit(self.head(torch.cat([self.normal(features), summary], dim=1)))


@dataclass(frozen=True)
class Scores:
    """How a batch fared."""

    score: Float[Tensor, " B"]
    """T, in nats above chance; 0 where the future is not known."""
    weight: Float[Tensor, " B"]
    has_future: Bool[Tensor, " B"]
    recognised: Bool[Tensor, " B"]
    """No other candidate looks more likely."""
    pool: Integer[Tensor, " B"]
    """Candidates, the own one included."""


class TransitionScorer(nn.Module):
    """Owns scorer, target encoder, queue and temperatures; `weigh` gives weights and learns.

    Everything that lasts is in its state_dict, except its optimiser's state.

    Args:
        contract: of the cell: shapes of the observations, limits of the actions.
    """

    def __init__(self, policy: Policy, contract: Contract, config: TransitionConfig) -> None:
        super().__init__()
        self.config = config
        encoder: Any = policy.observation_encoder() if isinstance(policy, HasEncoder) else None
        # In a list, so that the policy's weights do not become this module's.
        self._source: list[Any] = [encoder or PlainFeatures(policy)]
        self.target: nn.Module = self._source[0].clone()
        blank, instruction = _blank(policy, contract)
        with torch.no_grad():
            features = self.target(blank, instruction)
        device = features.device
        size = min(config.embedding, features.shape[1])
        self.net = ScorerNet(size, policy.horizon, policy.action_size, config).to(device)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        low, high = torch.tensor(contract.action.limits.position, dtype=torch.float32).T
        buffers = {
            "projection": torch.linalg.qr(torch.randn(features.shape[1], size))[0],
            "action_middle": (high + low) / 2,
            "action_range": ((high - low) / 2).clamp(min=1e-6),
            "queue": torch.zeros(config.queue, size),
            "queue_present": torch.zeros(config.queue, size),
            "queue_task": torch.full((config.queue,), -1),
            "queue_next": torch.zeros((), dtype=torch.int64),
            "updates": torch.zeros((), dtype=torch.int64),
            # temperature, beta, share of hard negatives
            "control": torch.tensor([config.temperature, config.beta, 0.0], dtype=torch.float64),
            # Moving averages of 1, score, margin and accuracy.
            "averages": torch.zeros(4, dtype=torch.float64),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(device))

    def train(self, mode: bool = True) -> "TransitionScorer":
        super().train(mode)
        self.target.eval()
        return self

    def weigh(self, batch: Batch) -> tuple[Float[Tensor, " B"], Metrics]:
        """Weight of each item, and one update of the scorer.

        Raises:
            NonFiniteLoss: nothing has been changed.
        """
        config = self.config
        warm = int(self.get_buffer("updates")) < config.warmup_updates
        present, target = self._targets(batch)
        scores, loss, told = self._score(batch, present, target)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteLoss(
                f"the transition scorer's loss is {loss.item()} at update "
                f"{int(self.get_buffer('updates'))}; its weights are untouched. Look for NaN or "
                "huge values in the saved batch"
            )
        self.optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(list(self.net.parameters()))
        self.optimizer.step()
        self._follow()
        self._push(target, present, batch.task, scores.has_future)
        weight = torch.ones_like(scores.weight) if warm else scores.weight
        known = scores.has_future
        self._control(told | {"known": float(known.float().mean())})
        self.get_buffer("updates").add_(1)
        temperature, beta, hard = self.get_buffer("control").tolist()
        return weight, {
            **{f"transition/{name}": value for name, value in told.items()},
            "transition/loss": float(loss.detach()),
            "transition/known_share": float(known.float().mean()),
            "transition/weight_min": float(weight.min()),
            "transition/weight_max": float(weight.max()),
            "transition/effective_share": effective_sample_size(weight),
            "transition/temperature": temperature,
            "transition/beta": beta,
            "transition/hard_share": hard,
        }

    @torch.no_grad()
    def scores(self, batch: Batch) -> Scores:
        """How a batch fares, without learning and without touching the queue."""
        return self._score(batch, *self._targets(batch))[0]

    def _score(
        self, batch: Batch, present: Float[Tensor, "B F"], target: Float[Tensor, "B F"]
    ) -> tuple[Scores, Float[Tensor, ""], Metrics]:
        config = self.config
        assert batch.has_future is not None
        known = batch.has_future
        temperature, beta, _ = self.get_buffer("control").tolist()
        middle, scale = self.get_buffer("action_middle"), self.get_buffer("action_range")
        chunk = torch.where(batch.valid[..., None], (batch.action - middle) / scale, 0.0)
        summary, tokens_loss = self.net.summarise(present, chunk)
        guess = self.net.guess(present, summary)
        logits = self._logits(batch, guess, present, target, known, temperature)
        score, log_p = transition_score(logits)
        score = torch.where(known, score, 0.0)
        # Another item's chunk in place of the own one.
        shuffled = summary[torch.randperm(len(summary), device=summary.device)]
        permuted = (self.net.guess(present, shuffled) * target).sum(dim=1) / temperature
        permuted = permuted.clamp(-20.0, 20.0)
        count = known.sum().clamp(min=1)
        by_item = config.id_weight * -log_p + config.rank_weight * rank_loss(logits[:, 0], permuted)
        loss = torch.where(known, by_item, 0.0).sum() / count + tokens_loss
        with torch.no_grad():
            weight = transition_weight(score, known, beta=beta, config=config)
            pool = logits.isfinite().sum(dim=1)
            recognised = logits.argmax(dim=1) == 0
            scores = Scores(score.detach(), weight, known, recognised, pool)
            told = {
                "score": float(score.sum() / count),
                "margin": float((logits[:, 0] - permuted)[known].sum() / count),
                "accuracy": float((recognised & known).sum() / count),
                "pool": float(pool.float().mean()),
            }
        return scores, loss, told

    @torch.no_grad()
    def _targets(self, batch: Batch) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B F"]]:
        """(projected features of the present, unit target): one pass of the averaged encoder."""
        if batch.has_future is None:
            raise ValueError(
                "the batch has no future observations; ask for them with DataNeeds.future_steps"
            )
        now, later = batch.observation, batch.future_observation
        both = {key: torch.cat([now[key], later[key]]) for key in now if key in later}
        features = self.target(both, [*batch.instruction, *batch.instruction])
        present, future = (features.float() @ self.get_buffer("projection")).chunk(2)
        change = self.config.target == "change"
        return present, unit(future - present if change else future)

    def _logits(
        self,
        batch: Batch,
        guess: Float[Tensor, "B F"],
        present: Float[Tensor, "B F"],
        target: Float[Tensor, "B F"],
        known: Bool[Tensor, " B"],
        temperature: float,
    ) -> Float[Tensor, "B C"]:
        """The own target, then the rest of the batch, other ranks, the queue and hard negatives."""
        queue, task = self.get_buffer("queue"), self.get_buffer("queue_task")
        filled = task >= 0
        draws = self.config.queue_draws
        hard = round(float(self.get_buffer("control")[2]) * draws)
        drawn = torch.randperm(len(queue), device=queue.device)[: draws - hard]
        elsewhere, there = gathered(target, known)
        others = torch.cat([target, elsewhere, queue[drawn]])
        is_present = torch.cat([known, there, filled[drawn]])[None].repeat(len(target), 1)
        is_present[:, : len(target)].fill_diagonal_(False)
        logits = candidate_logits(guess, target, others, is_present, temperature)
        if hard == 0:
            return logits
        # The rule: of the queue, those of the same task whose present looked most like ours.
        alike = unit(present) @ self.get_buffer("queue_present").T
        alike = alike.masked_fill(task[None] != batch.task[:, None], -torch.inf)
        close, place = alike.topk(hard, dim=1)
        more = candidate_logits(guess, target, queue[place], close.isfinite(), temperature)
        return torch.cat([logits, more[:, 1:]], dim=1)

    @torch.no_grad()
    def _push(self, target: Tensor, present: Tensor, task: Tensor, known: Tensor) -> None:
        """First in, first out; only futures that were seen."""
        size = self.config.queue
        new, seen, label = target[known][-size:], unit(present[known])[-size:], task[known][-size:]
        start = self.get_buffer("queue_next")
        place = (start + torch.arange(len(new), device=start.device)) % size
        self.get_buffer("queue")[place] = new
        self.get_buffer("queue_present")[place] = seen
        self.get_buffer("queue_task")[place] = label
        start.copy_((start + len(new)) % size)

    @torch.no_grad()
    def _follow(self) -> None:
        """Eq. P3: the target encoder moves towards the policy's."""
        mine, its = self.target.state_dict(), self._source[0].state_dict()
        moving = [name for name, t in mine.items() if t.is_floating_point()]
        if moving and self.config.ema_decay < 1.0:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateUsage] (one kernel for all)
                [mine[name] for name in moving],
                [its[name].detach() for name in moving],
                1.0 - self.config.ema_decay,
            )

    def _control(self, told: Metrics) -> None:
        averages = self.get_buffer("averages")
        if told["known"] > 0:
            new = torch.tensor([1.0, told["score"], told["margin"], told["accuracy"]])
            averages.mul_(0.98).add_(0.02 * new.to(averages))
        due = (int(self.get_buffer("updates")) + 1) % self.config.control_every == 0
        weight, score, margin, _ = averages.tolist()
        if self.config.adaptive and due and weight > 0:
            control = self.get_buffer("control")
            temperature, beta, _ = control.tolist()
            moved = controlled(temperature, beta, score=score / weight, margin=margin / weight)
            control.copy_(torch.tensor(moved, dtype=control.dtype))


class PlainFeatures(nn.Module):
    """For a policy that lends no encoder: its features as they are now, nothing to average."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._features = policy.features

    def forward(self, observation: Observation, instruction: list[str]) -> Tensor:
        return self._features(observation, instruction)

    def clone(self) -> "PlainFeatures":
        return self


def _blank(policy: Policy, contract: Contract) -> tuple[Observation, list[str]]:
    """An observation of zeros, to learn the size of the features."""
    device = getattr(policy, "device", torch.device("cpu"))
    keys = getattr(policy, "observation_keys", contract.observations)
    blank: Observation = {}
    for key in keys:
        shape = contract.observations[key].shape
        if contract.observations[key].is_image:
            shape = (shape[2], shape[0], shape[1])
        blank[key] = torch.zeros(1, *shape, device=device)
    return blank, [next(iter(contract.tasks.values())).instruction]
