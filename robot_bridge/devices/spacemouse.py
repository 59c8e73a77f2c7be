"""A 3Dconnexion SpaceMouse through Linux's hidraw; no vendor driver and no library is needed.

Its reports (little endian, int16 values of about +-350): 1 is translation x, y, z, 2 is rotation
rx, ry, rz, 3 is a bit field of buttons. Newer models send all six values in report 1. The device's
axes are x right, y towards the user, z down; `Reading.axes` turns y and z round, so that x is
right, y forward and z up, with rotations about the same axes.
"""

import struct
import time
from pathlib import Path

from robot_bridge.devices import Clock, Reading
from robot_bridge.devices.wire import Wire

FULL_SCALE = 350.0
VENDORS = {0x256F, 0x046D}
"""3Dconnexion; Logitech, under whose id the older ones run (product ids 0xC6xx only)."""
TRANSLATION, ROTATION, BUTTONS = 1, 2, 3


class SpaceMouse:
    """See the module. Its buttons are called `button0`, `button1`, ...

    Args:
        path: /dev/hidrawN; None finds the first one of the vendor.
        sysfs: where the kernel lists hidraw devices.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        sysfs: Path = Path("/sys/class/hidraw"),
        now: Clock = time.monotonic,
    ) -> None:
        self.name = f"SpaceMouse {path or '/dev/hidraw*'}"
        self._wire = Wire(lambda: path or find(sysfs), now)
        self._axes: dict[str, float] = {}
        self._held: set[str] = set()

    def read(self) -> Reading:
        reports = self._wire.read(64)  # hidraw gives one report a call
        if reports is None:
            self._axes.clear()
            self._held.clear()
            return Reading(False, problem=self._wire.problem)
        pressed: list[str] = []
        for report in reports:
            pressed += self._take(report)
        return Reading(True, frozenset(self._held), tuple(pressed), dict(self._axes))

    def close(self) -> None:
        self._wire.close()

    def _take(self, report: bytes) -> list[str]:
        """Returns what was pressed by the report; unknown ones (battery) are skipped."""
        kind = report[0]
        if kind == TRANSLATION and len(report) >= 7:
            self._move("", report[1:7])
            if len(report) >= 13:
                self._move("r", report[7:13])
        elif kind == ROTATION and len(report) >= 7:
            self._move("r", report[1:7])
        elif kind == BUTTONS and len(report) >= 2:
            bits = int.from_bytes(report[1:], "little")
            held = {f"button{i}" for i in range(8 * (len(report) - 1)) if bits >> i & 1}
            fresh = sorted(held - self._held)
            self._held = held
            return fresh
        return []

    def _move(self, prefix: str, body: bytes) -> None:
        x, y, z = struct.unpack("<3h", body)
        for axis, value in (("x", x), ("y", -y), ("z", -z)):
            self._axes[prefix + axis] = max(-1.0, min(1.0, value / FULL_SCALE))


def find(sysfs: Path) -> Path:
    """The device file of the first SpaceMouse.

    Raises:
        FileNotFoundError: none is plugged in.
    """
    for entry in sorted(sysfs.glob("hidraw*")):
        try:
            lines = (entry / "device" / "uevent").read_text().splitlines()
        except OSError:
            continue
        ids = next((line[7:].split(":") for line in lines if line.startswith("HID_ID=")), None)
        if ids is None or len(ids) != 3:
            continue
        vendor, product = int(ids[1], 16), int(ids[2], 16)
        if vendor == 0x256F or (vendor in VENDORS and product >> 8 == 0xC6):
            return Path("/dev") / entry.name
    raise FileNotFoundError(f"no SpaceMouse among {sysfs}/hidraw*; plug one in")
