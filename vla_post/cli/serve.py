"""`vla-post serve`: a policy for robots on other machines."""

import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vla_post.cli.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a policy over WebSockets; runners call it with `backend:=remote policy:=ws://HOST:PORT`.

    The token comes from --token-file or the environment's VLA_POST_TOKEN, on both sides.
    """

    policy: Annotated[Path, tyro.conf.Positional]
    """A checkpoint, an export folder, or a version of a registry (registry/v000012)."""
    host: str = "127.0.0.1"
    """0.0.0.0 listens to other machines, which needs a token and TLS."""
    port: int = 8765
    backend: Literal["auto", "torch", "onnx"] = "auto"
    threads: int = 1
    token_file: Path | None = None
    certificate: Path | None = None
    """PEM file of the server's TLS certificate (with its chain)."""
    key: Path | None = None
    """PEM file of its private key; may be in the certificate's file."""
    plain: bool = False
    """Other hosts without TLS, in a net that is closed or encrypted by other means."""

    def run(self) -> None:
        from vla_post.export.card import policy_contract
        from vla_post.export.runtime import load_policy
        from vla_post.export.server import PolicyServer
        from vla_post.export.wire import TOKEN_VARIABLE

        token = os.environ.get(TOKEN_VARIABLE, "")
        if self.token_file is not None:
            token = self.token_file.read_text(encoding="utf-8").strip()
            if not token:
                raise UserError(f"{self.token_file}: holds no token")
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("vla_post.export.server.connections").setLevel(logging.WARNING)
        policy = load_policy(self.policy, self.backend, threads=self.threads)
        try:
            server = PolicyServer(
                policy,
                policy_contract(self.policy),
                host=self.host,
                port=self.port,
                token=token,
                certificate=self.certificate,
                key=self.key,
                plain=self.plain,
            )
        except OSError as error:
            raise UserError(f"cannot serve on {self.host}:{self.port}: {error}") from error

        def end(*_: object) -> None:
            # Shutting down waits for the serving loop, which this very thread runs.
            threading.Thread(target=server.close, daemon=True).start()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        print(f"{server.url} serves {self.policy}; Ctrl-C ends it", flush=True)
        server.run()
        print(f"served {server.served} chunks", file=sys.stderr)
