"""RECAP: every kind of data as supervised training, by telling the policy which actions were good.

pi*0.6, arXiv:2511.14759; Eq. R1-R10 of our specification. B batch, H chunk length.

A value of what the *data* went on to get (a distribution over 201 bins, fitted to Monte-Carlo
returns) judges every recorded action by how much better it led than expected. The policy is then
trained on all of it, with "Advantage: positive" or "Advantage: negative" beside the instruction,
and asked for positive chunks on the robot (`policies/indicator.py`). What a person did, as a
demonstration or when taking over, is positive whatever the value says. In 3 of 10 items the
indicator is left out, which trains the policy without it too; the two together give the guidance
of Eq. R10.

Choices that the paper leaves open, or that differ from it:

- Returns are divided by the task's longest episode *plus the cost of a failure*, not by the longest
  episode alone: nothing saturates, so rewards and values have one scale, and Eq. R5 is exactly 0
  for a perfect value also in failures.
- The indicator belongs to a step and a policy here emits chunks: a chunk has the indicator of its
  first step and learns only the steps that share it. A person's steps are positive; the robot's
  have the chunk's own advantage.
- Thresholds are set on the steps that are judged, not on the forced ones, from the last few
  thousand advantages of each task.
- The value learns beside the policy by default, since robots keep adding data; `value="frozen"`
  stops it after its own warm-up, as when one trains offline, or inside SOP.
- Our policies have no discrete action tokens, so there is no second likelihood and nothing to
  insulate the backbone from (Eq. R9); `vla-post policy import --freeze` holds it still.

Paper's loop offline: begin every iteration from the pre-trained policy (`--start`) with all data so
far, and the value from the last one (`value_from`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Integer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trajectory_store import Contract, Source
from vla_post import parallel
from vla_post.batch import Batch, DataNeeds, Metrics, Policy
from vla_post.critics.bins import Bins
from vla_post.critics.build import build_encoder, longest_steps
from vla_post.critics.diagnostics import correlation
from vla_post.critics.encoders import Encoder
from vla_post.critics.networks import ValueNet
from vla_post.critics.returns import outcomes_of
from vla_post.critics.saved import CriticMissing
from vla_post.learners.optimisation import GradientAlgorithm, GuardedAdamW
from vla_post.learners.weighting import commanded_steps, weighted_flow_loss
from vla_post.policies.indicator import Guidance, Indicator, with_indicator
from vla_post.sharding import Shards

OTHERS = "(other instructions)"
VALUE_FILE = "value.safetensors"
"""Beside the weights of the policy, in each published version."""


@dataclass(frozen=True, kw_only=True)
class RecapConfig(GradientAlgorithm):
    """RECAP: train on everything, told what was good; act asking for good."""

    lookahead_s: float = 1.0
    """N of Eq. R5 as a time; the paper's 50 steps at 50 Hz. Beyond any episode it is Eq. R4."""
    failure_cost: float = 1.0
    """C_fail, in longest episodes of the task."""
    positive_share: float = 0.4
    """Of the judged steps of a task, those that count as positive; fewer is greedier, and the
    paper's preferred knob for speed (it used 0.1 for one task)."""
    indicator_dropout: float = 0.3
    guidance: float = 1.0
    """beta of Eq. R10 in published versions: 1 while collecting. `vla-post policy guidance` sets
    another one for a checkpoint (the paper evaluates with 1.5 to 2.5)."""
    threshold_window: int = 4096
    """Advantages of each task that its threshold is taken from."""
    encoder: Literal["auto", "state", "policy"] = "auto"
    """What the value sees: the contract's vectors, or a frozen copy of the policy's features."""
    bins: int = 201
    width: int = 128
    layers: int = 2
    value_learning_rate: float = 1e-3
    value_warmup: int = 300
    """First updates, which train the value alone."""
    value: Literal["online", "frozen"] = "online"
    """After the warm-up the value goes on learning, or stays as it is."""
    value_from: str = ""
    """Checkpoint folder whose value to begin with, instead of a fresh one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Guidance(beta=self.guidance)
        if not 0.0 < self.positive_share < 1.0 or not 0.0 <= self.indicator_dropout <= 1.0:
            raise ValueError(
                f"positive_share is {self.positive_share} and indicator_dropout "
                f"{self.indicator_dropout}; expected shares, the first neither 0 nor 1"
            )
        if not self.lookahead_s > 0 or self.failure_cost < 0 or self.value_warmup < 0:
            raise ValueError(
                f"lookahead_s {self.lookahead_s}, failure_cost {self.failure_cost}, value_warmup "
                f"{self.value_warmup}: expected a time above 0, and two numbers not below it"
            )
        if self.threshold_window < 10:
            raise ValueError(f"threshold_window is {self.threshold_window}; at least 10")

    def steps(self, contract: Contract) -> int:
        """N."""
        return max(1, round(self.lookahead_s * contract.control_hz))

    def data(self, contract: Contract) -> DataNeeds:
        return DataNeeds(future_steps=self.steps(contract), outcomes=True)

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> "Recap":
        encoder = build_encoder(self.encoder, policy, contract)
        if not isinstance(policy, TakesIndicator):
            raise ValueError(f"{type(policy).__name__} cannot be told what was good")
        policy.add_indicator(Guidance(beta=self.guidance))
        bins = Bins(low=-1.0, high=0.0, count=self.bins, labels="one_hot")
        value = ValueNet(encoder.size, bins, width=self.width, layers=self.layers)
        # The indicator's vectors are new parameters of the policy.
        return Recap(policy, list(policy.parameters()), value, encoder, self, contract)


@runtime_checkable
class TakesIndicator(Protocol):
    """A policy that reads the indicator: `vla_post.policies.lerobot_adapter.LeRobotPolicy`."""

    def add_indicator(self, guidance: Guidance) -> None: ...

    def parameters(self) -> Any: ...


# The mathematics -------------------------------------------------------------------------------


def recap_return(
    left: Integer[Tensor, " B"],
    outcome: Integer[Tensor, " B"],
    longest: Float[Tensor, " B"],
    failure_cost: float,
) -> Float[Tensor, " B"]:
    """R of Eq. R1-R2, in [-1, 0]: minus the time to success, and what a failure costs.

    Args:
        left: steps to the episode's end, the present one included; the last one costs nothing.
        outcome: 1 success, -1 failure; meaningless where 0.
        longest: steps of the task's longest episode.
        failure_cost: C_fail / longest.
    """
    cost = (left - 1).to(longest) + torch.where(outcome < 0, failure_cost * longest, 0.0)
    return (-cost / (longest * (1.0 + failure_cost))).clamp(min=-1.0)


def recap_advantage(
    realised: Float[Tensor, " B"],
    value: Float[Tensor, " B"],
    later_value: Float[Tensor, " B"],
    has_later: Bool[Tensor, " B"],
    waited: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """A of Eq. R5-R6: what the next N steps cost and led to, over what was expected.

    Args:
        realised: R.
        later_value: V after N steps; anything where `has_later` is false.
        has_later: the episode goes on that far; otherwise the sum stops at its end (Eq. R4).
        waited: cost of N steps, in the unit of the returns.
    """
    return torch.where(has_later, later_value - waited, realised) - value


def threshold(advantage: Float[Tensor, " N"], share: float) -> Float[Tensor, ""]:
    """eps of Eq. R7: `share` of the advantages lie strictly above it, within one of them.

    Equal ones are on one side together, the lower one, so that ties never exceed the share.
    """
    ranked = advantage.sort(descending=True).values
    count = round(share * len(ranked))
    return ranked[count] if count < len(ranked) else ranked[-1] - 1.0


def step_indicators(
    better: Integer[Tensor, " B"],
    source: Integer[Tensor, "B H"],
    demonstration: Bool[Tensor, " B"],
) -> tuple[Integer[Tensor, " B"], Bool[Tensor, "B H"]]:
    """(indicator of each chunk, its steps that share it) of Eq. R7.

    Args:
        better: `Indicator` of each chunk by its advantage.
        demonstration: items of the demonstrations' stores, positive from end to end.
    """
    positive = torch.full_like(source, Indicator.POSITIVE, dtype=torch.int64)
    forced = (source == int(Source.HUMAN)) | (source == int(Source.SCRIPTED))
    forced = forced | demonstration[:, None]
    each = torch.where(forced, positive, better[:, None])
    return each[:, 0], each == each[:, :1]


class RunningThresholds:
    """The last advantages of each task, and their threshold.

    Args:
        tasks: names; an item's task is an index into them.
    """

    def __init__(self, tasks: Sequence[str], share: float, window: int) -> None:
        self.tasks, self.share, self.window = list(tasks), share, window
        self.kept: dict[str, Tensor] = {}

    def update(
        self,
        task: Integer[Tensor, " B"],
        advantage: Float[Tensor, " B"],
        counted: Bool[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        """Takes in the counted items of a batch; returns the threshold of each item's task."""
        out = torch.zeros_like(advantage)
        tasks, values, counts = (parallel.gather(x) for x in (task, advantage, counted))
        for number in tasks.unique().tolist():
            name = self.tasks[number]
            new = values[(tasks == number) & counts].float().cpu()
            known = torch.cat([self.kept.get(name, new[:0]), new])[-self.window :]
            self.kept[name] = known
            if len(known):
                out[task == number] = threshold(known, self.share).to(out)
        return out


# The learner -----------------------------------------------------------------------------------


class Recap:
    """Owns the value and both optimisers; borrows the policy."""

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[nn.Parameter],
        value: ValueNet,
        encoder: Encoder,
        config: RecapConfig,
        contract: Contract,
    ) -> None:
        self.policy, self.value, self.encoder, self.config = policy, value, encoder, config
        hz = contract.control_hz
        self.horizon_steps = config.steps(contract)
        longest = {t.instruction: hz * t.time_limit_s for t in contract.tasks.values()}
        # Instructions that the contract does not know share the last place.
        longest[OTHERS] = longest_steps(contract)
        self.places = {text: number for number, text in enumerate(longest)}
        self.longest = torch.tensor(list(longest.values()), dtype=torch.float32)
        """Control steps of the longest episode of each task."""
        self.optimizer = GuardedAdamW(parameters, config)
        self.value_optimizer = GuardedAdamW(
            list(value.parameters()), GradientAlgorithm(learning_rate=config.value_learning_rate)
        )
        self.thresholds = RunningThresholds(
            list(longest), config.positive_share, config.threshold_window
        )
        self.rate_scale = 1.0
        self.value_only = 0
        self._describe()
        if config.value_from:
            self._load_value(Path(config.value_from))

    @property
    def updates(self) -> int:
        return self.optimizer.updates + self.value_only

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"value": self.value}

    def adopt(self, shards: Shards) -> None:
        self.optimizer.adopt(shards)

    def update(self, batch: Batch) -> Metrics:
        """Value and policy on one batch; see `Learner`."""
        if self.value_only < self.config.value_warmup:
            metrics = self.evaluate(batch)
            self.value_only += 1
            return metrics
        # The policy first: should its loss not be finite, nothing has changed yet.
        metrics = self.improve(batch)
        if self.config.value == "frozen":
            return metrics
        return self.evaluate(batch) | metrics

    def evaluate(self, batch: Batch) -> Metrics:
        """One step of the value towards the returns of the data (Eq. R3).

        Episodes that nobody labelled say nothing about returns and are left out.
        """
        realised, known = self.realised(batch)
        loss = self.value.loss(self.encoder(batch.observation, batch.instruction), realised)
        step = self.value_optimizer.step(weighted_flow_loss(loss, torch.ones_like(loss), known))
        return {"loss": step["loss"], "value/loss": step["loss"]}

    def improve(self, batch: Batch) -> Metrics:
        """One step of the policy on chunks and their indicators (Eq. R8)."""
        indicator, steps, told = self.label(batch)
        dropped = parallel.share(torch.rand, len(batch)) < self.config.indicator_dropout
        shown = torch.where(dropped, int(Indicator.NONE), indicator.cpu()).tolist()
        prompts = [
            with_indicator(text, Indicator(which))
            for text, which in zip(batch.instruction, shown, strict=True)
        ]
        steps = steps & commanded_steps(batch.source, batch.valid)
        chunk_loss = self.policy.chunk_loss(batch.replace(valid=steps, instruction=prompts))
        loss = weighted_flow_loss(chunk_loss, batch.weight, steps.any(dim=1))
        return self.optimizer.step(loss, self.rate_scale) | told

    @torch.no_grad()
    def label(self, batch: Batch) -> tuple[Integer[Tensor, " B"], Bool[Tensor, "B H"], Metrics]:
        """(`Indicator` of each chunk, its steps that share it, figures)."""
        advantage, known = self.advantage(batch)
        demonstration = torch.zeros_like(known) if batch.part is None else batch.part == 0
        human = (batch.source[:, 0] == int(Source.HUMAN)) | (
            batch.source[:, 0] == int(Source.SCRIPTED)
        )
        judged = known & ~human & ~demonstration
        eps = self.thresholds.update(self._task(batch), advantage, judged)
        better = torch.where(advantage > eps, int(Indicator.POSITIVE), int(Indicator.NEGATIVE))
        better = torch.where(known, better, int(Indicator.NONE))
        indicator, steps = step_indicators(better, batch.source, demonstration)
        positive = (indicator == Indicator.POSITIVE).float()
        some = judged.sum().clamp(min=1)
        realised, labelled = self.realised(batch)
        value = self.value(self.encoder(batch.observation, batch.instruction))
        return (
            indicator,
            steps,
            {
                "recap/positive_share": float(positive.mean()),
                "recap/judged_positive_share": float((positive * judged).sum() / some),
                "recap/judged_share": float(judged.float().mean()),
                "recap/threshold": float((eps * judged).sum() / some),
                "advantage/mean": float((advantage * judged).sum() / some),
                "value/mean": float(value.mean()),
                "value/return_correlation": correlation(value[labelled], realised[labelled]),
            },
        )

    @torch.no_grad()
    def advantage(self, batch: Batch) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """(A of Eq. R5, whether it is known): unknown where an episode without outcome ends."""
        if batch.has_future is None:
            raise ValueError("the batch has no future observations; draw it with `data()`'s needs")
        realised, labelled = self.realised(batch)
        value = self.value(self.encoder(batch.observation, batch.instruction))
        later = self.value(self.encoder(batch.future_observation, batch.instruction))
        scale = self._longest(batch) * (1.0 + self.config.failure_cost)
        advantage = recap_advantage(
            realised, value, later, batch.has_future, self.horizon_steps / scale
        )
        return advantage, labelled | batch.has_future

    def realised(self, batch: Batch) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """(R, whether the episode's outcome is known)."""
        left, outcome = outcomes_of(batch)
        longest = self._longest(batch)
        return recap_return(left, outcome, longest, self.config.failure_cost), outcome != 0

    def _longest(self, batch: Batch) -> Float[Tensor, " B"]:
        task = self._task(batch)
        return self.longest.to(task.device)[task]

    def _task(self, batch: Batch) -> Integer[Tensor, " B"]:
        """Not `Batch.task`, whose numbers change with what the stores hold."""
        others = self.places[OTHERS]
        places = [self.places.get(text, others) for text in batch.instruction]
        return torch.tensor(places, device=batch.weight.device)

    # State --------------------------------------------------------------------------------------

    def _describe(self) -> None:
        """What the published value was trained as, in its file."""
        config = self.config
        about = {
            "failure_cost": config.failure_cost,
            "bins": config.bins,
            "width": config.width,
            "layers": config.layers,
            "inputs": asdict(self.encoder.size),
            "encoder": {"kind": self.encoder.kind, "hash": self.encoder.hash},
        }
        self.value.card = {"recap": json.dumps(about)}

    def _load_value(self, folder: Path) -> None:
        file = folder / VALUE_FILE
        try:
            with safe_open(file, "pt") as opened:
                found = json.loads((opened.metadata() or {}).get("recap", "{}"))
            wanted = json.loads(self.value.card["recap"])
            differ = [name for name in wanted if found.get(name) != wanted[name]]
            if differ:
                raise CriticMissing(
                    f"{file}: a value of another kind; it differs in {', '.join(differ)}. Set "
                    "these knobs as they were, or begin with a fresh value"
                )
            self.value.load_state_dict(load_file(file))
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            if isinstance(error, CriticMissing):
                raise
            raise CriticMissing(
                f"{file}: no value to begin with ({error}); `vla-post train recap` publishes one "
                "with each version"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.optimizer.state_dict(),
            "value": self.value_optimizer.state_dict(),
            "value_only": self.value_only,
            "thresholds": dict(self.thresholds.kept),
            "encoder": self.encoder.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["policy"])
        self.value_optimizer.load_state_dict(state["value"])
        self.value_only = int(state["value_only"])
        self.thresholds.kept = dict(state["thresholds"])
        self.encoder.load_state_dict(state["encoder"])
        self._describe()
