"""`vla-post teleop`: drive a cell with a keyboard, gamepad, SpaceMouse or leader arm."""

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vla_post.cli.signals import ends_in_order


@dataclass(frozen=True, kw_only=True)
class TeleopCommand:
    """Drive a cell that runs. Ctrl-C, an unplugged device and a released deadman all end in HOLD.

    Hold the deadman (keyboard: space, gamepad: right bumper, SpaceMouse: left button) to take over.
    What the other keys mean is in the key maps, robot_bridge/teleop_maps; copy one to change it.
    """

    contract: Path
    """The cell's YAML file, or the name of a shipped one."""
    device: Literal["keyboard", "gamepad", "spacemouse", "leader"] = "keyboard"
    map: str = ""
    """Key map, a YAML file; the device's own by default."""
    path: Path | None = None
    """Device file such as /dev/input/js1; the first one found by default."""
    deadman_device: Literal["keyboard", "gamepad"] = "keyboard"
    """With a leader arm: what holds the deadman."""
    leader_topic: str = "leader/joint_states"
    """With a leader arm: its JointState topic, in the cell's namespace unless it begins with /."""
    leader_joints: Path | None = None
    """With a leader arm: YAML file, joint of the robot -> {joint, scale, offset} of the leader."""
    operator: str = ""
    """Your name, for the record."""
    namespace: str = ""
    """Of the cell; empty: the contract's name."""
    joint_states_topic: str = ""
    """Where the robot publishes its joint states, if the cell was started with that remapping."""

    def run(self) -> None:
        from robot_bridge.client import CellClient
        from robot_bridge.nodes.teleop import begin, watch
        from vla_post.cli.contract import find, path_of

        contract, path = find(self.contract), path_of(self.contract)
        remappings = {"joint_states": self.joint_states_topic} if self.joint_states_topic else None
        with CellClient(
            contract, namespace=self.namespace, name="teleop", remappings=remappings
        ) as client:
            session = begin(
                client,
                device=self.device,
                key_map=self.map,
                path=self.path,
                deadman_device=self.deadman_device,
                leader_topic=self.leader_topic,
                leader_joints=self.leader_joints,
                operator=self.operator,
                folder=path.parent,
            )
            try:
                with ends_in_order():
                    watch(session, threading.Event(), _say)
            except KeyboardInterrupt:
                pass
            finally:
                session.close()
                print(file=sys.stderr)


def _say(line: str) -> None:
    end = "\n" if not sys.stderr.isatty() else ""
    print(f"\r\x1b[K{line[:150]}" if not end else line, end=end, file=sys.stderr, flush=True)
