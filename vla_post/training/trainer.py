"""One policy being trained: algorithm, average of the weights, augmentation, state on disk."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from trajectory_store import ChunkBatch
from vla_post import parallel
from vla_post.batch import Algorithm, Batch, Learner, Metrics, NonFiniteLoss
from vla_post.policies.indicator import Guidance
from vla_post.policies.lerobot_adapter import LeRobotPolicy, load_weights
from vla_post.sharding import divide, held, placed, require_shardable, whole
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


Kept = Literal["policy", "state"]


class Trainer:
    """Owns everything that changes while training; `step` is one update.

    Args:
        shard: divide the policy among the processes (`vla_post.sharding`).

    Raises:
        ValueError: it cannot be sharded; the message says why.
    """

    def __init__(self, policy: LeRobotPolicy, config: TrainConfig, *, shard: bool = False) -> None:
        torch.manual_seed(config.seed)
        self.policy, self.config = policy, config
        policy.flow_samples = config.flow_samples
        parameters = list(policy.parameters())
        if policy.guidance is not None:
            # What another algorithm teaches goes without an indicator, so its versions must not ask
            # for one. RECAP asks again, in `build`.
            policy.guidance = Guidance(beta=0.0)
        self.learner: Learner = config.algorithm.build(policy, parameters, policy.contract)
        self.sharded, self._told_held = shard, False
        if shard:
            # After `build`, which may copy the policy. The optimiser has nothing to keep yet.
            shardable = require_shardable(policy.kind, self.learner)
            shardable.adopt(divide(policy.module))
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
        if not self._told_held:
            metrics |= self._held()
            self._told_held = True
        return metrics

    def _held(self) -> Metrics:
        """Bytes that the process with the most of them holds between updates, by what they are."""
        parameters = list(self.policy.module.parameters())
        mine = {
            "weights": held(parameters),
            "gradients": held(p.grad for p in parameters),
            "learner": held([self.learner.state_dict()]),
            "average": held(self.ema.weights.values()),
        }
        counts = torch.tensor([list(mine.values())], device=self.policy.device)
        most = parallel.gather(counts).max(dim=0).values.tolist()
        return {f"held/{name}": float(count) for name, count in zip(mine, most, strict=True)}

    def item_losses(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(loss, had anything to learn from), both (B,), of the items of the last step; None if it
        trained a critic alone."""
        if self.policy.last_loss is None:
            return None
        loss, counted = self.policy.last_loss
        return loss.cpu().numpy(), counted.cpu().numpy()

    def tensors(self, kind: Kept) -> dict[str, Any]:
        """What a checkpoint holds of the policy, whole.

        Where it is sharded, all processes call this together, and only the leader gets them.

        Args:
            kind: `policy`, the one to run; `state`, what `resume` needs.
        """
        kept: dict[str, Any] = {"average": self.ema.weights}
        if kind == "state":
            kept["policy"] = self.policy.module.state_dict()
            kept["learner"] = self.learner.state_dict()
        return whole(kept)

    def save_policy(self, folder: Path) -> Path:
        """A checkpoint with the averaged weights, the one to run, and the learner's networks.

        Where the policy is sharded, the other processes call `tensors("policy")` meanwhile.
        """
        self.policy.save(folder, state_dict=self.tensors("policy")["average"])
        for name, module in self.learner.modules.items():
            weights = {key: t.detach().cpu().contiguous() for key, t in module.state_dict().items()}
            card: dict[str, str] = getattr(module, "card", {})
            save_file(weights, folder / f"{name}.safetensors", metadata=card or None)
        return folder

    def save(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Everything that `resume` needs, into `folder`.

        Where the policy is sharded, the other processes call `tensors("state")` meanwhile.
        """
        tensors = self.tensors("state")
        state = {
            "learner": tensors["learner"],
            "modules": {name: m.state_dict() for name, m in self.learner.modules.items()},
            "ema": {"updates": self.ema.updates, "weights": tensors["average"]},
            "random": torch.get_rng_state(),
            "extra": dict(extra),
        }
        self.policy.save(folder / "policy", state_dict=tensors["policy"])
        save_state(folder, "state", state)

    def resume(self, folder: Path) -> dict[str, Any]:
        """Continues where `save` was called; returns its `extra`."""
        state = load_state(folder, "state")
        load_weights(self.policy.module, folder / "policy")
        self.learner.load_state_dict(state["learner"])
        for name, module in self.learner.modules.items():
            module.load_state_dict(state["modules"][name])
        self.ema.updates = int(state["ema"]["updates"])
        self.ema.weights = {
            name: placed(tensor, self.ema.weights[name])
            for name, tensor in state["ema"]["weights"].items()
        }
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
