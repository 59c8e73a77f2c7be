"""Signals that end a command in order."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ends_in_order() -> Generator[None]:
    """SIGTERM and a closed terminal end what is inside as Ctrl-C does: by KeyboardInterrupt.

    SIGINT itself too: a shell starts background jobs with it ignored, and Python keeps that.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
