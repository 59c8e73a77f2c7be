"""The nodes as real processes over real DDS: the loop, and what happens when parts of it fail."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy")
from std_srvs.srv import SetBool

import sim
from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
from trajectory_store import Outcome, Store
from trajectory_store.contract import Contract
from vla_post.export.registry import Registry

from .cells import cartesian
from .graph import Cell, checkpoint

pytestmark = pytest.mark.ros

TASKS = {
    name: {"instruction": text, "time_limit_s": 100.0}
    for name, text in (
        ("reach", "Reach the goal"),
        ("raises", "raise"),
        ("returns_nan", "nan"),
        ("returns_two", "shape"),
        ("hangs", "hang"),
        ("hangs_in_c", "hang in C"),
    )
} | {"short": {"instruction": "Reach the goal", "time_limit_s": 0.5}}


def contract(name: str = "test_cell") -> Contract:
    return cartesian(tasks=TASKS, cell=name)


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """One cell for the tests that leave it as they found it: HOLD, no episode."""
    folder = tmp_path_factory.mktemp("cell")
    policy = checkpoint(folder / "policy", contract())
    with Cell(contract(), folder, policy=policy, store=folder / "store") as running:
        running.up()
        yield running


@pytest.fixture(autouse=True)
def clean_up(request):
    yield
    if "cell" in request.fixturenames:
        cell = request.getfixturevalue("cell")
        cell.before_say = lambda: None
        if cell.moving:
            cell.call("supervisor/cancel_episode")
            cell.until(lambda: not cell.moving, "the cancelled episode's end")
        cell.call("supervisor/reset_estop")
        cell.mode("HOLD")


def rows_of(cell: Cell, uuid: str) -> tuple[Store, list[int]]:
    store = Store(cell.folder / "store")

    def stored() -> bool:
        store.refresh()
        return any(e.uuid == uuid and e.outcome for e in store.episodes)

    cell.until(stored, "the stored episode")
    episode = next(e for e in store.episodes if e.uuid == uuid)
    return store, list(range(episode.first_row, episode.end_row))


def test_the_policy_drives_from_the_first_tick_and_every_tick_is_recorded(cell):
    uuid = cell.start_episode("short")
    cell.until(lambda: not cell.moving, "the time limit")
    cell.until(lambda: cell.has_event("episode_end", episode=uuid), "the end")
    end = next(e for e in cell.events if e["type"] == "episode_end" and e["episode"] == uuid)
    assert (end["outcome"], end["truncated"], end["reason"]) == ("failure", True, "time_limit")
    store, rows = rows_of(cell, uuid)
    assert len(rows) == 40
    start = next(e for e in cell.events if e["type"] == "episode_start" and e["episode"] == uuid)
    stamps = store.read("stamp_ns", np.array(rows))
    np.testing.assert_array_equal(np.diff(stamps), cell.contract.dt_ns)
    assert stamps[0] == start["start_stamp_ns"]
    np.testing.assert_array_equal(store.read("source", np.array(rows)), 0)
    np.testing.assert_array_equal(store.read("action", np.array(rows)), np.float32(0.25))
    np.testing.assert_array_equal(store.read("action.policy", np.array(rows)), np.float32(0.25))
    steps = store.read("chunk_step", np.array(rows))
    np.testing.assert_array_equal(steps, np.arange(40) % 4)
    assert store.read("truncated", np.array(rows)).tolist() == [False] * 39 + [True]
    assert not store.read("terminated", np.array(rows)).any()
    episode = next(e for e in store.episodes if e.uuid == uuid)
    assert (episode.task, episode.operator, episode.problems) == ("short", "ann", ())


def test_a_person_takes_over_within_a_tick_and_hands_back_through_hold(cell):
    uuid = cell.start_episode()

    def drive(deadman: bool):
        def answer() -> None:
            cell.operator(deadman=deadman, target=[0.0, -0.5, 0.0, 1.0] if deadman else None)

        return answer

    cell.before_say = drive(False)
    cell.operator(deadman=False)
    cell.ticks(10)
    cell.before_say = drive(True)
    assert cell.call("supervisor/set_intervention", SetBool, data=True).success
    cell.operator(deadman=True, target=[0.0, -0.5, 0.0, 1.0])
    cell.mode("HUMAN")
    cell.ticks(10)
    assert cell.executed[-1][1:] == ("human:ann", [0.0, -0.5, 0.0, 1.0])
    cell.before_say = drive(False)
    cell.operator(deadman=False)
    cell.mode("HOLD")
    cell.ticks(3)
    assert cell.executed[-1][1:] == ("hold", [0.0, 0.0, 0.0, 1.0])
    released_ns = cell.executed[-1][0]
    assert cell.call("supervisor/resume_policy").success
    cell.ticks(10)
    labels = [label for ns, label, _ in cell.executed if ns > released_ns]
    assert labels[-1].startswith("policy:0#")
    cell.end_episode(success=True)
    store, rows = rows_of(cell, uuid)
    source = store.read("source", np.array(rows))
    changes = source[np.flatnonzero(np.diff(source, prepend=-1))]
    assert changes.tolist() == [0, 1, 3, 0]
    human = store.read("action.human", np.array(rows))
    np.testing.assert_array_equal(np.isnan(human).any(axis=1), source != 1)
    assert store.read("reward", np.array(rows)).tolist() == [0.0] * (len(rows) - 1) + [1.0]
    kinds = [e["type"] for e in cell.events if e.get("episode") == uuid]
    assert kinds == ["reset", "episode_start", "takeover", "release", "success", "episode_end"]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("raises", "the policy failed: RuntimeError: the network is on fire"),
        ("returns_nan", "it returned NaN or infinity"),
        ("returns_two", "it returned a chunk of shape (2, 4); expected (8, 4)"),
    ],
)
def test_a_policy_that_fails_leads_to_hold_with_the_reason(cell, task, reason):
    cell.start_episode(task)
    cell.until(lambda: reason in cell.state.get("reason", ""), reason)
    cell.ticks(5)
    assert cell.state["mode"] == "HOLD"
    assert cell.executed[-1][1] == "hold"


def test_an_emergency_stop_needs_a_reset_and_then_holds(cell):
    cell.start_episode()
    cell.ticks(3)
    seen = len(cell.executed)
    assert cell.call("supervisor/estop").success
    cell.ticks(3)
    drivers = [label.partition(":")[0] for _, label, _ in cell.executed[seen:]]
    assert drivers[-3:] == ["hold"] * 3
    assert drivers == sorted(drivers, reverse=True)  # policy..., then hold, never back
    assert cell.state["mode"] == "FAULT"
    assert not cell.call("supervisor/resume_policy").success
    assert cell.call("supervisor/reset_estop").success
    cell.mode("HOLD")
    assert cell.has_event("stop", reason="emergency stop by operator")


def test_wrong_joint_names_lead_to_hold(cell):
    cell.start_episode()
    cell.ticks(3)
    right, cell.names = cell.names, ["ee_x", "ee_y", "elbow", "gripper"]
    try:
        cell.until(lambda: "missing ee_z" in cell.state.get("reason", ""), "the reason")
        assert cell.state["mode"] == "HOLD"
    finally:
        cell.names = right


def test_a_second_publisher_of_commands_is_a_fault(cell):
    from trajectory_msgs.msg import JointTrajectory

    second = cell.node.create_publisher(JointTrajectory, "command", 1)
    try:
        cell.mode("FAULT")
        assert "one arbiter drives a cell" in cell.state["reason"]
    finally:
        cell.node.destroy_publisher(second)
    topic = f"/{cell.contract.cell}/command"
    cell.until(lambda: cell.node.count_publishers(topic) == 1, "the second publisher's end")


def test_an_episode_cannot_start_twice_nor_with_an_unknown_task(cell):
    uuid = cell.start_episode()
    answer = cell.call("supervisor/start_episode")
    assert (answer.success, uuid in answer.message) == (False, True)
    cell.end_episode(success=False)
    assert not cell.call("supervisor/end_episode", SetBool, data=True).success


class TestKilledNodes:
    """Each node in turn, with SIGKILL, while the policy drives."""

    def kill(self, cell: Cell, name: str) -> None:
        """Kills a node, and waits until its successor is active."""
        pid = cell.group.pids()[name]
        seen = len(cell.events)
        os.kill(pid, signal.SIGKILL)
        cell.until(lambda: cell.group.pids().get(name, pid) != pid, f"the restart of {name}")

        def again() -> bool:
            states = [e["state"] for e in cell.events[seen:] if e.get("node") == name]
            return states[-2:] == ["lost", "active"]

        self.back = again

    def test_runner(self, cell):
        cell.start_episode()
        cell.ticks(5)
        self.kill(cell, "runner")
        cell.until(lambda: "a chunk did not come" in cell.state.get("reason", ""), "HOLD")
        assert cell.state["mode"] == "HOLD"
        cell.ticks(5)
        assert cell.executed[-1][1] == "hold"
        cell.until(self.back, "the new runner")
        assert cell.call("supervisor/resume_policy").success
        cell.until(lambda: cell.executed[-1][1].startswith("policy:"), "the policy to drive again")

    def test_arbiter(self, cell):
        cell.start_episode()
        cell.ticks(5)
        self.kill(cell, "arbiter")

        def held() -> bool:
            if cell.moving:
                cell.say()  # a lockstep robot says a tick again that nobody answered
            return cell.state.get("reason") == "not resumed yet"

        seen = len(cell.executed)
        cell.until(held, "the new arbiter in HOLD")
        cell.until(lambda: len(cell.executed) > seen + 3, "its ticks")
        assert {label for _, label, _ in cell.executed[seen + 1 :]} == {"hold"}

    def test_recorder(self, cell):
        cell.start_episode()
        cell.ticks(5)
        self.kill(cell, "recorder")
        cell.ticks(20)
        cell.until(self.back, "the new recorder")
        cell.end_episode()
        uuid = cell.start_episode("short")
        cell.until(lambda: not cell.moving, "the time limit")
        store, rows = rows_of(cell, uuid)
        assert len(rows) == 40
        assert {e.outcome for e in store.episodes} <= set(Outcome)

    def test_supervisor(self, cell):
        cell.start_episode()
        cell.ticks(5)
        orphan = cell.episode
        self.kill(cell, "supervisor")
        cell.until(lambda: cell.has_event("episode_end", episode=orphan), "the orphan's end")
        cell.mode("HOLD")
        uuid = cell.start_episode("short")
        cell.until(lambda: cell.has_event("episode_end", episode=uuid), "an episode after it")
        seqs = [event["seq"] for event in cell.events]
        assert seqs == sorted(set(seqs))


def test_versions_are_adopted_between_episodes_and_poisoned_ones_never(tmp_path):
    cell_contract = contract("versions_cell")  # the other cell of this module still runs
    registry = Registry(tmp_path / "registry")

    def publish(value: float) -> int:
        folder = checkpoint(tmp_path / f"checkpoint{value}", cell_contract, value)
        return registry.publish(folder, contract=cell_contract).number

    publish(0.25)
    with Cell(cell_contract, tmp_path, registry=registry.root) as cell:
        cell.up()

        def drive() -> None:
            """A new episode, until its policy moves the robot: on a busy machine HOLD is first."""
            before = len(cell.executed)
            cell.start_episode()
            cell.until(
                lambda: (
                    any(label.startswith("policy:") for _, label, _ in cell.executed[before:])
                    and cell.executed[-1][1].startswith("policy:")
                ),
                "the policy drives",
            )

        drive()
        assert cell.executed[-1][2][0] == pytest.approx(0.25)
        publish(0.5)
        name = f"/{cell.contract.cell}/runner"
        cell.call("runner/reload_policy")
        cell.ticks(50)
        assert cell.executed[-1][1].startswith("policy:1#")
        cell.end_episode()
        cell.until(lambda: cell.active.get("version") == 2, "version 2")
        drive()
        assert cell.executed[-1][1].startswith("policy:2#")
        assert cell.executed[-1][2][0] == pytest.approx(0.5)
        assert cell.has_event("policy_switch", version=2)

        publish(50.0)
        cell.call("runner/reload_policy")
        cell.until(lambda: "version 3 refused" in cell.diagnostics[name][1], "the refusal of 3")
        tampered = publish(0.75)
        checkpoint(registry.path(tampered), cell_contract, 0.9)
        cell.call("runner/reload_policy")
        cell.until(lambda: "version 4 refused" in cell.diagnostics[name][1], "the refusal of 4")
        assert "SHA-256" in cell.diagnostics[name][1]
        cell.end_episode()
        drive()
        assert cell.executed[-1][1].startswith("policy:2#")

        # A canary that is withdrawn before this cell came to adopt it is never run.
        registry.rollback(to=2)
        canary = publish(0.6)  # pinned: not for all
        registry.start_canary(canary, cells=[cell.contract.cell])
        cell.call("runner/reload_policy")
        cell.ticks(50)
        registry.end_canary()
        cell.call("runner/reload_policy")
        cell.ticks(50)
        cell.end_episode()
        drive()
        assert cell.executed[-1][1].startswith("policy:2#")
        registry.start_canary(canary, cells=["another", cell.contract.cell])
        cell.call("runner/reload_policy")
        cell.end_episode()
        cell.until(lambda: cell.active.get("version") == canary, "the canary")
        # SOP-6: one version in all of an episode, and never an older one after it.
        of_episode: dict[str, set[int]] = {}
        starts = [(e["start_stamp_ns"], e["episode"]) for e in cell.events if _starts(e)]
        for stamp, label, _ in cell.executed:
            if label.startswith("policy:"):
                uuid = max(start for start in starts if start[0] <= stamp)[1]
                number = int(label.removeprefix("policy:").partition("#")[0])
                of_episode.setdefault(uuid, set()).add(number)
        assert {len(found) for found in of_episode.values()} == {1}
        ran = [max(of_episode[uuid]) for _, uuid in starts if uuid in of_episode]
        assert ran == sorted(ran)
        assert set(ran) == {1, 2}


def _starts(event: dict) -> bool:
    return event["type"] == "episode_start"


def test_the_whole_loop_with_the_simulated_robot_and_its_operator(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    path = Path(sim.__file__).parent / "contracts" / "metaworld_state.yaml"
    from trajectory_store.contract import load_contract

    policy = checkpoint(tmp_path / "policy", load_contract(path), 0.1)
    config = CellConfig(
        contract=path,
        policy=policy,
        store=tmp_path / "store",
        events_log=tmp_path / "events.jsonl",
        operator={"episodes": 2, "tasks": ["reach"], "seed": 7},
    )
    specs = cell_nodes(config)
    runner = next(i for i, spec in enumerate(specs) if spec.name == "runner")
    specs[runner] = type(specs[runner])(**vars(specs[runner]) | {"module": "fake_runner"})
    with ProcessGroup(specs, log_dir=tmp_path / "logs") as group:
        assert group.wait("operator", 150) == 0
    # Stopping right after the last label must not cost the last episode.
    store = Store(tmp_path / "store")
    assert [group.returncode(spec.name) or 0 for spec in specs] == [0] * 6
    assert len(store.episodes) == 2
    for episode in store.episodes:
        rows = np.arange(episode.first_row, episode.end_row)
        assert set(np.diff(store.read("stamp_ns", rows))) == {12_500_000}
        source = store.read("source", rows)
        assert {0, 1} <= set(source.tolist())
        assert episode.interventions >= 1
        assert episode.problems == ()
    events = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
