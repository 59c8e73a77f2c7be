"""What converters share: refusing to overwrite, going on, contracts from feature lists, names."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from trajectory_store import Contract, Episode, Outcome, StoreError, StoreWriter

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of)."""


class ConversionError(StoreError):
    """The source cannot be converted, or the target is in the way."""


def quiet(_what: str, _done: int, _of: int) -> None:
    return


def clear_target(target: Path, force: bool) -> None:
    """Raises:
    ConversionError: something is there and `force` is off.
    """
    # Away first: killed in the middle of deleting, half of it would look like a conversion.
    away = target.with_name(f".{target.name}.deleted")
    if target.exists():
        if not force:
            raise ConversionError(
                f"{target}: exists already; choose another place, or overwrite it with --force"
            )
        remove(away)
        target.replace(away)
    remove(away)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


CUT_SHORT = ("the writer died", "the writer was closed", "write_episode stopped")
"""How the notes of an episode begin their last line when its writer did not come to its end."""


def is_whole(
    writer: StoreWriter, found: Episode | None, ticks: int, outcome: Outcome | str
) -> bool:
    """Whether a store holds an episode already.

    What an earlier conversion left of it when it was killed or interrupted is hidden under another
    uuid: the episode can be written anew.

    Args:
        found: its entry, if there is one.
        ticks: how many it is to have.
        outcome: how it is to end.
    """
    if found is None:
        return False
    said = found.notes.rpartition("\n")[2]
    if found.outcome != Outcome.INTERRUPTED or not said.startswith(CUT_SHORT):
        return True
    if len(found) == ticks and outcome == Outcome.INTERRUPTED:
        return True  # recorded so, and converted to the end
    writer.change_episode(found.uuid, lambda e: e.replace(uuid=str(uuid4()), deleted=True))
    writer.flush()  # before another episode of that uuid is in the table
    return False


def slug(text: str, fallback: str) -> str:
    """A contract's name from free text: lower case, digits, underscores."""
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:60]
    return name if name[:1].isalpha() else f"{fallback}_{name}".strip("_")


def make_contract(
    *,
    cell: str,
    robot: str,
    control_hz: float,
    vectors: dict[str, Sequence[str]],
    images: dict[str, tuple[int, int, int]],
    action: Sequence[str],
    tasks: dict[str, str],
    codec: str = "jpeg",
) -> Contract:
    """A contract for data of unknown origin: units unknown, limits wide open.

    Args:
        vectors: feature -> names of its entries.
        images: feature -> (height, width, channels).
        tasks: name -> instruction.
    """
    observations: dict[str, Any] = {
        key: {
            "topic": key.replace(".", "/"),
            "type": "sensor_msgs/JointState",
            "names": list(names),
            "shape": [len(names)],
            "unit": "unknown",
            "rate_hz": control_hz,
        }
        for key, names in vectors.items()
    }
    for key, shape in images.items():
        observations[key] = {
            "topic": key.replace(".", "/"),
            "type": "sensor_msgs/CompressedImage",
            "shape": list(shape),
            "unit": "rgb8" if shape[2] == 3 else "mono8",
            "rate_hz": control_hz,
            "codec": codec,
            "quality": 95,
        }
    wide = [-1e9, 1e9]
    return Contract.model_validate(
        {
            "schema": "vla_post/cell/1",
            "cell": slug(cell, "cell"),
            "robot": slug(robot, "robot"),
            "control_hz": control_hz,
            "observations": observations,
            "actions": {
                "action": {
                    "names": list(action),
                    "unit": "unknown",
                    "mode": "absolute",
                    "limits": {"position": [wide] * len(action)},
                }
            },
            "tasks": {
                name: {"instruction": text or name, "time_limit_s": 3600}
                for name, text in tasks.items()
            },
        }
    )


def names_of(declared: Any, size: int, prefix: str) -> list[str]:
    """Names of a vector's entries as declared: a list, a mapping of lists, or none."""
    if isinstance(declared, dict):
        declared = [n for part in declared.values() for n in np.atleast_1d(part).tolist()]
    names = [str(n) for n in declared or ()]
    if len(names) != size or len(set(names)) != size:
        names = [f"{prefix}_{i}" for i in range(size)]
    return names
