"""`vla-post console`: the operator's web page for one cell or several."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vla_post.cli.errors import UserError
from vla_post.cli.signals import ends_in_order

if TYPE_CHECKING:
    from robot_bridge.console.server import ConsoleConfig, Links


@dataclass(frozen=True, kw_only=True)
class Console:
    """Serve the operator's web console. Ctrl-C ends it; the cells go on.

    Prints two links: one for operators, one for people who may only watch (and stop).
    """

    contract: tuple[Path, ...] = ()
    """The cells' YAML files."""
    namespace: tuple[str, ...] = ()
    """One for each contract, where a cell does not run under its contract's name."""
    run_folder: Path | None = None
    """A folder of `vla-post demo`: its contract, stores, registry and metrics."""
    store: str | None = None
    """A store, or a folder or s3:// prefix of stores, whose episodes are shown."""
    registry: str | None = None
    """Policy versions to show, activate and roll back."""
    metrics: Path | None = None
    """A learner's metrics.jsonl."""
    host: str = "127.0.0.1"
    port: int = 8765
    """The next free one is used when it is taken; 0 takes any."""
    allow_remote: bool = False
    """Permit a --host that other computers can reach."""
    host_name: tuple[str, ...] = ()
    """Further names by which browsers reach this server (a proxy, a DNS name)."""
    token_file: Path | None = None
    """Made with mode 0600 on first use; by default in ~/.local/state/vla_post/."""
    certificate: Path | None = None
    """TLS certificate chain (PEM)."""
    key: Path | None = None
    """The certificate's private key (PEM)."""
    dds_profile: Literal["loopback", "network"] = "loopback"
    """network: cells on other computers."""

    def run(self) -> None:
        from robot_bridge.console.server import serve
        from robot_bridge.dds import use_default_profile

        logging.basicConfig(level=logging.WARNING, format="console: %(message)s")
        use_default_profile(self.dds_profile)
        try:
            with ends_in_order():
                serve(self.config(), _say)
        except KeyboardInterrupt:
            return

    def config(self) -> "ConsoleConfig":
        """Raises UserError for paths that do not exist."""
        from robot_bridge.console.server import CellAddress, ConsoleConfig

        contracts, store = self.contract, self.store
        registry, metrics = self.registry, self.metrics
        if self.run_folder is not None:
            folder = self.run_folder
            if not (folder / "contract.yaml").is_file():
                raise UserError(f"--run-folder {folder}: no run there (contract.yaml is missing)")
            contracts = contracts or (folder / "contract.yaml",)
            store = store or str(folder / "stores" / "online")
            registry = registry or folder / "registry"
            metrics = metrics or folder / "metrics.jsonl"
        if not contracts:
            raise UserError("no cell; pass --contract CELL.yaml, or --run-folder runs/NAME")
        if self.namespace and len(self.namespace) != len(contracts):
            raise UserError(
                f"{len(self.namespace)} namespaces for {len(contracts)} contracts; give one for "
                "each, or none"
            )
        names = self.namespace or ("",) * len(contracts)
        return ConsoleConfig(
            cells=tuple(
                CellAddress(contract=path, namespace=name)
                for path, name in zip(contracts, names, strict=True)
            ),
            store=store,
            registry=registry,
            metrics=metrics,
            host=self.host,
            port=self.port,
            allow_remote=self.allow_remote,
            host_names=self.host_name,
            token_file=self.token_file,
            certificate=self.certificate,
            key=self.key,
        )


class ConsoleLink:
    """Tells the operator's link, once a console that runs as a process of a cell is ready.

    Args:
        path: where that console writes its links; an old file is removed.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say, self._last = path, say, ""
        path.unlink(missing_ok=True)

    def look(self) -> None:
        """Call it now and then; a restarted console may have another port."""
        try:
            link = self._path.read_text(encoding="utf-8").split()[0]
        except (OSError, IndexError):
            return
        if link != self._last:
            self._last = link
            self._say(f"console: {link}")


def _say(links: "Links") -> None:
    print(f"operator  {links.operator}", file=sys.stderr)
    print(f"viewer    {links.viewer}", file=sys.stderr)
    if links.address.startswith("http:") and "//127.0.0.1" not in links.address:
        print(
            "not encrypted: whoever shares this network can read the token; use --certificate and "
            "--key, a VPN, or an SSH tunnel to a loopback console",
            file=sys.stderr,
        )
    print("Ctrl-C ends the console; the cells go on", file=sys.stderr, flush=True)
