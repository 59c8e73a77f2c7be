"""Who may do what: tokens in a file, sessions in cookies, hosts, origins and rates.

Two tokens, one a role. They are exchanged for a session, whose secret lives in an HttpOnly cookie;
a script may send the token itself as `Authorization: Bearer`. Times are monotonic seconds and are
arguments, so tests need no real time.
"""

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

SESSION_IDLE_S = 12 * 3600.0
"""A session that said nothing for so long is over."""
MAX_SESSIONS = 200
LOGIN_TRIES = 5
LOGIN_WINDOW_S = 10.0
"""So many wrong tokens from one address within the window; after that it waits."""


class Role(StrEnum):
    VIEWER = "viewer"
    """Sees everything and may stop the robot."""
    OPERATOR = "operator"
    """Also drives, labels and chooses versions."""


class AccessError(ValueError):
    """The token file cannot be used; the message says what to do."""


class Denied(Exception):
    """A request is refused. `status` is the HTTP status, the message is for the person."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Tokens:
    operator: str
    viewer: str

    def role_of(self, token: str) -> Role | None:
        """In constant time: both are compared whatever the first one says."""
        given = token.encode()
        operator = hmac.compare_digest(given, self.operator.encode())
        viewer = hmac.compare_digest(given, self.viewer.encode())
        return Role.OPERATOR if operator else Role.VIEWER if viewer else None


def default_token_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "vla_post" / "console_tokens.json"


def load_tokens(path: Path) -> Tokens:
    """Reads the tokens, or makes them on first use.

    Raises:
        AccessError: others may read the file, or it holds something else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_tokens(path)
    except OSError as error:
        raise AccessError(
            f"{path}: cannot keep the console's tokens there: {error.strerror}"
        ) from (error)
    tokens = Tokens(secrets.token_urlsafe(24), secrets.token_urlsafe(24))
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"operator": tokens.operator, "viewer": tokens.viewer}, file)
        file.write("\n")
    return tokens


def _read_tokens(path: Path) -> Tokens:
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise AccessError(
                f"{path}: mode is {stat.filemode(mode)}, so others can read the console's tokens; "
                f"run `chmod 600 {path}`, or delete it for new ones"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
        tokens = Tokens(str(data["operator"]), str(data["viewer"]))
    except OSError as error:
        raise AccessError(f"{path}: cannot read the console's tokens: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, AccessError):
            raise
        raise AccessError(
            f'{path}: expected {{"operator": TOKEN, "viewer": TOKEN}}; delete it for new ones'
        ) from error
    if min(len(tokens.operator), len(tokens.viewer)) < 16 or tokens.operator == tokens.viewer:
        raise AccessError(
            f"{path}: needs two different tokens of at least 16 characters; delete it for new ones"
        )
    return tokens


class Bucket:
    """A token bucket: `rate` a second, `burst` at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._level, self._at = burst, -1e18

    def take(self, now_s: float, amount: float = 1.0) -> bool:
        self._level = min(self.burst, self._level + (now_s - self._at) * self.rate)
        self._at = now_s
        if self._level < amount:
            return False
        self._level -= amount
        return True


@dataclass(eq=False)
class Session:
    """One person at one browser, or one script."""

    id: str
    """Public: names the holder of a lease. The secret is only in the cookie."""
    role: Role
    name: str
    seen_s: float
    requests: Bucket = field(default_factory=lambda: Bucket(50, 200))
    """Of REST: pages load film strips in bursts."""

    @property
    def may_operate(self) -> bool:
        return self.role is Role.OPERATOR


class Sessions:
    """The sessions of one server, in memory: a restart asks for the token again."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._sessions: dict[bytes, Session] = {}
        self._bearers: dict[Role, Session] = {}
        self._tries: dict[str, Bucket] = {}

    def login(self, token: str, name: str, address: str, now_s: float) -> tuple[str, Session]:
        """Returns the cookie's secret and the session.

        Raises:
            Denied: wrong token, or too many of them.
        """
        role = self._check(token, address, now_s)
        if len(self._sessions) >= MAX_SESSIONS:
            oldest = min(self._sessions, key=lambda key: self._sessions[key].seen_s)
            del self._sessions[oldest]
        secret = secrets.token_urlsafe(32)
        session = Session(secrets.token_hex(4), role, clean_name(name) or role, now_s)
        self._sessions[_key(secret)] = session
        return secret, session

    def find(self, secret: str, now_s: float) -> Session | None:
        session = self._sessions.get(_key(secret))
        if session is None:
            return None
        if now_s - session.seen_s > SESSION_IDLE_S:
            del self._sessions[_key(secret)]
            return None
        session.seen_s = now_s
        return session

    def bearer(self, token: str, address: str, now_s: float) -> Session:
        """The one session of a role's scripts."""
        role = self._check(token, address, now_s)
        return self._bearers.setdefault(role, Session(f"script-{role}", role, "script", now_s))

    def logout(self, secret: str) -> None:
        self._sessions.pop(_key(secret), None)

    def _check(self, token: str, address: str, now_s: float) -> Role:
        if len(self._tries) > 1000:
            self._tries.clear()
        tries = self._tries.setdefault(address, Bucket(LOGIN_TRIES / LOGIN_WINDOW_S, LOGIN_TRIES))
        if not tries.take(now_s):
            raise Denied(429, "too many wrong tokens; wait a few seconds")
        role = self._tokens.role_of(token)
        if role is None:
            raise Denied(401, "this is not a token of this console")
        tries.take(now_s, -1.0)  # a right one costs nothing
        return role


def clean_name(name: str) -> str:
    """A person's name as it may stand in events: printable, short."""
    return "".join(c for c in name if c.isprintable()).strip()[:40]


def _key(secret: str) -> bytes:
    """Sessions are found by a hash, so that no comparison leaks the secret's first bytes."""
    return hashlib.sha256(secret.encode()).digest()


@dataclass(frozen=True)
class Origins:
    """Names under which this server may be addressed.

    A page of another site, or a name that was made to point here (DNS rebinding), is refused.
    """

    hosts: frozenset[str]
    """`name:port`, lower case."""
    scheme: str = "http"

    @classmethod
    def of(cls, names: Iterable[str], port: int, *, tls: bool = False) -> "Origins":
        hosts: set[str] = set()
        for name in names:
            bare = name.lower()
            bare = f"[{bare}]" if ":" in bare and not bare.startswith("[") else bare
            hosts.add(f"{bare}:{port}")
            if port == (443 if tls else 80):
                hosts.add(bare)
        return cls(frozenset(hosts), "https" if tls else "http")

    def check_host(self, host: str | None) -> None:
        if (host or "").lower() not in self.hosts:
            raise Denied(421, "this console does not answer to that name; see --host-name")

    def check_origin(self, origin: str | None) -> None:
        """Of everything that changes something, and of every WebSocket."""
        try:
            parts = urlsplit(origin or "")
        except ValueError:
            parts = urlsplit("")
        if parts.scheme != self.scheme or parts.netloc.lower() not in self.hosts:
            raise Denied(403, "a page of another site may not command this console")
