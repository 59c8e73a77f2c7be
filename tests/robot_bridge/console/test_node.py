"""The console as a process of a cell: its parameters, its address, a taken port, its absence."""

import dataclasses
import json
import signal
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("starlette")

import httpx

from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
from robot_bridge.fleet import FleetConfig, fleet_nodes
from vla_post.cli.console import ConsoleLink

from ...certificate import self_signed
from .testbed import DEADLINE_S, stepping, until, written

pytestmark = pytest.mark.ros


def console_of(folder: Any, **parameters: Any):
    path = folder / "cell.yaml"
    path.write_text(json.dumps(stepping().to_dict()))
    specs = cell_nodes(CellConfig(contract=path, store=folder / "store", console=parameters))
    return next(spec for spec in specs if spec.name == "console")


def test_it_tells_its_address_privately_takes_another_port_and_ends_in_order(tmp_path: Path):
    address = tmp_path / "console.address"
    said: list[str] = []
    link = ConsoleLink(address, said.append)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        spec = console_of(
            tmp_path, port=port, address_file=str(address), token_file=str(tmp_path / "tokens")
        )
        assert not spec.essential
        with ProcessGroup([spec], log_dir=tmp_path / "logs") as group:
            until(lambda: link.look() or group.poll() or said, "the address")
            url = said[0].removeprefix("console: ")
            assert stat.S_IMODE(address.stat().st_mode) == 0o600
            base, _, token = url.partition("/#token=")
            assert base != f"http://127.0.0.1:{port}"
            headers = {"authorization": f"Bearer {token}"}
            until(lambda: httpx.get(base).status_code == 200, "the page")
            cells = httpx.get(f"{base}/api/cells", headers=headers).json()["cells"]
            assert [cell["cell"] for cell in cells] == ["sawyer_state"]
            assert not cells[0]["online"]  # nobody watches, so nothing is subscribed to
            assert httpx.get(f"{base}/api/episodes", headers=headers).json()["total"] == 0
            link.look()
            assert len(said) == 1
    assert group.returncode("console") == 0
    assert token not in (tmp_path / "logs" / "console.log").read_text()


def test_a_fleet_has_one_console_for_all_its_cells(tmp_path: Path):
    """Its own process; the cells do not run."""
    address = tmp_path / "console.address"
    (tmp_path / "cell.yaml").write_text(written(stepping()))
    console = {"port": 0, "address_file": str(address), "token_file": str(tmp_path / "tokens")}
    cell = CellConfig(
        contract=tmp_path / "cell.yaml",
        policy=tmp_path,
        store=tmp_path / "stores",
        console=console,
    )
    specs = fleet_nodes(FleetConfig(cell=cell, cells=3))
    (spec,) = [spec for spec in specs if spec.module == "robot_bridge.nodes.console"]
    with ProcessGroup([spec], log_dir=tmp_path / "logs") as group:
        until(lambda: address.exists() or group.poll(), "the address")
        base, _, token = address.read_text().split()[0].partition("/#token=")
        headers = {"authorization": f"Bearer {token}"}
        until(lambda: httpx.get(base).status_code == 200, "the page")
        cells = httpx.get(f"{base}/api/cells", headers=headers).json()["cells"]
        assert [c["cell"] for c in cells] == ["sawyer_state_0", "sawyer_state_1", "sawyer_state_2"]
        assert httpx.get(f"{base}/api/episodes", headers=headers).json()["total"] == 0


def test_tls_from_the_command_line_to_the_browser(tmp_path: Path, chrome: Any):
    """No cell answers here: the page, its socket and the cookie are under test."""
    certificate, key = self_signed(tmp_path)
    path = tmp_path / "cell.yaml"
    path.write_text(written(stepping()))
    command = [
        *(sys.executable, "-m", "vla_post.cli.main", "console", "--contract", str(path)),
        *("--port", "0", "--token-file", str(tmp_path / "tokens")),
        *("--certificate", str(certificate), "--key", str(key)),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as it:
        assert it.stderr is not None
        try:
            lines = iter(it.stderr.readline, "")
            link = next(line.split()[1] for line in lines if line.startswith("operator"))
            base = link.partition("/#")[0].replace("127.0.0.1", "localhost")
            assert base.startswith("https://")
            trusting = ssl.create_default_context(cafile=str(certificate))
            assert httpx.get(base, verify=trusting).status_code == 200
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                httpx.get(base)
            with pytest.raises(httpx.TransportError):
                httpx.get(base.replace("https", "http"))

            context = chrome.new_context(ignore_https_errors=True)
            page = context.new_page()
            page.goto(link)
            page.wait_for_function("() => window.vlaConsole?.link?.open", timeout=DEADLINE_S * 1e3)
            (cookie,) = context.cookies()
            assert (cookie["secure"], cookie["httpOnly"]) == (True, True)
            assert cookie["sameSite"] == "Strict"
            context.close()
        finally:
            it.send_signal(signal.SIGTERM)
            it.communicate(timeout=DEADLINE_S)
        assert it.returncode == 0


def test_a_certificate_that_is_none_is_a_message(tmp_path: Path):
    (tmp_path / "no.pem").write_text("no certificate")
    path = tmp_path / "cell.yaml"
    path.write_text(written(stepping()))
    command = [
        *(sys.executable, "-m", "vla_post.cli.main", "console", "--contract", str(path)),
        *("--port", "0", "--token-file", str(tmp_path / "tokens")),
        *("--certificate", str(tmp_path / "no.pem"), "--key", str(tmp_path / "no.pem")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode != 0
    assert "no.pem" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_console_that_cannot_start_says_why_and_is_not_started_again(tmp_path: Path):
    tokens = tmp_path / "tokens"
    tokens.write_text("{}")
    tokens.chmod(0o644)
    spec = console_of(tmp_path, token_file=str(tokens))
    with ProcessGroup([dataclasses.replace(spec)], log_dir=tmp_path / "logs") as group:
        ended = until(group.poll, "its end")[0]
        assert (ended.restarting, ended.essential) == (False, False)
        assert "chmod 600" in group.last_words("console")
        assert "Traceback" not in group.last_words("console", 50)
