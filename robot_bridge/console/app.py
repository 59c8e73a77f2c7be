"""Routes and headers of the console; what each command does is in commands.py."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from robot_bridge.console.access import Denied, Origins, Session, Sessions, Tokens
from robot_bridge.console.commands import Commands
from robot_bridge.console.desk import PERIOD_S, Desk
from robot_bridge.console.drive import CommandRefused, Order
from robot_bridge.console.episodes import Library
from robot_bridge.console.hub import Browser
from robot_bridge.console.learning import Action, Learning, Plan
from robot_bridge.console.lease import Leases
from trajectory_store.contract import Contract

if TYPE_CHECKING:
    from robot_bridge.console.link import CellLink

log = logging.getLogger(__name__)

STATIC = Path(__file__).with_name("static")
MAX_BODY = 16 * 1024
MAX_BROWSERS = 40
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
SAFE = ("GET", "HEAD", "OPTIONS")
PLANS = (*get_args(Action), "shadow")

Handler = Callable[[Request, Session], Awaitable[Response]]


class Console:
    """Everything of one server."""

    def __init__(
        self,
        cells: Sequence[tuple[Contract, str, Callable[[], "CellLink"], Path]],
        *,
        tokens: Tokens,
        origins: Origins,
        library: Library,
        learning: Learning,
        title: str = "",
    ) -> None:
        """Args:
        cells: contract, name, how to connect and where the contract lies, for each cell.
        """
        self.leases = Leases()
        self.desks = {
            name: Desk(contract, name, connect, self.leases, folder)
            for contract, name, connect, folder in cells
        }
        self.sessions = Sessions(tokens)
        self.origins, self.library, self.learning, self.title = origins, library, learning, title
        self.commands = Commands(self.desks, self.leases, library, learning)
        self._browsers = 0
        self._cookie = "vla_post_console"
        if origins.hosts:  # two consoles of one computer share its cookies
            self._cookie += "_" + min(origins.hosts).rpartition(":")[2]

    def hello(self, session: Session) -> dict[str, Any]:
        return {
            "session": _who(session),
            "title": self.title,
            "now_ms": time.monotonic() * 1e3,
            "cells": [desk.describe() for desk in self.desks.values()],
            "has": {"registry": self.learning.registry is not None},
        }

    def app(self) -> ASGIApp:
        def guarded(path: str, handler: Handler, *methods: str) -> BaseRoute:
            return Route(path, self._guard(handler), methods=list(methods or ("GET",)))

        routes: list[BaseRoute] = [
            Route("/", _index),
            Route("/api/session", self._login, methods=["POST"]),
            Route("/api/session", self._logout, methods=["DELETE"]),
            guarded("/api/session", self._session),
            guarded("/api/cells", self._cells),
            guarded("/api/cells/{cell}", self._cell),
            guarded("/api/cells/{cell}/{command}", self._post_command, "POST"),
            guarded("/api/episodes", self._episodes),
            guarded("/api/episodes/{uuid}", self._episode),
            guarded("/api/episodes/{uuid}/pictures/{camera}/{step:int}", self._picture),
            guarded("/api/learner", self._learner),
            guarded("/api/versions", self._versions),
            guarded("/api/versions/plan", self._plan),
            WebSocketRoute("/ws", self._socket),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        return _Shield(Starlette(routes=routes, lifespan=self._lifespan), self.origins)

    # Life

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        tasks = [asyncio.create_task(self._broadcast()), asyncio.create_task(self._look_after())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for desk in self.desks.values():
                await desk.close()

    async def _broadcast(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            for desk in self.desks.values():
                try:
                    desk.broadcast()
                except Exception:
                    log.exception("%s: cannot be shown", desk.name)

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            for desk in self.desks.values():
                await desk.look_after()

    # Sessions

    def session_of(self, connection: HTTPConnection) -> Session:
        """Raises Denied."""
        now = time.monotonic()
        bearer = connection.headers.get("authorization", "")
        if bearer.startswith("Bearer "):
            return self.sessions.bearer(bearer.removeprefix("Bearer "), _address(connection), now)
        session = self.sessions.find(connection.cookies.get(self._cookie, ""), now)
        if session is None:
            raise Denied(401, "log in first")
        return session

    def _guard(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                session = self.session_of(request)
                if not session.requests.take(time.monotonic()):
                    raise Denied(429, "too many requests; wait a moment")
                return await handler(request, session)
            except Denied as error:
                return _error(error.status, str(error))
            except KeyError as error:
                return _error(404, str(error.args[0]))
            except CommandRefused as error:
                status = {"role": 403, "lease": 409, "taken": 409, "foreign": 409, "cell": 404}
                return _error(status.get(error.code, 400), str(error), code=error.code)
            except (ValueError, OSError) as error:
                return _error(400, str(error))

        return guarded

    async def _login(self, request: Request) -> Response:
        try:
            body = await _json(request)
            token, name = body.get("token"), body.get("name", "")
            if not isinstance(token, str) or not isinstance(name, str):
                raise Denied(400, "expected {token, name}")
            secret, session = self.sessions.login(token, name, _address(request), time.monotonic())
        except Denied as error:
            return _error(error.status, str(error))
        response = JSONResponse(_who(session))
        response.set_cookie(
            self._cookie,
            secret,
            httponly=True,
            samesite="strict",
            secure=self.origins.scheme == "https",
            path="/",
        )
        return response

    async def _logout(self, request: Request) -> Response:
        self.sessions.logout(request.cookies.get(self._cookie, ""))
        response = JSONResponse({})
        response.delete_cookie(self._cookie, path="/")
        return response

    async def _session(self, request: Request, session: Session) -> Response:
        return JSONResponse(_who(session) | {"now_ms": time.monotonic() * 1e3})

    # Cells

    async def _cells(self, request: Request, session: Session) -> Response:
        return JSONResponse(
            {"cells": [desk.describe() | desk.summary() for desk in self.desks.values()]}
        )

    def _desk(self, request: Request) -> Desk:
        name = request.path_params["cell"]
        if name not in self.desks:
            raise KeyError(f"no cell {name[:40]!r}; there are {', '.join(self.desks)}")
        return self.desks[name]

    async def _cell(self, request: Request, session: Session) -> Response:
        desk = self._desk(request)
        await desk.hold_open()
        return JSONResponse(
            desk.describe() | desk.summary() | desk.streams() | {"events": desk.recent_events()}
        )

    async def _post_command(self, request: Request, session: Session) -> Response:
        arguments = await _json(request)
        desk = self._desk(request)
        sent = arguments.pop("sent_ms", None)
        if sent is not None:
            if isinstance(sent, bool) or not isinstance(sent, int | float):
                raise Denied(400, "sent_ms is a number")
            if request.path_params["command"] != "stop":
                Order().check(0, float(sent), time.monotonic() * 1e3, desk.max_age_ms)
        await desk.hold_open()
        self.leases.renew(session, time.monotonic())
        body = await self.commands.run(
            request.path_params["command"], session, desk.name, arguments
        )
        return JSONResponse(body, status_code=200 if body["ok"] else 409)

    # Episodes

    async def _episodes(self, request: Request, session: Session) -> Response:
        query = request.query_params
        return JSONResponse(
            await self.library.listing(
                cell=query.get("cell", ""),
                task=query.get("task", ""),
                outcome=query.get("outcome", ""),
                limit=_count(query.get("limit", "50"), 1, 200),
                offset=_count(query.get("offset", "0"), 0, 10**9),
            )
        )

    async def _episode(self, request: Request, session: Session) -> Response:
        return JSONResponse(await self.library.detail(request.path_params["uuid"]))

    async def _picture(self, request: Request, session: Session) -> Response:
        path = request.path_params
        jpeg = await self.library.picture(path["uuid"], path["camera"], path["step"])
        return Response(
            jpeg, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"}
        )

    # Learner and versions

    async def _learner(self, request: Request, session: Session) -> Response:
        episodes = await self.library.summaries()
        return JSONResponse(await asyncio.to_thread(self.learning.progress, episodes))

    async def _versions(self, request: Request, session: Session) -> Response:
        return JSONResponse(await asyncio.to_thread(self.learning.versions))

    async def _plan(self, request: Request, session: Session) -> Response:
        query = request.query_params
        action = query.get("action", "")
        if action not in PLANS:
            raise Denied(400, f"action is one of {', '.join(PLANS)}")
        number = _count(query["version"], 0, 10**9) if "version" in query else None
        plan = await asyncio.to_thread(
            self.learning.plan,
            cast(Plan, action),
            number,
            share=_count(query.get("percent", "0"), 0, 100) / 100,
            cells=[name for name in query.get("cells", "").split(",") if name],
            known=list(self.desks),
        )
        takes = plan.pop("takes")
        plan["cells"] = [
            {
                "takes": desk.name in takes,
                "cell": desk.name,
                "runs": None if desk.link is None else desk.link.policy.get("version"),
                "in_episode": desk.link is not None and desk.link.episode is not None,
                "swap": desk.contract.safety.swap,
            }
            for desk in self.desks.values()
        ]
        return JSONResponse(plan)

    # Browsers

    async def _socket(self, socket: WebSocket) -> None:
        try:
            session = self.session_of(socket)
            if self._browsers >= MAX_BROWSERS:
                raise Denied(503, f"{MAX_BROWSERS} browsers are connected already")
        except Denied as error:
            await socket.send_denial_response(_error(error.status, str(error)))
            return
        await socket.accept()
        self._browsers += 1
        try:
            await Browser(socket, session, self).run()
        finally:
            self._browsers -= 1


class _Shield:
    """Before everything else: host, origin, size; and security headers on every answer."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {
            k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]
        }
        is_socket = scope["type"] == "websocket"
        try:
            self._origins.check_host(headers.get("host"))
            if is_socket or scope["method"] not in SAFE:
                # A browser says whence it comes; a script with a token has no cookie to lend.
                script = headers.get("authorization", "").startswith("Bearer ")
                if not script or "origin" in headers:
                    self._origins.check_origin(headers.get("origin"))
            if not is_socket and int(headers.get("content-length", "0") or 0) > MAX_BODY:
                raise Denied(413, f"a request has at most {MAX_BODY} bytes")
        except (Denied, ValueError) as error:
            status = error.status if isinstance(error, Denied) else 400
            refusal = _error(status, str(error))
            if is_socket:
                await WebSocket(scope, receive, send).send_denial_response(refusal)
            else:
                await refusal(scope, receive, self._dressed(send, "/api/"))
            return
        await self._app(scope, receive, self._dressed(send, scope["path"]))

    def _dressed(self, send: Send, path: str) -> Send:
        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                extra = dict(HEADERS)
                if b"cache-control" not in names:
                    extra["cache-control"] = "no-store" if path.startswith("/api/") else "no-cache"
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in extra.items()),
                ]
            await send(message)

        return dressed


async def _index(request: Request) -> Response:
    return FileResponse(STATIC / "index.html")


async def _json(request: Request) -> dict[str, Any]:
    """Raises Denied for too much, or for something else than an object."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Denied(413, f"a request has at most {MAX_BODY} bytes")
    try:
        data = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise Denied(400, "the body is not JSON") from None
    if not isinstance(data, dict):
        raise Denied(400, "the body is a JSON object")
    return data


def _error(status: int, message: str, **more: Any) -> JSONResponse:
    return JSONResponse({"error": message, **more}, status_code=status)


def _who(session: Session) -> dict[str, Any]:
    return {"id": session.id, "role": str(session.role), "name": session.name}


def _address(connection: HTTPConnection) -> str:
    return connection.client.host if connection.client else ""


def _count(text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise Denied(400, f"{text[:20]!r} is not a whole number from {low} to {high}")
    return int(text)
