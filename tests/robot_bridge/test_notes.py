"""What operators' devices may put into a cell's diary."""

import json

import pytest

from robot_bridge.core.events import MAX_NOTE, EventError, read_note


def test_a_command_and_a_label_are_let_in():
    command = {"type": "command", "name": "resume", "by": "ann", "ok": True, "device": "console"}
    assert read_note(json.dumps(command)) == command
    label = {"type": "label", "episode": "e1", "by": "ann", "outcome": "failure", "notes": ""}
    assert read_note(json.dumps(label)) == label


@pytest.mark.parametrize(
    "note",
    [
        {"type": "episode_end", "episode": "e1", "outcome": "success"},
        {"type": "command", "name": "resume", "seq": 7},
        {"type": "label", "episode": ["e1"]},
        {"type": "command", "name": 3},
        {"type": "label", "notes": "x" * MAX_NOTE},
        {},
    ],
)
def test_a_device_cannot_write_other_events_or_numbers(note):
    with pytest.raises(EventError):
        read_note(json.dumps(note))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '"stop"'])
def test_what_is_no_note_is_refused(text):
    with pytest.raises(EventError):
        read_note(text)
