"""Plays the rows of the fault table in docs/safety.md."""

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from robot_bridge.core.chunks import POLICY_ERROR

from .cells import arm
from .test_arbiter import Rig

ROOT = Path(__file__).parents[2]


def table() -> list[list[str]]:
    text = (ROOT / "docs" / "safety.md").read_text().partition("## Table of faults")[2]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def silent_robot(rig: Rig) -> None:
    rig.robot_speaks = False
    for _ in range(6):
        rig.chunk(0.3)
        rig.step()


def late_loop(rig: Rig) -> None:
    rig.tick_ns += 4 * rig.contract.dt_ns
    rig.chunk(0.3)
    rig.step()


def nan_robot(rig: Rig) -> None:
    rig.position = np.array([np.nan, 0.0])
    rig.step()


def nameless_robot(rig: Rig) -> None:
    rig.core.joint_state_unreadable("missing b; found a", rig.mono_s)
    rig.robot_speaks = False
    rig.step()


def resumed_without_runner(rig: Rig) -> None:
    rig.core.episode_ended()
    rig.step()
    rig.core.resume(rig.tick_ns, rig.mono_s)
    rig.step(260)


def short_chunk(rig: Rig) -> None:
    rig.core.offer_chunk(rig.tick_ns, rig.names, [[0.0, 0.0]] * 3, "3#9", rig.tick_ns)


def human(action: Callable[[Rig], None]) -> Callable[[Rig], None]:
    def play(rig: Rig) -> None:
        rig.drive_human()
        action(rig)
        rig.step()

    return play


PLAYS: dict[str, Callable[[Rig], object]] = {
    "emergency stop": lambda rig: (rig.core.estop(), rig.step()),
    "joint states stop": silent_robot,
    "joint states stop, contract says `stale: stop`": silent_robot,
    "joint states with NaN": nan_robot,
    "joint states lack a joint": nameless_robot,
    "the chunk runs out": lambda rig: rig.step(10),
    "chunk with NaN": lambda rig: rig.chunk(np.nan),
    "chunk with wrong joint names": lambda rig: rig.chunk(0.1, names=["a", "x"]),
    "chunk of the wrong length": short_chunk,
    "chunk from the future": lambda rig: rig.chunk(0.1, stamp_ns=10**12),
    "the policy raises": lambda rig: rig.chunk(0.1, frame=POLICY_ERROR + "the policy failed: x"),
    "no chunk after resuming": resumed_without_runner,
    "deadman released": human(lambda rig: rig.operator(deadman=False)),
    "operator's device silent": human(lambda rig: rig.step(14)),
    "operator's link lost": human(lambda rig: setattr(rig, "attached", False)),
    "operator's command with NaN": human(
        lambda rig: rig.operator(deadman=True, target=[np.nan, 0.0])
    ),
    "control loop misses ticks": late_loop,
    "the robot's process is gone (lockstep)": lambda rig: rig.core.robot_gone(),
    "the robot's driver is another process than before": lambda rig: rig.core.robot_restarted(),
    "the clock jumps back": lambda rig: rig.core.tick(rig.tick_ns - 10**9, rig.mono_s + 0.02),
}


def test_the_table_and_the_plays_name_the_same_rows():
    assert {row[0] for row in table() if row[4] == "core"} == set(PLAYS)


@pytest.mark.parametrize("row", [r for r in table() if r[4] == "core"], ids=lambda row: row[0])
def test_the_arbiter_does_what_the_table_says(row):
    what, mode, reason, _, _ = row
    rig = Rig(arm(safety={"stale": "stop"} if "stale: stop" in what else {}))
    rig.drive_policy(0.3)
    PLAYS[what](rig)
    rig.step()
    assert rig.core.mode == mode
    assert reason in rig.core.reason
    assert rig.last.label == "hold"


def test_rows_that_are_played_by_processes_name_existing_tests():
    names: set[str] = set()
    for part in ("nodes", "faults", "runner_node", "robot_restart", "bag"):
        file = f"test_{part}.py"
        tree = ast.parse((ROOT / "tests" / "robot_bridge" / file).read_text())
        names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                inner = (f.name for f in node.body if isinstance(f, ast.FunctionDef))
                names |= {f"{node.name}.{name}" for name in inner}
    rows = [row for row in table() if row[4] != "core"]
    assert rows
    assert {row[4] for row in rows} <= names
