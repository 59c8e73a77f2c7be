"""What the learner page makes of a metrics file that grows."""

import json
from pathlib import Path
from typing import Any

import pytest

from robot_bridge.console.learning import MIX_UPDATES, Curves


def write(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_mixture_is_the_mean_of_the_last_updates(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    curves = Curves(path)
    assert curves.mixture() == []
    old = {"mix/a/online": 1.0}
    write(path, *({"update": n, "loss": 1.0, **old} for n in range(1, 11)))
    new = {"mix/a/online": 0.1, "mix/a/offline": 0.3, "mix/b/c/offline": 0.6, "mix/odd": 1.0}
    write(path, *({"update": n, **new} for n in range(11, 11 + MIX_UPDATES // 2)))
    write(path, {"update": 99, "loss": 2.0}, {"update": 100, "mix/a/online": float("nan")})
    curves.look()
    # 25 rows of the new shares and 10 of the old ones; rows without shares do not count.
    a, b = curves.mixture()
    assert a["task"] == "a"
    assert a["online"] == pytest.approx((10 * 1.0 + 25 * 0.1) / 35, abs=1e-4)
    assert a["offline"] == pytest.approx(25 * 0.3 / 35, abs=1e-4)
    assert (b["task"], b["online"]) == ("b/c", 0.0)
    write(path, *({"update": n, **new} for n in range(101, 101 + MIX_UPDATES)))
    curves.look()
    assert curves.mixture()[0] == {"task": "a", "online": 0.1, "offline": 0.3}
    assert set(curves.to_dict()) == {"loss"}  # shares are no curves
    path.write_text(json.dumps({"update": 1, "loss": 1.0}) + "\n")  # a new run
    curves.look()
    assert curves.mixture() == []


def test_freshness_is_the_median_of_what_was_told_last(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    curves = Curves(path)
    write(path, *({"first_batch_of": "e", "tick_to_batch_s": s} for s in (100.0, 4.0, 6.0)))
    write(path, {"running": 3, "update_to_robot_s": 12.5}, {"episode": "e", "versions_behind": "x"})
    curves.look()
    assert curves.freshness() == {"tick_to_batch_s": 6.0, "update_to_robot_s": 12.5}
    write(path, *({"tick_to_batch_s": 1.0} for _ in range(20)))
    curves.look()
    assert curves.freshness()["tick_to_batch_s"] == 1.0


def test_a_fixed_mixture_is_shown_as_it_was_configured(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    curves = Curves(path)
    write(path, {"mixing": "fixed", "mix/a/offline": 1.0}, {"update": 1, "loss": 1.0})
    write(path, {"mixing": "fixed", "mix/a/offline": 0.5, "mix/a/online": 0.5})  # robots came
    curves.look()
    assert curves.mixture() == [{"task": "a", "online": 0.5, "offline": 0.5}]
    assert curves.mixture_updates == 0
    write(path, {"update": 2, "mix/a/online": 0.2, "mix/a/offline": 0.8})  # now it adapts
    curves.look()
    assert curves.mixture() == [{"task": "a", "online": 0.2, "offline": 0.8}]
    assert curves.mixture_updates == 1
