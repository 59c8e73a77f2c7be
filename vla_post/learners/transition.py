"""How well an action chunk explains the future that was seen: PTR's scorer and its candidate pool.

arXiv:2603.16542, Eq. P2-P11 of our specification; the formulas are in `transition_math`. B batch, H
chunk length, A action size, F feature size, K = 2 scorers, E summary of a chunk.

The scorer looks at the observation and the chunk and says what the future looks like; among the
futures of other chunks it should pick its own. Where it cannot, the chunk does not explain what
happened, and counts less. Nothing here touches the policy: the result is a weight for `chunk_loss`,
so any chunk head will do.

Differs from the paper, beside the options of `TransitionConfig`: observation and future both go
through the averaged copy of the policy's encoder, in one pass without gradients, and the scorer has
an encoder of the chunk and an optimiser of its own, so its losses never reach the policy. A scorer
never judges an episode that taught it: demonstrations are few and seen many times, and a network
that has met a state knows its future by heart, whatever the chunk says. Chunks are drawn at random,
so belief tokens summarise their own chunk and are not carried to the next. The queue's share of the
pool is drawn once per batch, and hard negatives are for learning only.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trajectory_store import Contract
from vla_post import parallel
from vla_post.batch import Batch, Metrics, NonFiniteLoss, Observation, Policy
from vla_post.critics.networks import EnsembleLinear
from vla_post.learners.transition_math import (
    TransitionConfig,
    belief_assignment,
    candidate_logits,
    controlled,
    gathered,
    pool_size,
    rank_loss,
    score_level,
    transition_score,
    transition_weight,
    unit,
)
from vla_post.learners.weighting import effective_sample_size
from vla_post.sharding import complete

SCORERS = 2
"""K: one for each half of the episodes."""
JUDGED_AMONG = 128
"""Candidates that a chunk is judged among, or as many as its batch has."""
HARD_AMONG = 8
"""Past targets that are looked at for each hard negative."""


@runtime_checkable
class HasEncoder(Protocol):
    """A policy that lends its encoder; `vla_post.policies.encoder`."""

    def observation_encoder(self) -> Any: ...


class ScorerNet(nn.Module):
    """What the future looks like, from the present's features and the chunk; K of them at once."""

    def __init__(self, features: int, horizon: int, action: int, config: TransitionConfig) -> None:
        super().__init__()
        self.config = config
        width, tokens = config.width, config.belief_tokens
        if tokens:
            self.step = EnsembleLinear(SCORERS, action, width)
            self.order = nn.Parameter(0.02 * torch.randn(SCORERS, 1, horizon, width))
            self.fuse = EnsembleLinear(SCORERS, features + width, width)
            self.slots = EnsembleLinear(SCORERS, width, tokens)
        else:
            self.whole = EnsembleLinear(SCORERS, horizon * action, width)
        summary = width * max(tokens, 1)
        self.hidden = EnsembleLinear(SCORERS, features + summary, width)
        self.out = EnsembleLinear(SCORERS, width, features)

    def summarise(
        self, features: Float[Tensor, "B F"], action: Float[Tensor, "B H A"]
    ) -> tuple[Float[Tensor, "K B E"], Float[Tensor, ""]]:
        """(summary e of the chunk, regulariser of the belief tokens)."""
        config, (size, steps) = self.config, action.shape[:2]
        if not config.belief_tokens:
            flat = action.flatten(1).expand(SCORERS, -1, -1)
            return torch.relu(self.whole(flat)), action.new_zeros(())
        said = torch.relu(self.step(action.flatten(0, 1).expand(SCORERS, -1, -1)))
        said = said.unflatten(1, (size, steps)) + self.order
        context = self._normal(features)[None, :, None].expand(SCORERS, -1, steps, -1)
        fused = torch.tanh(self.fuse(torch.cat([context, said], dim=3).flatten(1, 2)))
        slots = self.slots(fused).unflatten(1, (size, steps)).flatten(0, 1)
        assignment, entropy, crowding = belief_assignment(slots, config.token_temperature)
        fused = fused.unflatten(1, (size, steps)).flatten(0, 1)
        tokens = (assignment.transpose(1, 2) @ fused).unflatten(0, (SCORERS, size))
        loss = config.token_entropy_weight * entropy + config.token_diversity_weight * crowding
        return tokens.flatten(2), loss

    def guess(
        self, features: Float[Tensor, "B F"], summary: Float[Tensor, "K B E"]
    ) -> Float[Tensor, "K B F"]:
        context = self._normal(features).expand(SCORERS, -1, -1)
        hidden = torch.relu(self.hidden(torch.cat([context, summary], dim=2)))
        return unit(self.out(hidden))

    @staticmethod
    def _normal(features: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        return nn.functional.layer_norm(features, features.shape[-1:])


@dataclass(frozen=True)
class Scores:
    """How a batch fared."""

    score: Float[Tensor, " B"]
    """T, in nats above chance; 0 where the future is not known."""
    weight: Float[Tensor, " B"]
    has_future: Bool[Tensor, " B"]
    pool: Integer[Tensor, " B"]
    """Candidates, the own one included."""
    level: float
    """The score whose weight is the mean of the batch's, before clipping."""
    logits: Float[Tensor, "B C"]

    @property
    def recognised(self) -> Bool[Tensor, " B"]:
        """No other candidate looks more likely."""
        return self.logits.argmax(dim=1) == 0


class TransitionScorer(nn.Module):
    """Owns scorer, target encoder, queue and temperatures; `weigh` gives weights and learns.

    Everything that lasts is in its state_dict, except its optimiser's state.

    Args:
        contract: of the cell: shapes of the observations, and limits of the actions for a policy
            without statistics.
    """

    def __init__(self, policy: Policy, contract: Contract, config: TransitionConfig) -> None:
        super().__init__()
        self.config = config
        encoder: Any = policy.observation_encoder() if isinstance(policy, HasEncoder) else None
        # In a list, so that the policy's weights do not become this module's.
        self._source: list[Any] = [encoder or PlainFeatures(policy)]
        self.target: nn.Module = self._source[0].clone()
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
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
        middle, scale = _action_scale(policy, contract)
        buffers = {
            "projection": torch.linalg.qr(torch.randn(features.shape[1], size))[0],
            "action_middle": middle,
            "action_range": scale.clamp(min=1e-6),
            "queue": torch.zeros(config.queue, size),
            "queue_present": torch.zeros(config.queue, size),
            "queue_task": torch.full((config.queue,), -1),
            "queue_next": torch.zeros((), dtype=torch.int64),
            "updates": torch.zeros((), dtype=torch.int64),
            "lessons": torch.zeros((), dtype=torch.int64),
            # Chunks that taught each scorer.
            "taught": torch.zeros(SCORERS, dtype=torch.int64),
            # temperature, beta, share of hard negatives
            "control": torch.tensor([config.temperature, config.beta, 0.0], dtype=torch.float64),
            # Moving averages of 1, score, margin, accuracy and level.
            "averages": torch.zeros(5, dtype=torch.float64),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(device))

    def train(self, mode: bool = True) -> "TransitionScorer":
        super().train(mode)
        self.target.eval()
        return self

    def weigh(self, batch: Batch) -> tuple[Float[Tensor, " B"], Metrics]:
        """Weight of each item; with it, at times, one lesson for the scorer.

        Raises:
            NonFiniteLoss: nothing has been changed.
        """
        config, updates = self.config, int(self.get_buffer("updates"))
        warm = updates < config.warmup_updates
        present, target = self._targets(batch)
        # Judged first: what a batch teaches must not raise its own score.
        scores = self._judge(batch, present, target)
        self._require_finite(scores.score)
        known = scores.has_future
        known_share = float(known.float().mean())
        told = {"score": float(scores.score.sum() / known.sum().clamp(min=1))}
        if warm or updates % config.lesson_every == 0:
            told |= self._lesson(batch, present, target)
            told["accuracy"] = float((scores.recognised & known).sum() / known.sum().clamp(min=1))
            told["pool"] = float(scores.pool.float().mean())
            self._push(target, present, batch.task, known)
            self._control(told, scores.level, known_share)
        self._follow()
        self.get_buffer("updates").add_(1)
        # A tensor that a loss may keep: the judge's are for inference.
        weight = torch.ones(len(batch)).to(target) if warm else scores.weight.clone()
        temperature, beta, hard = self.get_buffer("control").tolist()
        low, high = weight.aminmax()
        return weight, {
            **{f"transition/{name}": value for name, value in told.items()},
            "transition/known_share": known_share,
            "transition/weight_min": float(low),
            "transition/weight_max": float(high),
            "transition/effective_share": effective_sample_size(weight),
            "transition/temperature": temperature,
            "transition/beta": beta,
            "transition/hard_share": hard,
        }

    @torch.no_grad()
    def scores(self, batch: Batch) -> Scores:
        """How a batch fares, without learning and without touching the queue."""
        return self._judge(batch, *self._targets(batch))

    @torch.inference_mode()
    def _judge(
        self, batch: Batch, present: Float[Tensor, "B F"], target: Float[Tensor, "B F"]
    ) -> Scores:
        """Each item by the scorer that its episode has not taught."""
        known = self._known(batch)
        temperature, beta, _ = self.get_buffer("control").tolist()
        summary, _ = self.net.summarise(present, self._chunk(batch))
        judge = self._judges(batch)
        guess = self._of(self.net.guess(present, summary), judge)
        # The queue fills up small batches; a large one is a pool by itself.
        draws = min(max(JUDGED_AMONG - len(batch), 0), self.config.queue_draws)
        others, there = self._pool(target, known, draws)
        logits = candidate_logits(guess, target, others, there, temperature)
        score, _ = transition_score(logits)
        pool = pool_size(logits)
        # Nothing is known of a chunk without a rival, or by a scorer that nothing has taught.
        sure = known & (pool > 1) & (self.get_buffer("taught")[judge] > 0)
        score = torch.where(sure, score, 0.0)
        level = score_level(score, sure, beta=beta)
        centre = 0.0
        if self.config.relative:
            seen, *_, total = self.get_buffer("averages").tolist()
            centre = total / seen if seen else level
        weight = transition_weight(score, sure, beta=beta, config=self.config, centre=centre)
        return Scores(score, weight, known, pool, level, logits)

    def _lesson(
        self, batch: Batch, present: Float[Tensor, "B F"], target: Float[Tensor, "B F"]
    ) -> Metrics:
        """One step of Eq. P6 and P7, each scorer on its half of the episodes."""
        config, known = self.config, self._known(batch)
        temperature, _, share = self.get_buffer("control").tolist()
        mine = 1 - self._judges(batch)
        summary, tokens_loss = self.net.summarise(present, self._chunk(batch))
        guess = self._of(self.net.guess(present, summary), mine)
        hard = round(share * config.queue_draws)
        others, there = self._pool(target, known, config.queue_draws - hard)
        if hard:
            more, close = self._hard(batch, present, hard)
            others, there = torch.cat([others, more]), torch.cat([there, close], dim=1)
        logits = candidate_logits(guess, target, others, there, temperature)
        _, log_p = transition_score(logits)
        # Another item's chunk in place of the own one.
        shuffled = summary[:, torch.randperm(len(target), device=target.device)]
        permuted = self._of(self.net.guess(present, shuffled), mine)
        permuted = ((permuted * target).sum(dim=1) / temperature).clamp(-20.0, 20.0)
        by_item = config.id_weight * -log_p + config.rank_weight * rank_loss(logits[:, 0], permuted)
        count = known.sum().clamp(min=1)
        loss = torch.where(known, by_item, 0.0).sum() / count + tokens_loss
        self._require_finite(loss)
        self.optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(list(self.net.parameters()))
        self.optimizer.step()
        self.get_buffer("taught").add_(torch.bincount(mine[known], minlength=SCORERS))
        self.get_buffer("lessons").add_(1)
        margin = (logits[:, 0] - permuted).detach()[known].sum() / count
        return {"loss": float(loss.detach()), "margin": float(margin)}

    def _require_finite(self, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteLoss(
                "the transition scorer's loss or score is not finite at update "
                f"{int(self.get_buffer('updates'))}; its weights are untouched. Look for NaN or "
                "huge values in the saved batch"
            )

    def _chunk(self, batch: Batch) -> Float[Tensor, "B H A"]:
        middle, scale = self.get_buffer("action_middle"), self.get_buffer("action_range")
        return torch.where(batch.valid[..., None], (batch.action - middle) / scale, 0.0)

    def _judges(self, batch: Batch) -> Integer[Tensor, " B"]:
        """Which scorer has not been taught by each item's episode; any, where nothing is held out
        or nobody knows the episodes."""
        if self.config.held_out and batch.episode is not None:
            return batch.episode % SCORERS
        return torch.randint(SCORERS, (len(batch),), device=batch.task.device)

    @staticmethod
    def _of(guess: Float[Tensor, "K B F"], scorer: Integer[Tensor, " B"]) -> Float[Tensor, "B F"]:
        return guess[scorer, torch.arange(len(scorer), device=scorer.device)]

    @staticmethod
    def _known(batch: Batch) -> Bool[Tensor, " B"]:
        if batch.has_future is None:
            raise ValueError(
                "the batch has no future observations; ask for them with DataNeeds.future_steps"
            )
        return batch.has_future

    @torch.no_grad()
    def _targets(self, batch: Batch) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B F"]]:
        """(projected features of the present, unit target): one pass of the averaged encoder."""
        self._known(batch)
        now, later = batch.observation, batch.future_observation
        both = {key: torch.cat([now[key], later[key]]) for key in now if key in later}
        features = self.target(both, [*batch.instruction, *batch.instruction])
        present, future = (features.float() @ self.get_buffer("projection")).chunk(2)
        change = self.config.target == "change"
        return present, unit(future - present if change else future)

    def _pool(
        self, target: Float[Tensor, "B F"], known: Bool[Tensor, " B"], draws: int
    ) -> tuple[Float[Tensor, "N F"], Bool[Tensor, "B N"]]:
        """Futures to tell the own one from, and which of them count for which item: the rest of the
        batch, other ranks, and so many of the queue."""
        elsewhere, there = gathered(target, known)
        pool, present = [target, elsewhere], [known, there]
        if draws:
            queue = self.get_buffer("queue")
            drawn = torch.randperm(len(queue), device=queue.device)[:draws]
            pool.append(queue[drawn])
            present.append(self.get_buffer("queue_task")[drawn] >= 0)
        there = torch.cat(present).repeat(len(target), 1)
        there.fill_diagonal_(False)
        return torch.cat(pool), there

    def _hard(
        self, batch: Batch, present: Float[Tensor, "B F"], count: int
    ) -> tuple[Float[Tensor, "N F"], Bool[Tensor, "B N"]]:
        """Some of the queue, and which of them count for which item. The rule: so many of the same
        task whose present looked most like the item's."""
        queue = self.get_buffer("queue")
        some = torch.randperm(len(queue), device=queue.device)[: HARD_AMONG * count]
        alike = unit(present) @ self.get_buffer("queue_present")[some].T
        other = self.get_buffer("queue_task")[some][None] != batch.task[:, None]
        close = alike.masked_fill_(other, -torch.inf).topk(min(count, len(some)), dim=1).indices
        return queue[some], torch.zeros_like(other).scatter_(1, close, True) & ~other

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
        if self.config.ema_decay == 1.0:
            return
        source = self._source[0].state_dict()
        if any(isinstance(its, DTensor) for its in source.values()):
            # One at a time: the policy is sharded so that its weights need not all be here at once.
            for name, mine in self.target.state_dict().items():
                if mine.is_floating_point():
                    mine.lerp_(complete(source[name]), 1.0 - self.config.ema_decay)
            return
        if self._pairs is None:
            mine, its = self.target.state_dict(), source
            moving = [name for name, t in mine.items() if t.is_floating_point()]
            self._pairs = [mine[name] for name in moving], [its[name] for name in moving]
        if self._pairs[0]:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateUsage] (one kernel for all)
                *self._pairs, 1.0 - self.config.ema_decay
            )

    def _control(self, told: Metrics, level: float, known_share: float) -> None:
        averages = self.get_buffer("averages")
        if known_share > 0:
            new = torch.tensor([1.0, told["score"], told["margin"], told["accuracy"], level])
            averages.mul_(0.98).add_(0.02 * new.to(averages))
        due = int(self.get_buffer("lessons")) % self.config.control_every == 0
        weight, score, margin, *_ = averages.tolist()
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


def _action_scale(policy: Policy, contract: Contract) -> tuple[Tensor, Tensor]:
    """Middle and scale of the actions (A,): what the policy normalises with, if it says so. Limits
    alone will not do: those of imported data are wide open."""
    known: Any = getattr(policy, "statistics", {}).get("action")
    if known is not None:
        middle, scale = (torch.as_tensor(known[name]).float() for name in ("mean", "std"))
        return middle, scale
    low, high = torch.tensor(contract.action.limits.position, dtype=torch.float32).T
    return (high + low) / 2, (high - low) / 2


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
