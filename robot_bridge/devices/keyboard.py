"""The keyboard of a terminal.

Terminals that speak the kitty protocol (kitty, foot, WezTerm, Ghostty, Alacritty, ...) report when
a key is released. Others only repeat a key that is held: then a key counts as held for `FIRST_S`
after it was first seen, which covers the pause before repeats begin, and for `REPEAT_S` after a
repeat. A window that loses the focus releases every key, where the terminal reports it.
"""

import os
import re
import select
import sys
import termios
import time
import tty
from typing import Any

from robot_bridge.devices import Clock, Reading

FIRST_S = 0.7
REPEAT_S = 0.2
ESCAPE_S = 0.05
"""A lone escape byte is the Escape key if nothing follows it for so long."""
_BEGIN = b"\x1b[?1004h\x1b[?u\x1b[c"
"""Report focus; ask for the kitty protocol, and for something that every terminal answers."""
_KITTY_ON, _KITTY_OFF = b"\x1b[>11u", b"\x1b[<u"
"""Report releases, for all keys."""
_END = b"\x1b[?1004l"
_SEQUENCE = re.compile(rb"\x1b\[([<=>?]?)([0-9;:]*)([A-Za-z~])|\x1bO([A-S])")
_LETTERS = {"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end"}
_CODES = {9: "tab", 13: "enter", 27: "escape", 32: "space", 127: "backspace"}


class Keyboard:
    """See the module.

    Args:
        fd_in: a terminal, or the reading end of what behaves like one.
        fd_out: gets the requests to the terminal.

    Raises:
        OSError: no terminal.
    """

    name = "keyboard"

    def __init__(
        self, fd_in: int | None = None, fd_out: int | None = None, *, now: Clock = time.monotonic
    ) -> None:
        self._in = sys.stdin.fileno() if fd_in is None else fd_in
        self._out = sys.stdout.fileno() if fd_out is None else fd_out
        self._now = now
        if not os.isatty(self._in):
            raise OSError("the keyboard needs a terminal; standard input is none")
        self._saved: list[Any] | None = termios.tcgetattr(self._in)
        tty.setcbreak(self._in)
        self._until: dict[str, float] = {}
        """Held keys, and until when they count as held."""
        self._data = b""
        self._data_s = 0.0
        self.kitty = False
        self._focus = True
        self._gone = ""
        os.write(self._out, _BEGIN)

    def read(self) -> Reading:
        """Raises KeyboardInterrupt for Ctrl-C, which the kitty protocol delivers as a key."""
        self._fetch()
        if self._gone:
            return Reading(False, problem=self._gone)
        pressed = self._parse()
        now = self._now()
        self._until = {key: until for key, until in self._until.items() if until > now}
        if not self._focus:
            return Reading(False, problem="the terminal is not in focus")
        return Reading(True, frozenset(self._until), tuple(pressed))

    def close(self) -> None:
        if self._saved is not None:
            saved, self._saved = self._saved, None
            try:
                os.write(self._out, (_KITTY_OFF if self.kitty else b"") + _END)
                termios.tcsetattr(self._in, termios.TCSADRAIN, saved)
            except (OSError, termios.error):
                return  # the terminal itself is gone

    def _fetch(self) -> None:
        try:
            while not self._gone and select.select([self._in], [], [], 0)[0]:
                block = os.read(self._in, 1024)
                if not block:
                    self._lose("the terminal is closed")
                    return
                self._data += block
                self._data_s = self._now()
        except OSError as error:
            self._lose(f"the terminal is gone ({error.strerror})")

    def _lose(self, problem: str) -> None:
        self._gone = problem
        self._until.clear()

    def _parse(self) -> list[str]:
        pressed: list[str] = []
        while self._data:
            if self._data[0] != 0x1B:
                pressed += self._byte(self._data[0])
                self._data = self._data[1:]
                continue
            match = _SEQUENCE.match(self._data)
            if match is not None:
                pressed += self._sequence(match)
                self._data = self._data[match.end() :]
            elif self._now() - self._data_s < ESCAPE_S and self._data[1:2] in (b"", b"[", b"O"):
                break  # the rest is on its way
            else:
                pressed += self._down("escape")
                self._data = self._data[1:]
        return pressed

    def _byte(self, byte: int) -> list[str]:
        if byte in (10, 13):
            return self._down("enter")
        name = _CODES.get(byte) or (chr(byte).lower() if 32 < byte < 127 else "")
        return self._down(name) if name else []

    def _sequence(self, match: re.Match[bytes]) -> list[str]:
        if match[4] is not None:
            return self._down(_LETTERS.get(match[4].decode(), ""))
        private, body, last = match[1].decode(), match[2].decode(), match[3].decode()
        if private == "?" and last == "u" and not self.kitty:
            self.kitty = True
            self._until.clear()
            os.write(self._out, _KITTY_ON)
            return []
        if private or last == "c":
            return []
        if last in "IO" and not body:
            self._focus = last == "I"
            self._until.clear()
            return []
        fields = [part.split(":") for part in body.split(";")]
        modifiers = fields[1] if len(fields) > 1 else []
        event = int(modifiers[1]) if len(modifiers) > 1 and modifiers[1] else 1
        if last == "u":
            code = int(fields[0][0] or 0)
            control = bool(int(modifiers[0] or 1) - 1 & 4) if modifiers else False
            if control and chr(code) == "c":
                raise KeyboardInterrupt
            name = _CODES.get(code) or (chr(code).lower() if 32 < code < 127 else "")
        else:
            name = _LETTERS.get(last, "")
        if event == 3:
            self._until.pop(name, None)
            return []
        return self._down(name, repeat=event == 2)

    def _down(self, name: str, *, repeat: bool = False) -> list[str]:
        if not name:
            return []
        fresh = name not in self._until and not repeat
        if self.kitty:
            self._until[name] = float("inf")
        else:
            until = self._now() + (FIRST_S if fresh else REPEAT_S)
            self._until[name] = max(until, self._until.get(name, 0.0)) if not fresh else until
        return [name] if fresh else []
