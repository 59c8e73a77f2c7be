"""One writer per store: an advisory lock on local disks, a lease in the repository on S3."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from trajectory_store.errors import StoreBusy
from trajectory_store.repository import is_url, open_repository, repository_exists, translated

LEASE_S = 30.0
"""On S3 a writer that has been silent for so long counts as dead."""
log = logging.getLogger(__name__)


class WriterLock:
    """Held from `acquire` to `release`; on S3 it lapses LEASE_S after a crash."""

    def __init__(self, location: str, name: str) -> None:
        self.location = location
        self.holder = {
            "writer": name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": os.urandom(8).hex(),
            "processes": _processes(),
        }
        self._handle: int | None = None
        self._path = Path()
        self._renewed = 0.0

    def acquire(self) -> None:
        """Raises:
        StoreBusy: names the holder.
        StoreUnavailable: the place cannot be written.
        """
        if is_url(self.location):
            self._lease(check=True)
            return
        store = Path(self.location)
        # Beside the store: icechunk wants its folder for itself.
        path = store.parent / f".{store.name}.lock"
        with translated(self.location):
            store.parent.mkdir(parents=True, exist_ok=True)
            # Held read-only, so that a disk can still be remounted read-only under a writer.
            handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise self._busy(_read_holder(path)) from None
        try:
            with translated(self.location):
                if os.statvfs(path).f_flag & os.ST_RDONLY:
                    raise OSError(errno.EROFS, "Read-only file system")
            # A full disk must not keep a writer from opening: the name is a courtesy.
            with contextlib.suppress(OSError):
                path.write_text(json.dumps(self.holder))
        except BaseException:
            os.close(handle)
            raise
        self._handle, self._path = handle, path

    def refresh(self) -> None:
        """Renews the lease on S3 when a third of it has passed."""
        if is_url(self.location) and time.monotonic() - self._renewed > LEASE_S / 3:
            self._lease(check=False)

    def release(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.truncate(self._path, 0)
            os.close(self._handle)
            self._handle = None
        elif is_url(self.location) and self._renewed:
            with contextlib.suppress(Exception):
                repository = open_repository(self.location)
                if repository.get_metadata().get("token") == self.holder["token"]:
                    repository.update_metadata({"until": 0.0})

    def _lease(self, check: bool) -> None:
        if not repository_exists(self.location):
            return  # created next; two creators conflict in icechunk
        repository = open_repository(self.location)
        with translated(self.location):
            found = repository.get_metadata()
            foreign = found.get("token") != self.holder["token"]
            if foreign and float(found.get("until", 0.0)) > time.time() and not _has_died(found):
                raise self._busy(found)
            if foreign and not check and found.get("token"):
                raise self._busy(found)
            repository.update_metadata(self.holder | {"until": time.time() + LEASE_S})
        self._renewed = time.monotonic()

    def _busy(self, holder: dict[str, Any]) -> StoreBusy:
        who = holder.get("writer", "another process")
        where = f"{holder.get('host', '?')}, process {holder.get('pid', '?')}"
        return StoreBusy(
            f"{self.location}: {who} ({where}, since {holder.get('since', '?')}) is writing here; "
            "a store has one writer. Stop it, or give this writer its own folder."
        )


def _processes() -> str:
    """Names the set of processes in which a process id means something: this boot's, this
    container's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _has_died(holder: dict[str, Any]) -> bool:
    """The holder of a lease was a process of this machine and is gone; no need to wait for it."""
    if not holder.get("processes") or holder["processes"] != _processes():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, ValueError, OSError):
        pass
    return False


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
