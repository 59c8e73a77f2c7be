r"""An operator's device on the teleop topics.

    python -m robot_bridge.nodes.teleop --ros-args -r __ns:=/CELL \
        -p contract:=FILE -p device:=gamepad

Parameters: `device` (keyboard, gamepad, spacemouse or leader), `map` (a key map; the device's own
by default), `path` (a device file; found by default), `operator` (a name). With `leader`:
`leader_topic` (JointState), `leader_joints` (YAML file: joint of the action -> joint, scale,
offset), and `deadman_device` (keyboard or gamepad).

A deadman that is released, a device that is unplugged or out of focus, a leader arm that falls
silent and the end of this process all lead to HOLD. The keyboard needs a terminal, so start it with
`vla-post teleop`, not from a launch file.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticStatus
from pydantic import TypeAdapter, ValidationError
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import JointState

from robot_bridge.client import CellClient
from robot_bridge.core.modes import Mode
from robot_bridge.core.teleop import (
    KeyMap,
    KeyMapError,
    Leader,
    LeaderJoint,
    Teleop,
    load_key_map,
)
from robot_bridge.devices import Device
from robot_bridge.devices.gamepad import XBOX_AXES, XBOX_BUTTONS, Gamepad
from robot_bridge.devices.keyboard import Keyboard
from robot_bridge.devices.spacemouse import SpaceMouse
from robot_bridge.driving import Hand, measured
from robot_bridge.nodes.common import UserError
from robot_bridge.snapshots import Joints
from trajectory_store.contract import Contract, load_contract

LONGEST_STEP_S = 0.1
"""A tick that comes later than this does not move the target further."""


class TeleopSession:
    """One person with one device at one cell, until `close`.

    Args:
        leader: moves the robot instead of the device, which keeps the deadman and the requests.
        folder: of the contract file.
    """

    def __init__(
        self,
        client: CellClient,
        device: Device,
        keys: KeyMap,
        *,
        leader: Leader | None = None,
        leader_topic: str = "leader/joint_states",
        operator: str = "",
        folder: Path | None = None,
    ) -> None:
        self.client, self.device, self.leader = client, device, leader
        self.teleop = Teleop(client.contract, keys, folder=folder)
        self.problem = ""
        """Why nothing is held, e.g. an unplugged device."""
        self.reply = ""
        """To the last request."""
        self.interrupted = threading.Event()
        """Ctrl-C was read as a key."""
        self._delta = client.contract.action.mode == "delta"
        self._last_ns = 0
        if leader is not None:
            client.subscribe(JointState, leader_topic, self._on_leader)
        client.drive(self._hand, operator=operator)
        client.report(self.diagnose)

    def status(self) -> str:
        """One line for people."""
        state = self.client.state
        chosen = self.teleop.jog.names[self.teleop.jog.selected]
        parts = [
            state.mode or "no arbiter heard",
            state.reason,
            "DEADMAN" if self._held else "",
            f"joint {chosen}",
            self.problem,
            self.reply,
        ]
        return " | ".join(part for part in parts if part)

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        """Level, one line, values."""
        level = DiagnosticStatus.WARN if self.problem else DiagnosticStatus.OK
        values = {"deadman": self._held, "device": type(self.device).__name__}
        return level, self.problem, values | ({"reply": self.reply} if self.reply else {})

    _held = False

    def close(self) -> None:
        self.client.release()
        self.device.close()

    def _on_leader(self, message: JointState) -> None:
        assert self.leader is not None
        self.leader.hear(list(message.name), message.position, time.monotonic())

    def _hand(self, stamp_ns: int, joints: Joints | None) -> Hand:
        try:
            reading = self.device.read()
        except KeyboardInterrupt:
            self.interrupted.set()
            return Hand(False)
        present, problem = reading.present, reading.problem
        leading = None
        if self.leader is not None:
            leading = self.leader.target(time.monotonic())
            if leading is None:
                present, problem = False, problem or self.leader.problem
        self.problem = problem
        dt_s = min(max(0.0, (stamp_ns - self._last_ns) / 1e9), LONGEST_STEP_S)
        self._last_ns = stamp_ns
        where = self.client.executed if self._delta else joints
        output = self.teleop.step(
            reading.held,
            reading.pressed,
            reading.axes,
            present=present,
            current=measured(self.client.contract, where),
            driving=self.client.state.mode == Mode.HUMAN,
            dt_s=dt_s,
        )
        for request in output.requests:
            self._ask(request)
        self._held = output.deadman
        target = output.target if leading is None or output.target is None else leading
        return Hand(output.deadman, target)

    def _ask(self, request: str) -> None:
        def done(future: Any) -> None:
            reply = future.result()
            self.reply = f"{request}: {'ok' if reply.success else reply.message}"

        self.client.ask(request).add_done_callback(done)


def make_device(name: str, keys: KeyMap, path: Path | None = None) -> Device:
    """Raises OSError where the keyboard has no terminal; other devices may come later."""
    if name == "keyboard":
        return Keyboard()
    if name == "gamepad":
        return Gamepad(path, buttons=keys.buttons or XBOX_BUTTONS, axes=keys.axes or XBOX_AXES)
    return SpaceMouse(path)


def begin(
    client: CellClient,
    *,
    device: str,
    key_map: str = "",
    path: Path | None = None,
    deadman_device: str = "keyboard",
    leader_topic: str = "leader/joint_states",
    leader_joints: Path | None = None,
    operator: str = "",
    folder: Path | None = None,
) -> TeleopSession:
    """Builds a session from what a user says.

    Raises:
        KeyMapError, OSError: a map, a device or a file that does not fit.
    """
    leader = None
    if device == "leader":
        leader = Leader(client.contract, read_leader_joints(leader_joints))
        device = deadman_device
    keys = load_key_map(key_map or device)
    if keys.device != device:
        raise KeyMapError(f"{key_map} is a map for a {keys.device}, the device is a {device}")
    Teleop(client.contract, keys, folder=folder)  # its mistakes come before the device is opened
    return TeleopSession(
        client,
        make_device(device, keys, path),
        keys,
        leader=leader,
        leader_topic=leader_topic,
        operator=operator,
        folder=folder,
    )


def read_leader_joints(path: Path | None) -> dict[str, LeaderJoint]:
    """Raises KeyMapError for a file that is not such a map."""
    if path is None:
        return {}
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, LeaderJoint]).validate_python(data)
    except OSError as error:
        raise KeyMapError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise KeyMapError(
            f"{path}: expected lines like `joint1: {{joint: leader_joint1, scale: 1.0}}`; {error}"
        ) from error


def _parameters(arguments: Sequence[str] | None) -> tuple[str, dict[str, str]]:
    """Namespace and parameters of this process, read by a node that lives for this only."""
    context = rclpy.Context()
    rclpy.init(
        args=list(arguments or []),
        context=context,
        signal_handler_options=SignalHandlerOptions.NO,
    )
    node = rclpy.create_node(
        "teleop", context=context, start_parameter_services=False, enable_rosout=False
    )
    try:
        defaults = {
            "contract": "", "device": "gamepad", "map": "", "path": "", "operator": "operator",
            "deadman_device": "gamepad", "leader_topic": "leader/joint_states",
            "leader_joints": "",
        }  # fmt: skip
        given = {n: str(node.declare_parameter(n, d).value or "") for n, d in defaults.items()}
        return node.get_namespace(), given
    finally:
        node.destroy_node()
        context.try_shutdown()


def main(arguments: list[str] | None = None) -> int:
    """0 after a signal, 2 for a user's mistake."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    from robot_bridge.dds import use_default_profile

    use_default_profile()
    namespace, given = _parameters(arguments)
    try:
        if not given["contract"]:
            raise UserError("teleop: no contract; pass `--ros-args -p contract:=FILE`")
        path = Path(given["contract"])
        contract: Contract = load_contract(path)
        with CellClient(
            contract,
            namespace="" if namespace == "/" else namespace,
            name="teleop",
            arguments=arguments,
        ) as client:
            session = begin(
                client,
                device=given["device"],
                key_map=given["map"],
                path=Path(given["path"]) if given["path"] else None,
                deadman_device=given["deadman_device"],
                leader_topic=given["leader_topic"],
                leader_joints=Path(given["leader_joints"]) if given["leader_joints"] else None,
                operator=given["operator"],
                folder=path.parent,
            )
            try:
                watch(session, stop, lambda line: print(line, file=sys.stderr, flush=True))
            finally:
                session.close()
    except (UserError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def watch(session: TeleopSession, stop: threading.Event, say: Callable[[str], None]) -> None:
    """Says the session's status when it changes, until the end."""
    said = ""
    while not (stop.wait(0.1) or session.interrupted.is_set()):
        status = session.status()
        if status != said:
            said = status
            say(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
