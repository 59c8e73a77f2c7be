"""The runner as a real process: shadows, swaps at chunk borders, policies that hang."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy")
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.nodes.common import reliable
from vla_post.export.registry import Registry

from .cells import cartesian
from .graph import Cell, checkpoint
from .test_nodes import TASKS

pytestmark = pytest.mark.ros

CONTRACT = cartesian(tasks=TASKS, cell="runner_cell", safety={"swap": "chunk"})


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("runner")
    registry = Registry(folder / "registry")
    publish(registry, 0.25)
    publish(registry, 0.5, promote=False)
    with Cell(
        CONTRACT,
        folder,
        registry=registry.root,
        shadow="newest",
        shadow_log=folder / "shadow.jsonl",
        runner={"inference_timeout_s": 1.0},
    ) as running:
        running.registry = registry
        running.shadows, running.shadow_chunks = [], []
        subscribe = running.node.create_subscription
        subscribe(
            String,
            "policy/shadow",
            lambda m: running.shadows.append(json.loads(m.data)),
            reliable(50),
        )
        subscribe(
            JointTrajectory, "policy/shadow_chunk", running.shadow_chunks.append, reliable(50)
        )
        running.up()
        yield running


def publish(registry: Registry, value: float, **options) -> int:
    folder = checkpoint(registry.root.parent / f"checkpoint{value}", CONTRACT, value)
    return registry.publish(folder, contract=CONTRACT, **options).number


def test_a_shadow_is_compared_with_the_active_policy_and_moves_nothing(cell):
    cell.start_episode()
    cell.until(lambda: any(s["shadow"] == 2 for s in cell.shadows), "the shadow's proposals")
    got = next(s for s in cell.shadows if s["shadow"] == 2)
    assert got["active"] == 1
    assert got["first"] == pytest.approx(0.125)  # 0.25 of a range of 2
    assert got["mean"] == pytest.approx(0.125)

    def chunks() -> list[JointTrajectory]:
        return [m for m in cell.shadow_chunks if m.header.frame_id.startswith("2#")]

    cell.until(chunks, "the shadow's chunk")
    np.testing.assert_allclose(chunks()[0].points[0].positions, 0.5)
    # It follows the newest version.
    newest = publish(cell.registry, 0.75, promote=False)
    cell.until(lambda: cell.shadows[-1]["shadow"] == newest, "the newer shadow")
    assert cell.shadows[-1]["first"] == pytest.approx(0.25)
    drivers = {label.partition("#")[0] for _, label, _ in cell.executed}
    assert drivers <= {"hold", "policy:1"}
    sent = [command[0] for _, label, command in cell.executed if label != "hold"]
    assert set(np.round(sent, 6)) == {0.25}
    # Another one is asked for while it runs; what cannot be is refused, and changes nothing.
    assert cell.set_parameters(of="runner", shadow="2") == [""]
    cell.until(lambda: cell.shadows[-1]["shadow"] == 2, "the older shadow")
    (why,) = cell.set_parameters(of="runner", shadow="/etc")
    assert "expected a version" in why
    assert "only `shadow`" in cell.set_parameters(of="runner", max_jump="9")[0]
    assert cell.set_parameters(of="runner", shadow="") == [""]
    cell.until(lambda: "shadow_version" not in cell.said("/runner_cell/runner"), "its end")
    log = (cell.folder / "shadow.jsonl").read_text().splitlines()
    assert json.loads(log[0])["v"] == 1
    cell.end_episode()


def test_a_version_is_adopted_between_chunks_where_the_contract_says_so(cell):
    cell.start_episode()
    cell.ticks(1)
    cell.until(lambda: cell.executed[-1][1].startswith("policy:1#"), "the old version")
    seen = len(cell.executed)
    number = publish(cell.registry, 0.4)
    cell.call("runner/reload_policy")
    cell.until(
        lambda: cell.executed[-1][1].startswith(f"policy:{number}#"), "the new version's chunk"
    )
    labels = [label.partition("#")[0] for _, label, _ in cell.executed[seen:]]
    assert "hold" not in labels
    assert labels == sorted(labels), "first one version, then the other"
    cell.until(lambda: cell.has_event("policy_switch", version=number), "the event of the switch")
    cell.end_episode()


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("hangs", "the policy hangs: no answer within 1 s"),
        # Its own watchdog cannot run, so the arbiter's has to do, and faulthandler's ends it.
        ("hangs_in_c", "a chunk did not come in time"),
    ],
)
def test_a_policy_that_hangs_leads_to_hold_and_a_new_runner(cell, task, reason):
    before = cell.group.pids()["runner"]
    seen = len(cell.events)
    cell.start_episode(task)
    cell.until(lambda: reason in cell.state.get("reason", ""), "the reason")
    assert cell.state["mode"] == "HOLD"
    cell.until(lambda: cell.group.pids().get("runner", before) != before, "a new process")

    def back() -> bool:
        states = [e["state"] for e in cell.events[seen:] if e.get("node") == "runner"]
        return states[-2:] == ["lost", "active"]

    cell.until(back, "the new runner")
    assert cell.state["mode"] == "HOLD"
    cell.end_episode(success=False)
    before = len(cell.executed)
    cell.start_episode()
    cell.until(
        lambda: any(label.startswith("policy:") for _, label, _ in cell.executed[before:]),
        "the policy drives again",
    )
    cell.end_episode()
