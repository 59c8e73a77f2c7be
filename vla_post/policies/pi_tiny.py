"""lerobot's pi0 and pi0.5 at a size that runs on a CPU, without a hub.

lerobot knows two sizes of Gemma, a fixed SigLIP of 400 M parameters and a tokenizer on the hub.
Inside `pi_parts(folder)` it builds its own classes at the sizes and with the tokenizer that the
folder describes. A folder without sizes (of a full checkpoint) only names the tokenizer.
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vla_post.policies.smolvla_tiny import make_tokenizer

SIZES = "pi_sizes.json"
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<image>")


@dataclass(frozen=True, kw_only=True)
class TinyPiConfig:
    """Size of both Gemmas and of SigLIP; lerobot's attention wants 8 heads."""

    image_size: int = 64
    patch_size: int = 16
    vision_width: int = 64
    vision_layers: int = 2
    text_width: int = 64
    text_mlp: int = 128
    expert_width: int = 64
    expert_mlp: int = 128
    layers: int = 3
    head_size: int = 16
    vocabulary: int = 512


def write_pi_folder(folder: Path, config: TinyPiConfig | None = None) -> Path:
    """Writes tokenizer and sizes; the same bytes each time."""
    config = config or TinyPiConfig()
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(
        config.vocabulary, _SPECIAL, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    (folder / SIZES).write_text(json.dumps(asdict(config), indent=2, sort_keys=True) + "\n")
    return folder


@contextmanager
def pi_parts(folder: Path | None) -> Generator[None]:
    """While open, lerobot builds pi0 and pi0.5 from the folder's parts; None changes nothing."""
    if folder is None:
        yield
        return
    names = ("pi0", "pi05")
    modeling = [import_module(f"lerobot.policies.{n}.modeling_{n}") for n in names]
    processing = [import_module(f"lerobot.policies.{n}.processor_{n}") for n in names]
    changes: list[tuple[Any, str, Any]] = []

    def change(module: Any, name: str, value: Any) -> None:
        changes.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    try:
        for module in processing:
            change(module, "TokenizerProcessorStep", _local_tokenizer(module, folder))
        if (folder / SIZES).exists():
            size = TinyPiConfig(**json.loads((folder / SIZES).read_text()))
            for module in modeling:
                change(module, "get_gemma_config", _gemma_sizes(module, size))
                for name in ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"):
                    change(module, name, _shrunk(getattr(module, name), size))
        yield
    finally:
        for module, name, value in reversed(changes):
            setattr(module, name, value)


def _local_tokenizer(module: Any, folder: Path) -> Any:
    step = module.TokenizerProcessorStep

    def make(**arguments: Any) -> Any:
        return step(**arguments | {"tokenizer_name": str(folder)})

    return make


def _gemma_sizes(module: Any, size: TinyPiConfig) -> Any:
    def sizes(variant: str) -> Any:
        expert = variant == "gemma_300m"
        return module.GemmaConfig(
            width=size.expert_width if expert else size.text_width,
            depth=size.layers,
            mlp_dim=size.expert_mlp if expert else size.text_mlp,
            num_heads=8,
            num_kv_heads=1,
            head_dim=size.head_size,
        )

    return sizes


def _shrunk(model: Any, size: TinyPiConfig) -> Any:
    """The class, made with what lerobot does not let one choose: vocabulary and vision tower."""

    def make(config: Any) -> Any:
        text = getattr(config, "text_config", config)
        text.vocab_size = size.vocabulary
        vision = getattr(config, "vision_config", None)
        if vision is not None:
            vision.hidden_size = size.vision_width
            vision.intermediate_size = 2 * size.vision_width
            vision.num_hidden_layers = size.vision_layers
            vision.num_attention_heads = 4
            vision.patch_size = size.patch_size
            vision.projection_dim = size.text_width
        return model(config=config)

    return make
