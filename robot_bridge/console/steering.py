"""Who drives a cell from a browser: the lease, the deadman, and what the arbiter hears of them."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from robot_bridge.console.access import Session
from robot_bridge.console.drive import CommandRefused, Drive, Hold
from robot_bridge.console.lease import LAPSE_S, Lease, Leases
from robot_bridge.driving import Hand, measured
from robot_bridge.snapshots import Joints, State
from trajectory_store.contract import Contract

if TYPE_CHECKING:
    from robot_bridge.console.link import CellLink

log = logging.getLogger(__name__)


def soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *values: Any) -> None:
    """In the event loop, from another thread."""
    try:
        loop.call_soon_threadsafe(call, *values)
    except RuntimeError:
        return  # the loop has ended; so will the link


class Steering:
    """Of one cell. `link` and `loop` are set while the desk has a link.

    `_hand` runs in the link's thread, everything else in the event loop.
    """

    def __init__(self, contract: Contract, name: str, leases: Leases) -> None:
        self._contract, self._name, self._leases = contract, name, leases
        self.link: CellLink | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._hold = Hold(contract)
        self._lock = threading.Lock()
        self._driver: Session | None = None
        self._elsewhere = False
        self._counted_s = self._released_s = 0.0

    @property
    def driven(self) -> bool:
        """A browser has the cell."""
        return self._driver is not None

    @property
    def foreign(self) -> bool:
        """Another device or program is the cell's operator."""
        return self._elsewhere and self._driver is None

    @property
    def held(self) -> int:
        """Number of the press that is held; 0 for none."""
        return self._hold.number

    def lease(self) -> Lease | None:
        return self._leases.holder(self._name, time.monotonic())

    # Commands of the operator ---------------------------------------------------------------------

    def take(self, session: Session, *, online: bool) -> None:
        """The lease, and with it the operator's topics.

        Raises:
            LeaseTaken: another session has it.
            CommandRefused: another device drives the cell, or nobody is there.
        """
        now = time.monotonic()
        if self._leases.holds(self._name, session, now):
            self._leases.acquire(self._name, session, now)
            return
        link = self.link
        if link is None or not online:
            raise CommandRefused("offline", f"{self._name} does not answer; is the cell up?")
        if self.foreign:
            raise CommandRefused(
                "foreign", "another device or program is this cell's operator; end it first"
            )
        self._leases.acquire(self._name, session, now)
        self._driver = session
        with self._lock:
            self._hold = Hold(self._contract)  # presses of other browsers count from elsewhere
        link.drive(self._hand, operator=session.name)

    def give(self, session: Session) -> bool:
        """Lets go and gives the lease back."""
        if not self._leases.release(self._name, session):
            return False
        self._stop()
        return True

    def drive(self, session: Session, drive: Drive) -> str:
        """One message of the deadman; returns `begin`, `end`, `over` or ``.

        Raises:
            CommandRefused
        """
        link = self.link
        if link is None or not self._leases.holds(self._name, session, time.monotonic()):
            raise CommandRefused("lease", "take the lease of this cell first")
        with self._lock:
            news = self._hold.hear(drive, time.monotonic() * 1e3)
        if news == "begin":
            link.ask("takeover")
            self.audit("hold", session, ok=True)
        elif news == "end":
            link.ask("hand_back")
            self.audit("release", session, ok=True)
        link.nudge()
        return news

    def let_go(self, session: Session, why: str) -> None:
        """The session's connection closed or misbehaved."""
        if self._driver is session:
            with self._lock:
                held = self._hold.end()
            if held and self.link is not None:
                self.link.nudge()
                self.link.ask("hand_back")
                self.audit("release", session, ok=True, message=why)

    def look_after(self) -> None:
        """Once a second: a lease that lapsed."""
        session = self._driver
        if session is not None and not self._leases.holds(self._name, session, time.monotonic()):
            self.audit("lease", session, ok=True, message=f"lapsed after {LAPSE_S:.0f} s")
            self._stop()

    def audit(self, name: str, session: Session, *, ok: bool, message: str = "") -> None:
        """Every command becomes an event of the cell."""
        log.info("%s: %s by %s: %s %s", self._name, name, session.name, ok, message)
        if self.link is not None:
            self.link.note(
                "command",
                {
                    "name": name,
                    "by": session.name,
                    "role": str(session.role),
                    "device": "console",
                    "ok": ok,
                    "message": message[:200],
                },
            )

    def _lost_hold(self) -> None:
        session = self._driver
        if session is not None and self.link is not None:
            self.link.ask("hand_back")
            self.audit("release", session, ok=True, message="the browser fell silent while holding")

    def _stop(self) -> None:
        with self._lock:
            self._hold.end()
        self._driver = None
        self._released_s = time.monotonic()
        if self.link is not None:
            self.link.release()

    # In the link's thread -------------------------------------------------------------------------

    def hear(self, state: State) -> None:
        """Counts the operator's devices now and then."""
        link = self.link
        if link is not None and state.seen_s - self._counted_s > 0.5:
            self._counted_s = state.seen_s
            mine = 1 if self._driver is not None else 0
            settled = state.seen_s - self._released_s > 2.0
            self._elsewhere = settled and link.operators() > mine

    def _hand(self, tick_ns: int, joints: Joints | None) -> Hand:
        """What the arbiter hears of the operator at this moment."""
        now = time.monotonic() * 1e3
        with self._lock:
            hold = self._hold
            if hold.silent(now):
                hold.end()
                if self.loop is not None:
                    soon(self.loop, self._lost_hold)
            if hold.number == 0:
                return Hand(False)
            link = self.link
            lockstep = link is not None and link.lockstep
            dt_s = 1.0 / self._contract.control_hz if lockstep else None
            return Hand(True, hold.target(now, self._start(joints), dt_s))

    def _start(self, joints: Joints | None) -> np.ndarray | None:
        """Where a hold begins: the measured set-points, or the last displacement command."""
        if self._contract.action.mode == "absolute":
            return measured(self._contract, joints)
        executed = None if self.link is None else self.link.executed
        return None if executed is None else executed.position
