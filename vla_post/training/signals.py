"""SIGINT and SIGTERM as a request to come to an end in order."""

import signal
import sys
import threading


class StopRequest(threading.Event):
    """Set by SIGINT or SIGTERM once `listen` was called.

    While `loading` is true there is nothing to bring to an end, and the process exits at once with
    status 0.
    """

    loading: bool = True

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._asked)

    def _asked(self, *_: object) -> None:
        self.set()
        if self.loading:
            sys.exit(0)
