"""One browser: what it gets and what it says.

A slow browser skips, it never queues: state and pictures wait in slots that newer ones replace,
and a camera's next picture is sent only when the one before was drawn. What must arrive (replies,
events) has a short queue; a browser that lets it overflow is disconnected.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from robot_bridge.console.access import Bucket, Session
from robot_bridge.console.commands import Commands
from robot_bridge.console.desk import Desk
from robot_bridge.console.drive import CommandRefused, Drive, Order
from robot_bridge.console.lease import Leases

if TYPE_CHECKING:
    from robot_bridge.console.app import Console

log = logging.getLogger(__name__)

MAX_MESSAGE = 8 * 1024
"""Bytes of one message of a browser."""
MAX_OUTBOX = 400
IN_FLIGHT = 2
"""Pictures of one camera on their way to the browser."""
SILENT_S = 20.0
"""A browser pings every second; silent for so long, it is gone."""
MAX_RUNNING = 16
"""Commands of one browser that wait for their answers."""
BAD_MESSAGES = 10
"""Malformed messages after which the connection is closed."""


class Browser:
    """One WebSocket. `run` returns when it is closed."""

    def __init__(self, socket: WebSocket, session: Session, console: "Console") -> None:
        self.session = session
        self._socket, self._console = socket, console
        self._leases: Leases = console.leases
        self._commands: Commands = console.commands
        self._wake = asyncio.Event()
        self._outbox: deque[str] = deque()
        self._texts: dict[str, str] = {}
        self._pictures: dict[int, tuple[int, bytes]] = {}
        self._in_flight: dict[int, int] = {}
        self._overflow = False
        self._order = Order()
        self._rate = Bucket(120, 240)
        self._bad = 0
        self._watched: Desk | None = None
        self._group: asyncio.TaskGroup
        self._running = 0

    # For the desk

    def put(self, kind: str, text: str) -> None:
        self._texts[kind] = text
        self._wake.set()

    def tell(self, text: str) -> None:
        if len(self._outbox) >= MAX_OUTBOX:
            self._overflow = True
        else:
            self._outbox.append(text)
        self._wake.set()

    def show(self, camera: int, seq: int, picture: bytes) -> None:
        self._pictures[camera] = (seq, picture)
        self._wake.set()

    # The connection

    async def run(self) -> None:
        console = self._console
        self.tell(json.dumps({"type": "hello", **console.hello(self.session)}))
        try:
            for desk in console.desks.values():
                await desk.enter(self)
            async with asyncio.TaskGroup() as group:
                self._group = group
                sender = group.create_task(self._send())
                try:
                    await self._receive()
                finally:
                    sender.cancel()
        except* (WebSocketDisconnect, RuntimeError, OSError) as errors:
            log.debug("%s: %s", self.session.name, errors)
        finally:
            for desk in console.desks.values():
                desk.steering.let_go(self.session, "the browser's connection was closed")
                await desk.leave(self)
            with contextlib.suppress(Exception):
                if self._socket.client_state is WebSocketState.CONNECTED:
                    await self._socket.close()

    async def _send(self) -> None:
        socket = self._socket
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._overflow:
                await socket.close(1013, "this browser is too slow")
                return
            while self._outbox:
                await socket.send_text(self._outbox.popleft())
            while self._texts:
                kind = next(iter(self._texts))
                await socket.send_text(self._texts.pop(kind))
            for camera in list(self._pictures):
                if self._in_flight.get(camera, 0) < IN_FLIGHT:
                    _, picture = self._pictures.pop(camera)
                    self._in_flight[camera] = self._in_flight.get(camera, 0) + 1
                    await socket.send_bytes(picture)

    async def _receive(self) -> None:
        while True:
            message = await asyncio.wait_for(self._socket.receive(), SILENT_S)
            if message["type"] == "websocket.disconnect":
                return
            now = time.monotonic()
            self.session.seen_s = now
            self._leases.renew(self.session, now)
            text = message.get("text")
            try:
                if text is None:
                    raise CommandRefused("format", "messages to the console are JSON text")
                if len(text) > MAX_MESSAGE:
                    raise CommandRefused("size", f"a message has at most {MAX_MESSAGE} bytes")
                self._handle(_parse(text), now)
            except CommandRefused as error:
                self.tell(
                    json.dumps({"type": "refused", "code": error.code, "message": str(error)})
                )
                if error.code in ("format", "size"):
                    self._bad += 1
                    if self._bad >= BAD_MESSAGES:
                        await self._socket.close(1008, "too many malformed messages")
                        return

    def _handle(self, data: Mapping[str, Any], now_s: float) -> None:
        kind = data.get("type")
        if kind == "stop":  # before rates, ages and leases: a stop is never too late
            self._group.create_task(self._answer(data, "stop", {}))
            return
        if kind == "drawn":
            for camera in data.get("cameras", [])[:64]:
                if isinstance(camera, int) and self._in_flight.get(camera, 0) > 0:
                    self._in_flight[camera] -= 1
            if self._pictures:
                self._wake.set()
            return
        if not self._rate.take(now_s):
            raise CommandRefused("rate", "too many messages; some were dropped")
        if kind == "ping":
            self.tell(json.dumps({"type": "pong", "t": _number(data, "t"), "now_ms": now_s * 1e3}))
        elif kind == "watch":
            self._watch(data)
        elif kind == "drive":
            self._drive(data, now_s)
        elif kind == "command":
            self._command(data, now_s)
        else:
            raise CommandRefused("format", f"no message of type {str(kind)[:40]!r}")

    def _desk(self, data: Mapping[str, Any]) -> Desk:
        desk = self._console.desks.get(str(data.get("cell")))
        if desk is None:
            raise CommandRefused("cell", f"no cell {str(data.get('cell'))[:40]!r}")
        return desk

    def _watch(self, data: Mapping[str, Any]) -> None:
        desk = None if data.get("cell") is None else self._desk(data)
        cameras = data.get("cameras", [])
        if not isinstance(cameras, list) or not all(isinstance(c, int) for c in cameras):
            raise CommandRefused("format", "cameras is a list of indices")
        if self._watched is not None and self._watched is not desk:
            self._watched.unwatch(self)
        self._watched = desk
        self._pictures.clear()
        self._in_flight.clear()
        if desk is not None:
            desk.watch(self, {c for c in cameras if 0 <= c < len(desk.cameras)})

    def _drive(self, data: Mapping[str, Any], now_s: float) -> None:
        self._must_operate()
        axes = data.get("axes", {})
        if not isinstance(axes, dict):
            raise CommandRefused("format", "axes is an object of numbers")
        drive = Drive(
            seq=int(_number(data, "seq")),
            sent_ms=_number(data, "t"),
            hold=int(_number(data, "hold")),
            axes={str(name): _number(axes, name) for name in axes},
            speed=_number(data, "speed", 0.25),
        )
        desk = self._desk(data)
        try:
            self._order.check(drive.seq, drive.sent_ms, now_s * 1e3, desk.max_age_ms)
            news = desk.steering.drive(self.session, drive)
        except CommandRefused as error:
            desk.steering.let_go(self.session, str(error))
            raise
        self.put(
            "driven",
            json.dumps({"type": "driven", "seq": drive.seq, "hold": drive.hold, "news": news}),
        )

    def _command(self, data: Mapping[str, Any], now_s: float) -> None:
        """Runs beside the connection: a slow cell must not keep a stop waiting."""
        name, arguments = str(data.get("name")), data.get("arguments", {})
        try:
            seq, sent = int(_number(data, "seq")), _number(data, "t")
            self._order.check(seq, sent, now_s * 1e3, self._desk(data).max_age_ms)
            if not isinstance(arguments, dict):
                raise CommandRefused("format", "arguments is an object")
            if self._running >= MAX_RUNNING:
                raise CommandRefused("busy", "too many commands wait for their answers")
        except CommandRefused as error:
            self._reply(data, name, {"ok": False, "code": error.code, "message": str(error)})
            return
        self._group.create_task(self._answer(data, name, arguments))

    async def _answer(self, data: Mapping[str, Any], name: str, arguments: dict[str, Any]) -> None:
        self._running += 1
        try:
            body = await self._commands.run(name, self.session, data.get("cell"), arguments)
        except CommandRefused as error:
            body = {"ok": False, "code": error.code, "message": str(error)}
        finally:
            self._running -= 1
        self._reply(data, name, body)

    def _reply(self, data: Mapping[str, Any], name: str, body: Mapping[str, Any]) -> None:
        number = data.get("id")
        reply = {"type": "reply", "id": number if isinstance(number, int) else None, "name": name}
        self.tell(json.dumps(reply | dict(body)))

    def _must_operate(self) -> None:
        if not self.session.may_operate:
            raise CommandRefused(
                "role", "a viewer may watch and stop; log in with the operator's token"
            )


def _parse(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandRefused("format", f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CommandRefused("format", "a message is a JSON object with a type")
    return data


def _number(data: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
        raise CommandRefused("format", f"{name} is {value!r:.40}; expected a number")
    return float(value) if value == value else _number({}, name)  # NaN is refused as missing
