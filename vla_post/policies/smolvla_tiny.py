"""lerobot's SmolVLA at a size that learns on a CPU: about a million parameters, no hub.

lerobot builds SmolVLA from a folder that describes its vision-language model: configuration,
tokenizer, image processor. `write_vlm_folder` writes such a folder for a tiny SmolVLM, with a
byte-level tokenizer, so that any instruction can be said and the longest stays short.
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_CORPUS = (
    "Open a drawer. Close the drawer. Press a button from the top. Push and open a window. "
    "Close a window. Pick and place a puck to a goal. Push the puck to a goal. Reach a goal "
    "position. Open a door with a revolving joint. Hammer a screw on the wall. Insert a peg "
    "sideways. Dunk the basketball into the basket. Grasp a stick and pull a box with the stick. "
    "Kick a soccer into the goal. Pick up a nut and place it onto a peg. Move the cup to the left "
    "of the plate. Turn the handle, lift the lid, fold the towel, wipe the table, stack the cubes."
)
"""What the tokenizer's merges are learned from: short commands, as cells give them."""

_SPECIAL = (
    "<pad>", "<|endoftext|>", "<image>", "<fake_token_around_image>", "<global-img>",
    "<end_of_utterance>",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TinyVlmConfig:
    """Size of the vision-language model. The defaults are the demo's policy."""

    image_size: int = 64
    """Pixels along each side; smaller or larger cameras are resized to it."""
    patch_size: int = 8
    pixel_shuffle: int = 2
    """Patches along each side that become one token."""
    vision_width: int = 96
    vision_layers: int = 3
    text_width: int = 96
    text_layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 512


def write_vlm_folder(folder: Path, config: TinyVlmConfig | None = None) -> Path:
    """Writes the folder that `SmolVLAConfig.vlm_model_name` points at; the same bytes each time."""
    # Typed as Any: these classes take their fields as keywords that only their code knows.
    tf: Any = import_module("transformers")
    config = config or TinyVlmConfig()
    tokenizer = make_tokenizer(
        config.vocabulary,
        _SPECIAL,
        eos_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    size = {"longest_edge": config.image_size}
    pictures: dict[str, Any] = {"size": size, "max_image_size": size, "do_image_splitting": False}
    processor = tf.SmolVLMProcessor(
        image_processor=tf.SmolVLMImageProcessor(**pictures),
        tokenizer=tokenizer,
        video_processor=tf.SmolVLMVideoProcessor(size=size, max_image_size=size),
        image_seq_len=(config.image_size // config.patch_size // config.pixel_shuffle) ** 2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    vlm = tf.SmolVLMConfig(
        vision_config={
            "model_type": "smolvlm_vision",
            "hidden_size": config.vision_width,
            "intermediate_size": 2 * config.vision_width,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.heads,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": config.text_width,
            "intermediate_size": 2 * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.text_width // config.heads,
            "vocab_size": config.vocabulary,
            "max_position_embeddings": 512,
            "pad_token_id": _SPECIAL.index("<pad>"),
            "bos_token_id": _SPECIAL.index("<|endoftext|>"),
            "eos_token_id": _SPECIAL.index("<|endoftext|>"),
        },
        scale_factor=config.pixel_shuffle,
        image_token_id=_SPECIAL.index("<image>"),
        pad_token_id=_SPECIAL.index("<pad>"),
        tie_word_embeddings=False,  # lerobot looks for `lm_head` among the parameters
    )
    (folder / "config.json").write_text(
        json.dumps(vlm.to_diff_dict(), indent=2, sort_keys=True, default=str) + "\n"
    )
    return folder


def make_tokenizer(vocabulary: int, special: tuple[str, ...], **arguments: Any) -> Any:
    """A byte-level tokenizer with merges for short commands; `special` (with `<pad>`) first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tf: Any = import_module("transformers")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([_CORPUS], trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", **arguments)
