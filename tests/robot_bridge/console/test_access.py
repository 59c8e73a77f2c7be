"""Tokens, sessions, names and rates, on a clock of our own."""

import os
import socket

import pytest

pytest.importorskip("starlette")

from robot_bridge.console.access import (
    AccessError,
    Bucket,
    Denied,
    Origins,
    Role,
    Sessions,
    Tokens,
    load_tokens,
)
from robot_bridge.console.lease import LAPSE_S, Leases, LeaseTaken
from robot_bridge.console.server import ConsoleConfig, _bind

TOKENS = Tokens("o" * 24, "v" * 24)


def test_the_token_file_is_made_private_and_kept(tmp_path):
    path = tmp_path / "state" / "tokens.json"
    first = load_tokens(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_tokens(path) == first
    assert first.operator != first.viewer
    assert min(len(first.operator), len(first.viewer)) >= 32


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_token_file_that_others_can_read_is_refused(tmp_path, mode):
    path = tmp_path / "tokens.json"
    load_tokens(path)
    os.chmod(path, mode)
    with pytest.raises(AccessError, match="chmod 600"):
        load_tokens(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"operator": "short", "viewer": "short2"}', '{"operator": 3}']
)
def test_a_token_file_with_something_else_is_refused(tmp_path, text):
    path = tmp_path / "tokens.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(AccessError, match="delete it"):
        load_tokens(path)


def test_roles_come_from_tokens_and_end_with_the_session():
    sessions = Sessions(TOKENS)
    secret, session = sessions.login("o" * 24, "Ann\n\x00", "here", 0.0)
    assert (session.role, session.name) == (Role.OPERATOR, "Ann")
    assert sessions.find(secret, 1.0) is session
    assert sessions.find(secret[:-1] + "x", 1.0) is None
    assert sessions.login("v" * 24, "", "here", 0.0)[1].role is Role.VIEWER
    sessions.logout(secret)
    assert sessions.find(secret, 1.0) is None
    secret, _ = sessions.login("o" * 24, "", "here", 0.0)
    assert sessions.find(secret, 13 * 3600.0) is None


def test_guessing_is_slowed_down_by_address_and_a_right_token_costs_nothing():
    sessions = Sessions(TOKENS)
    for _ in range(50):
        sessions.login("o" * 24, "", "there", 0.0)
    for _ in range(5):
        with pytest.raises(Denied) as refused:
            sessions.login("wrong", "", "here", 0.0)
        assert refused.value.status == 401
    with pytest.raises(Denied) as refused:
        sessions.login("o" * 24, "", "here", 0.0)
    assert refused.value.status == 429
    sessions.login("o" * 24, "", "there", 0.0)
    sessions.login("o" * 24, "", "here", 3.0)


def test_a_bucket_gives_its_burst_and_then_its_rate():
    bucket = Bucket(10.0, 5.0)
    assert [bucket.take(0.0) for _ in range(6)] == [True] * 5 + [False]
    assert bucket.take(0.1)
    assert not bucket.take(0.1)


def test_only_our_own_names_and_pages_are_served():
    origins = Origins.of(["localhost", "127.0.0.1", "::1"], 8765)
    for host in ("localhost:8765", "127.0.0.1:8765", "[::1]:8765", "LOCALHOST:8765"):
        origins.check_host(host)
        origins.check_origin(f"http://{host}")
    for host in (
        None,
        "",
        "localhost",
        "evil.example:8765",
        "localhost:8766",
        "127.0.0.1.evil:8765",
    ):
        with pytest.raises(Denied):
            origins.check_host(host)
    for origin in (None, "null", "http://evil.example", "https://localhost:8765", "http://[",
                   "http://localhost:8765.evil.example", "http://user@localhost:8765"):  # fmt: skip
        with pytest.raises(Denied):
            origins.check_origin(origin)
    assert Origins.of(["cell.example"], 443, tls=True).check_host("cell.example") is None


def test_one_lease_per_cell_which_lapses_in_silence():
    leases, sessions = Leases(), Sessions(TOKENS)
    ann = sessions.login("o" * 24, "Ann", "a", 0.0)[1]
    bob = sessions.login("o" * 24, "Bob", "b", 0.0)[1]
    leases.acquire("arm", ann, 0.0)
    with pytest.raises(LeaseTaken, match="Ann"):
        leases.acquire("arm", bob, 1.0)
    holder = leases.holder("arm", 1.0)
    assert holder is not None
    assert holder.asked_by == "Bob"
    leases.acquire("other", bob, 1.0)
    leases.renew(ann, LAPSE_S)
    assert leases.holds("arm", ann, 2 * LAPSE_S)
    leases.acquire("arm", bob, 2 * LAPSE_S + 0.1)
    assert leases.holds("arm", bob, 2 * LAPSE_S + 0.2)
    assert not leases.release("arm", ann)
    assert leases.release("arm", bob)


def test_other_computers_are_let_in_only_on_request():
    from pathlib import Path

    from robot_bridge.console.server import CellAddress

    cells = (CellAddress(contract=Path("cell.yaml")),)
    with pytest.raises(ValueError, match="--allow-remote"):
        ConsoleConfig(cells=cells, host="0.0.0.0")
    ConsoleConfig(cells=cells, host="0.0.0.0", allow_remote=True)
    with pytest.raises(ValueError, match="at least one contract"):
        ConsoleConfig(cells=())
    with pytest.raises(ValueError, match="belong together"):
        ConsoleConfig(cells=cells, certificate=Path("chain.pem"))


def test_a_taken_port_is_answered_by_the_next_free_one():
    with _bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with _bind("127.0.0.1", port) as second:
            assert second.getsockname()[1] != port


def test_small_messages_wait_for_no_acknowledgement():
    with _bind("127.0.0.1", 0) as listener:
        listener.setblocking(True)
        with socket.create_connection(listener.getsockname()):
            far, _ = listener.accept()
            with far:
                assert far.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
