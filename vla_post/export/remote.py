"""A policy on another machine, as a `ChunkPolicy`: for policies too large for the robot's computer.

The server is `vla-post serve` (`vla_post.export.server`). Whatever goes wrong on the way is a typed
error of one `act`; the next call connects again. Needs websockets and msgpack, no torch.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float, Int
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from trajectory_store.contract import Contract, ContractMismatch
from vla_post.export.runtime import LoadedPolicy, PolicyInputError
from vla_post.export.wire import (
    MAX_BYTES,
    PROTOCOL,
    TOKEN_VARIABLE,
    Act,
    Array,
    Card,
    Chunk,
    Failure,
    Hello,
    Message,
    WireError,
    arrays,
    decode,
    encode,
)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
log = logging.getLogger(__name__)


class RemoteError(ConnectionError):
    """No chunk came back: no server, no answer in time, or an answer that is none."""


class RemoteRefused(RemoteError):
    """The server is there and will not serve us: token, contract or protocol."""


class RemotePolicy(LoadedPolicy):
    """See `vla_post.export.runtime.ChunkPolicy`.

    Args:
        url: `ws://host:port`, or `wss://host:port` for TLS. The certificate is checked against the
            system's authorities, or those in the file that SSL_CERT_FILE names.
        token: the server's; by default the environment's VLA_POST_TOKEN.
        contract: of the cell; a server of another one is refused.
        timeout_s: for one chunk, after which the connection is given up.
        connect_s: for connecting.

    Raises:
        ValueError: not such a URL.
        RemoteError: no server; RemoteRefused: it does not serve us.
        trajectory_store.contract.ContractMismatch: it serves another cell.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        contract: Contract | None = None,
        timeout_s: float = 5.0,
        connect_s: float = 2.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(f"{url!r} is no policy server; expected ws://HOST:PORT or wss://...")
        self.url = url
        self._token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        if self._token and parts.scheme == "ws" and parts.hostname not in LOOPBACK:
            log.warning("%s: the token travels in the clear; use wss:// outside a closed net", url)
        self._contract = contract
        self._timeout_s, self._connect_s = timeout_s, connect_s
        self._connection: ClientConnection | None = None
        self._count = 0
        self._wire_s: deque[float] = deque(maxlen=256)
        self._card = self._connect()
        self._shapes = self._card.observations
        self.observation_keys = tuple(self._shapes)
        self.horizon, self.action_size = self._card.horizon, self._card.action_size
        self.contract_sha256 = self._card.contract_sha256
        self.takes_previous = self._card.takes_previous

    @property
    def any_batch(self) -> bool:
        return False

    def _chunks(
        self,
        observation: dict[str, np.ndarray],
        instructions: Sequence[str],
        seeds: Int[np.ndarray, " B"],
        previous: Float[np.ndarray, "k A"] | None,
        delay: int,
    ) -> Float[np.ndarray, "B H A"]:
        """Raises RemoteError beside what every policy raises."""
        self._count += 1
        request = Act(
            id=self._count,
            observation=arrays({key: value[0] for key, value in observation.items()}),
            instruction=instructions[0],
            seed=int(seeds[0]),
            previous=None if previous is None else Array.of(previous),
            delay=delay,
        )
        if self._connection is None and self._connect() != self._card:
            self.close()
            raise RemoteRefused(f"{self.url}: it serves another policy than before; restart")
        started = time.monotonic()
        answer = self._ask(request)
        if not isinstance(answer, Chunk) or answer.id != request.id:
            self.close()
            raise RemoteError(f"{self.url}: answered an act with {answer.type!r}")
        try:
            chunk = answer.chunk.numpy()
        except WireError as error:
            self.close()
            raise RemoteError(f"{self.url}: {error}") from error
        if chunk.shape != (self.horizon, self.action_size) or chunk.dtype != np.float32:
            self.close()
            raise RemoteError(
                f"{self.url}: sent a {chunk.dtype} chunk of shape {chunk.shape}; expected float32 "
                f"{(self.horizon, self.action_size)}"
            )
        self._wire_s.append(time.monotonic() - started - answer.inference_s)
        return chunk[None].copy()

    def reload(self, path: str | Path) -> None:
        raise ValueError(f"{self.url}: the server chooses its policy; restart it with {path}")

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # ---------------------------------------------------------------------------------------------

    @property
    def wire_ms(self) -> dict[str, str]:
        """Time on the wire, without the policy's own, of the last 256 chunks."""
        if not self._wire_s:
            return {}
        p50, p99 = np.quantile(list(self._wire_s), [0.5, 0.99]) * 1e3
        return {"wire_p50_ms": f"{p50:.1f}", "wire_p99_ms": f"{p99:.1f}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> Card:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            self._connection = connect(
                self.url,
                additional_headers=headers,
                open_timeout=self._connect_s,
                close_timeout=1.0,
                max_size=MAX_BYTES,
                compression=None,
                # Straight to the robot's own net, whatever proxy the shell knows.
                proxy=None,
            )
        except InvalidStatus as error:
            code = error.response.status_code
            why = f"wrong or missing token ({TOKEN_VARIABLE})" if code == 401 else f"HTTP {code}"
            raise RemoteRefused(f"{self.url}: refused us, {why}") from error
        except (OSError, WebSocketException) as error:
            raise RemoteError(
                f"{self.url}: no policy server ({type(error).__name__}: {str(error)[:200]}); is "
                "`vla-post serve` running there?"
            ) from error
        contract = self._contract.to_json() if self._contract is not None else ""
        answer = self._ask(Hello(contract=contract))
        if not isinstance(answer, Card) or answer.protocol != PROTOCOL:
            self.close()
            raise RemoteRefused(f"{self.url}: speaks another protocol than {PROTOCOL}")
        return answer

    def _ask(self, message: Message) -> Message:
        """One message there and one back; anything unexpected closes the connection."""
        assert self._connection is not None
        connection: Any = self._connection
        try:
            connection.send(encode(message))
            answer = decode(connection.recv(timeout=self._timeout_s))
        except TimeoutError as error:
            self.close()
            raise RemoteError(f"{self.url}: no answer within {self._timeout_s:g} s") from error
        except (OSError, WebSocketException, WireError) as error:
            self.close()
            raise RemoteError(
                f"{self.url}: the connection broke ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        if not isinstance(answer, Failure):
            return answer
        if answer.code == "input":
            raise PolicyInputError(f"{self.url}: {answer.text}")
        if answer.code != "policy":
            self.close()
        if answer.code == "contract":
            raise ContractMismatch(f"{self.url}: {answer.text}")
        raise RemoteError(f"{self.url}: {answer.text}")
