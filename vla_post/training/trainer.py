"""One policy being trained: algorithm, average of the weights, augmentation, state on disk."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from trajectory_store import ChunkBatch
from vla_post.batch import Algorithm, Batch, Learner, Metrics, NonFiniteLoss
from vla_post.policies.indicator import Guidance
from vla_post.policies.lerobot_adapter import LeRobotPolicy, load_weights
from vla_post.training.ema import Ema
from vla_post.training.state import load_state, save_state
from vla_post.transforms import shift_images


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a policy is trained, whatever it is trained on."""

    algorithm: Algorithm
    batch_size: int = 32
    """Chunks per update."""
    flow_samples: int = 1
    """Pairs of noise and flow time per chunk; they share one encoder pass."""
    image_shift: int = 0
    """Images are moved by up to this many pixels, at random."""
    ema_decay: float = 0.99
    """Of the average of the weights that is published; 0 publishes the last weights."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.flow_samples < 1 or self.image_shift < 0:
            raise ValueError(
                f"batch_size {self.batch_size}, flow_samples {self.flow_samples}, image_shift "
                f"{self.image_shift}: the first two must be at least 1, the last not negative"
            )


class Trainer:
    """Owns everything that changes while training; `step` is one update."""

    def __init__(self, policy: LeRobotPolicy, config: TrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.policy, self.config = policy, config
        policy.flow_samples = config.flow_samples
        parameters = list(policy.parameters())
        if policy.guidance is not None:
            # What another algorithm teaches goes without an indicator, so its versions must not ask
            # for one. RECAP asks again, in `build`.
            policy.guidance = Guidance(beta=0.0)
        self.learner: Learner = config.algorithm.build(policy, parameters, policy.contract)
        self.ema = Ema(policy.module, config.ema_decay)

    @property
    def updates(self) -> int:
        return self.learner.updates

    def step(self, chunk: ChunkBatch, *, save_bad_batch: Path | None = None) -> Metrics:
        """One update.

        Args:
            save_bad_batch: where the batch goes (safetensors) when its loss is not finite.

        Raises:
            NonFiniteLoss: nothing has been changed.
        """
        batch = Batch.from_numpy(chunk, self.policy.device)
        shifted = shift_images(batch.observation, self.config.image_shift)
        batch = batch.replace(observation=shifted)
        for module in (self.policy.module, *self.learner.modules.values()):
            module.train()
        self.policy.last_loss = None
        try:
            metrics = self.learner.update(batch)
        except NonFiniteLoss as error:
            if save_bad_batch is None:
                raise
            _save_batch(chunk, save_bad_batch)
            raise NonFiniteLoss(f"{error}; it is in {save_bad_batch}") from None
        self.ema.update(self.policy.module)
        return metrics

    def item_losses(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(loss, had anything to learn from), both (B,), of the items of the last step; None if it
        trained a critic alone."""
        if self.policy.last_loss is None:
            return None
        loss, counted = self.policy.last_loss
        return loss.cpu().numpy(), counted.cpu().numpy()

    def save_policy(self, folder: Path) -> Path:
        """A checkpoint with the averaged weights, the one to run, and the learner's networks."""
        self.policy.save(folder, state_dict=self.ema.weights)
        for name, module in self.learner.modules.items():
            weights = {key: t.detach().cpu().contiguous() for key, t in module.state_dict().items()}
            card: dict[str, str] = getattr(module, "card", {})
            save_file(weights, folder / f"{name}.safetensors", metadata=card or None)
        return folder

    def save(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Everything that `resume` needs, into `folder`."""
        state = {
            "learner": self.learner.state_dict(),
            "modules": {name: m.state_dict() for name, m in self.learner.modules.items()},
            "ema": {"updates": self.ema.updates, "weights": self.ema.weights},
            "random": torch.get_rng_state(),
            "extra": dict(extra),
        }
        self.policy.save(folder / "policy")
        save_state(folder, "state", state)

    def resume(self, folder: Path) -> dict[str, Any]:
        """Continues where `save` was called; returns its `extra`."""
        state = load_state(folder, "state")
        load_weights(self.policy.module, folder / "policy")
        self.learner.load_state_dict(state["learner"])
        for name, module in self.learner.modules.items():
            module.load_state_dict(state["modules"][name])
        self.ema.updates = int(state["ema"]["updates"])
        self.ema.weights = state["ema"]["weights"]
        torch.set_rng_state(state["random"])
        return state["extra"]


def cosine(progress: float, final: float) -> float:
    """Factor on the learning rate: 1 at `progress` 0, `final` at 1."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _save_batch(chunk: ChunkBatch, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"observation/{k}": v for k, v in chunk.observation.items()}
    arrays |= {name: getattr(chunk, name) for name in ("action", "valid", "source", "reward", "n")}
    arrays |= {"row": chunk.provenance.row, "store": chunk.provenance.store}
    save_file(
        {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in arrays.items()},
        path,
        metadata={"stores": "\n".join(chunk.provenance.stores)},
    )
