"""The console's process: which cells, which address, and how it ends."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from robot_bridge.console.access import Origins, Tokens, default_token_file, load_tokens
from robot_bridge.console.app import Console
from robot_bridge.console.episodes import Library
from robot_bridge.console.learning import Learning
from trajectory_store.contract import Contract, load_contract

if TYPE_CHECKING:
    from robot_bridge.console.link import CellLink

log = logging.getLogger(__name__)

PORT = 8765
PORT_TRIES = 20
"""A taken port is answered by the next free one."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class CellAddress:
    """One cell on the ROS graph."""

    contract: Path
    namespace: str = ""
    """Empty: the contract's `cell`."""
    remappings: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class ConsoleConfig:
    cells: tuple[CellAddress, ...]
    store: Path | str | None = None
    """A store, or a folder or `s3://` prefix of stores, whose episodes are shown."""
    registry: str | Path | None = None
    metrics: Path | None = None
    """A learner's `metrics.jsonl`."""
    host: str = "127.0.0.1"
    port: int = PORT
    """0 for any free one."""
    allow_remote: bool = False
    host_names: tuple[str, ...] = ()
    """Further names under which browsers reach this server."""
    token_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    """TLS, for anything but loopback and VPN."""
    address_file: Path | None = None
    """Gets the links with their tokens, readable by the user alone; for whoever started us."""
    title: str = ""

    def __post_init__(self) -> None:
        if not self.cells:
            raise ValueError("no cell; name at least one contract")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}; expected 0 (any) to 65535")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a certificate and its key belong together; give both or none")
        if not _is_local(self.host) and not self.allow_remote:
            raise ValueError(
                f"{self.host} can be reached from other computers; a console commands a robot, so "
                "say --allow-remote if you mean it (better: an SSH tunnel or a VPN)"
            )


@dataclass(frozen=True)
class Links:
    """Where the console is."""

    address: str
    operator: str
    viewer: str

    @classmethod
    def of(cls, address: str, tokens: Tokens) -> "Links":
        # A fragment stays in the browser: no log and no proxy sees the token.
        return cls(
            address, f"{address}/#token={tokens.operator}", f"{address}/#token={tokens.viewer}"
        )


def serve(config: ConsoleConfig, ready: Callable[[Links], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        ready: called once, when browsers may come.

    Raises:
        ValueError, OSError: a contract, the token file or the address cannot be used.
    """
    if config.certificate is not None and config.key is not None:
        _check_certificate(config.certificate, config.key)
    tokens = load_tokens(config.token_file or default_token_file())
    cells = [(load_contract(cell.contract), cell) for cell in config.cells]
    names = [cell.namespace.strip("/") or contract.cell for contract, cell in cells]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two cells are called {max(names, key=names.count)}; give each a namespace"
        )
    with contextlib.closing(_bind(config.host, config.port)) as listener:
        port = listener.getsockname()[1]
        tls = config.certificate is not None
        origins = Origins.of(_names(config), port, tls=tls)
        console = Console(
            [
                (contract, name, partial(_connect, contract, cell), cell.contract.parent)
                for (contract, cell), name in zip(cells, names, strict=True)
            ],
            tokens=tokens,
            origins=origins,
            library=Library(config.store),
            learning=Learning(config.metrics, config.registry),
            title=config.title,
        )
        shown = config.host if _is_local(config.host) else socket.gethostname()
        links = Links.of(f"{origins.scheme}://{shown}:{port}", tokens)
        if config.address_file is not None:
            _write_privately(config.address_file, f"{links.operator}\n{links.viewer}\n")
        server = _Server(
            uvicorn.Config(
                console.app(),
                log_config=None,
                access_log=False,
                lifespan="on",
                http="h11",
                ws="websockets-sansio",
                ws_max_size=16 * 1024,
                ws_per_message_deflate=False,  # pictures are compressed already
                ws_ping_interval=5.0,
                ws_ping_timeout=10.0,
                h11_max_incomplete_event_size=16 * 1024,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=2,
                ssl_certfile=config.certificate,
                ssl_keyfile=config.key,
            )
        )
        server.on_ready = partial(ready, links)
        asyncio.run(server.serve(sockets=[listener]))
        if config.address_file is not None:
            config.address_file.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    on_ready: Callable[[], None] = staticmethod(lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """uvicorn would send the signal to us once more; a stop in order is no failure."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.should_exit = True


def _check_certificate(certificate: Path, key: Path) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError among them
        raise ValueError(
            f"{certificate} with {key}: not a PEM certificate and its private key "
            f"({error.strerror or error})"
        ) from error


def _connect(contract: Contract, cell: CellAddress) -> "CellLink":
    from robot_bridge.console.link import CellLink

    return CellLink(contract, namespace=cell.namespace, remappings=cell.remappings)


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names(config: ConsoleConfig) -> set[str]:
    """Host names that a browser may use."""
    names = {*LOCAL_NAMES, *config.host_names}
    if not _is_local(config.host):
        names |= {socket.gethostname(), socket.getfqdn()}
        if config.host not in ("0.0.0.0", "::"):
            names.add(config.host)
        with contextlib.suppress(OSError):
            names |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    return names


def _bind(host: str, port: int) -> socket.socket:
    """Listens at `port`, or at the next free one.

    Raises:
        OSError: nothing near it is free, or the address is not this computer's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = [0] if port == 0 else [*range(port, min(port + PORT_TRIES, 65536)), 0]
    for candidate in ports:
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Its connections inherit this. A small message would else wait for the acknowledgement of
        # the one before, which a browser delays by up to 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(128)
        except OSError as error:
            listener.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise OSError(error.errno, f"cannot listen at {host}: {error.strerror}") from error
            continue
        listener.setblocking(False)
        if port not in (0, candidate):
            log.warning("port %d is taken; using %d", port, listener.getsockname()[1])
        return listener
    raise OSError(errno.EADDRINUSE, f"no free port at {host}")


def _write_privately(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)
