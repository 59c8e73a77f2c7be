"""One cell as the console sees it, and what everybody who watches it shares.

The link's callbacks run in the link's thread and only put values into slots; `broadcast` runs in
the event loop every `PERIOD_S`, builds each text once and hands it to all viewers. The link exists
while somebody watches: an unwatched console costs a cell nothing.
"""

import asyncio
import json
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from robot_bridge.console import sight
from robot_bridge.console.access import Session
from robot_bridge.console.drive import CommandRefused, Drive, Hold, max_age_ms
from robot_bridge.console.lease import LAPSE_S, Leases
from robot_bridge.driving import Hand, measured
from robot_bridge.snapshots import Frame, Joints
from trajectory_store.contract import Contract

if TYPE_CHECKING:
    from robot_bridge.console.link import CellLink

log = logging.getLogger(__name__)

PERIOD_S = 0.05
"""State and traces reach a viewer at most this often."""
LINGER_S = 20.0
"""The link stays for so long after the last viewer: a reload must not lose the cell."""
ONLINE_S = 2.0
"""The arbiter speaks ten times a second; silent for so long, the cell counts as gone."""
TIMELINE_S = 600.0
FRAME_HEADER = struct.Struct("<BBHId")
"""Camera's index, version 1, age when it arrived in ms, sequence number, server's time in ms."""


class Viewer(Protocol):
    """What a desk needs of a browser."""

    session: Session

    def put(self, kind: str, text: str) -> None:
        """Replaces what waits of this kind."""
        ...

    def tell(self, text: str) -> None:
        """Must arrive."""
        ...

    def show(self, camera: int, seq: int, picture: bytes) -> None: ...


class Desk:
    """Owned by the event loop. See the module.

    Args:
        connect: makes the link; called in a thread, as it takes a moment.
    """

    def __init__(
        self, contract: Contract, name: str, connect: Callable[[], "CellLink"], leases: Leases
    ) -> None:
        self.contract, self.name = contract, name
        self.cameras = list(contract.images)
        self.max_age_ms = max_age_ms(contract)
        self.link: CellLink | None = None
        self._connect, self._leases = connect, leases
        self._opening = asyncio.Lock()
        self._viewers: set[Viewer] = set()
        self._watchers: dict[Viewer, set[int]] = {}
        self._left_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hold = Hold(contract)
        self._hold_lock = threading.Lock()
        self._driver: Session | None = None
        self._foreign = False
        self._counted_s = self._released_s = 0.0
        self._mode = ""
        self._mode_s = time.monotonic()
        self._runs: deque[tuple[float, str]] = deque(maxlen=400)
        self._meters: dict[str, sight.Meter] = {}
        self._said: dict[str, str] = {}
        self._sent_s: dict[str, float] = {}
        self._events: deque[str] = deque(maxlen=500)
        self._chunk_new = self._runs_new = False

    # Viewers --------------------------------------------------------------------------------------

    async def enter(self, viewer: Viewer) -> None:
        """The viewer gets this cell's summaries from now on."""
        self._viewers.add(viewer)
        await self._open()

    async def leave(self, viewer: Viewer) -> None:
        self.unwatch(viewer)
        self._viewers.discard(viewer)
        self._left_s = time.monotonic()

    async def hold_open(self) -> None:
        """For a request without a browser: connects, and lingers a while."""
        self._left_s = time.monotonic()
        if self.link is None:
            await self._open()
            assert self.link is not None
            await asyncio.to_thread(self.link.wait_until, lambda: self.online, 3.0)

    def watch(self, viewer: Viewer, cameras: set[int]) -> None:
        """The viewer also gets pictures, traces and events."""
        new = viewer not in self._watchers
        self._watchers[viewer] = cameras
        self._follow_cameras()
        if new:
            for kind in ("chunk", "streams", "timeline"):
                if kind in self._said:
                    viewer.put(kind, self._said[kind])
            viewer.tell(self._texts("events", {"events": self.recent_events()}))

    def unwatch(self, viewer: Viewer) -> None:
        if self._watchers.pop(viewer, None) is not None:
            self._follow_cameras()

    def _follow_cameras(self) -> None:
        if self.link is None:
            return
        wanted = set[int]().union(*self._watchers.values())
        for index, key in enumerate(self.cameras):
            (self.link.watch if index in wanted else self.link.unwatch)(key)

    async def _open(self) -> None:
        async with self._opening:
            if self.link is not None:
                return
            self._loop = asyncio.get_running_loop()
            link = await asyncio.to_thread(self._connect)
            self.link = link
            link.listen(self._hear)
            self._follow_cameras()
            self._events.clear()
            for event in link.events:
                self._events.append(event.to_json())

    async def close(self) -> None:
        async with self._opening:
            link, self.link = self.link, None
            if link is not None:
                await asyncio.to_thread(link.close)
                self._said.clear()
                self._meters.clear()

    @property
    def online(self) -> bool:
        link = self.link
        return link is not None and time.monotonic() - link.state.seen_s < ONLINE_S

    # In the link's thread -------------------------------------------------------------------------

    def _hear(self, kind: str, value: Any) -> None:
        loop, link = self._loop, self.link
        if loop is None or link is None:
            return
        if kind == "frame":
            frame: Frame = value
            self._meter(frame.key).hit()
            age = time.time() - frame.stamp_ns / 1e9 if not self.contract.sim else 0.0
            index = self.cameras.index(frame.key)
            head = FRAME_HEADER.pack(
                index, 1, min(max(int(age * 1e3), 0), 65535), frame.seq, time.monotonic() * 1e3
            )
            self._soon(loop, self._show, index, frame.seq, head + frame.jpeg)
        elif kind == "joints":
            self._meter("joint_states").hit()
        elif kind == "executed":
            self._meter("executed").hit()
            label: str = value.label
            who = label.partition(":")[0]
            if not self._runs or self._runs[-1][1] != who:
                self._runs.append((time.monotonic() * 1e3, who))
                self._runs_new = True
        elif kind == "chunk":
            self._meter("action_chunk").hit()
            self._chunk_new = True
        elif kind == "event":
            text = value.to_json()
            self._events.append(text)
            self._soon(loop, self._tell_event, text)
        elif kind == "state":
            self._meter("arbiter_state").hit()
            if value.mode != self._mode:
                self._mode, self._mode_s = value.mode, time.monotonic()
            if value.seen_s - self._counted_s > 0.5:
                self._counted_s = value.seen_s
                mine = 1 if self._driver is not None else 0
                settled = value.seen_s - self._released_s > 2.0
                self._foreign = settled and link.operators() > mine

    @staticmethod
    def _soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *values: Any) -> None:
        try:
            loop.call_soon_threadsafe(call, *values)
        except RuntimeError:
            return  # the loop has ended; so will the link

    def _meter(self, key: str) -> sight.Meter:
        meter = self._meters.get(key)
        if meter is None:
            meter = self._meters[key] = sight.Meter()
        return meter

    def _hand(self, tick_ns: int, joints: Joints | None) -> Hand:
        """What the arbiter hears of the operator at this moment."""
        now = time.monotonic() * 1e3
        with self._hold_lock:
            hold = self._hold
            if hold.silent(now):
                hold.end()
                loop = self._loop
                if loop is not None:
                    self._soon(loop, self._lost_hold)
            if hold.number == 0:
                return Hand(False)
            link = self.link
            lockstep = link is not None and link.lockstep
            dt_s = 1.0 / self.contract.control_hz if lockstep else None
            return Hand(True, hold.target(now, self._start(joints), dt_s))

    def _start(self, joints: Joints | None) -> np.ndarray | None:
        """Where a hold begins: the measured set-points, or the last displacement command."""
        if self.contract.action.mode == "absolute":
            return measured(self.contract, joints)
        link = self.link
        executed = None if link is None else link.executed
        return None if executed is None else executed.position

    # Commands of the operator ---------------------------------------------------------------------

    def take(self, session: Session) -> None:
        """The lease, and with it the operator's topics.

        Raises:
            LeaseTaken: another session has it.
            CommandRefused: another device drives the cell, or nobody is there.
        """
        now = time.monotonic()
        if self._leases.holds(self.name, session, now):
            self._leases.acquire(self.name, session, now)
            return
        link = self.link
        if link is None or not self.online:
            raise CommandRefused("offline", f"{self.name} does not answer; is the cell up?")
        if self._foreign and self._driver is None:
            raise CommandRefused(
                "foreign", "another device or program is this cell's operator; end it first"
            )
        self._leases.acquire(self.name, session, now)
        self._driver = session
        with self._hold_lock:
            self._hold = Hold(self.contract)  # presses of other browsers count from elsewhere
        link.drive(self._hand, operator=session.name)

    def give(self, session: Session) -> bool:
        """Lets go and gives the lease back."""
        if not self._leases.release(self.name, session):
            return False
        self._stop_driving()
        return True

    def drive(self, session: Session, drive: Drive) -> str:
        """One message of the deadman; returns `begin`, `end`, `over` or ``.

        Raises:
            CommandRefused
        """
        link = self.link
        if link is None or not self._leases.holds(self.name, session, time.monotonic()):
            raise CommandRefused("lease", "take the lease of this cell first")
        with self._hold_lock:
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
            with self._hold_lock:
                held = self._hold.end()
            if held and self.link is not None:
                self.link.nudge()
                self.link.ask("hand_back")
                self.audit("release", session, ok=True, message=why)

    def _lost_hold(self) -> None:
        session = self._driver
        if session is not None and self.link is not None:
            self.link.ask("hand_back")
            self.audit("release", session, ok=True, message="the browser fell silent while holding")

    def _stop_driving(self) -> None:
        with self._hold_lock:
            self._hold.end()
        self._driver = None
        self._released_s = time.monotonic()
        if self.link is not None:
            self.link.release()

    def audit(self, name: str, session: Session, *, ok: bool, message: str = "") -> None:
        """Every command becomes an event of the cell."""
        log.info("%s: %s by %s: %s %s", self.name, name, session.name, ok, message)
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

    # In the event loop ----------------------------------------------------------------------------

    async def look_after(self) -> None:
        """Once a second: leases that lapsed, links that nobody needs."""
        now = time.monotonic()
        if self._driver is not None and not self._leases.holds(self.name, self._driver, now):
            self.audit("lease", self._driver, ok=True, message=f"lapsed after {LAPSE_S:.0f} s")
            self._stop_driving()
        if (
            self.link is not None
            and not self._viewers
            and not self._driver
            and now - self._left_s > LINGER_S
        ):
            await self.close()

    def broadcast(self) -> None:
        """Builds what changed and hands it to the viewers."""
        link = self.link
        if link is None or not self._viewers:
            return
        now = time.monotonic()
        for meter in self._meters.values():
            meter.measure(now)
        summary = self.summary()
        stable = json.dumps({k: v for k, v in summary.items() if k not in ("now_ms", "ages")})
        if stable != self._said.get("state") or now - self._sent_s.get("state", 0.0) > 0.5:
            self._said["state"], self._sent_s["state"] = stable, now
            text = self._texts("state", summary)
            for viewer in self._viewers:
                viewer.put(f"state {self.name}", text)
        if not self._watchers:
            return
        self._spread("trace", sight.trace(self.contract, link))
        if self._chunk_new:
            self._chunk_new = False
            self._spread("chunk", sight.chunk(self.contract, link))
        if self._runs_new:
            self._runs_new = False
            self._spread("timeline", self._timeline())
        if now - self._sent_s.get("streams", 0.0) >= 1.0:
            self._sent_s["streams"] = now
            self._spread("streams", self.streams())

    def _spread(self, kind: str, body: Mapping[str, Any] | None) -> None:
        if body is None:
            return
        text = self._texts(kind, body)
        if text != self._said.get(kind):
            self._said[kind] = text
            for viewer in self._watchers:
                viewer.put(kind, text)

    def _texts(self, kind: str, body: Mapping[str, Any]) -> str:
        return json.dumps({"type": kind, "cell": self.name, **body}, separators=(",", ":"))

    def _tell_event(self, text: str) -> None:
        body = f'{{"type":"event","cell":{json.dumps(self.name)},"event":{text}}}'
        for viewer in self._watchers:
            viewer.tell(body)

    def _show(self, index: int, seq: int, picture: bytes) -> None:
        for viewer, cameras in self._watchers.items():
            if index in cameras:
                viewer.show(index, seq, picture)

    # What there is to see -------------------------------------------------------------------------

    def recent_events(self) -> list[Any]:
        return [json.loads(text) for text in list(self._events)[-100:]]

    def summary(self) -> dict[str, Any]:
        """The cell in a nutshell, for banners and the fleet page."""
        link, now = self.link, time.monotonic()
        lease = self._leases.holder(self.name, now)
        out: dict[str, Any] = {
            "now_ms": round(now * 1e3, 1),
            "online": self.online,
            "lease": None
            if lease is None
            else {
                "id": lease.session.id,
                "name": lease.session.name,
                "asked_by": lease.asked_by,
            },
            "foreign": self._foreign and self._driver is None,
            "held": self._hold.number,
        }
        if link is None:
            return out
        return (
            out
            | sight.arbiter(link)
            | {
                "mode_since_ms": round(self._mode_s * 1e3),
                "episode": sight.episode(self.contract, link),
            }
        )

    def _timeline(self) -> dict[str, Any]:
        now = time.monotonic() * 1e3
        runs = [run for run in self._runs if now - run[0] < TIMELINE_S * 1e3]
        if not runs and self._runs:
            runs = [self._runs[-1]]
        return {"runs": [[round(start), who] for start, who in runs]}

    def streams(self) -> dict[str, Any]:
        """Rates and ages as they arrive here, and what the cell's own nodes count."""
        rows = sight.streams(self.contract, self._meters)
        return {"streams": rows, "nodes": {} if self.link is None else sight.counts(self.link)}

    def describe(self) -> dict[str, Any]:
        return sight.describe(self.contract, self.name)
