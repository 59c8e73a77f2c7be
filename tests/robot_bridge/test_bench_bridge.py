"""The benchmark of the robot side for a few seconds: its counts are exact on any machine."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("rclpy")

pytestmark = pytest.mark.ros

FILE = Path(__file__).parents[2] / "benchmarks" / "bench_bridge.py"


def test_every_message_is_received_or_counted_as_lost(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_bridge", FILE)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    result = bench.measure(5.0, tmp_path, reactions=2)
    assert len(result["streams"]) == 4
    for topic, counts in result["streams"].items():
        assert counts["published"] > 20, topic
        assert counts["received"] + counts["lost"] == counts["published"], topic
    assert result["rows"] > 0
    assert len(result["estop_ms"]) == 2
    assert len(result["watchdog_ms"]) == 1
    assert {"arbiter", "recorder", "supervisor", "driver"} <= result["cpu"].keys()
    rows = bench.table(result)
    assert any(what.startswith("emergency stop") for what, _, _ in rows)
