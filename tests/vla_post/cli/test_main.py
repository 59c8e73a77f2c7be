"""The command line: help without heavy imports, one clear line for a user's mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from vla_post.cli.main import COMMANDS
from vla_post.cli.progress import JsonLines, RunState


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vla_post.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_help_names_every_command():
    done = cli("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str):
    done = cli(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"vla-post {name}" in done.stdout


ROOT = Path(__file__).parents[3]
CONTRACTS = ROOT / "sim" / "contracts"
CONTRACT = str(CONTRACTS / "metaworld_state.yaml")
PIXELS_POLICY = str(ROOT / "vla_post" / "recipes" / "assets" / "demo_pixels")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fly"], "no command 'fly'"),
        (["registry", "list", "/nowhere"], "no such registry"),
        (["eval", "--checkpoints", "/nowhere"], "not a checkpoint"),
        (["eval"], "name either --registry DIR, or --checkpoints"),
        (["eval", "--registry", "/nowhere"], "no active version"),
        (["export", "/nowhere", "--store", "/nowhere", "--out", "/tmp/x"], "not a checkpoint"),
        (["up", "--contract", "/nowhere.yaml"], "cannot read the contract"),
        (["up", "--contract", CONTRACT, "--policy", "/nowhere"], "no such folder"),
        (["up", "--contract", CONTRACT, "--policy", str(CONTRACTS)], "not a checkpoint"),
        (["up", "--contract", CONTRACT, "--policy", PIXELS_POLICY], "another contract"),
        (["store", "info", "/nowhere"], "/nowhere"),
        (["demo", "--episodes", "0"], "episodes"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(arguments: list[str], expected: str):
    done = cli(*arguments)
    assert done.returncode != 0
    assert expected in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_run_folder_in_use_is_not_overwritten(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("precious")
    done = cli("demo", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "exists and is not empty" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_json_lines_wait_for_the_end_of_a_line(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    lines = JsonLines(path)
    assert lines.new() == []
    path.write_text('{"a": 1}\n{"a": ')
    assert lines.new() == [{"a": 1}]
    with path.open("a") as file:
        file.write("2}\n")
    assert lines.new() == [{"a": 2}]
    assert lines.new() == []


def test_the_display_counts_what_the_policy_did_alone():
    state = RunState()
    episode = {"task": "reach"}
    for event in (
        {"type": "policy_switch", "version": 3},
        {"type": "episode_start", **episode},
        {"type": "episode_end", "outcome": "success", **episode},
        {"type": "episode_start", **episode},
        {"type": "takeover"},
        {"type": "release"},
        {"type": "episode_end", "outcome": "success", **episode},
        {"type": "episode_start", **episode},
        {"type": "episode_end", "outcome": "failure", **episode},
    ):
        state.event(event)
    assert (state.episodes, state.successes, state.unaided) == (3, 2, 1)
    assert list(state.recent) == [True, False, False]
    assert (state.version, state.takeovers) == (3, 1)
    state.metric({"update": 7, "loss": 0.25})
    assert (state.updates, state.loss) == (7, 0.25)
