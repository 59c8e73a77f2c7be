"""The real server before real cells: what it lets in, what it refuses, what it writes down."""

import json
import socket
import stat
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("websockets")

import httpx
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from .testbed import DEADLINE_S, until

pytestmark = pytest.mark.ros
CELL = "franka_sim"


@contextmanager
def session(site, role="operator", name="ann"):
    """A browser's session without a browser: cookie, then WebSocket."""
    with httpx.Client(base_url=site.address, headers={"origin": site.address}) as client:
        client.timeout = DEADLINE_S
        assert client.post("/api/session", json={"token": site.token(role), "name": name})
        cookie = "; ".join(f"{k}={v}" for k, v in client.cookies.items())
        url = site.address.replace("http", "ws") + "/ws"
        with connect(url, origin=site.address, additional_headers={"cookie": cookie}) as ws:
            yield Talk(client, ws)


class Talk:
    def __init__(self, client, ws) -> None:
        self.client, self.ws, self.seq = client, ws, 0
        hello = self.wait("hello")
        self.offset = hello["now_ms"] - time.monotonic() * 1e3

    def wait(self, kind, **fields):
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            data = self.ws.recv(timeout=DEADLINE_S)
            if isinstance(data, str):
                message = json.loads(data)
                if message["type"] == kind and fields.items() <= message.items():
                    return message
        raise AssertionError(f"no {kind} {fields}")

    def say(self, **body) -> None:
        self.ws.send(json.dumps(body))

    def now(self) -> float:
        return time.monotonic() * 1e3 + self.offset

    def command(self, name, cell=CELL, age_ms=0.0, **arguments):
        self.seq += 1
        self.say(type="command", id=self.seq, seq=self.seq, t=self.now() - age_ms, cell=cell,
                 name=name, arguments=arguments)  # fmt: skip
        return self.wait("reply", id=self.seq)

    def drive(self, hold, axes=None, age_ms=0.0, seq=None) -> None:
        self.seq += 1
        self.say(type="drive", cell=CELL, seq=self.seq if seq is None else seq,
                 t=self.now() - age_ms, hold=hold, axes=axes or {}, speed=0.3)  # fmt: skip


def test_nothing_is_told_without_a_session_and_headers_are_strict(site):
    for path in ("/api/cells", "/api/episodes", "/api/learner", "/api/versions", "/api/session"):
        answer = httpx.get(site.address + path)
        assert answer.status_code == 401, path
        assert answer.headers["cache-control"] == "no-store"
    page = httpx.get(site.address)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "server" not in page.headers
    assert stat.S_IMODE(site.token_file.stat().st_mode) == 0o600


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(site):
    answer = httpx.post(
        f"{site.address}/api/session",
        json={"token": site.token(), "name": "ann"},
        headers={"origin": site.address},
    )
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert site.token() not in answer.text + cookie


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://localhost:1"])
def test_pages_of_other_sites_can_neither_log_in_nor_command_nor_listen(site, origin):
    headers = {} if origin is None else {"origin": origin}
    answer = httpx.post(
        f"{site.address}/api/session", json={"token": site.token()}, headers=headers
    )
    assert answer.status_code == 403
    with session(site) as talk:
        stop = talk.client.post(
            f"/api/cells/{CELL}/stop", json={}, headers={"origin": origin or "null"}
        )
        assert stop.status_code == 403
        cookie = "; ".join(f"{k}={v}" for k, v in talk.client.cookies.items())
        url = site.address.replace("http", "ws") + "/ws"
        with (
            pytest.raises(InvalidStatus) as refused,
            connect(url, origin=origin, additional_headers={"cookie": cookie}),
        ):
            pass
        assert refused.value.response.status_code == 403


def test_a_name_that_was_made_to_point_here_is_refused(site):
    for path in ("/", "/api/session", "/static/js/main.js"):
        answer = httpx.get(site.address + path, headers={"host": f"evil.example:{site.port}"})
        assert answer.status_code == 421


@pytest.mark.parametrize(
    "path",
    [
        "/static/../access.py",
        "/static/%2e%2e/access.py",
        "/static/..%2f..%2fclient.py",
        "/static//etc/passwd",
        "/static/js/../../server.py",
        "/api/episodes/..%2f..%2ftokens.json",
    ],
)
def test_paths_lead_nowhere_else(site, path):
    with socket.create_connection(("127.0.0.1", site.port), timeout=DEADLINE_S) as raw:
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n"
            f"Authorization: Bearer {site.token()}\r\nConnection: close\r\n\r\n"
        )
        raw.sendall(request.encode())
        answer = b""
        while part := raw.recv(65536):
            answer += part
    assert answer.split()[1] == b"404", answer[:200]
    assert b"import" not in answer
    assert site.token().encode() not in answer


def test_too_much_and_malformed_is_refused_in_words(site):
    with site.client() as client:
        base = f"/api/cells/{CELL}"
        assert client.post(f"{base}/lease", content=b"x" * 20_000).status_code == 413
        chunks = (b"x" * 4096 for _ in range(10))
        assert client.post(f"{base}/lease", content=chunks).status_code == 413
        for body in (b"{", b"[1]", b'"x"', b"[" * 15_000, b"\xff\xfe"):
            answer = client.post(f"{base}/lease", content=body)
            assert answer.status_code == 400, body[:10]
            assert "JSON" in answer.json()["error"]
        assert client.post(f"{base}/no_such", json={}).status_code == 400
        assert client.post("/api/cells/nowhere/stop", json={}).status_code == 404
        assert client.get("/api/episodes/none").status_code == 404
        assert client.get("/api/episodes?limit=many").status_code == 400
        assert client.get("/api/versions/plan?action=format").status_code == 400
        late = client.post(f"{base}/resume", json={"sent_ms": 1.0})
        assert late.status_code == 400
        assert late.json()["code"] == "late"
    with session(site) as talk:
        for text in ("", "nonsense", "[1]", '{"type": "format"}', "[" * 4000, "9" * 8000 + "x"):
            talk.ws.send(text)
            assert talk.wait("refused")["code"] in ("format", "size")
        talk.ws.send(b"\x00\x01")
        assert talk.wait("refused")["code"] == "format"
    with session(site) as talk:
        for body in ({"t": "x"}, {"t": float("nan")}, {"t": 1e300}, {}):
            talk.say(type="ping", **body)
            assert talk.wait("refused")["code"] == "format"
    with session(site) as talk:
        talk.ws.send("x" * 100_000)
        with pytest.raises(ConnectionClosed) as closed:
            talk.wait("nothing that ever comes")
    with session(site) as talk:
        for _ in range(10):
            talk.ws.send("nonsense")
        with pytest.raises(ConnectionClosed, match="too many malformed"):
            talk.wait("nothing that ever comes")
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


def test_a_viewer_sees_and_may_stop_but_never_command(site):
    with session(site, "viewer", "vic") as viewer, session(site) as ann:
        for name in ("lease", "resume", "start", "success", "activate", "rollback", "label"):
            assert viewer.command(name)["code"] == "role"
        viewer.drive(1)
        assert viewer.wait("refused")["code"] == "role"
        viewer.say(type="stop", id=99, cell=CELL)
        assert viewer.wait("reply", id=99)["ok"]
        ann.wait("state", cell=CELL, mode="FAULT")
        assert ann.command("lease")["ok"]
        assert ann.command("reset_stop")["ok"]
        ann.wait("state", cell=CELL, mode="HOLD")
        assert ann.command("release_lease")["ok"]


def test_commands_without_the_lease_late_or_twice_do_nothing_and_are_written_down(site):
    with session(site) as ann, session(site, name="bob") as bob:
        assert ann.command("resume")["code"] == "lease"
        assert ann.command("lease")["ok"]
        taken = bob.command("lease")
        assert taken["code"] == "taken"
        assert "ann" in taken["message"]
        ann.wait("state", cell=CELL, lease={"id": ann.client.get("/api/session").json()["id"],
                                             "name": "ann", "asked_by": "bob"})  # fmt: skip
        assert ann.command("resume", age_ms=5000.0)["code"] == "late"
        ann.seq -= 1
        assert ann.command("resume")["code"] == "order"
        ann.say(type="watch", cell=CELL, cameras=[])
        bob.drive(1, {"joint1": 1.0})
        assert bob.wait("refused")["code"] == "lease"
        assert ann.command("no_such")["code"] == "command"
        assert ann.command("start", task="no-such")["code"] == "task"
        assert ann.command("release_lease")["ok"]
        log = ann.client.get(f"/api/cells/{CELL}").json()["events"]
        until(lambda: any(_is(e, "release_lease", "ann", True) for e in _events(ann)), "the event")
        log = _events(ann)
        assert any(_is(e, "lease", "bob", False) for e in log)
        assert any(_is(e, "resume", "ann", False) for e in log)
        numbers = [e["seq"] for e in log]
        assert numbers == sorted(numbers)


def _events(talk):
    return talk.client.get(f"/api/cells/{CELL}").json()["events"]


def _is(event, name, by, ok):
    wanted = {"type": "command", "name": name, "by": by, "ok": ok, "device": "console"}
    return wanted.items() <= event.items()


def test_a_flood_is_thinned_out_and_a_stop_comes_through_it(site):
    with session(site) as ann:
        for _ in range(400):
            ann.say(type="ping", t=1.0)
        ann.say(type="stop", id=1000, cell=CELL)
        assert ann.wait("refused")["code"] == "rate"
        assert ann.wait("reply", id=1000)["ok"]


def test_a_late_drive_lets_go(site):
    with session(site) as ann:
        assert ann.command("lease")["ok"]
        hold = 1

        def driving():
            ann.drive(hold)
            return ann.client.get(f"/api/cells/{CELL}").json()["mode"] == "HUMAN"

        until(driving, "HUMAN")
        ann.drive(hold, age_ms=5000.0)
        assert ann.wait("refused")["code"] == "late"
        ann.drive(hold)  # the same press does not count any more
        assert ann.wait("driven", news="over")
        until(lambda: ann.client.get(f"/api/cells/{CELL}").json()["mode"] == "HOLD", "HOLD")
        ann.command("release_lease")
