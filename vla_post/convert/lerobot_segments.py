"""A LeRobot dataset that grows in segments, so that a conversion killed at any instant goes on.

While lerobot writes, its newest parquet files have no end yet and info, statistics and tasks are
overwritten in place. But a dataset that is resumed only ever gets new files beside those it has. So
a segment is finalized, then one atomic checkpoint says which files there are and keeps copies of
the three that change. To go on is to put everything back as the checkpoint says.
"""

import base64
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from vla_post.convert.common import ConversionError

CHANGING = ("meta/info.json", "meta/stats.json", "meta/tasks.parquet")
"""What lerobot overwrites; every other file is left alone once its segment is over."""


class GrowingDataset:
    """The folder in which a dataset grows: `dataset`, `checkpoint.json`, scratch space, a lock.

    Args:
        plan: what is being written; a checkpoint of another plan is thrown away.
        episodes: rows of all episodes wanted, in order. A checkpoint holds the first ones.
    """

    def __init__(
        self, folder: Path, plan: dict[str, Any], episodes: Sequence[dict[str, Any]]
    ) -> None:
        self.folder, self.root = folder, folder / "dataset"
        self._checkpoint = folder / "checkpoint.json"
        self._scratch = folder / "scratch"
        self._plan, self._episodes = plan, episodes
        self._files: dict[str, int] = {}
        self.done = 0
        """Episodes that a kill cannot take away any more."""

    @classmethod
    @contextmanager
    def held(
        cls, folder: Path, plan: dict[str, Any], episodes: Sequence[dict[str, Any]]
    ) -> Generator[Self]:
        """As the newest checkpoint has it, and nobody else's meanwhile.

        The folder goes in the end; after an error or a kill it stays, for the next one.

        Raises:
            ConversionError: another process writes there, or the disk is full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConversionError(
                    f"{folder}: another process is writing this dataset; wait for it, or choose "
                    "another target"
                ) from None
            growing = cls(folder, plan, episodes)
            try:
                with _temporary_files_in(growing._scratch):
                    growing._restore()
                    yield growing
            except Exception as error:
                if _disk_is_full(error):
                    raise ConversionError(
                        f"{folder}: the disk is full; {growing.done} of {len(episodes)} episodes "
                        "are safe there. Make room and give the same command again: it goes on "
                        "with the next one"
                    ) from error
                raise
        shutil.rmtree(folder)

    def commit(self, done: int) -> None:
        """Keeps the finalized dataset, which holds the first `done` episodes, from any kill."""
        files = _sizes(self.root)
        changing = {n: base64.b64encode((self.root / n).read_bytes()).decode() for n in CHANGING}
        for name in CHANGING:
            del files[name]
        content = {
            "plan": self._plan,
            "episodes": self._episodes[:done],
            "files": files,
            "changing": changing,
        }
        part = self._checkpoint.with_suffix(".part")
        part.write_text(json.dumps(content))
        part.replace(self._checkpoint)
        self._files, self.done = files, done

    @property
    def loose_bytes(self) -> int:
        """Size of the data and videos that a kill would take away now."""
        sizes = _sizes(self.root).items()
        return sum(size for name, size in sizes if name not in self._files)

    def _restore(self) -> None:
        found: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # nothing there yet
            found = json.loads(self._checkpoint.read_text())
        files: dict[str, int] = found.get("files", {})
        episodes: list[dict[str, Any]] = found.get("episodes", [])
        there = _sizes(self.root)
        if (
            not episodes
            or found["plan"] != self._plan
            or episodes != list(self._episodes[: len(episodes)])
            or any(there.get(name) != size for name, size in files.items())
        ):
            self._checkpoint.unlink(missing_ok=True)  # before the files that it speaks of
            shutil.rmtree(self.root, ignore_errors=True)
            return
        for name in there.keys() - files.keys():
            (self.root / name).unlink()
        for name, content in found["changing"].items():
            (self.root / name).write_bytes(base64.b64decode(content))
        for folder, _, _ in os.walk(self.root, topdown=False):
            with suppress(OSError):  # it is not empty
                os.rmdir(folder)
        self._files, self.done = files, len(episodes)


def _sizes(root: Path) -> dict[str, int]:
    """Bytes of every file, by its path relative to `root`."""
    return {
        os.path.relpath(path, root): os.path.getsize(path)
        for folder, _, names in os.walk(root)
        for name in names
        for path in [os.path.join(folder, name)]
    }


@contextmanager
def _temporary_files_in(folder: Path) -> Generator[None]:
    """Keeps what lerobot leaves in the machine's temporary folder (a whole video when it is killed)
    and in Hugging Face's cache (the episode table of every segment) where it can be cleared away.
    """
    import datasets.config

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before = tempfile.tempdir, datasets.config.HF_DATASETS_CACHE
    tempfile.tempdir = str(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    try:
        yield
    finally:
        tempfile.tempdir, datasets.config.HF_DATASETS_CACHE = before


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
