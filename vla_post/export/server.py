"""A policy server: one policy, any number of robots, over WebSockets (`vla_post.export.wire`).

One thread a connection; the policy answers one request at a time. A request that is malformed,
oversized or unfit is answered with a typed failure, and never ends the server.
"""

import hmac
import json
import logging
import ssl
import threading
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from trajectory_store.contract import Contract, ContractMismatch
from vla_post.export.runtime import ChunkPolicy, PolicyInputError
from vla_post.export.wire import (
    MAX_BYTES,
    PROTOCOL,
    Act,
    Array,
    Card,
    Chunk,
    Failure,
    Hello,
    Message,
    WireError,
    decode,
    encode,
)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_ROBOTS = 32
log = logging.getLogger(__name__)


class PolicyServer:
    """Serves until closed.

    Args:
        policy: what answers.
        contract: of its cell.
        host, port: to listen on; port 0 takes a free one.
        token: shared secret; every host but loopback needs one.
        certificate, key: PEM files for TLS; every host but loopback needs them unless `plain`.
        plain: allow other hosts without TLS, in a net that is closed or encrypted by other means.

    Raises:
        ValueError: an open host without token, or without TLS and `plain`.
        OSError: the port is taken, or a file does not read.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        contract: Contract,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        certificate: Path | None = None,
        key: Path | None = None,
        plain: bool = False,
    ) -> None:
        if host not in LOOPBACK and not token:
            raise ValueError(f"serving on {host} without a token: anybody could drive the policy")
        if host not in LOOPBACK and certificate is None and not plain:
            raise ValueError(
                f"serving on {host} without TLS would send the token in the clear: name "
                "--certificate and --key, or --plain in a closed net"
            )
        self.policy, self.contract = policy, contract
        self._token = token
        self._busy = threading.Lock()
        self._robots = threading.Semaphore(MAX_ROBOTS)
        self.served = 0
        context: ssl.SSLContext | None = None
        if certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate, key)
        self._server: Server = serve(
            self._talk,
            host,
            port,
            ssl=context,
            process_request=self._admit,
            # Browsers name an origin: no page that somebody visits may reach a robot's policy.
            origins=[None],
            max_size=MAX_BYTES,
            compression=None,
            open_timeout=5.0,
            close_timeout=1.0,
            logger=logging.getLogger(f"{__name__}.connections"),
        )
        self.port = int(self._server.socket.getsockname()[1])
        scheme = "ws" if context is None else "wss"
        self.url = f"{scheme}://{host}:{self.port}"

    def run(self) -> None:
        """Until `close` is called from another thread or a signal handler."""
        self._server.serve_forever()

    def close(self) -> None:
        self._server.shutdown()

    def __enter__(self) -> Self:
        """In a thread of its own, for tests and notebooks."""
        self._thread = threading.Thread(target=self.run, name="policy-server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._thread.join(timeout=10.0)

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if not self._token:
            return None
        given = request.headers.get("Authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            return None
        return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong or missing token\n")

    def _talk(self, connection: ServerConnection) -> None:
        """One robot, until it leaves."""
        if not self._robots.acquire(blocking=False):
            connection.close(1013, f"{MAX_ROBOTS} robots are connected")
            return
        try:
            while True:
                answer, stay = self._answer(connection.recv())
                connection.send(encode(answer))
                if not stay:
                    return
        except ConnectionClosed:
            pass
        finally:
            self._robots.release()

    def _answer(self, data: object) -> tuple[Message, bool]:
        """(answer, whether to go on talking)."""
        number = -1
        try:
            message = decode(data)
            if isinstance(message, Hello):
                return self._card(message), True
            if isinstance(message, Act):
                number = message.id
                return self._act(message), True
            raise WireError(f"a robot does not send {message.type!r}")
        except WireError as error:
            return Failure(id=number, code="malformed", text=str(error)[:500]), False
        except ContractMismatch as error:
            return Failure(id=number, code="contract", text=str(error)[:2000]), False
        except PolicyInputError as error:
            return Failure(id=number, code="input", text=str(error)[:500]), True
        except Exception as error:  # whatever a policy raises is the robot's to know, not our end
            log.exception("the policy failed")
            text = f"the policy failed: {type(error).__name__}: {error}"
            return Failure(id=number, code="policy", text=text[:500]), True

    def _card(self, hello: Hello) -> Card:
        if hello.protocol != PROTOCOL:
            raise WireError(f"protocol {hello.protocol}; this server speaks {PROTOCOL}")
        if hello.contract:
            try:  # as JSON: nothing in it can refer to itself, as YAML's anchors do
                robot = Contract.model_validate(json.loads(hello.contract))
            except (ValueError, RecursionError) as error:
                raise WireError("contract: not one that this server reads") from error
            robot.require_same(self.contract, here="this cell", there="the policy that is served")
        policy = self.policy
        return Card(
            contract_sha256=policy.contract_sha256,
            observations={
                key: list(self.contract.observations[key].shape) for key in policy.observation_keys
            },
            horizon=policy.horizon,
            action_size=policy.action_size,
            takes_previous=policy.takes_previous,
        )

    def _act(self, message: Act) -> Chunk:
        observation = {key: array.numpy() for key, array in message.observation.items()}
        previous = None if message.previous is None else message.previous.numpy()
        overlap: dict[str, Any] = {}
        if previous is not None:
            overlap = {"previous": previous, "delay": message.delay}
        with self._busy:
            started = time.perf_counter()
            chunk = self.policy.act(observation, message.instruction, message.seed, **overlap)
            seconds = time.perf_counter() - started
            self.served += 1
        return Chunk(id=message.id, chunk=Array.of(np.asarray(chunk)), inference_s=seconds)
