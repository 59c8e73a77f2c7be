"""A small flow-matching chunk policy, registered with lerobot as the policy type `chunk_flow`.

State (and environment state), a one-hot of the instruction's hash, noisy chunk and flow time go
through one residual MLP. It learns a task from a handful of demonstrations in seconds on a CPU.

lerobot's factory finds config, policy and processors by their names in this one module, so
`make_policy`, `lerobot-eval` and the hub formats work after `import vla_post.policies.flow`.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.optim import AdamWConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import make_default_policy_processor_steps, make_policy_processor_pipelines
from torch import Tensor, nn

from vla_post.policies.flow_math import euler, flow_loss, interpolate, target_velocity
from vla_post.policies.heads import FlowHead

TASK_INDEX = "observation.instruction_slot"
"""Added by the policy to its inputs: the slot of the instruction, (B,) int64."""


@PreTrainedConfig.register_subclass("chunk_flow")
@dataclass
class ChunkFlowConfig(PreTrainedConfig):
    """Sizes of the policy; features come from the cell contract."""

    chunk_size: int = 8
    n_action_steps: int = 4
    width: int = 256
    layers: int = 3
    num_steps: int = 5
    """Euler steps from noise to chunk."""
    instruction_slots: int = 64
    """Instructions are told apart by their hash; two may share a slot once there are many."""
    time_frequencies: int = 16
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "STATE": NormalizationMode.MEAN_STD,
            "ENV": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(lr=1e-3, weight_decay=1e-4)

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """Raises ValueError unless there is a vector to see and an action to emit."""
        if not self.vector_keys:
            raise ValueError("chunk_flow needs at least one state vector among its input features")
        if self.action_feature is None:
            raise ValueError("chunk_flow needs the output feature 'action'")

    @property
    def vector_keys(self) -> list[str]:
        """Keys of the vectors that it sees, in the order in which they are joined."""
        kinds = (FeatureType.STATE, FeatureType.ENV)
        return sorted(k for k, f in (self.input_features or {}).items() if f.type in kinds)


def make_chunk_flow_pre_post_processors(
    config: ChunkFlowConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[Any, Any]:
    """lerobot's standard steps: batch axis, device, normalisation, and back."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            steps.to_device,
            steps.normalize,
        ],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )


class ChunkFlowNet(nn.Module):
    """Velocity of a flattened chunk given a context vector: a residual MLP."""

    def __init__(self, context: int, chunk: int, width: int, layers: int, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(frequencies // 2) / 2.0)
        inputs = context + chunk + 2 * len(self.get_buffer("frequencies"))
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(layers)
        )
        self.out = nn.Linear(width, chunk)

    def forward(
        self,
        context: Float[Tensor, "N C"],
        x: Float[Tensor, "N H A"],
        time: Float[Tensor, " N"],
    ) -> Float[Tensor, "N H A"]:
        angle = time[:, None] * self.get_buffer("frequencies")
        joined = torch.cat([context, x.flatten(1), angle.sin(), angle.cos()], dim=1)
        hidden = nn.functional.gelu(self.embed(joined))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.out(hidden).view_as(x)


class ChunkFlowPolicy(PreTrainedPolicy):
    """See the module."""

    config_class = ChunkFlowConfig  # pyright: ignore[reportAssignmentType]
    name = "chunk_flow"  # pyright: ignore[reportAssignmentType]

    def __init__(self, config: ChunkFlowConfig, **_: Any) -> None:
        super().__init__(config)
        config.validate_features()
        self.config: ChunkFlowConfig = config
        assert config.input_features is not None
        assert config.action_feature is not None
        vectors = sum(config.input_features[key].shape[0] for key in config.vector_keys)
        self.noise_size = config.action_feature.shape[0]
        self.net = ChunkFlowNet(
            vectors + config.instruction_slots,
            config.chunk_size * self.noise_size,
            config.width,
            config.layers,
            config.time_frequencies,
        )
        self.reset()

    def encode(self, inputs: dict[str, Any]) -> Float[Tensor, "B C"]:
        vectors = [inputs[key].flatten(1) for key in self.config.vector_keys]
        if TASK_INDEX in inputs:
            slot = inputs[TASK_INDEX]
        else:
            slot = torch.tensor([self.slot(text) for text in inputs["task"]])
        hot = nn.functional.one_hot(slot, self.config.instruction_slots)
        return torch.cat([*vectors, hot.to(vectors[0])], dim=1)

    def slot(self, instruction: str) -> int:
        """Where an instruction sits in the one-hot; capitals and outer space do not matter."""
        digest = hashlib.sha256(instruction.strip().lower().encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.config.instruction_slots

    def velocity(self, context: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return self.net(context, x, time)

    def sample_time(self, n: int, device: torch.device) -> Tensor:
        return torch.rand(n, device=device)

    # lerobot ------------------------------------------------------------------------------------

    def get_optim_params(self) -> Any:
        return self.parameters()

    def reset(self) -> None:
        self._queue: deque[Tensor] = deque()

    def forward(
        self,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        time: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor, dict[str, Any]]:
        """lerobot's training call: `time` in its convention, noise at 1."""
        action = batch["action"]
        noise = torch.randn_like(action) if noise is None else noise
        t = self.sample_time(len(action), action.device) if time is None else 1.0 - time
        padding = batch.get("action_is_pad")
        valid = torch.ones_like(action[..., 0], dtype=torch.bool) if padding is None else ~padding
        velocity = self.velocity(self.encode(batch), interpolate(noise, action, t), t)
        loss = flow_loss(velocity, target_velocity(noise, action), valid)
        return (loss if reduction == "none" else loss.mean()), {"loss": loss.mean().item()}

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any
    ) -> Tensor:
        """(B, H, A), normalised; lerobot's postprocessor takes it to robot units."""
        self.eval()
        context = self.encode(batch)
        shape = (len(context), self.config.chunk_size, self.noise_size)
        noise = torch.randn(shape, device=context.device) if noise is None else noise
        return euler(lambda x, t: self.net(context, x, t), noise, self.config.num_steps)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """(B, A): one action at a time, a new chunk every `n_action_steps`."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch, **kwargs)
            self._queue.extend(chunk[:, : self.config.n_action_steps].transpose(0, 1))
        return self._queue.popleft()


class ChunkFlowHead(FlowHead):
    """The policy as the adapter drives it."""

    def __init__(self, policy: ChunkFlowPolicy) -> None:
        self.policy = policy
        self.horizon = policy.config.chunk_size
        self.action_size = self.noise_size = policy.noise_size
        self.denoising_steps = policy.config.num_steps

    def encode(self, inputs: dict[str, Any]) -> Tensor:
        return self.policy.encode(inputs)

    def repeat(self, context: Tensor, n: int) -> Tensor:
        return context.repeat_interleave(n, dim=0)

    def velocity(self, context: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return self.policy.velocity(context, x, time)

    def sample_time(self, n: int, device: torch.device) -> Tensor:
        return self.policy.sample_time(n, device)

    def features(self, context: Tensor) -> Tensor:
        return context
