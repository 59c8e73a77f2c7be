"""A real S3 server (moto's) as a process that may be stopped and started, and a proxy to cut.

    python benchmarks/s3_local.py PORT FOLDER

moto keeps objects in memory. This one writes them to FOLDER when it is told to end, and serves them
again when it is started there, with the same ETags: to its clients it is a server that was away.
"""

import contextlib
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

ACCOUNT = "123456789012"

PATIENCE_S = 600.0
"""For starting and stopping: all objects, which may be many, are read or written then."""


class S3Server:
    """The server's process. `environment` is what a client's process needs."""

    def __init__(self, folder: Path, bucket: str = "fleet") -> None:
        self.folder, self.bucket = folder, bucket
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        command = [sys.executable, __file__, str(self.port), str(self.folder), self.bucket]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert self._process.poll() is None, "the S3 server stopped"
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        """Objects stay in the folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(timeout=PATIENCE_S)
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def client_environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


class Proxy(socketserver.ThreadingTCPServer):
    """Forwards to `port`; `mode` is `open`, `cut` (refuses) or `swallow` (loses the answers)."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = port
        self.mode = "open"
        self.swallowed = 0
        self.sent = 0
        """Bytes from clients to the server."""
        self.requests: Counter[str] = Counter()
        """By method; a request begins a packet of its own."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(socketserver.BaseRequestHandler):
    server: Proxy

    def handle(self) -> None:
        if self.server.mode == "cut":
            return
        try:
            upstream = socket.create_connection(("127.0.0.1", self.server.target))
        except OSError:
            return  # the server is away
        with upstream:
            back = threading.Thread(target=self._back, args=(upstream,), daemon=True)
            back.start()
            try:
                while self.server.mode != "cut" and (data := self.request.recv(65536)):
                    self.server.sent += len(data)
                    method = data[:8].split(b" ", 1)[0].decode("latin-1")
                    if method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
                        self.server.requests[method] += 1
                    upstream.sendall(data)
            except OSError:
                pass
            self._shut(upstream)
            back.join(timeout=5)

    def _back(self, upstream: socket.socket) -> None:
        try:
            while data := upstream.recv(65536):
                if self.server.mode == "swallow":
                    self.server.swallowed += 1
                    break
                if self.server.mode == "cut":
                    break
                self.request.sendall(data)
        except OSError:
            pass
        self._shut(self.request)

    @staticmethod
    def _shut(side: socket.socket) -> None:
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)


def _backend() -> Any:
    from moto.s3.models import s3_backends

    return s3_backends[ACCOUNT]["aws"]


def _load(folder: Path) -> None:
    backend = _backend()
    index = folder / "index.json"
    if index.exists():
        for bucket, keys in json.loads(index.read_text()).items():
            backend.create_bucket(bucket, "us-east-1")
            for number, key in keys:
                backend.put_object(bucket, key, (folder / number).read_bytes())


def _save(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[tuple[str, str]]] = {}
    number = 0
    for name, bucket in _backend().buckets.items():
        index[name] = []
        for key in list(bucket.keys.keys()):
            number += 1
            (folder / str(number)).write_bytes(bucket.keys[key].value)
            index[name].append((str(number), key))
    (folder / "index.json").write_text(json.dumps(index))


def main() -> None:
    port, folder, bucket = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    def end(*_: object) -> None:
        _save(folder)
        os._exit(0)  # whatever is under way is cut, as when a server goes

    def outlive(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=outlive, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGTERM, end)
    _load(folder)
    if bucket not in _backend().buckets:
        _backend().create_bucket(bucket, "us-east-1")
    application = DomainDispatcherApplication(create_backend_app)
    make_server(
        "127.0.0.1", port, application, threaded=True, request_handler=MotoRequestHandler
    ).serve_forever()


if __name__ == "__main__":
    main()
