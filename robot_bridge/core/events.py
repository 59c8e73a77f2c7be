"""The cell's diary: versioned JSON events with one writer, the supervisor.

{"v": 1, "seq": 7, "stamp_ns": 1250000000, "type": "takeover", "episode": "...", ...}
"""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

VERSION = 1


class EventType(StrEnum):
    RESET = "reset"
    """Bring the scene to its start: episode, task, seed."""
    EPISODE_START = "episode_start"
    """episode, task, instruction, operator, seed, start_stamp_ns."""
    EPISODE_END = "episode_end"
    """episode, truncated, reason, end_stamp_ns, and outcome: success, failure, aborted (somebody or
    the supervisor ended it) or interrupted (it cannot have gone on as one)."""
    SUCCESS = "success"
    FAILURE = "failure"
    TAKEOVER = "takeover"
    RELEASE = "release"
    POLICY_SWITCH = "policy_switch"
    """version, sha256, step."""
    STOP = "stop"
    """An emergency stop or a latched fault: reason."""
    STOP_RESET = "stop_reset"
    COMMAND = "command"
    """A person asked for something: name, by, role, device, ok, message."""
    LABEL = "label"
    """A recorded episode gets other labels: episode, by, and any of outcome, task, instruction,
    notes. The recorder writes them."""
    NODE = "node"
    """A node was lost or came back: node, state."""


class EventError(ValueError):
    """A text is not an event that this version understands."""


@dataclass(frozen=True)
class Event:
    type: str
    stamp_ns: int
    seq: int
    fields: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> str:
        head = {"v": VERSION, "seq": self.seq, "stamp_ns": self.stamp_ns, "type": str(self.type)}
        return json.dumps(head | self.fields, separators=(",", ":"), allow_nan=False)

    def text(self, name: str, default: str = "") -> str:
        value = self.fields.get(name, default)
        return value if isinstance(value, str) else default

    def integer(self, name: str, default: int = 0) -> int:
        value = self.fields.get(name, default)
        return value if isinstance(value, int) else default


def parse_event(text: str) -> Event:
    """Raises EventError for anything but a JSON object with v, seq, stamp_ns and type.

    Unknown types and fields are kept, so that an older reader follows a newer writer.
    """
    try:
        data: Any = json.loads(text)
    except ValueError as error:
        raise EventError(f"an event is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise EventError(f"an event is a JSON object, found {type(data).__name__}")
    fields: dict[str, Any] = {str(k): v for k, v in data.items()}  # pyright: ignore[reportUnknownArgumentType]
    if fields.pop("v", None) != VERSION:
        raise EventError(f"an event of version {VERSION} was expected: {text[:80]}")
    head = [fields.pop(name, None) for name in ("seq", "stamp_ns", "type")]
    seq, stamp_ns, kind = head
    if not (isinstance(seq, int) and isinstance(stamp_ns, int) and isinstance(kind, str)):
        raise EventError(f"an event lacks seq, stamp_ns or type: {text[:80]}")
    return Event(kind, stamp_ns, seq, fields)


MAX_NOTE = 8192
"""Bytes of a note."""
_NOTES = {
    EventType.COMMAND: {"name", "by", "role", "device", "ok", "message"},
    EventType.LABEL: {"episode", "by", "outcome", "task", "instruction", "notes"},
}


def read_note(text: str) -> dict[str, Any]:
    """A note of an operator's device: its `type` (command or label) and that type's fields.

    Raises:
        EventError: another type, unknown fields, or values that are neither text nor true or false.
    """
    try:
        data: Any = json.loads(text) if len(text) <= MAX_NOTE else None
    except ValueError as error:
        raise EventError(f"a note is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise EventError(f"a note is a JSON object of at most {MAX_NOTE} bytes")
    fields: dict[str, Any] = {str(k): v for k, v in data.items()}  # pyright: ignore[reportUnknownArgumentType]
    known = _NOTES.get(fields.get("type", ""))
    if known is None:
        raise EventError(f"a note of type {str(fields.get('type'))[:40]!r} is not understood")
    if not fields.keys() <= known | {"type"} or not all(
        isinstance(value, str | bool) for value in fields.values()
    ):
        raise EventError(f"a {fields['type']} note has the fields {', '.join(sorted(known))}")
    return fields


class EventWriter:
    """Numbers the events of one writer."""

    def __init__(self) -> None:
        self.seq = 0

    def make(self, kind: EventType, stamp_ns: int, **fields: Any) -> Event:
        self.seq += 1
        return Event(kind, stamp_ns, self.seq, fields)
