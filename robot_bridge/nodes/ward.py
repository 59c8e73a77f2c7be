"""The lifecycle nodes under the supervisor's care: asked how they are, and to come up."""

from collections.abc import Callable
from typing import Any

from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.node import Node

from robot_bridge.core.events import EventType
from robot_bridge.nodes.common import monotonic_s


class Ward:
    """One of them.

    Args:
        say: writes an event, as `SupervisorNode.say`.
    """

    LOOK_S = 0.5
    SILENCE_S = 2.0
    """Without an answer for this long an active node counts as lost. DDS itself takes 5 s to miss
    a killed process, and never misses a hung one."""
    LOST_S = 5.0
    """A transition was lost, with the process that was asked, when a node has answered other
    questions without a pause for so long and not this one. One that is busy (loading a policy takes
    minutes on a busy machine) answers nothing; asking it again would end in a transition that is
    not allowed any more, which ends the node."""

    def __init__(self, node: Node, name: str, say: Callable[..., None]) -> None:
        self.name, self._node, self._say = name, node, say
        self.state = State.PRIMARY_STATE_UNKNOWN
        self._get = node.create_client(GetState, f"{name}/get_state")
        self._change = node.create_client(ChangeState, f"{name}/change_state")
        self._asked_at = self._changed_at = -1e9
        self._question: Any = None
        self._asking = self._changing = False
        self._answers_since = self._answered_at = -1e9
        """It answers without a pause from then to then."""

    @property
    def active(self) -> bool:
        return self.state == State.PRIMARY_STATE_ACTIVE

    def look(self) -> None:
        now = monotonic_s()
        if not self._get.service_is_ready():
            self._lose("gone")
            self._asking = self._changing = False
            return
        if self._asking:
            if now - self._asked_at < self.SILENCE_S:
                return
            self._get.remove_pending_request(self._question)
            # A node that is busy with a transition (loading a policy) may be silent for long.
            if not self._changing:
                self._lose("silent")
        period = self.LOOK_S if self.active else 0.1
        if now - self._asked_at < period:
            return
        self._asked_at, self._asking = now, True
        self._question = self._get.call_async(GetState.Request())
        self._question.add_done_callback(self._on_state)

    def _on_state(self, future: Any) -> None:
        self._asking = False
        if future.result() is None:
            return
        now = monotonic_s()
        if now - self._answered_at > self.SILENCE_S or self._answers_since < self._changed_at:
            self._answers_since = now
        self._answered_at = now
        state = future.result().current_state.id
        if state == self.state:
            return
        was_active, self.state = self.active, state
        if self.active:
            self._say(EventType.NODE, node=self.name, state="active")
        elif was_active:
            self._say(EventType.NODE, node=self.name, state="lost")

    def _lose(self, state: str) -> None:
        if self.active:
            self._say(EventType.NODE, node=self.name, state="lost")
            self._node.get_logger().error(f"{self.name} is {state}")
        self.state = State.PRIMARY_STATE_UNKNOWN

    def raise_up(self) -> None:
        transition = {
            State.PRIMARY_STATE_UNCONFIGURED: Transition.TRANSITION_CONFIGURE,
            State.PRIMARY_STATE_INACTIVE: Transition.TRANSITION_ACTIVATE,
        }.get(self.state)
        now = monotonic_s()
        answers_for_s = self._answered_at - max(self._answers_since, self._changed_at)
        if transition is None or (self._changing and answers_for_s < self.LOST_S):
            return
        if now - self._changed_at < 0.5 and not self._changing and self._failed:
            return  # it refused just now; its own log says why
        self._changing, self._changed_at = True, now
        request = ChangeState.Request(transition=Transition(id=transition))
        self._change.call_async(request).add_done_callback(self._on_changed)

    _failed = False

    def _on_changed(self, future: Any) -> None:
        self._changing = False
        self._failed = not future.result().success
        self._asked_at = -1e9
        self.state = State.PRIMARY_STATE_UNKNOWN
        if self._failed:
            self._changed_at = monotonic_s()
            self._node.get_logger().warning(
                f"{self.name} refused a transition; its log says why", throttle_duration_sec=5.0
            )
