"""Order of writes on a local disk, so that a power cut leaves a store that opens.

icechunk's local storage renames new files into place and never syncs them, so that the file system
may write `repo`, which names the newest snapshot, before the chunks that the snapshot refers to. A
durable commit therefore

1. writes chunks, manifests and the snapshot, to which nothing refers yet (`Session.flush`),
2. syncs the file system,
3. moves the branch, which replaces `repo`,
4. syncs again.

Between 3 and 4, a file system that does not order a rename after the data of the renamed file (XFS;
ext4 mounted with noauto_da_alloc) may come back with an empty `repo`. Its predecessors are kept in
`overwritten/`, as hard links, and `restore_repo_file` takes the newest whole one.

syncfs also writes what others have on that file system; in return it needs no list of new files
and is one call, however many arrays a commit touches. On S3 a commit is durable when it returns.
"""

import ctypes
import logging
import os
from pathlib import Path

import icechunk
import imagecodecs

from trajectory_store.errors import StoreUnavailable
from trajectory_store.schema import BRANCH

log = logging.getLogger(__name__)
BACKUPS_KEPT = 32
"""Predecessors of `repo`. icechunk keeps all, which at a commit a second would soon outweigh the
data: each one lists every snapshot."""
_MAGIC = "ICE🧊CHUNK".encode()
_HEADER_BYTES = 39
_libc = ctypes.CDLL(None, use_errno=True)


def sync(folder: str | Path) -> None:
    """Returns when everything written so far on the folder's file system is on the disk.

    Raises:
        OSError: the disk failed.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(handle) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(handle)


def settle(location: str) -> None:
    """Syncs a local store; does nothing for one on S3.

    Raises:
        StoreUnavailable
    """
    if "://" not in location:
        try:
            sync(location)
        except OSError as error:
            raise StoreUnavailable(f"{location}: the disk did not sync ({error})") from error


def commit_session(
    repository: icechunk.Repository,
    location: str,
    session: icechunk.Session,
    message: str,
    *,
    durable: bool = True,
) -> str:
    """Commits the session and returns the snapshot's id; with `durable`, power cuts included."""
    if not durable or "://" in location:
        return session.commit(message)
    parent = session.snapshot_id
    snapshot_id = session.flush(message)
    sync(location)
    repository.reset_branch(BRANCH, snapshot_id, from_snapshot_id=parent)
    sync(location)
    return snapshot_id


def is_whole(repo_file: Path) -> bool:
    """The file is one that icechunk wrote, to its end."""
    try:
        raw = repo_file.read_bytes()
        return raw.startswith(_MAGIC) and bool(imagecodecs.zstd_decode(raw[_HEADER_BYTES:]))
    except (OSError, RuntimeError, ValueError):
        return False


def restore_repo_file(location: str) -> None:
    """Puts the newest whole predecessor in the place of a `repo` that a power cut emptied.

    The writer's lock is held. A `repo` that is whole, or a folder without one, is left alone.
    """
    repo = Path(location) / "repo"
    if "://" in location or not repo.is_file() or is_whole(repo):
        return
    for backup in _backups(location):
        if is_whole(backup):
            log.warning("%s: a power cut lost its last write; taking %s", repo, backup)
            part = repo.with_name(".repo.part")
            part.write_bytes(backup.read_bytes())
            sync(location)
            part.replace(repo)
            sync(location)
            return


def prune_backups(location: str) -> int:
    """Deletes all but the newest predecessors of `repo` in a local store; returns how many."""
    old = [] if "://" in location else _backups(location)[BACKUPS_KEPT:]
    for backup in old:
        backup.unlink(missing_ok=True)
    return len(old)


def _backups(location: str) -> list[Path]:
    """The newest first: icechunk's names count down."""
    folder = Path(location) / "overwritten"
    return sorted(folder.glob("repo.*")) if folder.is_dir() else []
