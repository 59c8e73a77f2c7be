"""Every control of the console: what it needs, what it does, what is said about it.

The WebSocket and the REST interface both come here. `docs/console.md` lists the names.
"""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Literal, cast, get_args

from robot_bridge.console.access import Session
from robot_bridge.console.desk import Desk
from robot_bridge.console.drive import CommandRefused
from robot_bridge.console.episodes import Library
from robot_bridge.console.learning import Action, Learning
from robot_bridge.console.lease import Leases, LeaseTaken
from robot_bridge.snapshots import Reply

Needs = Literal["session", "operator", "lease"]

MAX_CELLS = 200
NEEDS: Mapping[str, Needs] = {
    "stop": "session",
    "lease": "operator",
    "release_lease": "operator",
    "resume": "lease",
    "hold": "lease",
    "reset_stop": "lease",
    "start": "lease",
    "success": "lease",
    "failure": "lease",
    "cancel": "lease",
    "reset_done": "lease",
    "label": "operator",
    "shadow": "operator",
    "activate": "operator",
    "rollback": "operator",
    "canary": "operator",
    "withdraw": "operator",
}
"""Command -> who may: anybody who logged in, operators, or the operator who holds the cell."""

_REQUESTS = {
    "resume": "resume_policy",
    "hold": "hand_back",
    "reset_stop": "reset_estop",
    "success": "success",
    "failure": "failure",
    "cancel": "cancel",
    "reset_done": "reset_done",
}
"""Those that are one request of the supervisor."""

Body = dict[str, Any]


class Commands:
    """Runs commands; `run` answers `{ok, message, ...}` or raises CommandRefused."""

    def __init__(
        self, desks: Mapping[str, Desk], leases: Leases, library: Library, learning: Learning
    ) -> None:
        self._desks, self._leases = desks, leases
        self._library, self._learning = library, learning

    async def run(
        self,
        name: str,
        session: Session,
        cell: Any,
        arguments: Mapping[str, Any],
    ) -> Body:
        needs = NEEDS.get(name)
        if needs is None:
            raise CommandRefused(
                "command", f"no command {name[:40]!r}; there are {', '.join(NEEDS)}"
            )
        desk = self._desks.get(str(cell))
        if desk is None:
            raise CommandRefused("cell", f"no cell {str(cell)[:40]!r}")
        try:
            self._check(name, needs, session, desk)
            body = await self._dispatch(name, session, desk, arguments)
        except LeaseTaken as error:
            desk.steering.audit(name, session, ok=False, message=f"{error} holds the lease")
            raise CommandRefused("taken", f"{error} is this cell's operator") from None
        except CommandRefused as error:
            desk.steering.audit(name, session, ok=False, message=str(error))
            raise
        desk.steering.audit(name, session, ok=body["ok"], message=str(body.get("message", "")))
        return body

    def _check(self, name: str, needs: Needs, session: Session, desk: Desk) -> None:
        if needs != "session" and not session.may_operate:
            raise CommandRefused(
                "role", "a viewer may watch and stop; log in with the operator's token"
            )
        if needs == "lease" and not self._leases.holds(desk.name, session, time.monotonic()):
            raise CommandRefused("lease", "take the lease of this cell first")

    async def _dispatch(
        self, name: str, session: Session, desk: Desk, arguments: Mapping[str, Any]
    ) -> Body:
        if name == "lease":
            desk.steering.take(session, online=desk.online)
            return {"ok": True, "message": ""}
        if name == "release_lease":
            return {"ok": desk.steering.give(session), "message": ""}
        if name == "label":
            return await self._label(session, desk, arguments)
        if name in get_args(Action):
            return await self._version(cast(Action, name), session, arguments)
        link = desk.link
        if link is None:
            raise CommandRefused("offline", f"{desk.name} is not connected")
        if name == "shadow":
            return await _answer(link.shadow(_version_name(arguments)))
        if name == "stop":
            desk.steering.let_go(session, "stop")
            return await _answer(link.stop())
        if name == "start":
            return await self._start(session, desk, arguments)
        return await _answer(link.ask(_REQUESTS[name]))

    async def _start(self, session: Session, desk: Desk, arguments: Mapping[str, Any]) -> Body:
        task = _text(arguments, "task", limit=80)
        if task not in desk.contract.tasks:
            raise CommandRefused(
                "task", f"no task {task!r}; this cell has {', '.join(desk.contract.tasks)}"
            )
        instruction = _text(arguments, "instruction", limit=200, empty=True)
        seed = arguments.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise CommandRefused("seed", "seed is a whole number from 0")
        assert desk.link is not None
        return await _answer(
            desk.link.ask(
                "start_episode",
                task=task,
                seed=seed,
                operator=session.name,
                instruction=instruction,
            )
        )

    async def _label(self, session: Session, desk: Desk, arguments: Mapping[str, Any]) -> Body:
        limits = {"outcome": 20, "task": 80, "instruction": 200, "notes": 2000}
        changes = {
            name: _text(arguments, name, limit=limit, empty=True)
            for name, limit in limits.items()
            if name in arguments
        }
        if not changes:
            raise CommandRefused("format", "nothing to change: outcome, task, instruction, notes")
        uuid = _text(arguments, "uuid", limit=40)
        try:
            before, after = await self._library.label(uuid, changes, desk, by=session.name)
        except ValueError as error:
            raise CommandRefused("label", str(error)) from None
        return {"ok": True, "message": "", "before": before, "after": after}

    async def _version(self, name: Action, session: Session, arguments: Mapping[str, Any]) -> Body:
        number = arguments.get("version")
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole and (name in ("activate", "canary") or number is not None):
            raise CommandRefused("version", "version is a whole number")
        reason = f"{session.name}: {_text(arguments, 'reason', limit=200, empty=True)}"
        share, cells = arguments.get("share", 0.0), arguments.get("cells", [])
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise CommandRefused("format", "share is a number from 0 to 1")
        named = isinstance(cells, list) and len(cells) <= MAX_CELLS
        if not named or not all(isinstance(c, str) and len(c) <= 80 for c in cells):
            raise CommandRefused("format", f"cells is a list of at most {MAX_CELLS} names")
        try:
            version = await asyncio.to_thread(
                self._learning.point,
                name,
                number,
                reason=reason,
                pin=arguments.get("pin", True) is True,
                share=float(share),
                cells=cells,
            )
        except (ValueError, OSError) as error:
            raise CommandRefused("version", str(error)) from None
        return {"ok": True, "message": "", "version": version}


def _version_name(arguments: Mapping[str, Any]) -> str:
    """Of a shadow; empty for none."""
    wanted = arguments.get("version")
    if wanted is None:
        return ""
    if wanted == "newest" or (isinstance(wanted, int) and not isinstance(wanted, bool)):
        return str(wanted)
    raise CommandRefused("version", "version is a whole number, `newest`, or null for no shadow")


async def _answer(reply: "Future[Reply]") -> Body:
    answer = await asyncio.wrap_future(reply)
    return {"ok": answer.success, "message": answer.message}


def _text(arguments: Mapping[str, Any], name: str, *, limit: int, empty: bool = False) -> str:
    value = arguments.get(name, "" if empty else None)
    if not isinstance(value, str) or len(value) > limit or not (value or empty):
        raise CommandRefused("format", f"{name} is a text of at most {limit} characters")
    return value
