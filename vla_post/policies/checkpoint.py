"""The card of a checkpoint, `vla_post.json`: which cell it was made for, and by what.

Read by the registry and the robot, so neither torch nor lerobot is needed here.
"""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from trajectory_store.contract import Contract

CARD = "vla_post.json"
FORMAT = "vla_post/checkpoint/1"


class CheckpointError(ValueError):
    """A folder that is not a readable checkpoint; the message says what to do."""


def write_card(
    folder: Path,
    *,
    kind: str,
    contract: Contract,
    statistics: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, Any] | None = None,
    guidance: Mapping[str, Any] | None = None,
) -> None:
    """Writes the card beside a lerobot policy's own files.

    Args:
        training: what holds for whoever trains it next (frozen parts, adapters).
        guidance: how a policy with an indicator acts (`indicator.py`).
    """
    card = {
        "format": FORMAT,
        "kind": kind,
        "contract": contract.to_json(),
        "contract_sha256": contract.sha256,
        "statistics": {
            key: {name: np.asarray(value).tolist() for name, value in entry.items()}
            for key, entry in statistics.items()
        },
        "training": dict(training or {}),
        "guidance": None if guidance is None else dict(guidance),
        "versions": _versions("vla-post", "torch", "lerobot", "transformers"),
    }
    (folder / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card of a checkpoint folder.

    Raises:
        CheckpointError: no folder, no card, or not ours.
    """
    path = Path(folder) / CARD
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError as error:
        what = "has no " + CARD if Path(folder).is_dir() else "does not exist"
        raise CheckpointError(
            f"{folder}: not a checkpoint of this project, it {what}. `vla-post train` writes "
            "checkpoints; `vla-post registry list` shows the published ones."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint's card ({error})") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise CheckpointError(f"{path}: found format {found!r}; expected {FORMAT!r}")
    missing = {"kind", "contract", "contract_sha256", "statistics"} - card.keys()
    if missing:
        raise CheckpointError(f"{path}: the card lacks {', '.join(sorted(missing))}")
    return card


def _versions(*packages: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
