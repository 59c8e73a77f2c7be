"""A device file that may vanish and come back."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from robot_bridge.devices import Clock

AGAIN_S = 1.0
"""Between two tries to open a device that is not there."""


class Wire:
    """Reads what has arrived; opens the file again after it was unplugged.

    Args:
        find: the file's path; raises OSError with a remedy while there is none.
        now: monotonic seconds.
    """

    def __init__(self, find: Callable[[], Path], now: Clock = time.monotonic) -> None:
        self._find, self._now = find, now
        self._fd = -1
        self._next_try = -1e9
        self.problem = "not opened yet"

    def read(self, size: int = 4096) -> list[bytes] | None:
        """Blocks of bytes, one a report for HID devices; None when the device is not there."""
        if self._fd < 0 and not self._open():
            return None
        blocks: list[bytes] = []
        while True:
            try:
                block = os.read(self._fd, size)
            except BlockingIOError:
                return blocks
            except OSError as error:
                return self._lose(f"unplugged ({error.strerror})")
            if not block:
                return self._lose("unplugged (end of file)")
            blocks.append(block)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _open(self) -> bool:
        if self._now() < self._next_try:
            return False
        self._next_try = self._now() + AGAIN_S
        try:
            path = self._find()
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError as error:
            self.problem = (
                f"{error.filename}: permission denied; add yourself to its group (input, plugdev) "
                "or add a udev rule"
            )
            return False
        except OSError as error:
            self.problem = str(error)
            return False
        self.problem = ""
        return True

    def _lose(self, problem: str) -> None:
        self.close()
        self.problem = problem
