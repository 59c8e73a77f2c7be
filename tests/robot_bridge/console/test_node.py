"""The console as a process of a cell: its parameters, its address, a taken port, its absence."""

import dataclasses
import json
import socket
import stat

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("starlette")

import httpx

from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
from vla_post.cli.console import ConsoleLink

from .testbed import stepping, until

pytestmark = pytest.mark.ros


def console_of(folder, **parameters):
    path = folder / "cell.yaml"
    path.write_text(json.dumps(stepping().to_dict()))
    specs = cell_nodes(CellConfig(contract=path, store=folder / "store", console=parameters))
    return next(spec for spec in specs if spec.name == "console")


def test_it_tells_its_address_privately_takes_another_port_and_ends_in_order(tmp_path):
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


def test_a_console_that_cannot_start_says_why_and_is_not_started_again(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("{}")
    tokens.chmod(0o644)
    spec = console_of(tmp_path, token_file=str(tokens))
    with ProcessGroup([dataclasses.replace(spec)], log_dir=tmp_path / "logs") as group:
        ended = until(group.poll, "its end")[0]
        assert (ended.restarting, ended.essential) == (False, False)
        assert "chmod 600" in group.last_words("console")
        assert "Traceback" not in group.last_words("console", 50)
