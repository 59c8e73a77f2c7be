"""`metrics.jsonl`: one JSON object a line, always; wandb as a mirror of it."""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

log = logging.getLogger(__name__)

MIRROR_PERIOD_S = 2.0
"""Rows of updates reach the mirror this often; other rows always do."""


class MetricsLog:
    """Appends to a file, each line whole and flushed, and mirrors numbers to wandb.

    Args:
        path: of the file; its folder is made.
        mirror: also to wandb: offline unless the user is logged in or set WANDB_MODE.
        config: what the mirror shows as the run's configuration.
    """

    def __init__(
        self, path: Path, *, mirror: bool = False, config: Mapping[str, Any] | None = None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")
        self._start = time.monotonic()
        self._mirror: Any = _open_mirror(path.parent, config or {}) if mirror else None
        self._mirrored_s = -MIRROR_PERIOD_S

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds `time_s` since the log was opened and `stamp_s`, the wall clock."""
        full = {"time_s": round(time.monotonic() - self._start, 3), "stamp_s": time.time(), **row}
        self._file.write(json.dumps(full) + "\n")
        self._file.flush()
        # wandb's own process took most of a core at a hundred rows a second; the file has them all.
        due = time.monotonic() - self._mirrored_s >= MIRROR_PERIOD_S
        if self._mirror is not None and (due or "loss" not in row):
            self._mirrored_s = time.monotonic()
            self._mirror.log({k: v for k, v in full.items() if isinstance(v, (int, float))})

    def close(self) -> None:
        self._file.close()
        if self._mirror is not None:
            self._mirror.finish(quiet=True)
            self._mirror = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a line that is being written is left out."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def _open_mirror(folder: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        log.info("wandb is not installed; metrics.jsonl has everything")
        return None
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    try:
        return wandb.init(
            project="vla-post", dir=str(folder), config=dict(config), mode=mode, settings=settings
        )
    except Exception as error:  # a mirror must not stop the run, whatever breaks in it
        log.warning("wandb does not start (%s); metrics.jsonl has everything", error)
        return None
