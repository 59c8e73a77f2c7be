"""A learner's state on disk: nested dicts of tensors and plain values, without pickle.

Tensors go to `NAME.safetensors`, the rest to `NAME.json`. Written under a temporary name and
renamed, so an interrupted save leaves the previous state.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Keys must be strings or integers; values dicts, lists, tensors or plain JSON values."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _split(state, "", tensors)
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f"{name}.safetensors", folder / f"{name}.json"
    save_file(tensors, weights.with_suffix(".safetensors.new"))
    text.with_suffix(".json.new").write_text(json.dumps(tree))
    weights.with_suffix(".safetensors.new").replace(weights)
    text.with_suffix(".json.new").replace(text)


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """What `save_state` wrote. Raises FileNotFoundError when there is none."""
    tree = json.loads((folder / f"{name}.json").read_text())
    return _join(tree, load_file(folder / f"{name}.safetensors"))


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        pairs = [
            [key, _split(inner, f"{path}/{key}", tensors)]  # pairs keep integer keys integers
            for key, inner in value.items()
        ]
        return {"pairs": pairs}
    if isinstance(value, (list, tuple)):
        return {"list": [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _join(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, inner),) = tree.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "pairs":
        return {key: _join(value, tensors) for key, value in inner}
    if kind == "list":
        return [_join(value, tensors) for value in inner]
    return inner
