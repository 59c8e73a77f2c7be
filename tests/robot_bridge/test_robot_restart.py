"""A whole simulated cell, every node of it; and its robot is killed in mid-episode."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("mcap")
pytest.importorskip("starlette")
from diagnostic_msgs.msg import DiagnosticArray

import sim
from robot_bridge.bringup import CellConfig, NodeSpec, ProcessGroup, cell_nodes
from robot_bridge.client import CellClient
from trajectory_store import Episode, Outcome, Store, load_contract
from vla_post.export.registry import Registry

from .graph import DEADLINE_S, checkpoint

pytestmark = pytest.mark.ros
CONTRACT = Path(sim.__file__).parent / "contracts" / "metaworld_state.yaml"
REASON = "the robot was restarted"


class Whole:
    """Everything that `cell_nodes` knows, and the fleet's attention broker."""

    def __init__(self, folder: Path) -> None:
        contract = load_contract(CONTRACT)
        self.folder = folder
        self.registry = Registry(folder / "registry")
        self.publish(0.1)
        config = CellConfig(
            contract=CONTRACT,
            registry=self.registry.root,
            store=folder / "store",
            uplink=str(folder / "fleet"),
            bag=folder / "bag",
            events_log=folder / "events.jsonl",
            operator={"episodes": 1000, "tasks": ["reach"], "motor_noise": 0.0},
            teleop={"device": "gamepad", "path": str(folder / "no_such_device")},
            console={"port": 0, "token_file": str(folder / "tokens")},
        )
        specs = cell_nodes(config)
        for i, spec in enumerate(specs):
            if spec.name == "runner":
                specs[i] = dataclasses.replace(spec, module="fake_runner")
        attention = NodeSpec(
            name="attention", module="sim.nodes.attention", namespace="/fleet", parameters={}
        )
        self.names = {f"{spec.namespace}/{spec.name}" for spec in [*specs, attention]}
        self.group = ProcessGroup([*specs, attention], log_dir=folder / "logs")
        self.client = CellClient(contract)
        self.heard: dict[str, list[float]] = {}
        self.client.subscribe(DiagnosticArray, "/diagnostics", self._on_diagnostics)

    def publish(self, value: float) -> int:
        contract = load_contract(CONTRACT)
        folder = checkpoint(self.folder / f"checkpoint{value}", contract, value)
        return self.registry.publish(folder, contract=contract).number

    def stored(self, uuid: str) -> tuple[Store, Episode]:
        store = Store(self.folder / "store")

        def there() -> bool:
            store.refresh()
            return any(e.uuid == uuid and e.outcome for e in store.episodes)

        self.until(there, "the stored episode")
        return store, store.episode(uuid)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.heard.setdefault(status.name, []).append(time.monotonic())

    def until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            self.group.poll()
            self.client.wait_until(condition, 0.2)
            if time.monotonic() > deadline:
                logs = {name: self.group.last_words(name, 4) for name in self.group.pids()}
                raise AssertionError(f"waited for {what}; {self.client.state}; {logs}")

    def events(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        log = self.folder / "events.jsonl"
        rows = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
        return [
            r for r in rows
            if r["type"] == kind and all(r.get(k) == v for k, v in fields.items())
        ]  # fmt: skip


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        whole = Whole(tmp_path_factory.mktemp("whole"))
    with whole.client, whole.group:
        yield whole


def test_every_node_says_once_a_second_how_it_is(cell: Whole):
    cell.until(
        lambda: all(len(cell.heard.get(name, ())) > 4 for name in cell.names), "diagnostics of all"
    )
    for name in cell.names:
        assert np.median(np.diff(cell.heard[name])) == pytest.approx(1.0, abs=0.5), name
    assert set(cell.heard) == cell.names


def test_a_robot_that_was_killed_ends_the_episode_that_it_was_in(cell: Whole):
    """Its successor stands in a fresh scene: nothing may look as if the episode had gone on."""

    def driving(since_ns: int = 0) -> bool:
        executed = cell.client.executed
        if executed is None or executed.stamp_ns < since_ns:
            return False
        return executed.label.startswith("policy:")

    reasons: set[str] = set()
    cell.client.listen(lambda kind, value: reasons.add(value.reason) if kind == "state" else None)
    for _ in range(4):  # an episode may be over by the time that the robot dies
        count = len(cell.events("episode_start"))
        cell.until(lambda n=count: len(cell.events("episode_start")) > n, "an episode's start")
        begun = cell.events("episode_start")[-1]
        cell.until(lambda e=begun: driving(e["start_stamp_ns"]), "the policy drives")
        uuid, robot = begun["episode"], cell.group.pids()["robot"]
        os.kill(robot, signal.SIGKILL)
        cell.until(lambda u=uuid: cell.events("episode_end", episode=u), "the episode's end")
        end = cell.events("episode_end", episode=uuid)[0]
        if end["outcome"] == "interrupted":
            break
    assert (end["outcome"], end["reason"], end["truncated"]) == ("interrupted", REASON, False)
    assert any(reason.startswith(REASON) for reason in reasons), reasons
    assert cell.group.pids()["robot"] != robot

    # The session goes on with a new episode, in time that never went back.
    cell.until(lambda: cell.events("episode_start")[-1]["episode"] != uuid, "the next episode")
    begun = cell.events("episode_start")[-1]
    assert begun["start_stamp_ns"] > end["end_stamp_ns"]
    cell.until(lambda: driving(begun["start_stamp_ns"]), "the policy drives in it")
    stamps = [event["stamp_ns"] for event in cell.events("episode_start")]
    assert stamps == sorted(stamps)

    store, episode = cell.stored(uuid)
    assert (episode.outcome, episode.problems) == (Outcome.INTERRUPTED, (REASON,))
    rows = np.arange(episode.first_row, episode.end_row)
    assert len(rows)
    stamps = store.read("stamp_ns", rows)
    np.testing.assert_array_equal(np.diff(stamps), cell.client.contract.dt_ns)
    assert stamps[-1] <= end["end_stamp_ns"]


def test_it_records_while_the_console_and_the_registry_are_away(cell: Whole):
    """No learner runs, the folder of versions is gone like a share without its network, and the
    console dies as often as it comes back: the episode is recorded to its last tick."""
    away = cell.folder / "away"
    cell.registry.root.rename(away)
    killed = 0

    def kill_console() -> None:
        nonlocal killed
        pid = cell.group.pids().get("console")
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            killed += 1

    kill_console()
    before = len(cell.events("episode_start"))
    runner = f"/{cell.client.contract.cell}/runner"
    said: set[str] = set()

    def over() -> bool:
        kill_console()
        said.add(cell.client.health[runner].message)
        begun = cell.events("episode_start")[before:]
        return bool(begun) and bool(cell.events("episode_end", episode=begun[0]["episode"]))

    cell.until(over, "an episode that began and ended meanwhile")
    assert killed >= 2
    assert any(text.startswith("the registry cannot be read") for text in said), said
    start = cell.events("episode_start")[before]
    end = cell.events("episode_end", episode=start["episode"])[0]
    store, episode = cell.stored(start["episode"])
    assert (episode.outcome, episode.problems) == (end["outcome"], ())
    stamps = store.read("stamp_ns", np.arange(episode.first_row, episode.end_row))
    assert (stamps[0], stamps[-1]) == (start["start_stamp_ns"], end["end_stamp_ns"])
    np.testing.assert_array_equal(np.diff(stamps), cell.client.contract.dt_ns)

    away.rename(cell.registry.root)
    number = cell.publish(0.2)
    cell.until(lambda: cell.events("policy_switch", version=number), "the version that came then")
