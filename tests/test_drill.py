"""The fault drill on one cell, without policies; benchmarks/drill_fleet.py is the whole of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRILL = Path(__file__).parents[1] / "benchmarks" / "drill_fleet.py"


@pytest.mark.ros
@pytest.mark.timeout(900)
def test_nothing_is_lost_or_doubled_when_network_server_and_cell_fail(tmp_path):
    for package in ("rclpy", "moto", "mcap_ros2"):
        pytest.importorskip(package)
    words = ["--folder", str(tmp_path / "drill"), "--cells", "1", "--away-s", "0", "--short"]
    done = subprocess.run(
        [sys.executable, DRILL, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["lost"] == report["doubled"] == 0
    assert report["episodes_compared"] >= 6
    # Bags may lack the last ticks of episodes that were cut off; the drill lets no other go.
    assert report["ticks_found_in_bags"] > 0.9 * report["ticks_compared"] > 100
    for outage in ("network", "server"):
        assert report[outage]["episodes_meanwhile"] >= 1
    assert report["cell"]["rows_kept"] >= report["cell"]["rows_before"] > 5
    assert {"recorder", "robot", "supervisor", "uplink"} <= set(report["cell"]["killed"])
