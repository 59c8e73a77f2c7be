"""The cell contract: every problem at once, with its line; one hash for one meaning."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajectory_store.contract import (
    Contract,
    ContractError,
    ContractMismatch,
    diff,
    load_contract,
    parse_contract,
)

SHIPPED = sorted((Path(__file__).parents[2] / "sim" / "contracts").glob("*.yaml"))

MINIMAL = """\
schema: vla_post/cell/1
cell: bench
robot: arm
control_hz: 50
observations:
  observation.state:
    topic: joint_states
    type: sensor_msgs/JointState
    names: [a, b]
    shape: [2]
    unit: rad
actions:
  action:
    names: [a, b]
    unit: rad
    mode: absolute
    limits:
      position: [[-1, 1], [-2, 2]]
tasks:
  wave: {instruction: Wave, time_limit_s: 5}
"""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_contracts_load_and_survive_a_round_trip(path: Path):
    contract = load_contract(path)
    assert parse_contract(contract.to_json()).sha256 == contract.sha256


def test_the_hash_ignores_comments_and_order_but_no_value():
    contract = parse_contract(MINIMAL)
    head, tail = MINIMAL.split("robot: arm\n")
    reordered = f"# a comment\nrobot: arm\n{head}{tail}"
    assert parse_contract(reordered).sha256 == contract.sha256
    assert parse_contract(MINIMAL.replace("unit: rad", "unit: deg")).sha256 != contract.sha256


def test_every_problem_is_reported_at_once_with_its_line():
    text = (
        MINIMAL.replace("control_hz: 50", "control_hz: -50")
        .replace("type: sensor_msgs/JointState", "type: my_msgs/Joints")
        .replace("mode: absolute", "mode: absolute\n    speed: 3")
        .replace("tasks:", "tusks:")
    )
    with pytest.raises(ContractError) as caught:
        parse_contract(text, name="cell.yaml")
    message = str(caught.value)
    for line, field in [
        (4, "control_hz: found -50"),
        (8, "observations.observation.state.type: found 'my_msgs/Joints'"),
        (17, "actions.action.speed: is not a field"),
        (20, "tusks: is not a field"),
        (1, "tasks: is missing"),
    ]:
        assert f"cell.yaml:{line}: {field}" in message
    assert len(message.splitlines()) == 5


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("names: [a, b]\n    shape", "names: [a, a]\n    shape", "the same joint twice"),
        ("shape: [2]", "shape: [3]", "lists 2 joints and `shape` is [3]"),
        ("[[-1, 1], [-2, 2]]", "[[-1, 1]]", "limits.position has 1 entries for 2 joints"),
        ("[[-1, 1], [-2, 2]]", "[[1, -1], [-2, 2]]", "low must be < high"),
        ("observation.state", "state", "must start with 'observation.'"),
        ("    limits:", "    held: [c]\n    limits:", "held` names ['c']"),
        ("schema: vla_post/cell/1", "schema: vla_post/cell/9", "'vla_post/cell/1'"),
        ("tasks:\n", "execute_steps: 20\ntasks:\n", "more than chunk_horizon 16"),
    ],
)
def test_a_wrong_value_says_what_was_expected(old: str, new: str, expected: str):
    assert old in MINIMAL
    with pytest.raises(ContractError) as caught:
        parse_contract(MINIMAL.replace(old, new, 1))
    assert expected in str(caught.value)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "a: [1, 2", "\t: x", "null"])
def test_what_is_no_mapping_is_refused(text: str):
    with pytest.raises(ContractError):
        parse_contract(text)


@given(st.text(max_size=200))
def test_no_text_breaks_the_parser(text: str):
    with pytest.raises(ContractError):
        parse_contract(text)


def test_a_missing_file_is_one_clear_error(tmp_path: Path):
    with pytest.raises(ContractError, match="cannot read the contract"):
        load_contract(tmp_path / "absent.yaml")


def test_a_mismatch_names_the_fields_that_differ():
    here = parse_contract(MINIMAL)
    there = parse_contract(MINIMAL.replace("[-2, 2]", "[-3, 3]").replace("50", "20"))
    assert diff(here, here) == []
    with pytest.raises(ContractMismatch) as caught:
        here.require_same(there, here="the running cell", there="checkpoint v000003")
    message = str(caught.value)
    assert "checkpoint v000003 was made for another contract than the running cell" in message
    assert "control_hz: 50.0 -> 20.0" in message
    assert "actions.action.limits.position" in message


def test_an_unknown_task_names_the_known_ones():
    contract: Contract = parse_contract(MINIMAL)
    with pytest.raises(ContractError, match="has no task 'fly'; it knows wave"):
        contract.task("fly")


def test_rules_over_several_fields_are_told_beside_wrong_fields():
    """A wrong field hides only the rules that need it."""
    text = """
schema: vla_post/cell/1
cell: bench
robot: arm
control_hz: fast
chunk_horizon: 4
execute_steps: 9
observations:
  observation.state:
    topic: joint_states
    type: sensor_msgs/JointState
    names: [x, x]
    shape: [3]
    unit: m
    rate_hz: 0
actions:
  action:
    names: [dx, dy]
    unit: 3
    mode: delta
    held: [gripper]
    limits: {position: [[1, -1]]}
tasks:
  push: {instruction: "", time_limit_s: 5}
"""
    with pytest.raises(ContractError) as caught:
        parse_contract(text, name="c.yaml")
    lines = str(caught.value).splitlines()
    expected = [
        "control_hz: found 'fast'",
        "execute_steps is 9, more than chunk_horizon 4",
        "observation.state: `names` lists 2 joints and `shape` is [3]",
        "observation.state: `names` holds the same joint twice",
        "observation.state.rate_hz: found 0",
        "action.unit: found 3",
        "`held` names ['gripper'], which `names` does not list",
        "limits.position has 1 entries for 2 joints",
        "limits.position of dx is [1.0, -1.0]; low must be < high",
        "tasks.push.instruction: found ''",
    ]
    for part in expected:
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == len(expected)
    assert all(line.startswith("c.yaml:") for line in lines)


def test_a_rule_that_needs_a_wrong_field_waits_for_it():
    with pytest.raises(ContractError) as caught:
        parse_contract(MINIMAL.replace("[[-1, 1], [-2, 2]]", "[[-1, wide]]"))
    (line,) = str(caught.value).splitlines()
    assert "limits.position.0.1: found 'wide'" in line
