"""The robot side under load: loss, jitter, latency, reaction times and CPU, with real processes.

    python benchmarks/bench_bridge.py [--seconds 600] [--keep FOLDER]

A driver (7 joints at 500 Hz, three 640x480 JPEG cameras at 30 Hz), arbiter at 50 Hz, recorder and
supervisor, each a process; this one plays the policy and looks on. The thresholds are the project's
budgets for two idle cores; other work on the machine shows in every time, and `load` says how much
there was. All clocks are this machine's.
"""

import argparse
import array
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import simplejpeg
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
from robot_bridge.dds import use_default_profile
from robot_bridge.nodes.common import latched, reliable, set_stamp, stamp_ns
from trajectory_store import Store
from trajectory_store.contract import Contract, load_contract

JOINTS = [f"joint{i}" for i in range(1, 8)]
CAMERAS = ("front", "side", "wrist")
JOINT_DEPTH, CAMERA_DEPTH = 1000, 30
"""What the driver's publishers keep for a reader that was paused: 2 s and 1 s."""
JOINT_HZ, CAMERA_HZ, CONTROL_HZ, HORIZON = 500, 30, 50, 25
DT_NS = 10**9 // CONTROL_HZ
SERVICES: dict[str, Any] = {
    "supervisor/end_episode": SetBool,
    **{
        f"supervisor/{name}": Trigger
        for name in ("start_episode", "reset_done", "resume_policy", "estop", "reset_estop")
    },
}
STEADY = Clock(clock_type=ClockType.STEADY_TIME)


def contract() -> Contract:
    camera = {"type": "sensor_msgs/CompressedImage", "shape": [480, 640, 3], "unit": "rgb8"}
    observations: dict[str, Any] = {
        f"observation.images.{name}": camera
        | {
            "topic": f"cameras/{name}/image_raw/compressed",
            "rate_hz": CAMERA_HZ,
            "align": "nearest",
        }
        for name in CAMERAS
    }
    observations["observation.state"] = {
        "topic": "joint_states",
        "type": "sensor_msgs/JointState",
        "names": JOINTS,
        "shape": [7],
        "unit": "rad",
        "rate_hz": JOINT_HZ,
        "align": "interpolate",
    }
    limits = {
        "position": [[-2.8, 2.8]] * 7,
        "velocity": [2.0] * 7,
        "acceleration": [10.0] * 7,
        "jerk": [5000.0] * 7,
    }
    action = {"names": JOINTS, "unit": "rad", "mode": "absolute", "limits": limits}
    return Contract.model_validate(
        {
            "schema": "vla_post/cell/1",
            "cell": "bench_cell",
            "robot": "bench_arm",
            "control_hz": CONTROL_HZ,
            "chunk_horizon": HORIZON,
            "execute_steps": 10,
            "observations": observations,
            "actions": {"action": action},
            # Busy machines pause processes; here the pauses are measured and must not end the run.
            "safety": {"overrun_ticks": 1_000_000, "chunk_max_age_ms": 5000},
            "tasks": {"wave": {"instruction": "Wave", "time_limit_s": 100_000.0}},
        }
    )


def drive(out: Path) -> None:
    """The driver's process: publishes until SIGINT, then writes what it sent and received."""
    use_default_profile()
    rclpy.init()
    node = rclpy.create_node("driver", namespace="/bench_cell")
    joints = node.create_publisher(JointState, "joint_states", reliable(JOINT_DEPTH))
    eyes = [
        node.create_publisher(
            CompressedImage, f"cameras/{name}/image_raw/compressed", reliable(CAMERA_DEPTH)
        )
        for name in CAMERAS
    ]
    frames = [array.array("B", jpeg) for jpeg in pictures()]
    position = [0.0] * 7
    sent = {"joint_states": 0} | dict.fromkeys(CAMERAS, 0)
    commands: list[tuple[int, int]] = []
    joint_message, image = JointState(name=JOINTS), CompressedImage(format="jpeg")

    def say_joints() -> None:
        joint_message.position = array.array("d", position)
        set_stamp(joint_message.header.stamp, time.time_ns())
        joints.publish(joint_message)
        sent["joint_states"] += 1

    def say_frame(camera: int) -> None:
        set_stamp(image.header.stamp, time.time_ns())
        image.data = frames[(sent[CAMERAS[camera]] + camera) % len(frames)]
        eyes[camera].publish(image)
        sent[CAMERAS[camera]] += 1

    def obey(message: JointTrajectory) -> None:
        commands.append((stamp_ns(message.header.stamp), time.time_ns()))
        position[:] = message.points[0].positions

    node.create_subscription(JointTrajectory, "command", obey, reliable(10))
    # Sent before anybody knows of it is not lost, but would count as published.
    while not all(eye.get_subscription_count() for eye in eyes) or (
        joints.get_subscription_count() < 2
    ):
        time.sleep(0.05)
    time.sleep(1.0)
    node.create_timer(1 / JOINT_HZ, say_joints, clock=STEADY)
    for camera in range(len(CAMERAS)):
        node.create_timer(1 / CAMERA_HZ, lambda c=camera: say_frame(c), clock=STEADY)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(1))
    while not stop:
        executor.spin_once(timeout_sec=0.1)
    out.write_text(json.dumps({"sent": sent, "commands": commands}))
    time.sleep(1.0)  # what is on its way still arrives
    node.destroy_node()
    rclpy.try_shutdown()


def pictures() -> list[bytes]:
    """Eight 640x480 frames with some texture: about 60 kB each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:480, :640].astype(np.float32)
    out: list[bytes] = []
    for i in range(8):
        base = np.stack(
            [np.sin((x + 9 * i) / 30), np.cos((y - 5 * i) / 40), np.sin((x + y) / 50)], -1
        )
        noisy = base * 90 + 128 + rng.normal(0, 4, base.shape)
        out.append(simplejpeg.encode_jpeg(np.clip(noisy, 0, 255).astype(np.uint8), quality=90))
    return out


class Looker:
    """Plays the policy, calls the services, and notes when things happen."""

    def __init__(self, folder: Path) -> None:
        self.contract = contract()
        self.folder = folder
        path = folder / "cell.yaml"
        path.write_text(json.dumps(self.contract.to_dict()))
        load_contract(path)
        specs = cell_nodes(CellConfig(contract=path, store=folder / "store", simulated=False))
        specs = [
            replace(s, parameters={**s.parameters, "stamp_commands": True})
            if s.name == "arbiter"
            else s
            for s in specs
        ]
        self.group = ProcessGroup(specs, log_dir=folder / "logs")
        use_default_profile()
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("looker", namespace="/bench_cell", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.state: dict[str, str] = {}
        self.state_at = 0
        self.executed: list[tuple[int, str, int]] = []
        self.diagnostics: dict[str, dict[str, str]] = {}
        self.messages: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self.policy_on = True
        self.chunks = 0
        subscribe = self.node.create_subscription
        subscribe(DiagnosticStatus, "arbiter/state", self.on_state, latched())
        subscribe(JointState, "arbiter/executed", self.on_executed, reliable(100))
        subscribe(DiagnosticArray, "/diagnostics", self.on_diagnostics, reliable(20))
        subscribe(String, "events", lambda m: self.events.append(json.loads(m.data)), latched(200))
        self.chunk = self.node.create_publisher(JointTrajectory, "policy/action_chunk", reliable(1))
        self.clients = {
            service: self.node.create_client(kind, service) for service, kind in SERVICES.items()
        }
        self.node.create_timer(0.1, self.say_chunk, clock=STEADY)

    def say_chunk(self) -> None:
        if not self.policy_on:
            return
        self.chunks += 1
        now = time.time_ns()
        message = JointTrajectory(joint_names=JOINTS)
        set_stamp(message.header.stamp, now)
        message.header.frame_id = f"1#{self.chunks}"
        for i in range(HORIZON):
            phase = (now / 1e9 + i / CONTROL_HZ) * 0.8
            message.points.append(JointTrajectoryPoint(positions=[0.5 * np.sin(phase)] * 7))
        self.chunk.publish(message)

    def on_state(self, message: DiagnosticStatus) -> None:
        self.state = {pair.key: pair.value for pair in message.values}
        self.state_at = time.time_ns()

    def on_executed(self, message: JointState) -> None:
        now = time.time_ns()
        self.executed.append((stamp_ns(message.header.stamp), message.header.frame_id, now))

    def on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            values: dict[str, str] = {}
            for pair in status.values:
                values[pair.key] = pair.value
            name = status.name.rpartition("/")[2]
            self.diagnostics[name], self.messages[name] = values, status.message

    def until(self, condition: Any, what: str, deadline_s: float = 120.0) -> None:
        deadline = time.monotonic() + deadline_s
        while not condition():
            self.executor.spin_once(timeout_sec=0.02)
            self.group.poll()
            if time.monotonic() > deadline:
                raise SystemExit(f"waited {deadline_s:.0f} s for {what}; state {self.state}")

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.02)

    def call(self, service: str, **fields: Any) -> Any:
        client = self.clients[service]
        self.until(client.service_is_ready, service)
        future = client.call_async(SERVICES[service].Request(**fields))
        self.until(future.done, f"{service}'s answer")
        return future.result()

    def driving(self) -> None:
        """Until the policy drives."""

        def drives() -> bool:
            if self.state.get("mode") == "FAULT":
                self.call("supervisor/reset_estop")
            if self.state.get("mode") == "HOLD":
                self.call("supervisor/resume_policy")
            self.wait(0.1)
            return bool(self.executed) and self.executed[-1][1].startswith("policy:")

        self.until(drives, "the policy drives")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(seconds: float, folder: Path, reactions: int = 20) -> dict[str, Any]:
    """One session; the figures by name. Every loss is counted, by sequence numbers."""
    looker = Looker(folder)
    result: dict[str, Any] = {}
    with looker.group as group:
        looker.until(lambda: looker.messages.get("supervisor") == "", "all nodes to be active")
        out = folder / "driver.json"
        driver = subprocess.Popen([sys.executable, __file__, "--driver", str(out)])
        try:
            looker.until(lambda: len(looker.executed) > CONTROL_HZ, "the driver")
            looker.call("supervisor/start_episode")
            looker.call("supervisor/reset_done")
            looker.until(lambda: any(e["type"] == "episode_start" for e in looker.events), "start")
            looker.driving()
            pids = group.pids() | {"driver": driver.pid, "this process": os.getpid()}
            before = {name: cpu_s(pid) for name, pid in pids.items()}
            first, started, begun = len(looker.executed), time.monotonic(), time.time_ns()
            loads: list[float] = []
            while time.monotonic() - started < seconds:
                looker.wait(min(5.0, seconds))
                loads.append(os.getloadavg()[0])
            wall, ended = time.monotonic() - started, time.time_ns()
            ticks = looker.executed[first:]
            result["load"] = float(np.mean(loads))
            result["cpu"] = {n: (cpu_s(pid) - before[n]) / wall for n, pid in pids.items()}
            held = sum(label == "hold" for _, label, _ in ticks)
            result["held"] = f"{held} ({looker.state['reason']})" if held else "0"
            looker.call("supervisor/end_episode", data=True)
            estops, watchdogs = react(looker, driver, reactions)
            result["estop_ms"], result["watchdog_ms"] = estops, watchdogs
            os.kill(driver.pid, signal.SIGINT)
            driver.wait(30)
            # The recorder's own counts, once nothing more comes.
            seen: list[Any] = []

            def quiet() -> bool:
                looker.wait(1.5)
                told = looker.diagnostics.get("recorder", {})
                seen.append({k: v for k, v in told.items() if k.startswith(("received", "lost"))})
                return len(seen) > 2 and seen[-1] == seen[-2]

            looker.until(quiet, "the recorder's last counts")
        finally:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        counts = looker.diagnostics["recorder"]
    looker.executor.shutdown()
    looker.node.destroy_node()
    looker.context.try_shutdown()
    report = json.loads(out.read_text())
    stamps = np.array([ns for ns, _, _ in ticks])
    commands = np.array([c for c in report["commands"] if begun <= c[0] <= ended])
    periods_ms = np.diff(stamps) / 1e6
    result["jitter_ms"] = np.abs(periods_ms - DT_NS / 1e6)
    result["missed"] = int(np.round(periods_ms / (DT_NS / 1e6) - 1).clip(min=0).sum())
    result["command_ms"] = (commands[:, 1] - commands[:, 0]) / 1e6
    result["streams"] = {}
    for name, published in report["sent"].items():
        topic = name if name == "joint_states" else f"cameras/{name}/image_raw/compressed"
        result["streams"][topic] = {
            "published": published,
            "received": int(counts[f"received {topic}"]),
            "lost": int(counts[f"lost {topic}"]),
        }
    store = Store(folder / "store")
    episode = store.episodes[-1]
    result["rows"] = len(episode)
    result["episode_s"] = episode.duration_s
    result["gaps"] = int((np.diff(store.read("stamp_ns", episode)) > 1.5 * DT_NS).sum())
    result["seconds"] = wall
    return result


def react(looker: Looker, driver: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(ms from the request to the first stop command; ms from the last sample to HOLD)."""
    stops: list[float] = []
    for _ in range(n):
        looker.driving()
        seen, asked = len(looker.executed), time.time_ns()
        looker.call("supervisor/estop")
        looker.until(lambda s=seen: any(x[1] == "hold" for x in looker.executed[s:]), "the stop")
        stop = next(x for x in looker.executed[seen:] if x[1] == "hold")
        stops.append((stop[2] - asked) / 1e6)
    silences: list[float] = []
    for _ in range(max(1, n // 4)):
        looker.driving()
        seen = len(looker.executed)
        os.kill(driver.pid, signal.SIGSTOP)
        stopped = time.time_ns()
        try:
            looker.until(
                lambda s=seen: any(x[1] == "hold" for x in looker.executed[s:]), "the watchdog"
            )
        finally:
            os.kill(driver.pid, signal.SIGCONT)
        held = next(x for x in looker.executed[seen:] if x[1] == "hold")
        silences.append((held[2] - stopped) / 1e6)
    return np.array(stops), np.array(silences)


def table(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, measured, budget)"""

    def spread(values: np.ndarray) -> str:
        p50, p99 = np.quantile(values, [0.5, 0.99])
        return f"p50 {p50:.1f}, p99 {p99:.1f}, max {values.max():.1f} ms"

    rows = [
        (
            f"lost, {topic}",
            f"{s['lost']} of {s['published']} ({s['received']} received)",
            "0",
        )
        for topic, s in result["streams"].items()
    ]
    cpu = {name: f"{share:.0%} of a core" for name, share in result["cpu"].items()}
    return [
        *rows,
        ("rows stored; gaps between them", f"{result['rows']}; {result['gaps']}", "one a tick; 0"),
        ("arbiter, deviation from 20 ms", spread(result["jitter_ms"]), "p99 < 4 ms"),
        ("arbiter, missed ticks", str(result["missed"]), "0"),
        ("ticks in HOLD", result["held"], "0"),
        ("decision to robot", spread(result["command_ms"]), "p99 < 5 ms"),
        ("emergency stop, request to stop command", spread(result["estop_ms"]), "one tick, 20 ms"),
        ("silent robot to HOLD", spread(result["watchdog_ms"]), "100 ms + one tick"),
        ("CPU of the recorder", cpu.pop("recorder"), "< 60 %"),
        *((f"CPU of the {name}", share, "") for name, share in cpu.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--keep", type=Path, help="keep store and logs in this folder")
    parser.add_argument("--driver", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.driver:
        drive(arguments.driver)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(arguments.seconds, folder)
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, load average {result['load']:.1f}, {result['seconds']:.0f} s\n"
    )
    print("| what | measured | budget |\n|---|---|---|")
    for row in table(result):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
