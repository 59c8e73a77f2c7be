"""The nouns that the learners share: `Batch`, `Policy`, `Learner`, `Metrics`.

B batch, H chunk length, A action size, F feature size. Flow time everywhere in this project: noise
at t = 0, data at t = 1, velocity = data - noise; adapters convert (docs/concepts.md).
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from trajectory_store import ChunkBatch

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
        )

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def __len__(self) -> int:
        return len(self.n)


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


@runtime_checkable
class Learner(Protocol):
    """One algorithm. Owns its optimiser; borrows the policy."""

    def update(self, batch: Batch) -> Metrics: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
