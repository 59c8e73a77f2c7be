"""The real runner asks a policy server; when the server dies the cell holds, and goes on after."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")
from vla_post.export.server import PolicyServer

from .cells import cartesian
from .graph import Cell

pytestmark = pytest.mark.ros

TASKS = {"reach": {"instruction": "Reach the goal", "time_limit_s": 1000.0}}
CONTRACT = cartesian(tasks=TASKS, cell="remote_cell")


class Constant:
    """Always the same chunk, so that the test knows what should be executed."""

    observation_keys = tuple(CONTRACT.observations)
    horizon, action_size = CONTRACT.chunk_horizon, CONTRACT.action.size
    contract_sha256 = CONTRACT.sha256
    takes_previous = False

    def act(self, observation: Any, instruction: str, seed: int = 0, **_: Any) -> np.ndarray:
        assert {k: v.shape for k, v in observation.items()} == {
            k: f.shape for k, f in CONTRACT.observations.items()
        }
        return np.full((self.horizon, self.action_size), 0.25, np.float32)

    def act_batch(self, *_: Any) -> Any: ...

    def reload(self, path: Any) -> None: ...

    def close(self) -> None: ...


def drives(cell: Cell) -> None:
    before = len(cell.executed)
    cell.until(
        lambda: any(label.startswith("policy:0#") for _, label, _ in cell.executed[before:]),
        "a chunk of the server",
    )
    label, command = cell.executed[-1][1:]
    assert label == "hold" or command[0] == pytest.approx(0.25)


def test_a_server_that_dies_leads_to_hold_and_its_return_to_motion(tmp_path):
    with PolicyServer(Constant(), CONTRACT) as server:
        url, port = server.url, server.port
        cell = Cell(CONTRACT, tmp_path, server=url, runner_module="robot_bridge.nodes.runner")
        with cell:
            cell.up()
            runner = cell.group.pids()["runner"]
            cell.start_episode()
            drives(cell)
            server.close()
            cell.until(lambda: "RemoteError" in cell.state.get("reason", ""), "the reason")
            assert cell.state["mode"] == "HOLD"
            cell.end_episode(success=False)
            with PolicyServer(Constant(), CONTRACT, port=port):
                cell.start_episode()
                drives(cell)
                cell.end_episode()
            assert cell.group.pids()["runner"] == runner, "the runner never crashed"
