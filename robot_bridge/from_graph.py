"""Drafts a cell contract from a running ROS 2 graph, for a person to complete.

Whatever a graph cannot tell is drafted on the safe side: the limits let each joint move by a
twentieth of its unit around where it stood, until somebody writes in what the data sheet says.
"""

import re
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import simplejpeg

SHIFT = 0.05
"""Half width of the drafted position limits."""
_KINDS = {
    "sensor_msgs/msg/JointState": "sensor_msgs/JointState",
    "sensor_msgs/msg/CompressedImage": "sensor_msgs/CompressedImage",
    "sensor_msgs/msg/Image": "sensor_msgs/Image",
}
_SKIPPED = ("arbiter/executed", "teleop/", "sim/")


class GraphError(RuntimeError):
    """Nothing usable was heard; the message says what was looked for."""


@dataclass
class Heard:
    """One topic."""

    topic: str
    kind: str
    arrivals: list[float] = field(default_factory=list[float])
    names: list[str] = field(default_factory=list[str])
    position: list[float] = field(default_factory=list[float])
    shape: tuple[int, int, int] = (0, 0, 0)

    @property
    def rate_hz(self) -> float:
        gaps = [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]
        return 1.0 / statistics.median(gaps) if gaps and statistics.median(gaps) > 0 else 0.0


def listen(namespace: str, seconds: float) -> list[Heard]:
    """Everything a contract can observe under a namespace.

    Raises:
        GraphError: no such topic spoke in that time.
    """
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    from robot_bridge.dds import use_default_profile
    from robot_bridge.nodes.common import best_effort
    from robot_bridge.nodes.streams import image_array

    use_default_profile()
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("contract_draft", context=context, start_parameter_services=False)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    heard: dict[str, Heard] = {}
    prefix = "/" + namespace.strip("/")
    prefix = prefix if prefix.endswith("/") else prefix + "/"

    def watch(topic: str, kind: str) -> None:
        from sensor_msgs.msg import CompressedImage, Image, JointState

        entry = heard[topic] = Heard(topic.removeprefix(prefix), _KINDS[kind])

        def joints(message: JointState) -> None:
            entry.arrivals.append(time.monotonic())
            entry.names = [str(name) for name in message.name]
            entry.position = [float(value) for value in message.position]

        def compressed(message: CompressedImage) -> None:
            entry.arrivals.append(time.monotonic())
            if not entry.shape[0] and bytes(message.data[:2]) == b"\xff\xd8":
                height, width, space, _ = simplejpeg.decode_jpeg_header(bytes(message.data))
                entry.shape = (int(height), int(width), 1 if space == "Gray" else 3)

        def raw(message: Image) -> None:
            entry.arrivals.append(time.monotonic())
            if not entry.shape[0]:
                height, width, channels = image_array(message).shape
                entry.shape = (int(height), int(width), int(channels))

        kinds: dict[str, tuple[Any, Any]] = {
            "sensor_msgs/msg/JointState": (JointState, joints),
            "sensor_msgs/msg/CompressedImage": (CompressedImage, compressed),
            "sensor_msgs/msg/Image": (Image, raw),
        }
        message_type, callback = kinds[kind]
        node.create_subscription(message_type, topic, callback, best_effort(10))

    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for topic, kinds in node.get_topic_names_and_types():
                skipped = any(part in topic for part in _SKIPPED)
                if topic.startswith(prefix) and topic not in heard and not skipped:
                    kind = next((k for k in kinds if k in _KINDS), None)
                    if kind is not None:
                        watch(topic, kind)
            executor.spin_once(timeout_sec=0.05)
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown(context=context)
    spoke = [h for h in heard.values() if h.names or h.shape[0]]
    if not any(h.kind == "sensor_msgs/JointState" for h in spoke):
        silent = ", ".join(sorted(heard)) or "no topic at all"
        raise GraphError(
            f"no JointState was heard under {prefix} within {seconds:g} s (seen: {silent}). Check "
            "the namespace, ROS_DOMAIN_ID, and that the robot's driver runs on this computer"
        )
    return sorted(spoke, key=lambda h: (h.kind != "sensor_msgs/JointState", h.topic))


def draft(heard: list[Heard], *, cell: str, robot: str) -> str:
    """A contract as YAML with comments where a person has to look."""
    joints = next(h for h in heard if h.kind == "sensor_msgs/JointState")
    lines = [
        "# Drafted from a running graph. Lines with CHECK need a person before a robot moves.",
        "schema: vla_post/cell/1",
        f"cell: {_name(cell)}",
        f"robot: {_name(robot)}",
        f"control_hz: {max(1, min(50, round(joints.rate_hz)))}  # CHECK: rate of the commands",
        "chunk_horizon: 16",
        "execute_steps: 8",
        "",
        "observations:",
    ]
    seen: set[str] = set()
    for entry in heard:
        if entry.kind == "sensor_msgs/JointState":
            key = "observation.state"
            if key in seen:
                key = f"observation.{_name(entry.topic)}"
        else:
            key = f"observation.images.{_name(_camera(entry.topic))}"
        if key in seen:
            continue
        seen.add(key)
        lines += [f"  {key}:", f"    topic: {entry.topic}", f"    type: {entry.kind}"]
        if entry.kind == "sensor_msgs/JointState":
            lines += [
                f"    names: [{', '.join(entry.names)}]",
                f"    shape: [{len(entry.names)}]",
                "    unit: rad  # CHECK",
            ]
        else:
            lines += [f"    shape: {list(entry.shape)}", "    unit: rgb8  # CHECK"]
        rate = max(1.0, entry.rate_hz)
        lines += [f"    rate_hz: {rate:.0f}", f"    min_rate_hz: {rate * 0.8:.0f}"]
    centre = ", ".join(f"[{p - SHIFT:.4f}, {p + SHIFT:.4f}]" for p in joints.position)
    n = len(joints.names)
    lines += [
        "",
        "actions:",
        "  action:",
        "    topic: command  # remapped to the controller when the cell is started",
        f"    names: [{', '.join(joints.names)}]",
        "    unit: rad  # CHECK",
        "    mode: absolute",
        "    limits:  # CHECK: around where the robot stood; take them from the data sheet",
        f"      position: [{centre}]",
        f"      velocity: [{', '.join(['0.1'] * n)}]",
        f"      acceleration: [{', '.join(['0.5'] * n)}]",
        f"      jerk: [{', '.join(['10.0'] * n)}]",
        "",
        "safety:",
        "  stale: hold",
        "  joint_state_max_age_ms: 100",
        "",
        "tasks:",
        "  first-task: {instruction: Describe the task here, time_limit_s: 30}  # CHECK",
        "",
    ]
    return "\n".join(lines)


def _camera(topic: str) -> str:
    parts = [
        p for p in topic.split("/") if p not in ("image_raw", "compressed", "cameras", "image")
    ]
    return parts[-1] if parts else "camera"


def _name(text: str) -> str:
    name = re.sub(r"[^a-z0-9_]+", "_", text.lower()).strip("_")
    return name if name[:1].isalpha() else f"cell_{name}"
