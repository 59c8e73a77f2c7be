"""The uplink as a process of a cell: what it delivers, and what waits, is in /diagnostics.

    python -m robot_bridge.nodes.uplink --ros-args -r __ns:=/CELL -p store:=PATH -p dest:=PREFIX

Parameters: `store` (a store, or a folder of several), `dest` (a folder or s3://bucket/prefix),
`name` (of this robot there), `bandwidth_mbit_s` (0: no limit). The cell works without it: a
destination that is away is a warning and a growing backlog, nothing else.
"""

import os
import sys
import threading
from dataclasses import asdict
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node

from robot_bridge.nodes.common import STEADY, UserError, reliable, run, set_stamp
from trajectory_store.uplink import Uplink, UplinkConfig, UplinkHealth

NICENESS = 10
"""Added to the process's: the control loop comes first."""
SHOWN = (
    "dest",
    "backlog_episodes",
    "backlog_bytes",
    "oldest_s",
    "delivered",
    "delivered_bytes",
    "attempts_failed",
)


class UplinkNode(Node):
    def __init__(self, **options: Any) -> None:
        super().__init__("uplink", start_parameter_services=False, **options)

        def value(name: str, default: Any) -> Any:
            return self.declare_parameter(name, default).value

        self.declare_parameter("contract", "")  # every node of a cell is given it
        store, dest = str(value("store", "")), str(value("dest", ""))
        if not store or not dest:
            raise UserError("uplink: pass `--ros-args -p store:=PATH -p dest:=PREFIX`")
        try:
            config = UplinkConfig(
                store=store,
                dest=dest,
                name=str(value("name", "")),
                bandwidth_mbit_s=float(value("bandwidth_mbit_s", 0.0)),
            )
        except ValueError as error:
            raise UserError(f"uplink: {error}") from error
        self.exit_status = 0
        self._uplink = Uplink(config)
        self._publisher = self.create_publisher(DiagnosticArray, "/diagnostics", reliable(10))
        self._name = f"{self.get_namespace()}/uplink".replace("//", "/")
        self.create_timer(1.0, self._tell, clock=STEADY)
        self._thread = threading.Thread(target=self._work, name="uplink", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._uplink.end()
        self._thread.join(timeout=30.0)

    def _work(self) -> None:
        try:
            self._uplink.run()
        except Exception as error:
            # A process that stays without its thread would look well; it is started again.
            self.get_logger().error(f"the uplink ends: {error}")
            self.exit_status = 1

    def _tell(self) -> None:
        message = DiagnosticArray(status=[self._status(h) for h in self._uplink.health])
        set_stamp(message.header.stamp, self.get_clock().now().nanoseconds)
        if message.status:
            self._publisher.publish(message)

    def _status(self, health: UplinkHealth) -> DiagnosticStatus:
        # One store is the usual case; several (a fleet on one machine) are told apart by name.
        several = len(self._uplink.routes) > 1
        name = f"{self._name}/{health.dest.rpartition('/')[2]}" if several else self._name
        text = health.error
        if health.backlog_episodes:
            waits = f"{health.backlog_episodes} episodes wait, oldest {health.oldest_s:.0f} s"
            text = f"{waits}; {health.error}" if health.error else waits
        values = {k: v for k, v in asdict(health).items() if k in SHOWN}
        return DiagnosticStatus(
            level=DiagnosticStatus.OK if health.ok else DiagnosticStatus.WARN,
            name=name,
            message=text,
            values=[KeyValue(key=k, value=str(v)) for k, v in values.items()],
        )


def main(arguments: list[str] | None = None) -> int:
    os.nice(NICENESS)
    return run(UplinkNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
