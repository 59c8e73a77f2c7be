"""The console's end of a cell: `CellClient`, plus what only a console says."""

import json
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from std_msgs.msg import String
from std_srvs.srv import Trigger

from robot_bridge.client import CellClient
from robot_bridge.nodes.common import reliable
from robot_bridge.snapshots import Reply
from trajectory_store.contract import Contract

NOTES_TOPIC = "operator/notes"
"""JSON for the cell's diary; the supervisor, its one writer, numbers and publishes it."""


class CellLink(CellClient):
    """See the module. Everything here may be called from any thread."""

    def __init__(self, contract: Contract, **options: Any) -> None:
        super().__init__(contract, name="console", **options)
        self._notes: Any = None
        self._arbiter_stop: Any = None
        self._do(self._open_notes)

    def note(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Puts an entry into the cell's events: `command` (who asked for what) or `label`."""
        text = json.dumps({"type": kind, **fields})
        self._do(lambda: self._notes.publish(String(data=text)))

    def nudge(self) -> None:
        """Publishes the operator's hand now instead of at the next period, in real time: in the
        caller's thread, so that a jog waits for nobody."""
        driving = self._driving
        if driving is not None:
            driving.say_now()

    def stop(self) -> "Future[Reply]":
        """The emergency stop, by the supervisor and the arbiter itself: one is enough."""
        reply: Future[Reply] = Future()
        by_supervisor = self.ask("estop", timeout_s=3.0)

        def later(done: "Future[Reply]") -> None:
            if not reply.done():
                reply.set_result(done.result())

        def at_once() -> None:
            if self._arbiter_stop.service_is_ready():
                call = self._arbiter_stop.call_async(Trigger.Request())
                call.add_done_callback(answered)

        def answered(call: Any) -> None:
            if call.result().success and not reply.done():
                reply.set_result(Reply(True, str(call.result().message)))

        self._do(at_once)
        by_supervisor.add_done_callback(later)
        return reply

    def operators(self) -> int:
        """How many devices publish the operator's deadman, ours included."""
        return self._node.count_publishers(f"{self.namespace}/teleop/joy")

    def _open_notes(self) -> None:
        self._arbiter_stop = self._node.create_client(Trigger, "arbiter/estop")
        self._notes = self._node.create_publisher(String, NOTES_TOPIC, reliable(50))
