# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""What the launch files share: launch arguments <-> `CellConfig`, `NodeSpec` -> launch_ros nodes.

Imports launch and launch_ros, which come with ROS 2 and not with the wheels.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from robot_bridge.bringup import CellConfig, NodeSpec, cell_nodes
from robot_bridge.dds import LOOPBACK, use_default_profile
from robot_bridge.fleet import FleetConfig, fleet_nodes

ARGUMENTS: Mapping[str, tuple[str, str]] = {
    "contract": ("", "path of the cell contract (YAML)"),
    "registry": (
        "",
        "policy versions (folder or s3://); the runner follows the active one",
    ),
    "policy": ("", "checkpoint folder of one fixed policy, instead of a registry"),
    "backend": ("torch", "torch or onnx"),
    "server": ("", "ws:// address of a policy server, instead of a registry or a policy"),
    "shadow": ("", "candidate beside the policy that moves nothing: folder, version or newest"),
    "shadow_log": ("", "file that gets every comparison of the shadow as one JSON line"),
    "insight_every": ("0", "tell the policy's doubt and its critic's value of every k-th chunk"),
    "store": ("", "trajectory store to record into; empty: record nothing"),
    "uplink": ("", "deliver the store's episodes to this prefix, e.g. s3://fleet/cells; empty: no"),
    "uplink_name": ("", "of this cell there; empty: the store's folder name"),
    "uplink_mbit_s": ("0", "limit of what is sent, in megabits a second; 0: none"),
    "bag": ("", "folder for MCAP files with every topic; empty: none"),
    "events_log": ("", "file that gets every event as one JSON line"),
    "auto_resume": ("false", "true: episodes start with the policy driving"),
    "teleop": ("", "gamepad, spacemouse or leader; empty: no device (keyboard: vla-post teleop)"),
    "teleop_map": ("", "key map (YAML) of that device; empty: its own"),
    "console": ("true", "false: no web console for the operator (of a fleet: one for all cells)"),
    "console_port": ("8765", "of the web console, on this computer; the next free one if taken"),
    "namespace": ("", "empty: the contract's cell name"),
    "dds_profile": (LOOPBACK, "loopback (this computer only) or network"),
}
SIMULATED: Mapping[str, tuple[str, str]] = {
    "real_time_factor": ("1.0", "speed of a simulated cell that is not in lockstep"),
    "episodes": ("0", "episodes that the scripted operator runs; 0: no scripted operator"),
}
REAL: Mapping[str, tuple[str, str]] = {
    "command_topic": ("", "e.g. /joint_trajectory_controller/joint_trajectory"),
    "joint_states_topic": ("", "e.g. /joint_states"),
}

FLEET: Mapping[str, tuple[str, str]] = {
    "cells": ("2", "number of simulated cells"),
    "operators": ("0", "scripted operators who share them; 0: one for each"),
    "first_domain": ("", "cell i gets ROS domain first_domain + i; empty: all share one"),
}


def declare(*groups: Mapping[str, tuple[str, str]]) -> list[Any]:
    return [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for group in groups
        for name, (default, text) in group.items()
    ]


def nodes(simulated: bool, *groups: Mapping[str, tuple[str, str]]) -> Any:
    """An action that reads the arguments when the launch begins, and starts the cell's nodes."""
    return _start(groups, lambda given: cell_nodes(cell_config(given, simulated=simulated)))


def fleet(*groups: Mapping[str, tuple[str, str]]) -> Any:
    """The same for a fleet of simulated cells."""
    return _start(groups, lambda given: fleet_nodes(fleet_config(given)))


def _start(
    groups: Sequence[Mapping[str, tuple[str, str]]],
    specs: Callable[[Mapping[str, str]], list[NodeSpec]],
) -> Any:
    names = [name for group in groups for name in group]

    def start(context: Any) -> list[Any]:
        given = {name: LaunchConfiguration(name).perform(context) for name in names}
        environment: dict[str, str] = {}
        use_default_profile(given["dds_profile"], environment)
        return [
            *(SetEnvironmentVariable(k, v) for k, v in environment.items()),
            LogInfo(msg=f"vla_post: cells of {given['contract']}"),
            *(launch_node(spec) for spec in specs(given)),
        ]

    return OpaqueFunction(function=start)


def fleet_config(given: Mapping[str, str]) -> FleetConfig:
    """Raises ValueError for what the arguments cannot mean."""
    domain = given.get("first_domain", "")
    return FleetConfig(
        cell=cell_config(given, simulated=True),
        cells=int(given["cells"]),
        operators=int(given["operators"]),
        first_domain=int(domain) if domain else None,
    )


def cell_config(given: Mapping[str, str], *, simulated: bool) -> CellConfig:
    """Launch arguments are text; raises ValueError for what they cannot mean."""

    def path(name: str) -> Path | None:
        return Path(given[name]).expanduser() if given.get(name) else None

    contract = path("contract")
    if contract is None:
        raise ValueError("no contract; add contract:=FILE to the ros2 launch command")
    backend = given.get("backend", "torch")
    if backend not in ("torch", "onnx"):
        raise ValueError(f"backend is {backend!r}; expected torch or onnx")
    episodes = int(given.get("episodes", "0"))
    device = given.get("teleop", "")
    if device not in ("", "gamepad", "spacemouse", "leader"):
        raise ValueError(f"teleop is {device!r}; expected gamepad, spacemouse or leader")
    topics = {
        "command": given.get("command_topic", ""),
        "joint_states": given.get("joint_states_topic", ""),
    }
    return CellConfig(
        contract=contract,
        registry=given.get("registry") or None,
        policy=path("policy"),
        backend=backend,
        server=given.get("server", ""),
        shadow=given.get("shadow", ""),
        shadow_log=path("shadow_log"),
        insight_every=int(given.get("insight_every", "0")),
        store=path("store"),
        uplink=given.get("uplink", ""),
        uplink_name=given.get("uplink_name", ""),
        uplink_mbit_s=float(given.get("uplink_mbit_s", "0")),
        bag=path("bag"),
        events_log=path("events_log"),
        simulated=simulated,
        auto_resume=given.get("auto_resume", "false").lower() == "true",
        real_time_factor=float(given.get("real_time_factor", "1.0")),
        operator={"episodes": episodes} if episodes else None,
        teleop={"device": device, "map": given.get("teleop_map", "")} if device else None,
        remappings={source: target for source, target in topics.items() if target},
        namespace=given.get("namespace", ""),
        console={"port": int(given.get("console_port", "8765"))}
        if given.get("console", "true").lower() == "true"
        else None,
    )


def launch_node(spec: NodeSpec) -> Any:
    name = spec.name.rpartition("/")[2]
    return Node(
        package="vla_post",
        executable=name,
        name=name,
        namespace=spec.namespace,
        parameters=[dict(spec.parameters)],
        remappings=list(spec.remappings.items()),
        respawn=spec.restart == "always",
        respawn_delay=1.0,
        additional_env=dict(spec.environment),
        output="screen",
    )


def describe(actions: Sequence[Any]) -> Any:
    from launch import LaunchDescription

    return LaunchDescription(list(actions))
