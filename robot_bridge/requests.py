"""What people and programs ask of a cell's nodes, and the answers that always come."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.node import Node
from std_srvs.srv import SetBool, Trigger

from robot_bridge.snapshots import Reply

REQUESTS: Mapping[str, tuple[str, Any, dict[str, Any]]] = {
    "start_episode": ("start_episode", Trigger, {}),
    "success": ("end_episode", SetBool, {"data": True}),
    "failure": ("end_episode", SetBool, {"data": False}),
    "cancel": ("cancel_episode", Trigger, {}),
    "reset_done": ("reset_done", Trigger, {}),
    "takeover": ("set_intervention", SetBool, {"data": True}),
    "hand_back": ("set_intervention", SetBool, {"data": False}),
    "resume_policy": ("resume_policy", Trigger, {}),
    "estop": ("estop", Trigger, {}),
    "reset_estop": ("reset_estop", Trigger, {}),
}
"""What can be asked for: name -> service of the supervisor, its type and its fields."""


@dataclass(eq=False)
class _Pending:
    """A request whose answer has not come."""

    client: Any
    request: Any
    what: str
    """The service's name, for messages."""
    deadline: float
    reply: "Future[Reply]" = field(default_factory=Future)
    call: Any = None
    """None until the service was there."""


class Requests:
    """Of one node. Everything but `ask` runs in the thread that spins it."""

    def __init__(self, node: Node) -> None:
        self._namespace = node.get_namespace()
        self._pending: list[_Pending] = []
        self._clients = {
            service: node.create_client(kind, f"supervisor/{service}")
            for service, kind, _ in REQUESTS.values()
        }
        self._parameters = {
            name: node.create_client(SetParameters, f"{name}/set_parameters")
            for name in ("supervisor", "runner")
        }

    def ask(
        self,
        name: str,
        values: Mapping[str, str | int],
        timeout_s: float,
        do: Callable[[Callable[[], None]], None],
    ) -> "Future[Reply]":
        """Sends a request, after the supervisor's parameters were set to `values`.

        Args:
            do: runs a function in the node's thread.

        Raises:
            ValueError: no such request.
        """
        if name not in REQUESTS:
            raise ValueError(f"no request {name!r}; there are {', '.join(REQUESTS)}")
        service, kind, fields = REQUESTS[name]
        reply: Future[Reply] = Future()
        deadline = time.monotonic() + timeout_s

        def send() -> None:
            what = f"supervisor/{service}"
            answer = self._call(self._clients[service], kind.Request(**fields), what, deadline)
            answer.add_done_callback(lambda done: reply.set_result(done.result()))

        def configure() -> None:
            self._set("supervisor", values, deadline).add_done_callback(configured)

        def configured(done: "Future[Reply]") -> None:
            if done.result().success:
                send()
            else:
                reply.set_result(done.result())

        do(configure if values else send)
        return reply

    def shadow(
        self, wanted: str, timeout_s: float, do: Callable[[Callable[[], None]], None]
    ) -> "Future[Reply]":
        """Asks the policy runner for a shadow: a version, `newest`, or none if empty."""
        reply: Future[Reply] = Future()
        deadline = time.monotonic() + timeout_s

        def send() -> None:
            answer = self._set("runner", {"shadow": wanted}, deadline)
            answer.add_done_callback(lambda done: reply.set_result(done.result()))

        do(send)
        return reply

    def _set(self, node: str, values: Mapping[str, str | int], deadline: float) -> "Future[Reply]":
        parameters = [_parameter(key, value) for key, value in values.items()]
        request = SetParameters.Request(parameters=parameters)
        return self._call(self._parameters[node], request, f"{node}/set_parameters", deadline)

    def _call(self, client: Any, request: Any, what: str, deadline: float) -> "Future[Reply]":
        pending = _Pending(client, request, what, deadline)
        self._pending.append(pending)
        self._send(pending)
        return pending.reply

    def look_after(self) -> None:
        """Sends what waits for its service, and answers what has waited for too long."""
        now = time.monotonic()
        for pending in list(self._pending):
            if now >= pending.deadline:
                self._pending.remove(pending)
                if pending.call is not None:
                    pending.client.remove_pending_request(pending.call)
                pending.reply.set_result(
                    Reply(
                        False,
                        f"{self._namespace}/{pending.what} does not answer; is the cell "
                        "up, and in this ROS domain (ROS_DOMAIN_ID)?",
                    )
                )
            elif pending.call is None:
                self._send(pending)

    def close(self) -> None:
        for pending in self._pending:
            pending.reply.set_result(Reply(False, f"{pending.what}: the client was closed"))
        self._pending.clear()

    def _send(self, pending: _Pending) -> None:
        """Once the service is there; `look_after` comes back until then."""
        if pending.client.service_is_ready():
            pending.call = pending.client.call_async(pending.request)
            pending.call.add_done_callback(lambda call: self._answered(pending, call))

    def _answered(self, pending: _Pending, call: Any) -> None:
        if pending in self._pending:
            self._pending.remove(pending)
            pending.reply.set_result(_as_reply(call.result()))


def _as_reply(response: Any) -> Reply:
    if isinstance(response, SetParameters.Response):
        results: Any = response.results
        refused = [str(result.reason) for result in results if not result.successful]
        return Reply(not refused, "; ".join(refused))
    return Reply(bool(response.success), str(response.message))


def _parameter(name: str, value: str | int) -> ParameterMessage:
    if isinstance(value, str):
        content = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)
    else:
        content = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)
    return ParameterMessage(name=name, value=content)
