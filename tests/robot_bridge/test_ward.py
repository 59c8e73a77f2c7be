"""How the supervisor asks a lifecycle node to come up: once, unless the request was lost."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy")
from lifecycle_msgs.msg import State, Transition

from robot_bridge.nodes import ward as wards


class Service:
    """The client of a node's service; the test decides when it answers."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.callbacks: list[Any] = []

    def service_is_ready(self) -> bool:
        return True

    def call_async(self, request: Any) -> Any:
        self.asked.append(request)
        return SimpleNamespace(add_done_callback=self.callbacks.append)

    def remove_pending_request(self, call: Any) -> None:
        self.callbacks.clear()

    def answer(self, result: Any) -> None:
        for callback in self.callbacks:
            callback(SimpleNamespace(result=lambda: result))
        self.callbacks.clear()


class Desk:
    """A ward, its two services and a clock."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(wards, "monotonic_s", lambda: self.now)
        services: dict[str, Service] = {}
        node = SimpleNamespace(
            create_client=lambda kind, name: services.setdefault(name, Service()),
        )
        node.get_logger = lambda: SimpleNamespace(error=print, warning=lambda *_, **__: None)
        any_node: Any = node
        self.ward = wards.Ward(any_node, "runner", lambda *_, **__: None)
        self.get, self.change = services["runner/get_state"], services["runner/change_state"]

    def run(self, seconds: float, state: int | None) -> None:
        """Its timer at 10 Hz; the node says `state`, or nothing."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            self.ward.look()
            if state is not None:
                self.get.answer(SimpleNamespace(current_state=SimpleNamespace(id=state)))
            if not self.ward.active:
                self.ward.raise_up()

    @property
    def asked(self) -> list[int]:
        return [request.transition.id for request in self.change.asked]


UNCONFIGURED, INACTIVE = State.PRIMARY_STATE_UNCONFIGURED, State.PRIMARY_STATE_INACTIVE
CONFIGURE, ACTIVATE = Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE


def test_a_node_that_loads_for_ten_minutes_is_asked_once(monkeypatch):
    desk = Desk(monkeypatch)
    desk.run(1.0, UNCONFIGURED)
    assert desk.asked == [CONFIGURE]
    desk.run(600.0, None)  # busy: it answers nothing
    assert desk.asked == [CONFIGURE]
    desk.change.answer(SimpleNamespace(success=True))
    desk.run(1.0, INACTIVE)
    assert desk.asked == [CONFIGURE, ACTIVATE]


def test_a_node_that_was_restarted_meanwhile_is_asked_again(monkeypatch):
    desk = Desk(monkeypatch)
    desk.run(1.0, UNCONFIGURED)
    desk.run(30.0, None)
    desk.run(4.0, UNCONFIGURED)  # another process answers; the old one took the request with it
    assert desk.asked == [CONFIGURE]
    desk.run(2.0, UNCONFIGURED)
    assert desk.asked == [CONFIGURE, CONFIGURE]
