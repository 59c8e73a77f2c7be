"""One cell as the console sees it, and what everybody who watches it shares.

The link's callbacks run in the link's thread and only put values into slots; `broadcast` runs in
the event loop every `PERIOD_S`, builds each text once and hands it to all viewers. The link exists
while somebody watches: an unwatched console costs a cell nothing. What was heard is in `ears`, who
drives in `steering`.
"""

import asyncio
import json
import logging
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from robot_bridge.console import sight
from robot_bridge.console.access import Session
from robot_bridge.console.drive import max_age_ms
from robot_bridge.console.ears import Ears, hint, traces
from robot_bridge.console.lease import Leases
from robot_bridge.console.steering import Steering, soon
from robot_bridge.snapshots import Frame
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
        folder: where the contract lies.
    """

    def __init__(
        self,
        contract: Contract,
        name: str,
        connect: Callable[[], "CellLink"],
        leases: Leases,
        folder: Path,
    ) -> None:
        self.contract, self.name = contract, name
        self.cameras = list(contract.images)
        self.max_age_ms = max_age_ms(contract)
        self.link: CellLink | None = None
        self.steering = Steering(contract, name, leases)
        self._connect = connect
        self._ears = Ears(contract)
        self._sight = sight.Overlay(contract, folder)
        self._opening = asyncio.Lock()
        self._viewers: set[Viewer] = set()
        self._watchers: dict[Viewer, set[int]] = {}
        self._left_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._said: dict[str, str] = {}
        self._sent_s: dict[str, float] = {}

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
            self._loop = self.steering.loop = asyncio.get_running_loop()
            link = await asyncio.to_thread(self._connect)
            self.link = self.steering.link = link
            link.listen(self._hear)
            self._follow_cameras()
            self._ears.events.clear()
            for event in link.events:
                self._ears.events.append(event.to_json())

    async def close(self) -> None:
        async with self._opening:
            link, self.link = self.link, None
            self.steering.link = None
            if link is not None:
                await asyncio.to_thread(link.close)
                self._said.clear()
                self._ears.clear()

    @property
    def online(self) -> bool:
        link = self.link
        return link is not None and time.monotonic() - link.state.seen_s < ONLINE_S

    # In the link's thread -------------------------------------------------------------------------

    def _hear(self, kind: str, value: Any) -> None:
        loop = self._loop
        if loop is None or self.link is None:
            return
        self._ears.hear(kind, value)
        if kind == "frame":
            frame: Frame = value
            age = time.time() - frame.stamp_ns / 1e9 if not self.contract.sim else 0.0
            index = self.cameras.index(frame.key)
            head = FRAME_HEADER.pack(
                index, 1, min(max(int(age * 1e3), 0), 65535), frame.seq, time.monotonic() * 1e3
            )
            soon(loop, self._show, index, frame.seq, head + frame.jpeg)
        elif kind == "event":
            soon(loop, self._tell_event, value.to_json())
        elif kind == "state":
            self.steering.hear(value)

    # In the event loop ----------------------------------------------------------------------------

    async def look_after(self) -> None:
        """Once a second: leases that lapsed, links that nobody needs."""
        self.steering.look_after()
        lonely = not self._viewers and not self.steering.driven
        if self.link is not None and lonely and time.monotonic() - self._left_s > LINGER_S:
            await self.close()

    def broadcast(self) -> None:
        """Builds what changed and hands it to the viewers."""
        link, ears = self.link, self._ears
        if link is None or not self._viewers:
            return
        now = time.monotonic()
        ears.measure(link.health, now)
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
        if ears.chunk_new:
            ears.chunk_new = False
            chunk = sight.chunk(self.contract, link)
            if chunk is not None:
                chunk["paths"] = self._sight.paths(link)
            self._spread("chunk", chunk)
        if ears.runs_new:
            ears.runs_new = False
            self._spread("timeline", ears.timeline())
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
        return self._ears.recent_events()

    def summary(self) -> dict[str, Any]:
        """The cell in a nutshell, for banners and the fleet page."""
        link, steering = self.link, self.steering
        lease = steering.lease()
        out: dict[str, Any] = {
            "now_ms": round(time.monotonic() * 1e3, 1),
            "online": self.online,
            "lease": None
            if lease is None
            else {
                "id": lease.session.id,
                "name": lease.session.name,
                "asked_by": lease.asked_by,
            },
            "foreign": steering.foreign,
            "held": steering.held,
        }
        if link is None:
            return out
        return (
            out
            | sight.arbiter(link)
            | {
                "mode_since_ms": round(self._ears.mode_s * 1e3),
                "episode": sight.episode(self.contract, link),
                "traces": traces(link.health),
                "hint": hint(link.health),
                "shadow": sight.shadow(link),
            }
        )

    def streams(self) -> dict[str, Any]:
        """Rates, ages and losses, and what the cell's own nodes count."""
        nodes = {} if self.link is None else sight.counts(self.link)
        return {"streams": self._ears.streams(), "nodes": nodes}

    def describe(self) -> dict[str, Any]:
        return sight.describe(self.contract, self.name) | {"overlay": self._sight.cameras}
