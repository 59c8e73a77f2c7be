"""Any lerobot policy directory (of `lerobot-train`, or a hub download) as a checkpoint for a cell.

lerobot's weights, processors and statistics stay as they are; features take the contract's names.
Everything that does not fit is reported at once, before any weight is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trajectory_store.contract import Contract
from vla_post.policies.checkpoint import CARD, CheckpointError
from vla_post.policies.heads import check_family
from vla_post.policies.lerobot_adapter import VLM_FOLDER, LeRobotPolicy

FILES = (
    "config.json",
    "model.safetensors",
    "policy_preprocessor.json",
    "policy_postprocessor.json",
)
RESIZING = ("smolvla", "pi0", "pi05", "chunk_flow")
"""Types that bring pictures of any size to their own."""


def import_lerobot(
    folder: str | Path,
    contract: Contract,
    *,
    rename: Mapping[str, str] | None = None,
    vlm_folder: Path | None = None,
    device: str | None = None,
) -> LeRobotPolicy:
    """Reads lerobot's directory for a cell; `save` makes it a checkpoint.

    Args:
        rename: {feature of the directory: feature of the contract}, where the names differ.
        vlm_folder: tokenizer (and for SmolVLA the configuration) of the vision-language model.

    Raises:
        CheckpointError: files are missing or do not load, or features do not fit the contract.
        UnsupportedPolicy: a type or setting without a chunk head that we know.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(_what_is_missing(folder, missing))
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = str(config["type"])
        found: dict[str, Any] = config["input_features"]
        action = tuple(config["output_features"]["action"]["shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: not the configuration of a lerobot policy ({error!r})"
        ) from error
    check_family(kind)
    names = _match(kind, found, action, contract, dict(rename or {}))
    if vlm_folder is None and not (folder / VLM_FOLDER).is_dir():
        vlm_folder = _local_vlm(config, folder)
    policy = LeRobotPolicy.load_lerobot(folder, contract, {}, device=device, vlm_folder=vlm_folder)
    _rename_features(policy, names)
    policy.statistics = _statistics(policy)
    return policy


def _what_is_missing(folder: Path, missing: list[str]) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    text = f"{folder}: not a lerobot policy directory, it lacks {', '.join(missing)}"
    if missing == [n for n in FILES if n.startswith("policy_")]:
        text += (
            ". It was written by a lerobot that kept the normalisation inside the model; convert "
            "it with `python -m lerobot.processor.migrate_policy_normalization --pretrained-path "
            f"{folder}`"
        )
    elif (folder / "pretrained_model" / "config.json").is_file():
        text += f". Did you mean {folder / 'pretrained_model'}?"
    elif (folder / "adapter_config.json").is_file():
        text += ". It holds adapters of peft only; merge them into their policy first"
    return text


def _match(
    kind: str,
    found: Mapping[str, Any],
    action: tuple[int, ...],
    contract: Contract,
    rename: dict[str, str],
) -> dict[str, str]:
    """{feature of the directory: feature of the contract}; raises with every problem."""
    problems = [
        f"--rename names {key!r}, which the policy does not see; it sees {', '.join(found)}"
        for key in rename.keys() - found.keys()
    ]
    names: dict[str, str] = {}
    for key, feature in found.items():
        if ".empty_camera_" in key:
            names[key] = key  # lerobot fills these with blank pictures
            continue
        name = rename.get(key, key)
        declared = contract.observations.get(name)
        shape = tuple(feature["shape"])
        if declared is None:
            free = [k for k in contract.observations if k not in found and k not in rename.values()]
            problems.append(
                f"the policy sees {key} {shape}, which cell {contract.cell!r} does not declare; "
                f"give --rename {key}=NAME, where NAME is one of {', '.join(free) or 'none'}"
            )
            continue
        names[key] = name
        height_first = declared.shape if not declared.is_image else _channels_first(declared.shape)
        resized = declared.is_image and kind in RESIZING
        if height_first != shape and not (resized and len(shape) == 3):
            problems.append(
                f"{name}: the policy sees {shape}, the cell declares {height_first}"
                + (" (channels, height, width)" if declared.is_image else "")
            )
    if action != (contract.action.size,):
        problems.append(f"action: the policy has {action}, the cell ({contract.action.size},)")
    if problems:
        raise CheckpointError(
            f"this {kind} does not fit the contract of cell {contract.cell!r}:\n- "
            + "\n- ".join(problems)
        )
    return names


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    height, width, channels = shape
    return channels, height, width


def _local_vlm(config: Mapping[str, Any], folder: Path) -> Path | None:
    """Where the vision-language model's tokenizer is on this machine; None if it needs none."""
    if config["type"] not in ("smolvla", "pi0", "pi05"):
        return None
    steps = json.loads((folder / "policy_preprocessor.json").read_text()).get("steps", [])
    named = [step.get("config", {}).get("tokenizer_name") for step in steps]
    name = str(next(filter(None, named), config.get("vlm_model_name", "")))
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{folder}: its tokenizer {name!r} is not on this machine. Download it where there is "
            f"a network (`hf download {name} --exclude '*.safetensors' --local-dir DIR`) and give "
            "--vlm DIR"
        ) from error


def _rename_features(policy: LeRobotPolicy, names: Mapping[str, str]) -> None:
    """The contract's names, in the order in which the networks were trained."""

    def renamed(table: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(key, key): value for key, value in table.items()}

    policy.config.input_features = renamed(policy.config.input_features)
    for pipeline in (policy.preprocess, policy.postprocess):
        for step in pipeline.steps:
            if hasattr(step, "rename_map"):
                step.rename_map = {}
            if hasattr(step, "features") and hasattr(step, "stats"):
                step.features, step.stats = renamed(step.features), renamed(step.stats or {})
                step.to()


def _statistics(policy: LeRobotPolicy) -> dict[str, dict[str, Any]]:
    """What the normaliser holds, for the card."""
    for step in policy.preprocess.steps:
        stats = getattr(step, "stats", None)
        if stats:
            return {
                key: {name: np.asarray(value) for name, value in entry.items()}
                for key, entry in stats.items()
                if key in policy.contract.vectors or key == "action"
            }
    return {}


def is_ours(folder: Path) -> bool:
    """Whether the folder already is a checkpoint of this project."""
    return (folder / CARD).is_file()
