"""Any lerobot flow policy with an action-chunk head as our `Policy`; the one door to lerobot.

B batch, n samples per observation, H chunk length, A action size, W the model's action width (A, or
more where it pads), F feature size. lerobot's flow policies put noise at t = 1 and predict
noise - action; this project puts noise at t = 0 and speaks of data - noise: the heads convert.

One encoder pass serves all samples and all denoising steps, in training as on the robot.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trajectory_store.contract import Contract, parse_contract
from vla_post.batch import Batch, Observation
from vla_post.policies.checkpoint import CARD, CheckpointError, read_card, write_card
from vla_post.policies.flow_math import euler, flow_loss, interpolate, target_velocity
from vla_post.policies.rtc import RtcConfig, guided, prefix_weights

VLM_FOLDER = "vlm"
"""Inside a checkpoint: what SmolVLA needs to know of its vision-language model."""

Statistics = Mapping[str, Mapping[str, Any]]
"""{key: {"mean": (D,), "std": (D,), "min": (D,), "max": (D,)}} of the training data."""


class UnsupportedPolicy(ValueError):
    """A lerobot policy without a flow-matching chunk head that we know."""


class ChunkHead(Protocol):
    """What the adapter asks of one type of lerobot policy, in this project's flow convention."""

    noise_size: int
    """W."""
    denoising_steps: int

    def encode(self, inputs: dict[str, Any]) -> Any:
        """Everything that depends on the observation alone; `inputs` are preprocessed."""
        ...

    def repeat(self, context: Any, n: int) -> Any:
        """The context of each item n times in a row. May reuse `context`'s memory."""
        ...

    def velocity(
        self, context: Any, x: Float[Tensor, "N H W"], time: Float[Tensor, " N"]
    ) -> Float[Tensor, "N H W"]: ...

    def sample_time(self, n: int, device: torch.device) -> Float[Tensor, " n"]:
        """Times as the policy's own training draws them."""
        ...

    def features(self, context: Any) -> Float[Tensor, "B F"]: ...


class LeRobotPolicy:
    """A lerobot policy, its pre- and postprocessor and the cell it was made for.

    Args:
        module: a lerobot `PreTrainedPolicy`; `.train()` and `.parameters()` are its own.
        preprocess, postprocess: lerobot's pipelines; they hold the normalisation statistics.
        contract: of the cell whose observations and actions these are.
        statistics: what the processors normalise with, kept for the checkpoint's card.

    Raises:
        UnsupportedPolicy: no flow-matching chunk head, or its chunk is not the contract's.
    """

    flow_samples: int = 1
    """Pairs of noise and time per item in `chunk_loss`; they share one encoder pass."""

    def __init__(
        self,
        module: Any,
        preprocess: Any,
        postprocess: Any,
        contract: Contract,
        statistics: Statistics,
    ) -> None:
        self.module: nn.Module = module
        self.config: Any = module.config
        self.preprocess, self.postprocess = preprocess, postprocess
        self.contract = contract
        self.statistics = statistics
        self.horizon = int(self.config.chunk_size)
        self.action_size = int(self.config.action_feature.shape[0])
        expected = (contract.chunk_horizon, contract.action.size)
        if (self.horizon, self.action_size) != expected:
            raise UnsupportedPolicy(
                f"the policy emits chunks of (H, A) = {(self.horizon, self.action_size)}; cell "
                f"{contract.cell!r} declares {expected}"
            )
        self.head = _head(module)

    # Building and checkpoints -------------------------------------------------------------------

    @classmethod
    def build(cls, config: Any, contract: Contract, statistics: Statistics) -> Self:
        """A policy with fresh weights from a lerobot policy configuration."""
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        _offline()
        module = get_policy_class(config.type)(config)
        stats: Any = {
            key: {name: torch.as_tensor(v, dtype=torch.float32) for name, v in entry.items()}
            for key, entry in statistics.items()
        }
        preprocess, postprocess = make_pre_post_processors(config, dataset_stats=stats)
        return cls(module, preprocess, postprocess, contract, statistics)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None) -> Self:
        """Reads a checkpoint folder.

        Raises:
            CheckpointError: not a checkpoint of ours, incomplete, or not readable.
        """
        folder = Path(folder)
        card = read_card(folder)
        _offline()
        # `lerobot.policies` registers lerobot's own types; ours registers itself.
        import lerobot.policies  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        import vla_post.policies.flow  # pyright: ignore[reportUnusedImport]  # noqa: F401

        overrides: dict[str, Any] = {}
        try:
            config: Any = PreTrainedConfig.from_pretrained(folder)
            if device is not None:
                config.device = device
            if (folder / VLM_FOLDER).is_dir():
                config.vlm_model_name = str(folder / VLM_FOLDER)
                overrides["tokenizer_processor"] = {"tokenizer_name": config.vlm_model_name}
            overrides["device_processor"] = {"device": config.device}
            module: Any = get_policy_class(config.type)(config)
            load_weights(module, folder)
            preprocess, postprocess = make_pre_post_processors(
                config, pretrained_path=str(folder), preprocessor_overrides=overrides
            )
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{folder}: this checkpoint does not load ({type(error).__name__}: {error}). It "
                "may be incomplete or made by another lerobot; roll back to an older version."
            ) from error
        module.to(config.device).eval()
        contract = parse_contract(card["contract"], name=str(folder / CARD))
        return cls(module, preprocess, postprocess, contract, card["statistics"])

    def save(self, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> Path:
        """Writes a lerobot directory plus our card.

        Args:
            state_dict: weights to store instead of the module's own (an average of them, say).
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vlm = getattr(self.config, "vlm_model_name", None)
        if vlm is not None:
            _copy_folder(Path(vlm), folder / VLM_FOLDER)
            self.config.vlm_model_name = VLM_FOLDER
        try:
            self.config.save_pretrained(folder)
        finally:
            if vlm is not None:
                self.config.vlm_model_name = vlm
        weights = self.module.state_dict() if state_dict is None else state_dict
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        self.preprocess.save_pretrained(folder)
        self.postprocess.save_pretrained(folder)
        write_card(folder, kind=self.kind, contract=self.contract, statistics=self.statistics)
        return folder

    # The `Policy` noun --------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """lerobot's name of the policy type."""
        return str(self.config.type)

    @property
    def observation_keys(self) -> list[str]:
        """What it looks at, in the contract's order."""
        return [k for k in self.contract.observations if k in self.config.input_features]

    @property
    def noise_size(self) -> int:
        """W, the last axis of `noise`: the action size, or more where the model pads actions."""
        return self.head.noise_size

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that train."""
        return (p for p in self.module.parameters() if p.requires_grad)

    def encode(self, observation: Observation, instruction: list[str]) -> Any:
        """The head's context; give it to `sample` for many chunks of one observation."""
        return self.head.encode(self._inputs(observation, instruction))

    def act(
        self,
        observation: Observation,
        instruction: list[str],
        n_samples: int = 1,
        *,
        noise: Float[Tensor, "B n H W"] | None = None,
        previous: Float[Tensor, "B k A"] | None = None,
        delay: int = 0,
        rtc: RtcConfig | None = None,
    ) -> Float[Tensor, "B n H A"]:
        """Sampled chunks in robot units; see `vla_post.batch.Policy`.

        Args:
            previous: rows of the chunk that is being executed, from this observation's tick on, in
                robot units: the new chunk continues it (`vla_post.policies.rtc`).
            delay: how many of these rows will have been executed when the new chunk arrives.
        """
        if previous is None:
            with torch.inference_mode():
                context = self.encode(observation, instruction)
                return self.sample(context, len(instruction), n_samples, noise=noise)
        with torch.no_grad():  # inference tensors could not carry the guidance's gradient
            rows = previous[:, : self.horizon]
            overlap = rows.shape[1]
            rows = nn.functional.pad(rows, (0, 0, 0, self.horizon - overlap))
            inputs = self._inputs(observation, instruction, action=rows)
            rtc = rtc or RtcConfig()
            weights = prefix_weights(delay, overlap, self.horizon, rtc.schedule)
            padding = self.noise_size - self.action_size
            follow = (
                nn.functional.pad(inputs.pop("action"), (0, padding)),
                nn.functional.pad(weights[:, None].repeat(1, self.action_size), (0, padding)),
                rtc,
            )
            context = self.head.encode(inputs)
            return self.sample(context, len(instruction), n_samples, noise=noise, follow=follow)

    def sample(
        self,
        context: Any,
        batch_size: int,
        n_samples: int = 1,
        *,
        noise: Float[Tensor, "B n H W"] | None = None,
        follow: tuple[Tensor, Tensor, RtcConfig] | None = None,
    ) -> Float[Tensor, "B n H A"]:
        """Integrates the flow from noise to chunks, and un-normalises them.

        Args:
            follow: (previous (B, H, W), weights (H, W), config) of `vla_post.policies.rtc`.
        """
        shape = (batch_size, n_samples, self.horizon, self.noise_size)
        if noise is None:
            noise = torch.randn(shape, device=self.device)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {shape}")
        if n_samples > 1:
            context = self.head.repeat(context, n_samples)

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            return self.head.velocity(context, x, time)

        field = velocity
        if follow is not None:
            previous, weights, rtc = follow
            previous = previous.repeat_interleave(n_samples, dim=0)
            field = guided(velocity, previous, weights.to(previous), rtc)
        x = euler(field, noise.flatten(0, 1), self.head.denoising_steps)
        action = self.unnormalise(x[..., : self.action_size])
        return action.unflatten(0, (batch_size, n_samples))

    def chunk_loss(
        self,
        batch: Batch,
        *,
        noise: Float[Tensor, "B n H W"] | Float[Tensor, "B H W"] | None = None,
        time: Float[Tensor, "B n"] | Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " B"]:
        """Flow-matching loss of each item over its valid steps; padding weighs exactly 0.

        `noise` and `time` (0 noise, 1 data) fix the draw; without them `flow_samples` pairs are
        drawn per item.
        """
        inputs = self._inputs(batch.observation, batch.instruction, action=batch.action)
        action = inputs["action"]
        size = len(action)
        if noise is None:
            shape = (size, self.flow_samples, self.horizon, self.noise_size)
            noise = torch.randn(shape, device=action.device)
        elif noise.ndim == 3:
            noise = noise[:, None]
        n = noise.shape[1]
        if time is None:
            time = self.head.sample_time(size * n, action.device)
        time, noise = time.reshape(-1), noise.flatten(0, 1)
        context = self.head.encode(inputs)
        if n > 1:
            context = self.head.repeat(context, n)
        padded = nn.functional.pad(action, (0, self.noise_size - self.action_size))
        data = padded.repeat_interleave(n, dim=0)
        velocity = self.head.velocity(context, interpolate(noise, data, time), time)
        valid = batch.valid.repeat_interleave(n, dim=0)
        real = slice(None, self.action_size)
        loss = flow_loss(velocity[..., real], target_velocity(noise, data)[..., real], valid)
        return loss.unflatten(0, (size, n)).mean(dim=1)

    def features(self, observation: Observation, instruction: list[str]) -> Float[Tensor, "B F"]:
        """What the policy's own encoder says of the observation, for critics and scorers."""
        return self.head.features(self.encode(observation, instruction))

    def unnormalise(self, action: Float[Tensor, "N H A"]) -> Float[Tensor, "N H A"]:
        """Network units to robot units, by lerobot's postprocessor."""
        return self.postprocess(action).to(action.device)

    def _inputs(
        self, observation: Observation, instruction: list[str], action: Tensor | None = None
    ) -> dict[str, Any]:
        batch: dict[str, Any] = dict(observation) | {"task": list(instruction)}
        if action is not None:
            batch["action"] = action
        return self.preprocess(batch)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Copies a checkpoint's weights into a module of the same architecture.

    Raises:
        CheckpointError: missing file, or weights of another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    try:
        module.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: not the weights of this architecture ({error}). Compare config.json with the "
            "version that ran before, or roll back."
        ) from error


def _head(module: Any) -> ChunkHead:
    from vla_post.policies.flow import ChunkFlowPolicy

    if isinstance(module, ChunkFlowPolicy):
        return module
    if module.config.type == "smolvla":
        return SmolVlaHead(module)
    raise UnsupportedPolicy(
        f"policy type {module.config.type!r} is not supported; use smolvla or "
        f"{ChunkFlowPolicy.name}"
    )


class SmolVlaHead:
    """SmolVLA's own networks, called so that the vision-language prefix runs once per item.

    The prefix never attends to the action tokens, so its keys and values serve every noise, time
    and denoising step; the loss equals lerobot's, which recomputes the prefix each time.
    """

    def __init__(self, policy: Any) -> None:
        self.policy: Any = policy
        self.model: Any = policy.model
        self.noise_size = int(policy.config.max_action_dim)
        self.denoising_steps = int(policy.config.num_steps)

    def encode(self, inputs: dict[str, Any]) -> tuple[Tensor, Any, Tensor]:
        """(mask of the prefix's tokens, their keys and values, their final hidden states)."""
        from lerobot.policies.common.vla_utils import make_att_2d_masks

        policy, model = self.policy, self.model
        images, image_masks = policy.prepare_images(inputs)
        embeddings, pad_masks, attention_masks = model.embed_prefix(
            images,
            image_masks,
            inputs["observation.language.tokens"],
            inputs["observation.language.attention_mask"],
            state=policy.prepare_state(inputs),
        )
        (hidden, _), cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad_masks, attention_masks),
            position_ids=torch.cumsum(pad_masks, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        return pad_masks, cache, hidden

    def repeat(self, context: tuple[Tensor, Any, Tensor], n: int) -> tuple[Tensor, Any, Tensor]:
        pad_masks, cache, hidden = context
        cache.batch_repeat_interleave(n)
        return pad_masks.repeat_interleave(n, dim=0), cache, hidden

    def velocity(self, context: tuple[Tensor, Any, Tensor], x: Tensor, time: Tensor) -> Tensor:
        pad_masks, cache, _ = context
        return -self.model.denoise_step(pad_masks, cache, x, 1.0 - time)

    def sample_time(self, n: int, device: torch.device) -> Tensor:
        return 1.0 - self.model.sample_time(n, device)

    def features(self, context: tuple[Tensor, Any, Tensor]) -> Tensor:
        pad_masks, _, hidden = context
        mask = pad_masks[..., None].to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def _offline() -> None:
    """Checkpoints are complete: a robot must not wait for a hub that it cannot reach."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _copy_folder(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())


def parse_features(contract: Contract) -> tuple[dict[str, Any], dict[str, Any]]:
    """lerobot's input and output features of a cell."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    def vector_type(key: str) -> FeatureType:
        return FeatureType.ENV if key == "observation.environment_state" else FeatureType.STATE

    inputs: dict[str, Any] = {
        key: PolicyFeature(type=vector_type(key), shape=f.shape)
        for key, f in contract.vectors.items()
    }
    for key, f in contract.images.items():
        height, width, channels = f.shape
        inputs[key] = PolicyFeature(type=FeatureType.VISUAL, shape=(channels, height, width))
    output = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(contract.action.size,))}
    return inputs, output
