"""The closed loop on its real parts: ROS 2 processes, MuJoCo, store, learner, registry, report."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trajectory_store import FleetView, NotAStore, Outcome, Source
from vla_post.export.registry import Registry

pytestmark = [pytest.mark.ros, pytest.mark.timeout(900)]

PATIENCE_S = 600.0


def demo(run: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vla_post.cli.main", "demo", "--policy", "state"]
    return subprocess.Popen(
        [*command, "--out", str(run), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Names every process that this run starts, directly or not.
        env=os.environ | {"VLA_POST_TEST_RUN": str(run)},
        start_new_session=True,
    )


def left_over(run: Path) -> list[int]:
    """Processes that carry the run's mark in their environment."""
    mark = f"VLA_POST_TEST_RUN={run}".encode()
    found: list[int] = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:
                continue
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


def test_the_loop_closes_and_reports(tmp_path: Path):
    run = tmp_path / "run"
    options = ("--episodes", "8", "--evaluation-episodes", "6", "--learn-s", "400")
    process = demo(run, *options)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert left_over(run) == []
    assert "report: " in out
    assert "pick-place" in out

    episodes = FleetView(run / "stores" / "online").episodes
    assert len(episodes) == 8
    assert sum(e.ticks_by(Source.HUMAN) for e in episodes) > 0, "the operator never took over"
    versions = Registry(run / "registry").versions()
    assert len(versions) >= 2, "the learner published nothing"
    assert versions[-1].learner_step > 0
    assert versions[1].snapshots, "a version names the data that it was trained on"
    outcome = json.loads((run / "evaluation.json").read_text())
    assert outcome["paired"]["all"]["episodes"] == 6
    card = json.loads((run / "export" / "policy.json").read_text())
    assert card["parity"]["max_error"] <= card["parity"]["bound"]
    report = (run / "report.html").read_text()
    for text in ("pick-place", "Learning curve", "before and after", "vla_post demo, state"):
        assert text in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_an_interrupt_leaves_nothing_running_and_everything_readable(tmp_path: Path):
    run = tmp_path / "run"
    process = demo(run, "--episodes", "500", "--no-export")
    store = run / "stores" / "online"

    def finished() -> set[str]:
        try:
            episodes = FleetView(store).episodes
        except NotAStore:
            return set()
        return {e.uuid for e in episodes if e.outcome in (Outcome.SUCCESS, Outcome.FAILURE)}

    wait_until(lambda: len(finished()) >= 2, process)
    recorded = finished()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("vla-post: interrupted; everything that was recorded is in")
    assert "Traceback" not in err
    assert left_over(run) == []
    assert recorded <= finished()
    for episode in FleetView(store).episodes:
        assert len(FleetView(store).stores[0].read("action", episode)) == len(episode)
