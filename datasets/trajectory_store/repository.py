"""Where a store lives: icechunk repositories in local folders and on S3, and fast reads from both.

icechunk's interface is asynchronous; `run` drives it from a loop of our own, so that callers in
threads, notebooks and event loops all work alike.
"""

import asyncio
import atexit
import logging
import os
import shutil
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import icechunk
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer.core import default_buffer_prototype
from zarr.core.buffer.cpu import Buffer

from trajectory_store.chunk_files import ChunkFiles
from trajectory_store.durability import is_whole, sync
from trajectory_store.errors import DamagedChunk, NotAStore, StoreError, StoreUnavailable

log = logging.getLogger(__name__)
if "ICECHUNK_LOG" not in os.environ:
    icechunk.set_logs_filter("error")  # it warns of two writers on a local disk; we hold a lock
SPLIT_CHUNKS = 4096
"""Chunk references in one manifest file: a commit rewrites the last one only."""

_loop: tuple[int, asyncio.AbstractEventLoop] | None = None
_loop_lock = threading.Lock()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Runs `work` on the package's own event loop and waits for it. Safe after a fork."""
    global _loop
    with _loop_lock:
        if _loop is None or _loop[0] != os.getpid():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="store-io", daemon=True)
            thread.start()
            _loop = (os.getpid(), loop)
            # A thread inside icechunk while the interpreter is torn down ends in a crash.
            atexit.register(_stop, os.getpid(), loop, thread)
    return asyncio.run_coroutine_threadsafe(work, _loop[1]).result()


def _stop(pid: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if pid == os.getpid():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)


def is_url(location: str) -> bool:
    return "://" in location


def normalise(location: str | Path) -> str:
    """A URL stays, a path becomes absolute."""
    text = str(location)
    if text.startswith("s3://"):
        return text.rstrip("/")
    if is_url(text):
        raise NotAStore(f"{text}: found another scheme; a store is a local folder or s3://...")
    return str(Path(text).expanduser().absolute())


def storage(location: str) -> icechunk.Storage:
    """Credentials and endpoint of S3 come from AWS_* variables (AWS_ENDPOINT_URL, ...)."""
    if not is_url(location):
        return icechunk.local_filesystem_storage(location)
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return icechunk.s3_storage(
        bucket=bucket,
        prefix=prefix,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        endpoint_url=endpoint,
        allow_http=bool(endpoint and endpoint.startswith("http://")),
        force_path_style=bool(endpoint),
        from_env=True,
    )


@cache
def _config() -> icechunk.RepositoryConfig:
    split = icechunk.ManifestSplittingConfig.from_dict(
        {
            icechunk.ManifestSplitCondition.AnyArray(): {
                icechunk.ManifestSplitDimCondition.Axis(0): SPLIT_CHUNKS
            }
        }
    )
    config = icechunk.RepositoryConfig.default()
    config.manifest = icechunk.ManifestConfig(splitting=split)
    # Chunks are cached by us, decoded; metadata caches are kept small so that hundreds of stores
    # fit.
    config.caching = icechunk.CachingConfig(
        num_snapshot_nodes=2_000, num_chunk_refs=20_000, num_bytes_chunks=0, num_bytes_attributes=0
    )
    # Updates listed in `repo`, which every commit rewrites; nothing of ours reads the list.
    config.num_updates_per_repo_info_file = 64
    # A lost connection must become an error within seconds: the writer then spools and tries again.
    config.storage = icechunk.StorageSettings(
        retries=icechunk.StorageRetriesSettings(
            max_tries=3, initial_backoff_ms=100, max_backoff_ms=1_000
        ),
        timeouts=icechunk.StorageTimeoutSettings(
            connect_timeout_ms=3_000, read_timeout_ms=10_000, operation_timeout_ms=30_000
        ),
    )
    return config


def _exists(location: str) -> bool:
    # Without these settings icechunk tries for a minute before it says that nobody answers.
    return icechunk.Repository.exists(storage(location), storage_settings=_config().storage)


def create_repository(location: str, first: Callable[[icechunk.Repository], None]) -> None:
    """A new repository with a first commit; on a local disk it appears whole or not at all."""
    with translated(location):
        if is_url(location):
            if not _exists(location):
                icechunk.Repository.create(storage(location), config=_config()).save_config()
            first(icechunk.Repository.open(storage(location), config=_config()))
            return
        target = Path(location)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise NotAStore(
                f"{location}: found something else there; expected a store, or an empty or new "
                "folder"
            )
        building = target.with_name(f".{target.name}.new")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        repository = icechunk.Repository.create(storage(str(building)), config=_config())
        repository.save_config()
        first(repository)
        sync(building)
        building.replace(target)
        sync(target.parent)


def repository_exists(location: str) -> bool:
    if not is_url(location):
        return (Path(location) / "repo").is_file()
    with translated(location):
        return _exists(location)


def open_repository(location: str) -> icechunk.Repository:
    """Raises:
    NotAStore: nothing there that icechunk wrote.
    StoreUnavailable: it cannot be reached or read.
    """
    if not is_url(location) and not (Path(location) / "repo").is_file():
        found = "a folder without one" if Path(location).is_dir() else "no such folder"
        if Path(location).is_file():
            found = "a file"
        raise NotAStore(
            f"{location}: found {found}, expected a trajectory store. "
            "`vla-post store ls FOLDER` lists the stores under a folder."
        )
    with translated(location):
        if is_url(location) and not _exists(location):
            raise NotAStore(f"{location}: no trajectory store under this prefix")
        try:
            return icechunk.Repository.open(storage(location), config=_config())
        except icechunk.IcechunkError:
            repo = Path(location) / "repo"
            if is_url(location) or is_whole(repo):
                raise
            raise DamagedChunk(
                f"{repo}: {repo.stat().st_size} bytes that icechunk did not write to the end; a "
                "power cut can do that. `vla-post store repair`, or the next writer, takes the "
                "newest whole one from overwritten/"
            ) from None


class translated:  # noqa: N801 - reads as a phrase: `with translated(location):`
    """Turns icechunk's and the system's errors into ours, with the location and a remedy."""

    def __init__(self, location: str) -> None:
        self.location = location

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, StoreError):
            return
        if isinstance(error, (icechunk.IcechunkError, OSError)):
            raise unavailable(self.location, error) from error


def unavailable(location: str, error: BaseException) -> StoreError:
    """The typed error that says what to do about a failed read or write."""
    text = str(error)
    low = text.lower()
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if "no space left" in low or "quota" in low:
        return StoreUnavailable(f"{location}: the disk is full ({first}). Free space, or move it.")
    if "read-only" in low or "permission denied" in low:
        return StoreUnavailable(
            f"{location}: cannot write here ({first}). Check the owner and the mount, or choose "
            "another folder."
        )
    if "snapshot id not found" in low:
        return StoreUnavailable(
            f"{location}: {first}; gc has expired that snapshot, or it belongs to another store"
        )
    if "repository doesn't exist" in low or ("not found" in low and "repo" in low):
        return NotAStore(f"{location}: no trajectory store here ({first})")
    if is_url(location):
        return StoreUnavailable(
            f"{location}: the object storage did not answer as expected ({first}). Check the "
            "network, AWS_ENDPOINT_URL and the credentials."
        )
    return StoreUnavailable(f"{location}: the store cannot be read or written ({first})")


class Snapshot:
    """Bytes of one snapshot, by zarr key. Threads may share it."""

    def __init__(self, location: str, repository: icechunk.Repository, snapshot_id: str) -> None:
        self.location = location
        self.snapshot_id = snapshot_id
        with translated(location):
            self.session = repository.readonly_session(snapshot_id=snapshot_id)
        self.store = self.session.store
        self._files = None if is_url(location) else ChunkFiles(location, repository, self.session)

    def get(self, key: str) -> bytes | None:
        """The whole value, or None where nothing was ever written."""
        with translated(self.location):
            return run(_get(self.store, key, None))

    def get_chunk(self, array: str, index: int, key: str) -> bytes | None:
        """`get` for chunk `index` along the first axis; local files are read straight."""
        if self._files is not None and (found := self._files.find(array, index)) is not None:
            return self._present(found.read(), key)
        return self.get(key)

    def _present(self, data: bytes | None, key: str) -> bytes:
        if data is None:
            raise DamagedChunk(
                f"{self.location}: the file of {key} has gone. Run `vla-post store verify` for the "
                "extent and `repair` to set the episodes aside."
            )
        return data

    def get_ranges(self, wanted: list[tuple[str, int, str, int, int]]) -> list[bytes | None]:
        """Parts of chunks: (array, index, key, start, stop) each."""
        out: list[bytes | None] = [None] * len(wanted)
        rest: list[int] = []
        for i, (array, index, _, start, stop) in enumerate(wanted):
            found = self._files.find(array, index) if self._files is not None else None
            if found is None:
                rest.append(i)
            else:
                out[i] = self._present(found.read(start, stop), wanted[i][2])
        if rest:
            with translated(self.location):
                values = run(_get_many(self.store, [wanted[i] for i in rest]))
            for i, value in zip(rest, values, strict=True):
                out[i] = value
        return out


async def _get(store: Any, key: str, span: tuple[int, int] | None) -> bytes | None:
    request = RangeByteRequest(*span) if span else None
    value = await store.get(key, default_buffer_prototype(), request)
    return None if value is None else value.to_bytes()


async def _get_many(store: Any, wanted: list[tuple[str, int, str, int, int]]) -> list[bytes | None]:
    gate = asyncio.Semaphore(64)

    async def one(key: str, start: int, stop: int) -> bytes | None:
        async with gate:
            return await _get(store, key, (start, stop))

    return await asyncio.gather(*(one(k, a, b) for _, _, k, a, b in wanted))


async def _set_many(store: Any, values: dict[str, bytes]) -> None:
    gate = asyncio.Semaphore(32)

    async def one(key: str, value: bytes) -> None:
        async with gate:
            await store.set(key, Buffer.from_bytes(value))

    # Metadata first: icechunk refuses a chunk outside its array's shape.
    await asyncio.gather(*(one(k, v) for k, v in values.items() if k.endswith("zarr.json")))
    await asyncio.gather(*(one(k, v) for k, v in values.items() if not k.endswith("zarr.json")))


def set_many(store: Any, values: dict[str, bytes]) -> None:
    run(_set_many(store, values))


async def _delete_many(store: Any, keys: list[str]) -> None:
    await asyncio.gather(*(store.delete(k) for k in keys))


def delete_many(store: Any, keys: list[str]) -> None:
    run(_delete_many(store, keys))


def find_stores(prefix: str, known: Collection[str] = ()) -> Iterator[str]:
    """Every store at or under a folder or S3 prefix, in order of name.

    Args:
        known: stores that were found before; on S3 each of them costs no request.
    """
    if is_url(prefix):
        yield from _find_on_s3(prefix, known)
        return
    root = Path(prefix)
    if (root / "repo").is_file():
        yield str(root)
        return
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if not n.startswith(".")]
        if "repo" in files:
            names.clear()
            yield folder
        names.sort()


def s3_options() -> dict[str, Any]:
    """For obstore's S3Store: endpoint from AWS_* variables as in `storage`, and patience."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    client: dict[str, Any] = {"connect_timeout": "3s", "timeout": "60s"}
    if not endpoint:
        return {"client_options": client}
    client["allow_http"] = endpoint.startswith("http://")
    return {
        "client_options": client,
        "endpoint": endpoint,
        "virtual_hosted_style_request": False,
    }


def _find_on_s3(prefix: str, known: Collection[str]) -> Iterator[str]:
    inside = {k for k in known if k.startswith(f"{prefix}/")}
    if prefix in known or (not inside and repository_exists(prefix)):
        yield prefix
        return
    try:
        from obstore.store import S3Store
    except ImportError:
        raise StoreError(
            f"{prefix}: listing stores on S3 needs the package obstore; "
            "install `vla-post[s3]`, or name each store"
        ) from None
    bucket, _, path = prefix.removeprefix("s3://").partition("/")
    try:
        make: Any = S3Store
        s3 = make(bucket, **s3_options())
        pending = [path]
        while pending:
            here = pending.pop(0)
            listed = s3.list_with_delimiter(f"{here}/" if here else None)
            names = {str(o["path"]).rsplit("/", 1)[-1] for o in listed["objects"]}
            if "repo" in names:
                yield f"s3://{bucket}/{here}"
            else:
                below = sorted(str(p).rstrip("/") for p in listed["common_prefixes"])
                yield from (s for p in below if (s := f"s3://{bucket}/{p}") in inside)
                pending += [p for p in below if f"s3://{bucket}/{p}" not in inside]
    except Exception as error:
        raise unavailable(prefix, error) from error
