"""A small flow-matching chunk policy, registered with lerobot as the policy type `chunk_flow`.

It sees any vectors, any number of cameras and the instruction; a head predicts the velocity of the
noisy chunk. The MLP head learns a task from a handful of demonstrations of its state in seconds on
a CPU; the transformer head is for pictures, longer chunks and several tasks. One encoder pass
serves all samples and denoising steps.

Instructions are vectors of a frozen sentence encoder (`language.py`), kept in the checkpoint for
the cell's tasks, or a one-hot of their hash where there is no encoder.

lerobot's factory finds config, policy and processors by their names in this one module, so
`make_policy`, `lerobot-eval` and the hub formats work after `import vla_post.policies.flow`.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.optim import AdamWConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import make_default_policy_processor_steps, make_policy_processor_pipelines
from torch import Tensor, nn

from vla_post.policies import language
from vla_post.policies.flow_math import euler, flow_loss, interpolate, target_velocity
from vla_post.policies.flow_nets import Encoded, Eye, MlpHead, TransformerHead, keypoints
from vla_post.policies.heads import FlowHead
from vla_post.policies.indicator import Indicator, split_indicator

TASK_INDEX = "observation.instruction_slot"
"""An input instead of the text: the number that `slot` gives to an instruction, (B,) int64."""
INDICATOR_STRIDE = 1 << 20
"""With an indicator, the number is the instruction's plus so many times the indicator's."""


@PreTrainedConfig.register_subclass("chunk_flow")
@dataclass
class ChunkFlowConfig(PreTrainedConfig):
    """Sizes of the policy; features come from the cell contract."""

    chunk_size: int = 8
    n_action_steps: int = 4
    head: str = "mlp"
    """`mlp` or `transformer`."""
    width: int = 256
    layers: int = 3
    attention_heads: int = 4
    """Of the transformer."""
    image_size: int = 64
    """Pictures are resized to this many pixels along each side."""
    eye_width: int = 64
    """Features per place of a picture."""
    num_steps: int = 5
    """Euler steps from noise to chunk."""
    language: str = "hash"
    """`sentence`: a frozen sentence encoder; `hash`: a one-hot of the instruction's hash."""
    instructions: list[str] = field(default_factory=list[str])
    """Whose sentence vectors the checkpoint keeps; others need the encoder where they are used."""
    language_width: int = 32
    """Numbers that the MLP head sees of a sentence vector."""
    instruction_slots: int = 64
    """With `hash`: two instructions may share a slot."""
    advantage_indicator: bool = False
    """Reads whether an action was better than expected (`indicator.py`), as RECAP trains it."""
    time_frequencies: int = 16
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
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
        """Raises ValueError unless there is something to see and an action to emit."""
        if not self.vector_keys and not self.image_features:
            raise ValueError("chunk_flow needs a vector or a camera among its input features")
        if self.head not in ("mlp", "transformer") or self.language not in ("hash", "sentence"):
            raise ValueError(
                f"head {self.head!r}, language {self.language!r}: expected mlp or transformer, "
                "and hash or sentence"
            )
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
        sizes = {key: config.input_features[key].shape[0] for key in config.vector_keys}
        self.noise_size = config.action_feature.shape[0]
        sentence = config.language == "sentence"
        if sentence:
            # A row of zeros is not embedded yet; a checkpoint brings them all.
            self.register_buffer("sentences", torch.zeros(len(config.instructions), language.SIZE))
        text = language.SIZE if sentence else config.instruction_slots
        self.eyes = nn.ModuleList(Eye(config.eye_width) for _ in config.image_features)
        if config.head == "mlp":
            context = sum(sizes.values()) + 2 * config.eye_width * len(self.eyes)
            if sentence:
                self.read = nn.Linear(text, config.language_width)
            self.net: nn.Module = MlpHead(
                context + (config.language_width if sentence else text),
                config.chunk_size * self.noise_size,
                config.width,
                config.layers,
                config.time_frequencies,
            )
        else:
            self.read = nn.Linear(text, config.width)
            self.feel = nn.ModuleList(nn.Linear(n, config.width) for n in sizes.values())
            self.look = nn.ModuleList(nn.Linear(config.eye_width, config.width) for _ in self.eyes)
            places = (-(-config.image_size // 8)) ** 2
            self.places = nn.Parameter(0.02 * torch.randn(len(self.eyes), places, config.width))
            self.net = TransformerHead(
                config.chunk_size,
                self.noise_size,
                config.width,
                config.layers,
                config.attention_heads,
                config.time_frequencies,
            )
        if config.advantage_indicator:
            self.add_indicator()
        self._slots = {language.clean(text): n for n, text in enumerate(config.instructions)}
        self._embedded: set[int] = set()
        self._more: list[Tensor] = []
        self.reset()

    def embed_instructions(self) -> None:
        """Fills the sentence vectors that the checkpoint keeps, where it has none yet."""
        for text in self.config.instructions:
            self.slot(text)

    def add_indicator(self) -> None:
        """A learned vector for each indicator, 0 at first: the policy stays what it was."""
        self.config.advantage_indicator = True
        text = self.config.instruction_slots if self.config.language == "hash" else language.SIZE
        self.indicator = nn.Embedding(len(Indicator), text, padding_idx=int(Indicator.NONE))
        nn.init.zeros_(self.indicator.weight)
        self.indicator.to(self.device)

    # The observation, once ----------------------------------------------------------------------

    def encode(self, inputs: dict[str, Any]) -> Encoded:
        """`inputs` hold normalised vectors, pictures in [0, 1], and `task` or `TASK_INDEX`."""
        config = self.config
        vectors = [inputs[key].flatten(1) for key in config.vector_keys]
        grids = [
            eye(self._resized(inputs[key]))
            for eye, key in zip(self.eyes, config.image_features, strict=True)
        ]
        if TASK_INDEX in inputs:
            slot = inputs[TASK_INDEX]
        else:
            slot = torch.tensor([self.slot(text) for text in inputs["task"]])
        said = self._said(slot.to(self.device))
        if config.head == "mlp":
            seen = [keypoints(grid) for grid in grids]
            if config.language == "sentence":
                said = self.read(said)
            memory = torch.cat([*vectors, *seen, said], dim=1)
            return Encoded(memory, memory)
        tokens = [self.read(said)[:, None]]
        tokens += [net(v)[:, None] for net, v in zip(self.feel, vectors, strict=True)]
        for number, (net, grid) in enumerate(zip(self.look, grids, strict=True)):
            tokens.append(net(grid.flatten(2).transpose(1, 2)) + self.places[number])
        joined = torch.cat(tokens, dim=1)
        assert isinstance(self.net, TransformerHead)
        return Encoded(joined.mean(dim=1), self.net.remember(joined))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def slot(self, instruction: str) -> int:
        """The number of an instruction; capitals and outer space do not matter.

        Raises:
            NoSentenceEncoder: neither kept in the checkpoint nor can it be embedded here.
        """
        if self.config.advantage_indicator:
            instruction, indicator = split_indicator(instruction)
            return self._slot(instruction) + INDICATOR_STRIDE * int(indicator)
        return self._slot(instruction)

    def _slot(self, instruction: str) -> int:
        text = language.clean(instruction)
        if self.config.language == "hash":
            digest = hashlib.sha256(text.encode()).digest()
            return int.from_bytes(digest[:8], "big") % self.config.instruction_slots
        table = self.get_buffer("sentences")
        if text not in self._slots:
            self._more.append(language.embed(text))
            self._slots[text] = len(table) + len(self._more) - 1
        slot = self._slots[text]
        if slot < len(table) and slot not in self._embedded:
            if not table[slot].any():
                table[slot] = language.embed(text).to(table)
            self._embedded.add(slot)
        return slot

    def _said(self, slot: Tensor) -> Tensor:
        """(B, L) of slots (B,)."""
        if self.config.advantage_indicator:
            indicator = self.indicator(slot // INDICATOR_STRIDE)
            return self._text(slot % INDICATOR_STRIDE) + indicator
        return self._text(slot)

    def _text(self, slot: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        if self.config.language == "hash":
            return nn.functional.one_hot(slot, self.config.instruction_slots).to(dtype)
        table = self.get_buffer("sentences")
        if self._more:
            table = torch.cat([table, torch.stack(self._more).to(table)])
        # Not table[slot]: that exports as GatherND, which wants int64.
        return table.index_select(0, slot).to(dtype)

    def _resized(self, image: Tensor) -> Tensor:
        size = self.config.image_size
        if tuple(image.shape[-2:]) == (size, size):
            return image
        return nn.functional.interpolate(
            image, size=(size, size), mode="bilinear", align_corners=False, antialias=True
        )

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
        t = torch.rand(len(action), device=action.device) if time is None else 1.0 - time
        padding = batch.get("action_is_pad")
        valid = torch.ones_like(action[..., 0], dtype=torch.bool) if padding is None else ~padding
        velocity = self.net(self.encode(batch).memory, interpolate(noise, action, t), t)
        loss = flow_loss(velocity, target_velocity(noise, action), valid)
        return (loss if reduction == "none" else loss.mean()), {"loss": loss.mean().item()}

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any
    ) -> Tensor:
        """(B, H, A), normalised; lerobot's postprocessor takes it to robot units."""
        self.eval()
        memory = self.encode(batch).memory
        shape = (len(memory), self.config.chunk_size, self.noise_size)
        noise = torch.randn(shape, device=memory.device) if noise is None else noise
        return euler(lambda x, t: self.net(memory, x, t), noise, self.config.num_steps)

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

    def encode(self, inputs: dict[str, Any]) -> Encoded:
        return self.policy.encode(inputs)

    def repeat(self, context: Encoded, n: int) -> Encoded:
        return context._replace(memory=context.memory.repeat_interleave(n, dim=0))

    def velocity(self, context: Encoded, x: Tensor, time: Tensor) -> Tensor:
        return self.policy.net(context.memory, x, time)

    def sample_time(self, n: int, device: torch.device) -> Tensor:
        return torch.rand(n, device=device)

    def features(self, context: Encoded) -> Tensor:
        return context.summary
