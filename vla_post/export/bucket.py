"""A policy registry in object storage: the same versions, pointer and history under s3://.

```text
s3://bucket/prefix/
  versions/v000012.json            the manifest; a version exists when this does
  files/SHA256                     a file, whole
  deltas/SHA256-BASE               what makes it of the file BASE, where that is smaller
  state.json                       pointer, canary and the last entries of the history
```

Objects are put first and the manifest last, with "only if it is not there": publication is atomic,
and two publishers never take one number. The state is replaced with "only if it is still what I
read". Differences (`delta.py`) are against a whole file, never against another difference, so a
robot needs at most two downloads, and one while it keeps the base. Everything is held against its
hash on arrival. Robots read through a cache on their own disk; while the bucket does not answer
they see the state as it was last.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from trajectory_store.repository import s3_options, unavailable
from vla_post.export.delta import NoDelta, decode, encode
from vla_post.export.registry import Registry, State
from vla_post.export.version import (
    MANIFEST,
    RegistryError,
    RegistryUnavailable,
    Version,
    VersionDamaged,
    manifest_bytes,
    parse_manifest,
    version_name,
)

log = logging.getLogger(__name__)
WORTH = 0.8
"""A difference is sent when it is at most this share of the whole file."""
SMALL_BYTES = 1 << 16
"""Files below this are sent whole."""
HISTORY_KEPT = 200
VERSIONS_CACHED = 8
"""Of a robot's cache, beside what the newest of them are differences of."""
YOUNG = timedelta(hours=1)
"""`prune` leaves objects that somebody may be publishing just now."""


class BucketRegistry(Registry):
    """See the module. `root` is the cache's folder."""

    def __init__(self, location: str, *, cache: Path | None = None) -> None:
        """Args:
        location: s3://bucket/prefix; AWS_* variables say where and as whom.
        cache: default $XDG_CACHE_HOME/vla_post/registry/HASH.
        """
        name = hashlib.sha256(location.encode()).hexdigest()[:16]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        super().__init__(cache or home / "vla_post" / "registry" / name)
        self._location = location
        self._objects = _Objects(location)
        self._tag: str | None = None
        self._known: State | None = None
        self._manifests: dict[int, Version] = {}
        self.problem = ""
        """Why the bucket did not answer the last time; empty when it did."""

    @property
    def location(self) -> str:
        return self._location

    # Versions ------------------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        names = [key.removesuffix(".json") for key, _ in self._objects.list("versions")]
        return sorted(int(n[1:]) for n in names if n.startswith("v") and n[1:].isdecimal())

    def version(self, number: int) -> Version:
        if number in self._manifests:
            return self._manifests[number]
        cached = self.root / version_name(number) / MANIFEST
        if cached.is_file():
            version = parse_manifest(cached.read_bytes(), str(cached))
        else:
            key = f"versions/{version_name(number)}.json"
            data = self._objects.get(key)
            if data is None:
                raise self._missing(number)
            version = parse_manifest(data, f"{self.location}/{key}")
        self._manifests[number] = version
        return version

    def path(self, number: int) -> Path:
        """Downloads what is not in the cache."""
        folder = self.root / version_name(number)
        if not folder.is_dir():
            self._fetch(self.version(number), folder)
        return folder

    def verify(self, number: int, **options: Any) -> Version:
        self.path(number)
        try:
            return super().verify(number, **options)
        except VersionDamaged:
            # The cache may be what is damaged; the bucket's objects are hashed as they come.
            shutil.rmtree(self.root / version_name(number), ignore_errors=True)
            for digest in self.version(number).files.values():
                self._content(digest).unlink(missing_ok=True)
            return super().verify(number, **options)

    def _fetch(self, version: Version, folder: Path) -> None:
        (self.root / "content").mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".fetching-", dir=self.root))
        try:
            for name, digest in version.files.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._have(digest, version.stored.get(name, f"files/{digest}")), target)
            (temporary / MANIFEST).write_bytes(manifest_bytes(version))
            temporary.chmod(0o755)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process of this robot was quicker
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._trim(version.number)

    def _content(self, digest: str) -> Path:
        return self.root / "content" / digest

    def _have(self, digest: str, key: str) -> Path:
        """The file in the cache, after a download if need be."""
        path = self._content(digest)
        if path.is_file():
            return path
        data = self._objects.get(key)
        if data is None:
            raise VersionDamaged(f"{self.location}/{key}: missing; roll back to another version")
        if key.startswith("deltas/"):
            base = key.rpartition("-")[2]
            try:
                data = decode(self._have(base, f"files/{base}").read_bytes(), data)
            except (NoDelta, ValueError, RuntimeError) as error:
                raise VersionDamaged(f"{self.location}/{key}: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise VersionDamaged(
                f"{self.location}/{key}: its SHA-256 is not the manifest's. Roll back to another "
                "version"
            )
        self._keep(digest, data)
        return path

    def _keep(self, digest: str, data: bytes) -> None:
        (self.root / "content").mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", dir=self.root)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(self._content(digest))

    def _trim(self, newest: int) -> None:
        """Old versions leave the cache, and contents that none of the rest needs."""
        cached = sorted(int(p.name[1:]) for p in self.root.glob("v??????"))
        keep = set(cached[-VERSIONS_CACHED:]) | {newest, (self._known or {}).get("version")}
        bases: set[str] = set()
        for number in cached:
            if number not in keep:
                shutil.rmtree(self.root / version_name(number), ignore_errors=True)
                self._manifests.pop(number, None)
            else:
                bases |= set(_bases(self.version(number)))
        for path in (self.root / "content").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_nlink == 1 and path.name not in bases:
                    path.unlink()

    # Publishing ----------------------------------------------------------------------------------

    def _take_in(self, temporary: Path, manifest: dict[str, Any]) -> Version:
        files: dict[str, str] = manifest["files"]
        last = max(self.numbers(), default=None)
        before = None if last is None else self.version(last)
        stored: dict[str, str] = {}
        objects: dict[str, bytes] = {}
        sent = 0
        for name, digest in files.items():
            data = (temporary / name).read_bytes()
            stored[name], objects[stored[name]] = self._smallest(name, digest, data, before)
            self._keep(digest, data)
            if before is None or before.files.get(name) != digest:
                sent += len(objects[stored[name]])
        for key, data in objects.items():
            if not self._objects.exists(key):
                self._objects.put(key, data)
        manifest = manifest | {"stored": stored, "sent_bytes": sent}
        while True:
            version = Version(number=max(self.numbers(), default=0) + 1, **manifest)
            key = f"versions/{version.name}.json"
            if self._objects.create(key, manifest_bytes(version)):
                break
            if self._objects.get(key) == manifest_bytes(version):
                break  # the answer to an earlier attempt was lost
        for key, data in objects.items():  # `prune` saw them before the manifest named them
            if not self._objects.exists(key):
                self._objects.put(key, data)
        self._fetch(version, self.root / version.name)
        return version

    def _smallest(
        self, name: str, digest: str, data: bytes, before: Version | None
    ) -> tuple[str, bytes]:
        """Object and contents for a file: whole, or as a difference of an earlier whole one."""
        whole = f"files/{digest}"
        if before is None or name not in before.files:
            return whole, data
        there = before.stored.get(name, whole)
        if before.files[name] == digest:  # unchanged: stays as it is stored
            return there, self._objects.get(there) or data if there != whole else data
        if not name.endswith(".safetensors") or len(data) < SMALL_BYTES:
            return whole, data
        base = there.rpartition("-")[2] if there.startswith("deltas/") else before.files[name]
        try:
            delta = encode(self._have(base, f"files/{base}").read_bytes(), data)
        except (NoDelta, VersionDamaged):
            return whole, data
        if len(delta) > WORTH * len(data):
            return whole, data
        return f"deltas/{digest}-{base}", delta

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._objects.delete(f"versions/{version_name(number)}.json")
            self._manifests.pop(number, None)
            shutil.rmtree(self.root / version_name(number), ignore_errors=True)
        needed: set[str] = set()
        for version in self.versions():
            needed |= set(version.stored.values())
            needed |= {f"files/{base}" for base in _bases(version)}
        before = datetime.now(UTC) - YOUNG
        for folder in ("files", "deltas"):
            for name, modified in self._objects.list(folder):
                if f"{folder}/{name}" not in needed and modified < before:
                    self._objects.delete(f"{folder}/{name}")

    # State ---------------------------------------------------------------------------------------

    def _state(self) -> State:
        try:
            changed = self._objects.get_if_changed("state.json", self._tag)
        except RegistryUnavailable as error:
            # A robot goes on with what it knew; who wants to change something is refused below.
            if not self.problem:
                log.warning("%s", error)
            self.problem = str(error)
            if self._known is None:
                self._known = self._remembered(error)
            return self._known
        self.problem = ""
        if changed is not None:
            data, self._tag = changed
            self._known = state = json.loads(data) if data else {}
            self._forget_others(state)
            self._remember(data)
        return self._known or {}

    def _forget_others(self, state: State) -> None:
        """A bucket that was emptied and filled again gives old numbers to new versions."""
        with contextlib.suppress(OSError, ValueError):
            if json.loads((self.root / "state.json").read_bytes()).get("id") == state.get("id"):
                return
        self._manifests.clear()
        for folder in self.root.glob("v??????"):
            shutil.rmtree(folder, ignore_errors=True)

    def _remember(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)
            part = self.root / f".state-{os.getpid()}"
            part.write_bytes(data)
            part.replace(self.root / "state.json")

    def _remembered(self, error: RegistryError) -> State:
        try:
            return json.loads((self.root / "state.json").read_bytes())
        except (OSError, ValueError):
            raise error from None

    def _change(self, change: Callable[[State], State], entries: list[dict[str, Any]]) -> None:
        while True:
            self._tag = None  # the newest, not what we know
            old = self._state()
            if self.problem:
                raise RegistryUnavailable(self.problem)
            new = change(old)
            history = [*old.get("history", ()), *entries][-HISTORY_KEPT:]
            new = new | {"history": history, "id": old.get("id") or uuid4().hex}
            if self._objects.replace("state.json", json.dumps(new).encode(), self._tag):
                self._tag = None
                return
            time.sleep(0.05)  # somebody else was quicker: look again

    def history(self) -> list[dict[str, Any]]:
        """The last HISTORY_KEPT entries."""
        return list(self._state().get("history", ()))


def _bases(version: Version) -> Iterator[str]:
    for key in version.stored.values():
        if key.startswith("deltas/"):
            yield key.rpartition("-")[2]


class _Objects:
    """The few operations on a bucket that this needs, with errors that a person can act on."""

    def __init__(self, location: str) -> None:
        try:
            import obstore
            from obstore.store import S3Store
        except ModuleNotFoundError:
            raise RegistryError(
                f"{location}: a registry on S3 needs the package obstore; install `vla-post[s3]`"
            ) from None
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        make: Any = S3Store
        retry = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
        self._obstore: Any = obstore
        self._store: Any = make(bucket, prefix=prefix or None, retry_config=retry, **s3_options())
        self._location = location

    @contextlib.contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except RegistryError:
            raise
        except Exception as error:  # obstore's classes share no useful base
            raise RegistryUnavailable(str(unavailable(self._location, error))) from error

    def get(self, key: str) -> bytes | None:
        with self._translated():
            try:
                return bytes(self._obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def get_if_changed(self, key: str, tag: str | None) -> tuple[bytes, str | None] | None:
        """(contents, tag); empty contents where there is nothing; None when the tag still holds."""
        options = {"if_none_match": tag} if tag else {}
        with self._translated():
            try:
                found = self._obstore.get(self._store, key, options=options)
                return bytes(found.bytes()), found.meta["e_tag"]
            except FileNotFoundError:
                return b"", None
            except self._obstore.exceptions.NotModifiedError:
                return None

    def exists(self, key: str) -> bool:
        with self._translated():
            try:
                self._obstore.head(self._store, key)
            except FileNotFoundError:
                return False
            return True

    def put(self, key: str, data: bytes) -> None:
        with self._translated():
            self._obstore.put(self._store, key, data)

    def create(self, key: str, data: bytes) -> bool:
        """False when something is there."""
        with self._translated():
            try:
                self._obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

    def replace(self, key: str, data: bytes, tag: str | None) -> bool:
        """False when it is not what had this tag any more; None: when something is there."""
        if tag is None:
            return self.create(key, data)
        with self._translated():
            try:
                mode = {"e_tag": tag}
                self._obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            except (self._obstore.exceptions.PreconditionError, FileNotFoundError):
                return False
            return True

    def list(self, folder: str) -> list[tuple[str, datetime]]:
        """(name, last change) of the objects in a folder."""
        with self._translated():
            return [
                (str(entry["path"]).rpartition("/")[2], entry["last_modified"])
                for page in self._obstore.list(self._store, prefix=folder)
                for entry in page
            ]

    def delete(self, key: str) -> None:
        with self._translated(), contextlib.suppress(FileNotFoundError):
            self._obstore.delete(self._store, key)
