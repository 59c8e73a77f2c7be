"""A gamepad through Linux's joystick interface, /dev/input/js*.

The kernel writes `struct js_event` (include/uapi/linux/joystick.h): u32 time in ms, s16 value, u8
type, u8 number; type 1 is a button, 2 an axis in [-32767, 32767], and 0x80 is added to the events
that report the state at opening.
"""

import struct
import time
from collections.abc import Sequence
from pathlib import Path

from robot_bridge.devices import Clock, Reading
from robot_bridge.devices.wire import Wire

EVENT = struct.Struct("<IhBB")
BUTTON, AXIS, INITIAL = 0x01, 0x02, 0x80

XBOX_BUTTONS = (
    "a", "b", "x", "y", "lb", "rb", "back", "start", "guide", "left_stick", "right_stick",
)  # fmt: skip
XBOX_AXES = (
    "left_x", "left_y", "left_trigger", "right_x", "right_y", "right_trigger", "dpad_x", "dpad_y",
)  # fmt: skip
"""Order of the kernel's xpad driver; `left_y` is negative forward."""
DPAD = {
    ("dpad_x", -1): "dpad_left",
    ("dpad_x", 1): "dpad_right",
    ("dpad_y", -1): "dpad_up",
    ("dpad_y", 1): "dpad_down",
}


class Gamepad:
    """See the module.

    Args:
        path: the device; None for the first /dev/input/js*.
        buttons, axes: names by the kernel's numbers; others are called b11, axis8, ...
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        buttons: Sequence[str] = XBOX_BUTTONS,
        axes: Sequence[str] = XBOX_AXES,
        now: Clock = time.monotonic,
    ) -> None:
        self.name = f"gamepad {path or '/dev/input/js*'}"
        self._buttons, self._axis_names = tuple(buttons), tuple(axes)
        self._wire = Wire(lambda: path or _first(), now)
        self._rest = b""
        self._held: set[str] = set()
        self._axes: dict[str, float] = {}

    def read(self) -> Reading:
        blocks = self._wire.read()
        if blocks is None:
            self._held.clear()
            self._axes.clear()
            self._rest = b""
            return Reading(False, problem=self._wire.problem)
        data = self._rest + b"".join(blocks)
        whole = len(data) - len(data) % EVENT.size
        self._rest = data[whole:]
        pressed: list[str] = []
        for _, value, kind, number in EVENT.iter_unpack(data[:whole]):
            known = self._take(kind & ~INITIAL, number, value)
            if not kind & INITIAL:
                pressed += known
        return Reading(True, frozenset(self._held), tuple(pressed), dict(self._axes))

    def close(self) -> None:
        self._wire.close()

    def _take(self, kind: int, number: int, value: int) -> list[str]:
        """Returns what was pressed by the event."""
        if kind == BUTTON:
            names = self._buttons
            name = names[number] if number < len(names) else f"b{number}"
            return self._switch(name, bool(value))
        if kind != AXIS:
            return []
        names = self._axis_names
        name = names[number] if number < len(names) else f"axis{number}"
        self._axes[name] = max(-1.0, value / 32767)
        out: list[str] = []
        for (axis, sign), button in DPAD.items():
            if axis == name:
                out += self._switch(button, value * sign > 16384)
        return out

    def _switch(self, name: str, down: bool) -> list[str]:
        fresh = down and name not in self._held
        (self._held.add if down else self._held.discard)(name)
        return [name] if fresh else []


def _first() -> Path:
    found = sorted(Path("/dev/input").glob("js*"))
    if not found:
        raise FileNotFoundError(
            "no gamepad at /dev/input/js*: plug one in, and load the kernel's joydev module if "
            "there is still none"
        )
    return found[0]
