"""Any lerobot policy with an action-chunk head as our `Policy`; the one door to lerobot.

B batch, n samples per observation, H chunk length, A action size, W width of the noise (A, or more
where a model pads actions), F feature size. One head per family calls the networks (`heads.py`);
here are units, devices, precision, what trains, and checkpoints.

One encoder pass serves all samples and all denoising steps, in training as on the robot.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TextIO

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trajectory_store.contract import Contract, parse_contract
from vla_post import parallel
from vla_post.batch import Batch, Observation
from vla_post.policies.checkpoint import CARD, CheckpointError, read_card, write_card
from vla_post.policies.encoder import ObservationEncoder, observation_encoder
from vla_post.policies.heads import Guide, UnsupportedPolicy, check_family, make_head
from vla_post.policies.indicator import Guidance, Indicator, extrapolated, with_indicator
from vla_post.policies.lora import LoraConfig, add_lora, merge_lora
from vla_post.policies.pi_tiny import pi_parts
from vla_post.policies.rtc import RtcConfig, guided, prefix_weights
from vla_post.sharding import local, placed

VLM_FOLDER = "vlm"
"""Inside a checkpoint: tokenizer and sizes of a vision-language model, else taken from a hub."""

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What lerobot normalises pictures with where a policy asks for mean and deviation."""

Precision = Literal["float32", "bfloat16"]

Statistics = Mapping[str, Mapping[str, Any]]
"""{key: {mean, std, min, max, q01, q99: (D,)}} of the training data."""


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
    last_loss: tuple[Tensor, Tensor] | None = None
    """(loss, had any step to learn from), both (B,), of the last `chunk_loss`."""

    def __init__(
        self,
        module: Any,
        preprocess: Any,
        postprocess: Any,
        contract: Contract,
        statistics: Statistics,
        *,
        vlm_folder: Path | None = None,
    ) -> None:
        self.module: nn.Module = module
        self.config: Any = module.config
        self.preprocess, self.postprocess = preprocess, postprocess
        self.contract = contract
        self.statistics = statistics
        self.vlm_folder = vlm_folder
        self.head = make_head(module)
        self.horizon, self.action_size = self.head.horizon, self.head.action_size
        self.frozen: tuple[str, ...] = ()
        self.lora: LoraConfig | None = None
        self.guidance: Guidance | None = None
        """How it acts if it was trained with an indicator; None: it was not."""
        expected = (contract.chunk_horizon, contract.action.size)
        if (self.horizon, self.action_size) != expected:
            raise UnsupportedPolicy(
                f"the policy emits chunks of (H, A) = {(self.horizon, self.action_size)}; cell "
                f"{contract.cell!r} declares {expected}"
            )

    # Building and checkpoints -------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        config: Any,
        contract: Contract,
        statistics: Statistics,
        *,
        vlm_folder: Path | None = None,
    ) -> Self:
        """A policy with fresh weights from a lerobot policy configuration.

        Args:
            vlm_folder: tokenizer (and sizes, `pi_tiny`) that travel with the checkpoint.
        """
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        check_family(config.type)
        _offline()
        stats: Any = {
            key: {name: torch.as_tensor(v, dtype=torch.float32) for name, v in entry.items()}
            for key, entry in (
                {key: IMAGENET for key in config.image_features} | dict(statistics)
            ).items()
        }
        with _quiet(), pi_parts(vlm_folder if config.type in ("pi0", "pi05") else None):
            module = get_policy_class(config.type)(config)
            preprocess, postprocess = make_pre_post_processors(config, dataset_stats=stats)
        module.to(config.device)
        return cls(module, preprocess, postprocess, contract, statistics, vlm_folder=vlm_folder)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None) -> Self:
        """Reads a checkpoint folder.

        Raises:
            CheckpointError: not a checkpoint of ours, incomplete, or not readable.
        """
        folder = Path(folder)
        card = read_card(folder)
        settings = card.get("training", {})
        lora = settings.get("lora")
        policy = cls.load_lerobot(
            folder,
            parse_contract(card["contract"], name=str(folder / CARD)),
            card["statistics"],
            device=device,
            lora=LoraConfig(**lora) if lora else None,
        )
        policy.freeze(settings.get("frozen", ()))
        policy.guidance = read_guidance(card)
        return policy

    @classmethod
    def load_lerobot(
        cls,
        folder: Path,
        contract: Contract,
        statistics: Statistics,
        *,
        device: str | None = None,
        vlm_folder: Path | None = None,
        lora: LoraConfig | None = None,
    ) -> Self:
        """Reads lerobot's own files of a policy directory.

        Args:
            vlm_folder: tokenizer and model description; the directory's own `vlm` if it has one.

        Raises:
            CheckpointError: incomplete or not readable.
            UnsupportedPolicy: no chunk head that we know, or another chunk than the contract's.
        """
        _offline()
        # `lerobot.policies` registers lerobot's own types; ours registers itself.
        import lerobot.policies  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        import vla_post.policies.flow  # pyright: ignore[reportUnusedImport]  # noqa: F401

        if vlm_folder is None and (folder / VLM_FOLDER).is_dir():
            vlm_folder = folder / VLM_FOLDER
        overrides: dict[str, Any] = {}
        try:
            config: Any = PreTrainedConfig.from_pretrained(folder)
            check_family(config.type)
            if device is not None:
                config.device = device
            if vlm_folder is not None:
                overrides["tokenizer_processor"] = {"tokenizer_name": str(vlm_folder)}
                if hasattr(config, "vlm_model_name"):
                    config.vlm_model_name = str(vlm_folder)
            for name in ("load_vlm_weights", "pretrained_backbone_weights"):
                if hasattr(config, name):  # the checkpoint holds all weights: nothing is fetched
                    setattr(config, name, None if name.startswith("pre") else False)
            overrides["device_processor"] = {"device": config.device}
            with _quiet(), pi_parts(vlm_folder if config.type in ("pi0", "pi05") else None):
                module: Any = get_policy_class(config.type)(config)
            if lora is not None:
                add_lora(module, lora)
            load_weights(module, folder)
            preprocess, postprocess = make_pre_post_processors(
                config, pretrained_path=str(folder), preprocessor_overrides=overrides
            )
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError | UnsupportedPolicy):
                raise
            raise CheckpointError(
                f"{folder}: this checkpoint does not load ({type(error).__name__}: {error}). It "
                "may be incomplete or made by another lerobot; roll back to an older version."
            ) from error
        module.to(config.device).eval()
        policy = cls(module, preprocess, postprocess, contract, statistics, vlm_folder=vlm_folder)
        policy.lora = lora
        return policy

    def save(self, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> Path:
        """Writes a lerobot directory plus our card.

        Args:
            state_dict: weights to store instead of the module's own (an average of them, say).
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.vlm_folder is not None:
            _copy_folder(self.vlm_folder, folder / VLM_FOLDER)
        vlm = getattr(self.config, "vlm_model_name", None)
        if vlm is not None and self.vlm_folder is not None:
            self.config.vlm_model_name = VLM_FOLDER
        try:
            self.config.save_pretrained(folder)
        finally:
            if vlm is not None:
                self.config.vlm_model_name = vlm
        weights = self.module.state_dict() if state_dict is None else state_dict
        save_file(_unshared(weights), folder / "model.safetensors", metadata={"format": "pt"})
        self.preprocess.save_pretrained(folder)
        self.postprocess.save_pretrained(folder)
        write_card(
            folder,
            kind=self.kind,
            contract=self.contract,
            statistics=self.statistics,
            training={
                "frozen": list(self.frozen),
                "lora": None if self.lora is None else asdict(self.lora),
            },
            guidance=None if self.guidance is None else asdict(self.guidance),
        )
        return folder

    # What trains --------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that train."""
        return (p for p in self.module.parameters() if p.requires_grad)

    def freeze(self, patterns: Sequence[str]) -> int:
        """Stops training the parameters whose names match one of the patterns (`*` and `?`).

        The patterns are kept in the checkpoint and hold for whoever trains it next.

        Returns:
            How many numbers have stopped training.

        Raises:
            ValueError: a pattern that matches nothing, or nothing left to train.
        """
        count = 0
        named = dict(self.module.named_parameters())
        for pattern in patterns:
            matched = [p for name, p in named.items() if fnmatchcase(name, pattern)]
            if not matched:
                parts = sorted({".".join(name.split(".")[:3]) + ".*" for name in named})
                raise ValueError(
                    f"no parameter of this {self.kind} matches {pattern!r}; there are "
                    f"{', '.join(parts[:12])}{', ...' if len(parts) > 12 else ''}"
                )
            for parameter in matched:
                count += parameter.numel() * parameter.requires_grad
                parameter.requires_grad_(False)
        if patterns and not any(p.requires_grad for p in named.values()):
            raise ValueError(f"freezing {', '.join(patterns)} leaves nothing to train")
        self.frozen = tuple(dict.fromkeys([*self.frozen, *patterns]))
        return count

    def add_lora(self, config: LoraConfig) -> int:
        """Freezes everything and adds low-rank adapters (peft) that train instead.

        Returns:
            How many numbers train now.
        """
        add_lora(self.module, config)
        self.lora = config
        return sum(p.numel() for p in self.parameters())

    def merge_lora(self) -> None:
        """Folds the adapters into the weights: a plain lerobot policy again, all of it training."""
        merge_lora(self.module)
        self.lora = None

    def add_indicator(self, guidance: Guidance) -> None:
        """Makes it a policy that is told whether an action was good, and asked for good ones.

        Nothing changes for a `chunk_flow` until it is trained: its vectors are 0 at first.

        Raises:
            UnsupportedPolicy: it reads no instruction, or cuts the prompt before the indicator.
        """
        module: Any = self.module
        if self.kind == "chunk_flow":
            if not self.config.advantage_indicator:
                module.add_indicator()
        elif not self.can_continue:
            raise UnsupportedPolicy(
                f"{self.kind} reads no instruction, so it cannot be told what was good; take "
                "chunk_flow, smolvla, pi0 or pi05"
            )
        else:
            self._require_whole_prompts()
        self.guidance = guidance

    def _require_whole_prompts(self) -> None:
        blank: dict[str, Any] = {
            key: torch.zeros(1, *feature.shape, device=self.device)
            for key, feature in self.config.input_features.items()
        }
        for text in {task.instruction for task in self.contract.tasks.values()}:
            good, bad = (
                self._inputs(blank, [with_indicator(text, indicator)])
                for indicator in (Indicator.POSITIVE, Indicator.NEGATIVE)
            )
            tokens = "observation.language.tokens"
            if torch.equal(good[tokens], bad[tokens]):
                raise UnsupportedPolicy(
                    f"the prompt of {text!r} with its indicator is longer than this {self.kind} "
                    f"reads ({good[tokens].shape[1]} tokens): shorten the instruction, or raise "
                    "tokenizer_max_length"
                )

    @property
    def precision(self) -> Precision:
        """In which the networks compute; weights and losses stay float32. Kept in config.json."""
        return "bfloat16" if self.config.use_amp else "float32"

    @precision.setter
    def precision(self, value: Precision) -> None:
        self.config.use_amp = value == "bfloat16"

    def _computing(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.config.use_amp))

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
    def can_continue(self) -> bool:
        """Whether `act` takes `previous`: flow policies do."""
        return self.head.can_continue

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def encode(self, observation: Observation, instruction: list[str]) -> Any:
        """The head's context; give it to `sample` for many chunks of one observation."""
        with self._computing():
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
        size = len(instruction)
        observation, instruction, beta = self._asked(observation, instruction)
        if previous is None:
            with torch.inference_mode():
                context = self.encode(observation, instruction)
                return self.sample(context, size, n_samples, noise=noise, beta=beta)
        if not self.can_continue:
            raise ValueError(
                f"{self.kind} has no flow that could be led to continue a running chunk; act "
                "without `previous` and blend where the chunks overlap"
            )
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
            with self._computing():
                context = self.head.encode(inputs)
            return self.sample(context, size, n_samples, noise=noise, follow=follow, beta=beta)

    def _asked(
        self, observation: Observation, instruction: list[str]
    ) -> tuple[Observation, list[str], float]:
        """What the networks see: once, or twice where `beta` (then not 1) extrapolates."""
        if self.guidance is None:
            return observation, instruction, 1.0
        prompts = self.guidance.prompts(instruction)
        if len(prompts) == 1:
            return observation, prompts[0], 1.0
        twice = {key: torch.cat([value, value]) for key, value in observation.items()}
        return twice, [*prompts[0], *prompts[1]], self.guidance.beta

    def sample(
        self,
        context: Any,
        batch_size: int,
        n_samples: int = 1,
        *,
        noise: Float[Tensor, "B n H W"] | None = None,
        follow: tuple[Tensor, Tensor, RtcConfig] | None = None,
        beta: float = 1.0,
    ) -> Float[Tensor, "B n H A"]:
        """Chunks from noise, in robot units; the context stays usable.

        Args:
            follow: (previous (B, H, W), weights (H, W), config) of `vla_post.policies.rtc`.
            beta: other than 1 extrapolates from a context of 2 B items (`indicator.extrapolated`).
        """
        shape = (batch_size, n_samples, self.horizon, self.noise_size)
        if noise is None:
            noise = parallel.share(
                lambda rows: torch.randn(rows, *shape[1:], device=self.device), batch_size
            )
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {shape}")
        guide: Guide | None = None if beta == 1.0 else partial(extrapolated, beta=beta)
        if follow is not None:
            previous, weights, rtc = follow
            previous = previous.repeat_interleave(n_samples, dim=0)
            lead = partial(guided, previous=previous, weights=weights.to(previous), config=rtc)
            guide = lead if guide is None else _in_turn(guide, lead)
        with self._computing():
            action = self.head.sample(context, noise, guide)
        action = self.unnormalise(action.float().flatten(0, 1))
        return action.unflatten(0, (batch_size, n_samples))

    def chunk_loss(
        self,
        batch: Batch,
        *,
        noise: Float[Tensor, "B n H W"] | Float[Tensor, "B H W"] | None = None,
        time: Float[Tensor, "B n"] | Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " B"]:
        """The policy's own training loss of each item over valid steps; padding weighs exactly 0.

        `noise` and `time` (0 noise, 1 data) fix the draw; without them `flow_samples` pairs are
        drawn per item.
        """
        inputs = self._inputs(batch.observation, batch.instruction, action=batch.action)
        action = inputs["action"]
        # Some networks see the whole noisy chunk: a padded step may hold anything but NaN.
        action = torch.where(batch.valid[..., None], action, action.nan_to_num(0.0, 0.0, 0.0))
        if noise is None:
            shape = (self.flow_samples, self.horizon, self.noise_size)
            noise = parallel.share(
                lambda rows: torch.randn(rows, *shape, device=action.device), len(action)
            )
        elif noise.ndim == 3:
            noise = noise[:, None]
        if time is None:
            time = parallel.share(
                lambda rows: self.head.sample_time(rows, action.device),
                noise.shape[0] * noise.shape[1],
            )
        time = time.reshape(noise.shape[:2])
        with self._computing():
            context = self.head.encode(inputs)
            loss = self.head.loss(context, action, batch.valid, noise, time).float().mean(dim=1)
        self.last_loss = loss.detach(), batch.valid.any(dim=1)
        return loss

    def features(self, observation: Observation, instruction: list[str]) -> Float[Tensor, "B F"]:
        """What the policy's own encoder says of the observation, for critics and scorers."""
        with self._computing():
            return self.head.features(self.encode(observation, instruction)).float()

    def observation_encoder(self) -> ObservationEncoder:
        """What the policy sees with, sharing its weights; see `vla_post.policies.encoder`."""
        return observation_encoder(self)

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


def read_guidance(card: Mapping[str, Any]) -> Guidance | None:
    """How the policy of a checkpoint's card acts with its indicator; None without one."""
    found = card.get("guidance")
    return None if found is None else Guidance(**found)


def _in_turn(first: Guide, second: Guide) -> Guide:
    return lambda velocity: second(first(velocity))


def load_weights(module: nn.Module, folder: Path) -> None:
    """Copies a checkpoint's weights into a module of the same architecture.

    Raises:
        CheckpointError: missing file, or weights of another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    try:
        weights = load_file(file)
        fix = getattr(module, "_fix_pytorch_state_dict_keys", None)
        if fix and not all(name.startswith("model.") for name in weights):
            # pi0 and pi0.5: openpi's names, as lerobot's own loading reads them.
            fixed: dict[str, Tensor] = fix(weights, module.config)
            weights = {
                name if name.startswith("model.") else f"model.{name}": value
                for name, value in fixed.items()
            }
        own = module.state_dict(keep_vars=True)
        weights = {
            name: placed(value, own[name]) if name in own else value
            for name, value in weights.items()
        }
        missing, unexpected = module.load_state_dict(weights, strict=False)
        # lerobot stores tied weights once: what shares memory with a loaded tensor has its values.
        memory = {name: local(tensor.detach()).data_ptr() for name, tensor in own.items()}
        loaded = {memory[name] for name in own.keys() & weights.keys()}
        missing = [name for name in missing if memory[name] not in loaded]
        if missing or unexpected:
            raise RuntimeError(
                f"missing {', '.join(missing[:3]) or 'nothing'}, unexpected "
                f"{', '.join(unexpected[:3]) or 'nothing'}"
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: not the weights of this architecture ({error}). Compare config.json with the "
            "version that ran before, or roll back."
        ) from error


def _unshared(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, tied weights written out once per name, as safetensors wants them."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        value = tensor.detach().cpu().contiguous()
        out[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return out


def _quiet() -> redirect_stdout[TextIO]:
    """lerobot prints while it builds; our stdout is for data."""
    return redirect_stdout(sys.stderr)


def _offline() -> None:
    """Checkpoints are complete: a robot must not wait for a hub that it cannot reach."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _copy_folder(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".model", ".txt"):
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
