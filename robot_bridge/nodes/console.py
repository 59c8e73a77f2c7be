"""The console as a process of a cell, with ROS parameters.

    python -m robot_bridge.nodes.console --ros-args -r __ns:=/CELL -p contract:=FILE -p store:=PATH

Parameters: `contract`, `store`, `registry`, `metrics`, `host`, `port`, `allow_remote`,
`token_file`, `address_file`, `nice` (added to the process's niceness), `cells` (namespaces of
several cells with this contract, in this ROS domain; by default the one in the node's own). The
links with their tokens go to `address_file`, never to the log.
"""

import contextlib
import itertools
import logging
import os
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

from robot_bridge.bringup import USER_MISTAKE


def read_parameters(arguments: list[str]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Namespace, parameters and remappings, as any node gets them."""
    import rclpy

    from robot_bridge.dds import use_default_profile

    use_default_profile()
    context = rclpy.Context()
    rclpy.init(args=arguments, context=context)
    try:
        node = rclpy.create_node(
            "console",
            context=context,
            automatically_declare_parameters_from_overrides=True,
            start_parameter_services=False,
            enable_rosout=False,
        )
        names: Any = node.list_parameters([], 1).names
        values = {name: node.get_parameter(name).value for name in names}
        namespace = node.get_namespace()
        node.destroy_node()
    finally:
        context.try_shutdown()
    rules = [b for a, b in itertools.pairwise(arguments) if a in ("-r", "--remap")]
    pairs = [rule.split(":=", 1) for rule in rules if ":=" in rule and not rule.startswith("__")]
    return namespace, values, {source: target for source, target in pairs}


@contextlib.contextmanager
def heartbeat(namespace: str) -> Generator[None]:
    """Says in /diagnostics that the console is there; it listens to a cell only while somebody
    looks at it."""
    import rclpy
    from diagnostic_msgs.msg import DiagnosticStatus
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    from robot_bridge.nodes.common import Diagnostics

    context, stop = rclpy.Context(), threading.Event()
    rclpy.init(args=[], context=context, signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node(
        "console",
        namespace=namespace,
        context=context,
        start_parameter_services=False,
        enable_rosout=False,
    )
    _diagnostics = Diagnostics(node, lambda: (DiagnosticStatus.OK, "", {}))
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def spin() -> None:
        with contextlib.suppress(ExternalShutdownException):
            while not stop.is_set():
                executor.spin_once(timeout_sec=0.5)

    thread = threading.Thread(target=spin, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("robot_bridge.console").setLevel(logging.INFO)
    try:
        from robot_bridge.console.server import PORT, CellAddress, ConsoleConfig, Links, serve
    except ModuleNotFoundError as error:
        print(
            f"console: needs the package {error.name!r}; run `pip install 'vla-post[console]'`",
            file=sys.stderr,
        )
        return USER_MISTAKE
    namespace, values, remappings = read_parameters(sys.argv if arguments is None else arguments)

    def path(name: str) -> Path | None:
        return Path(str(values[name])).expanduser() if values.get(name) else None

    def ready(links: Links) -> None:
        where = path("token_file") or "the default token file"
        print(f"console: {links.address} (tokens in {where})", file=sys.stderr, flush=True)

    os.nice(max(0, int(values.get("nice", 0))))
    contract = path("contract")
    try:
        if contract is None:
            raise ValueError("no contract; pass `--ros-args -p contract:=FILE`")
        config = ConsoleConfig(
            cells=tuple(
                CellAddress(contract=contract, namespace=str(cell), remappings=remappings)
                for cell in (values.get("cells") or [namespace])
            ),
            store=path("store"),
            registry=str(values["registry"]) if values.get("registry") else None,
            metrics=path("metrics"),
            host=str(values.get("host") or "127.0.0.1"),
            port=int(values.get("port", PORT)),
            allow_remote=bool(values.get("allow_remote", False)),
            token_file=path("token_file"),
            address_file=path("address_file"),
        )
        with heartbeat(namespace):
            serve(config, ready)
    except (ValueError, OSError) as error:
        print(f"console: {error}", file=sys.stderr)
        return USER_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
