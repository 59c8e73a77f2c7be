"""The nouns that the learners share: `Batch`, `Policy`, `Algorithm`, `Learner`, `Metrics`.

B batch, H chunk length, A action size, F feature size. Flow time everywhere in this project: noise
at t = 0, data at t = 1, velocity = data - noise; adapters convert (docs/concepts.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, runtime_checkable
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from trajectory_store import ChunkBatch, Contract, Source

Metrics = dict[str, float]
Observation = dict[str, Tensor]
"""Robot units under LeRobot keys: vectors (B, D) float32; images (B, C, height, width), 0 to 1."""


@dataclass(frozen=True)
class Batch:
    """A `ChunkBatch` of the store as tensors; normalisation happens inside the policy."""

    observation: Observation
    action: Float[Tensor, "B H A"]
    """Commands that were sent to the robot, in the contract's unit."""
    valid: Bool[Tensor, "B H"]
    """False where the chunk reaches past the end of its episode."""
    reward: Float[Tensor, "B H"]
    source: Integer[Tensor, "B H"]
    """`trajectory_store.Source` of each step."""
    next_observation: Observation
    """At step n; the last stored observation when the episode ends inside the chunk."""
    n: Integer[Tensor, " B"]
    """Steps until `next_observation`: the bootstrap is gamma**n."""
    terminated: Bool[Tensor, " B"]
    """A real end (success, failure) lies within `n` steps, never a time-out."""
    task: Integer[Tensor, " B"]
    instruction: list[str]
    weight: Float[Tensor, " B"]
    """Of the item in the loss; 1 unless a learner sets it."""
    left: Integer[Tensor, " B"] | None = None
    """Steps from the anchor to the end of its episode, the anchor's included."""
    outcome: Integer[Tensor, " B"] | None = None
    """How the episode ended: 1 success, -1 failure, 0 anything else."""
    episode: Integer[Tensor, " B"] | None = None
    """A number of the item's episode, the same in every run and batch; says nothing else."""
    part: Integer[Tensor, " B"] | None = None
    """Of the mixture: 0 demonstrations, 1 what robots recorded, 2 interventions drawn apart."""
    future_observation: Observation = field(default_factory=dict[str, Tensor])
    """`DataNeeds.future_steps` after the anchor; {} unless asked for."""
    has_future: Bool[Tensor, " B"] | None = None
    """The episode reaches that far."""
    to_takeover: Integer[Tensor, "B H"] | None = None
    """Steps until a person takes over, if asked for; `trajectory_store.NO_TAKEOVER` otherwise."""

    @classmethod
    def from_numpy(cls, chunk: ChunkBatch, device: torch.device | str = "cpu") -> Self:
        def put(value: np.ndarray) -> Tensor:
            return to_device(value, device)

        return cls(
            observation=observation_from_numpy(chunk.observation, device),
            action=put(chunk.action),
            valid=put(chunk.valid),
            reward=put(chunk.reward),
            source=put(chunk.source),
            next_observation=observation_from_numpy(chunk.next_observation, device),
            n=put(chunk.n),
            terminated=put(chunk.terminated),
            task=put(chunk.task),
            instruction=chunk.instruction,
            weight=torch.ones(len(chunk.n), device=device),
            left=put(chunk.left),
            outcome=put(chunk.outcome),
            episode=put(_numbers(chunk)),
            part=put(chunk.part),
            future_observation=observation_from_numpy(chunk.future_observation, device),
            has_future=None if chunk.has_future is None else put(chunk.has_future),
            to_takeover=None if chunk.to_takeover is None else put(chunk.to_takeover),
        )

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def __len__(self) -> int:
        return len(self.n)


def _numbers(chunk: ChunkBatch) -> np.ndarray:
    """(B,) checksum of each item's episode uuid, non-negative."""
    place = chunk.provenance
    found, inverse = np.unique(place.episode, return_inverse=True)
    numbers = [crc32(place.uuids[int(k)].encode()) for k in found]
    return np.array(numbers, np.int64)[inverse]


def to_device(value: np.ndarray, device: torch.device | str) -> Tensor:
    """The array as a tensor. To a GPU it goes through pinned memory, so that the copy runs beside
    the computation that was queued before it."""
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def observation_from_numpy(
    observation: dict[str, np.ndarray], device: torch.device | str = "cpu"
) -> Observation:
    """The one place where stored arrays become network inputs, for training and robot alike.

    Images (B, height, width, C) u1 become (B, C, height, width) float in [0, 1]; vectors stay.
    """
    out: Observation = {}
    for key, value in observation.items():
        tensor = to_device(value, device)
        if value.dtype == np.uint8:
            tensor = tensor.movedim(-1, -3).float() / 255.0
        out[key] = tensor
    return out


@runtime_checkable
class Policy(Protocol):
    """Anything that maps observations to action chunks."""

    horizon: int
    action_size: int

    def act(
        self,
        observation: Observation,
        instruction: list[str],
        n_samples: int = 1,
        *,
        noise: Tensor | None = None,
    ) -> Float[Tensor, "B n H A"]:
        """Sampled chunks in robot units; `noise` (B, n, H, A) makes them reproducible."""
        ...

    def chunk_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> Float[Tensor, " B"]:
        """Unreduced loss of each item, averaged over its valid steps; padding weighs exactly 0."""
        ...

    def features(self, observation: Observation, instruction: list[str]) -> Float[Tensor, "B F"]:
        """What the policy's own encoder says of the observation, for critics and scorers."""
        ...


@dataclass(frozen=True, kw_only=True)
class DataNeeds:
    """What an algorithm wants in its batches; `training.data.mixture` draws accordingly.

    Demonstrations always give chunks from every tick, whoever drove; the fields that speak of who
    drove are about what robots recorded.
    """

    sources: tuple[Source, ...] | None = None
    """Online chunks start only where one of these drove, and only such ticks count as something new
    to learn from. None: anyone."""
    valid_sources: tuple[Source, ...] | None = None
    """`Batch.valid` only where one of these drove. None: anyone."""
    next_observation: bool = False
    """Load `Batch.next_observation`; costs a second observation per item."""
    future_steps: int = 0
    """Control steps from a chunk's start to `Batch.future_observation`; 0 loads none."""
    takeovers: bool = False
    """Fill in `Batch.to_takeover`."""
    double_buffer: bool = False
    """Half of each batch from what people showed (demonstrations and interventions), half from
    everything that robots recorded, interventions included (arXiv:2410.21845)."""
    backup: int | None = None
    """Control steps to the next observation; None: the policy's chunk."""
    outcomes: bool = False
    """Learns from how episodes ended, so the data must hold successes and failures."""
    rewards: bool = False
    """Learns from recorded rewards, so the data must hold different ones."""
    keys: tuple[str, ...] = ()
    """Observation features beside those that the policy sees."""


@runtime_checkable
class Learner(Protocol):
    """One algorithm at work. Owns its optimiser and its own networks; borrows the policy."""

    rate_scale: float
    """Factor on the learning rate, for runs whose end is known."""

    @property
    def updates(self) -> int:
        """Optimiser steps so far."""
        ...

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Networks beside the policy, such as a critic. The trainer switches them to training mode,
        saves and restores their weights, and publishes each as NAME.safetensors with the policy."""
        ...

    def update(self, batch: Batch) -> Metrics:
        """One update; "loss" is among the metrics.

        Raises:
            NonFiniteLoss: nothing has been changed.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `update` needs to go on, less the weights of policy and `modules`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm's knobs, what data it wants, and how its learner is built.

    A subclass in a file of `learners/` is the whole interface of an algorithm; its name and place
    stand in `training.algorithms.ALGORITHMS`.
    """

    def data(self, contract: Contract) -> DataNeeds:
        """What its batches must hold."""
        return DataNeeds()

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> Learner:
        """The learner.

        Args:
            parameters: of the policy, on its device.
            contract: of the cell: rates, limits and observation shapes.
        """
        raise TypeError(f"{type(self).__name__} does not say how its learner is built")


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite; raised before the optimiser steps, so that the last
    weights are good. `training` saves the batch."""
