"""The fleet's attention broker as a ROS 2 node.

    python -m sim.nodes.attention --ros-args -r __ns:=/fleet -p operators:=2

Cells say on `attention/wanted` (String JSON {cell, ticket, wants}, at least every second while they
want somebody) that they need an operator; `attention/granted` (String JSON {cells: {cell: ticket},
waiting}) says who has one. Writes its figures to the file `figures` when it ends.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.node import Node
from std_msgs.msg import String

from robot_bridge.nodes.common import (
    STEADY,
    Diagnostics,
    UserError,
    latched,
    monotonic_s,
    reliable,
    run,
)
from sim.attention import Attention

WANTED, GRANTED = "/fleet/attention/wanted", "/fleet/attention/granted"


class AttentionNode(Node):
    """Raises UserError for a number of operators below 1."""

    def __init__(self, **options: Any) -> None:
        super().__init__("attention", start_parameter_services=False, **options)
        operators = int(self.declare_parameter("operators", 1).value or 0)
        self._figures = str(self.declare_parameter("figures", "").value or "")
        try:
            self._attention = Attention(operators)
        except ValueError as error:
            raise UserError(f"attention: {error}") from error
        self._said = ""
        self._granted = self.create_publisher(String, GRANTED, latched())
        self.create_subscription(String, WANTED, self._on_wanted, reliable(100))
        self.create_timer(1.0, self._look, clock=STEADY)
        self._diagnostics = Diagnostics(self, self.diagnose)
        self._say()

    def close(self) -> None:
        if self._figures:
            figures = self._attention.figures(monotonic_s())
            card = {
                "operators": figures.operators,
                "attendances": len(figures.waits_s),
                "busy": round(figures.busy, 3),
                "mean_wait_s": round(statistics.mean(figures.waits_s or [0.0]), 3),
                "longest_wait_s": round(max(figures.waits_s, default=0.0), 3),
            }
            Path(self._figures).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        attention = self._attention
        values = {"attended": len(attention.granted), "waiting": len(attention.waiting)}
        return DiagnosticStatus.OK, "", values

    def _on_wanted(self, message: String) -> None:
        try:
            said = json.loads(message.data)
            cell, ticket, wants = str(said["cell"]), int(said["ticket"]), bool(said["wants"])
        except (ValueError, KeyError, TypeError):
            self.get_logger().warning(f"not understood: {message.data[:80]}")
            return
        self._attention.hear(cell, ticket, wants, monotonic_s())
        self._say()

    def _look(self) -> None:
        self._attention.tick(monotonic_s())
        self._say()

    def _say(self) -> None:
        text = json.dumps({"cells": self._attention.granted, "waiting": self._attention.waiting})
        if text != self._said:
            self._said = text
            self._granted.publish(String(data=text))


def main(arguments: list[str] | None = None) -> int:
    return run(AttentionNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
