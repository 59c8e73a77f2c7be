"""The doubts at takeovers: kept over restarts, never a reason to fail."""

import json
from pathlib import Path
from typing import Any

import pytest

from robot_bridge.bringup import CellConfig, cell_nodes
from robot_bridge.core import takeovers
from robot_bridge.core.takeovers import Takeovers

from .cells import arm


def test_the_threshold_of_yesterday_is_there_today(tmp_path: Path):
    path = str(tmp_path / "stores" / ".one.doubt.json")
    first = Takeovers(arm(), path)
    assert (first.threshold, first.problem, len(first)) == (None, "", 0)
    assert not first.exceeded(1e9)
    for doubt in (9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 3.0):
        first.add(doubt, 7)
    again = Takeovers(arm(), path)
    assert (again.threshold, len(again), again.problem) == (2.0, 8, "")  # of the last quarter
    assert (again.exceeded(2.5), again.exceeded(1.5)) == (True, False)
    again.add(5.0, 8)
    rows = json.loads(Path(path).read_text())["takeovers"]
    assert [row["version"] for row in rows] == [7] * 8 + [8]
    assert [p.name for p in Path(path).parent.iterdir()] == [".one.doubt.json"]


HEAD = {"format": takeovers.FORMAT, "joints": ["a", "b"], "unit": "rad"}
ROW = {"doubt": 1.0, "version": 1, "time_s": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\x00" * 40,
        "[1]",
        "null",
        json.dumps(HEAD),
        json.dumps(HEAD | {"takeovers": [{"doubt": 1.0}]}),
        json.dumps(HEAD | {"takeovers": [3]}),
        json.dumps(HEAD | {"takeovers": [ROW | {"doubt": float("nan")}]}),
        json.dumps(HEAD | {"takeovers": [ROW | {"doubt": -1.0}]}),
        json.dumps(HEAD | {"takeovers": [ROW], "unit": "m"}),
        json.dumps(HEAD | {"takeovers": [ROW], "joints": ["x"]}),
    ],
)
def test_an_unreadable_file_is_told_and_put_aside(tmp_path: Path, text: str):
    path = tmp_path / "doubt.json"
    path.write_text(text)
    found = Takeovers(arm(), str(path))
    assert found.threshold is None
    assert "learning the threshold of doubt anew" in found.problem
    assert (tmp_path / "doubt.json.unreadable").read_text() == text
    found.add(4.0, 1)
    assert found.problem == ""
    assert Takeovers(arm(), str(path)).threshold == 4.0


def test_what_is_no_text_is_unreadable_too(tmp_path: Path):
    path = tmp_path / "doubt.json"
    path.write_bytes(b"\xff\xfe\x80")
    assert "anew" in Takeovers(arm(), str(path)).problem


def test_a_folder_that_cannot_be_written_is_told_and_learning_goes_on(tmp_path: Path):
    (tmp_path / "file").write_text("")
    here = Takeovers(arm(), str(tmp_path / "file" / "doubt.json"))
    here.add(2.0, 1)
    assert here.threshold == 2.0
    assert "the takeover is not kept" in here.problem


def test_only_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(takeovers, "KEPT", 4)
    path = str(tmp_path / "doubt.json")
    here = Takeovers(arm(), path)
    for doubt in range(6):
        here.add(doubt, 1)
    assert (len(here), here.threshold) == (4, 5.0)
    assert len(Takeovers(arm(), path)) == 4


def test_the_file_is_beside_the_store_or_else_beside_the_events(tmp_path: Path):
    (tmp_path / "cell.yaml").write_text(json.dumps(arm().to_dict()))

    def parameter(**config: Any) -> Any:
        cell = CellConfig(contract=tmp_path / "cell.yaml", policy=tmp_path, **config)
        specs = {spec.name: spec for spec in cell_nodes(cell)}
        return specs["runner"].parameters["takeovers"]

    store, events = tmp_path / "stores" / "one", tmp_path / "events.jsonl"
    expected = str(tmp_path / "stores" / ".one.doubt.json")
    assert parameter(store=store, events_log=events) == expected
    assert parameter(events_log=events) == str(tmp_path / ".events.jsonl.doubt.json")
    assert parameter() == ""
