# pyright: reportMissingParameterType=false, reportAttributeAccessIssue=false
"""Executes the launch files against a recording stand-in of `launch` and `launch_ros`.

The stand-in has the classes that the files use, with their real signatures; the files, the shared
code and the node list are the real ones.
"""

import runpy
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import sim
from robot_bridge.bringup import CellConfig, cell_nodes
from robot_bridge.fleet import FleetConfig, fleet_nodes

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
CONTRACT = Path(sim.__file__).parent / "contracts" / "metaworld_state.yaml"


class Context:
    def __init__(self, given: dict[str, str]) -> None:
        self.values = dict(given)


class DeclareLaunchArgument:
    def __init__(self, name: str, *, default_value: str, description: str) -> None:
        self.name, self.default, self.description = name, default_value, description

    def execute(self, context: Context) -> list[Any]:
        context.values.setdefault(self.name, self.default)
        return []


class LaunchConfiguration:
    def __init__(self, name: str) -> None:
        self.name = name

    def perform(self, context: Context) -> str:
        return context.values[self.name]


class OpaqueFunction:
    def __init__(self, *, function: Any) -> None:
        self.function = function

    def execute(self, context: Context) -> list[Any]:
        return self.function(context)


class Recorded:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options

    def execute(self, context: Context) -> list[Any]:
        return []


class Node(Recorded):
    def __init__(
        self,
        *,
        package: str,
        executable: str,
        name: str,
        namespace: str,
        parameters: list[dict[str, Any]],
        remappings: list[tuple[str, str]],
        respawn: bool,
        respawn_delay: float,
        additional_env: dict[str, str],
        output: str,
    ) -> None:
        super().__init__()
        self.__dict__.update(locals())


class SetEnvironmentVariable(Recorded):
    pass


class LogInfo(Recorded):
    pass


class LaunchDescription:
    def __init__(self, entities: list[Any]) -> None:
        self.entities = entities


@pytest.fixture
def ros2_launch(monkeypatch):
    """`ros2 launch vla_post FILE name:=value ...`, returning everything that would run."""
    modules = {
        "launch": {"LaunchDescription": LaunchDescription},
        "launch.actions": {
            "DeclareLaunchArgument": DeclareLaunchArgument,
            "LogInfo": LogInfo,
            "OpaqueFunction": OpaqueFunction,
            "SetEnvironmentVariable": SetEnvironmentVariable,
        },
        "launch.substitutions": {"LaunchConfiguration": LaunchConfiguration},
        "launch_ros": {},
        "launch_ros.actions": {"Node": Node},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "robot_bridge.launching", raising=False)
    for variable in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
        monkeypatch.delenv(variable, raising=False)

    def run(file: str, **given: str) -> list[Any]:
        description = runpy.run_path(str(LAUNCH / file))["generate_launch_description"]()
        context, executed = Context(given), []
        entities = list(description.entities)
        while entities:
            entity = entities.pop(0)
            executed.append(entity)
            entities = [*entity.execute(context), *entities]
        return executed

    yield run
    sys.modules.pop("robot_bridge.launching", None)


def nodes(executed: list[Any]) -> dict[str, Node]:
    return {e.name: e for e in executed if isinstance(e, Node)}


def test_the_simulated_cell_starts_what_vla_post_up_starts(ros2_launch, tmp_path):
    executed = ros2_launch(
        "sim_cell.launch.py",
        contract=str(CONTRACT),
        registry=str(tmp_path / "registry"),
        store=str(tmp_path / "store"),
        episodes="3",
    )
    specs = cell_nodes(
        CellConfig(
            contract=CONTRACT,
            registry=tmp_path / "registry",
            store=tmp_path / "store",
            operator={"episodes": 3},
            console={"port": 8765},
        )
    )
    found = nodes(executed)
    assert list(found) == [spec.name for spec in specs]
    for spec in specs:
        node = found[spec.name]
        assert node.package == "vla_post"
        assert node.executable == spec.name
        assert node.namespace == spec.namespace
        assert node.parameters == [dict(spec.parameters)]
        assert node.respawn == (spec.restart == "always")
    environment = [e.arguments for e in executed if isinstance(e, SetEnvironmentVariable)]
    assert dict(environment)["FASTDDS_DEFAULT_PROFILES_FILE"].endswith("loopback.xml")


def test_a_real_cell_is_remapped_to_its_controller(ros2_launch, tmp_path):
    target = "/joint_trajectory_controller/joint_trajectory"
    found = nodes(
        ros2_launch(
            "cell.launch.py",
            contract=str(CONTRACT),
            policy=str(tmp_path),
            command_topic=target,
            joint_states_topic="/joint_states",
            console="false",
        )
    )
    assert list(found) == ["supervisor", "arbiter", "runner"]
    for node in found.values():
        assert ("command", target) in node.remappings
        assert ("joint_states", "/joint_states") in node.remappings
        assert node.parameters[0]["use_sim_time"] is False


def test_up_and_the_launch_file_start_the_same_nodes_with_the_same_parameters(
    ros2_launch, tmp_path, monkeypatch
):
    from vla_post.cli import up
    from vla_post.cli.main import main

    robot = ROOT / "robot_bridge" / "contracts" / "so101.yaml"
    given = {
        "store": str(tmp_path / "store"),
        "bag": str(tmp_path / "bag"),
        "events_log": str(tmp_path / "events.jsonl"),
        "server": "ws://127.0.0.1:9",
        "teleop": "gamepad",
        "command_topic": "/vla_joint_trajectory_controller/joint_trajectory",
        "joint_states_topic": "/joint_states",
    }
    started: list[Any] = []

    class Recording(up.ProcessGroup):
        def start(self) -> None:
            started.extend(child.spec for child in self._children.values())
            raise KeyboardInterrupt

    monkeypatch.setattr(up, "ProcessGroup", Recording)
    flags = [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", v)]
    with pytest.raises(SystemExit):
        main(["up", "--contract", "so101", "--logs", str(tmp_path / "logs"), *flags])
    launched = nodes(ros2_launch("cell.launch.py", contract=str(robot), **given))
    assert [spec.name for spec in started] == list(launched)
    assert "teleop" in launched
    for spec in started:
        node = launched[spec.name]
        parameters = dict(spec.parameters)
        parameters.pop("address_file", "")  # by which `up` learns the console's link, to print it
        assert node.parameters == [parameters]
        assert node.remappings == list(spec.remappings.items())
        assert node.namespace == spec.namespace


def test_a_fleet_has_a_namespace_a_clock_and_a_store_for_each_cell(ros2_launch, tmp_path):
    executed = ros2_launch(
        "fleet.launch.py",
        contract=str(CONTRACT),
        policy=str(tmp_path),
        store=str(tmp_path / "stores"),
        cells="3",
        operators="2",
        episodes="4",
    )
    started = [e for e in executed if isinstance(e, Node)]
    config = FleetConfig(
        cell=CellConfig(
            contract=CONTRACT,
            policy=tmp_path,
            store=tmp_path / "stores",
            operator={"episodes": 4},
            console={"port": 8765},
        ),
        cells=3,
        operators=2,
    )
    specs = fleet_nodes(config)
    assert [f"{n.namespace}/{n.name}" for n in started] == [f"/{s.name}" for s in specs]
    assert len(started) == 3 * 6 + 2  # the attention of the operators, and one console
    for node, spec in zip(started, specs, strict=True):
        assert node.executable == spec.name.rpartition("/")[2]
        assert node.parameters == [dict(spec.parameters)]
    recorders = [n for n in started if n.name == "recorder"]
    assert [n.namespace for n in recorders] == [
        "/sawyer_state_0",
        "/sawyer_state_1",
        "/sawyer_state_2",
    ]
    assert recorders[2].parameters[0]["store"] == str(tmp_path / "stores" / "sawyer_state_2")
    assert ("/clock", "/sawyer_state_2/clock") in recorders[2].remappings
    operators = [n for n in started if n.name == "operator"]
    assert [n.parameters[0]["seed"] for n in operators] == [0, 10_000, 20_000]
    assert all(n.parameters[0]["shared_attention"] for n in operators)
    assert started[-2].parameters == [{"operators": 2}]
    (console,) = [n for n in started if n.name == "console"]
    assert console.parameters == [
        {
            "contract": str(CONTRACT),
            "cells": config.namespaces,
            "store": str(tmp_path / "stores"),
            "port": 8765,
        }
    ]
    assert console.namespace == "/fleet"


def test_a_fleet_without_a_console(ros2_launch, tmp_path):
    given = {"contract": str(CONTRACT), "policy": str(tmp_path)}
    executed = ros2_launch("fleet.launch.py", **given, console="false")
    assert "console" not in {n.name for n in executed if isinstance(n, Node)}


def test_a_fleet_in_domains_of_its_own_cannot_share_operators(ros2_launch, tmp_path):
    given = {"contract": str(CONTRACT), "policy": str(tmp_path), "episodes": "1"}
    with pytest.raises(ValueError, match=r"one ROS domain.*console:=false"):
        ros2_launch("fleet.launch.py", **given, first_domain="40")
    (one,) = [
        n
        for n in ros2_launch("fleet.launch.py", **given, first_domain="40", cells="1")
        if isinstance(n, Node) and n.name == "console"
    ]
    assert one.additional_env == {"ROS_DOMAIN_ID": "40"}
    given["console"] = "false"
    executed = ros2_launch("fleet.launch.py", **given, first_domain="40")
    domains = [(n.namespace, n.additional_env) for n in executed if isinstance(n, Node)]
    assert ("/sawyer_state_1", {"ROS_DOMAIN_ID": "41"}) in domains
    with pytest.raises(ValueError, match="need all of them in one ROS domain"):
        ros2_launch("fleet.launch.py", **given, first_domain="40", operators="1")
    with pytest.raises(ValueError, match=r"domains 101 to 102; they must lie in 0\.\.101"):
        ros2_launch("fleet.launch.py", **given, first_domain="101")


def test_no_contract_is_said_plainly(ros2_launch):
    with pytest.raises(ValueError, match="contract:=FILE"):
        ros2_launch("cell.launch.py")


def test_every_executable_exists_runs_the_right_module_and_is_executable(tmp_path):
    specs = cell_nodes(
        CellConfig(
            contract=CONTRACT,
            policy=tmp_path,
            store=tmp_path / "s",
            bag=tmp_path / "b",
            operator={"episodes": 1},
            teleop={"device": "gamepad"},
            uplink=str(tmp_path / "fleet"),
            console={},
        )
    )
    scripts = {path.name: path for path in (LAUNCH / "scripts").iterdir()}
    assert set(scripts) == {spec.name for spec in specs} | {"attention"}
    assert "from sim.nodes.attention import main" in scripts["attention"].read_text()
    for spec in specs:
        lines = scripts[spec.name].read_text().splitlines()
        assert lines[0].startswith("#!")
        assert lines[1] == f"from {spec.module} import main"
        assert scripts[spec.name].stat().st_mode & 0o111


def test_the_ros_package_names_itself_and_its_files(tmp_path):
    root = ET.parse(LAUNCH / "package.xml").getroot()
    assert root.findtext("name") == "vla_post"
    assert root.findtext("export/build_type") == "ament_python"
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "install_data", "-d", str(tmp_path)],
        cwd=LAUNCH,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    installed = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert {"vla_post", "package.xml", "cell.launch.py", "sim_cell.launch.py"} <= installed
    assert {"arbiter", "runner", "recorder", "supervisor", "robot", "operator"} <= installed


def test_no_package_file_makes_ours_shadow_ros():
    assert not list(LAUNCH.rglob("__init__.py"))
