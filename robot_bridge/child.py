"""Runs a module as a child that does not outlive its parent.

    python -m robot_bridge.child PARENT_PID MODULE [ARGUMENTS]

The kernel sends SIGTERM when the parent dies, however it dies; whoever has not left
`GRACE_S` later is killed, with what it started itself.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Raises OSError where the kernel refuses (it does not on Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    threading.Thread(target=_outlive, args=(parent,), name="parent-watch", daemon=True).start()


def _outlive(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(GRACE_S)
    # We lead our own process group (see ProcessGroup), so this reaches grandchildren as well.
    target = os.getpid()
    if os.getpgid(target) == target:
        os.killpg(target, signal.SIGKILL)
    os.kill(target, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
