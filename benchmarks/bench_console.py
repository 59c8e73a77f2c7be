"""The console under load: three cameras of 640x480 at 20 Hz in real headless Chromium.

    python benchmarks/bench_console.py [--seconds 20] [--viewers 10]

A publisher process plays the cameras and a set-point arm; arbiter, supervisor and console are the
real ones. Prints one JSON object: pictures drawn per second and camera, their age from the server's
receipt to the drawn canvas, the server's share of a core, the way of a jog from the page to the
server and back (with the hand published on the teleop topics in between) and to the arbiter's
executed command and back, and the arbiter's jitter with one viewer and with many.

Then the demonstration's cell in lockstep, which runs as fast as the machine lets it: how much
slower it gets with nobody, one and many at its console, in turns. The browsers are on the same
machine, so what they need is in the figure. The bounds that the page is designed for are printed
beside the figures. About three minutes with the defaults.
"""

import argparse
import array
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HZ = 50
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]


def contract_of(folder: Path) -> Path:
    camera = {
        "type": "sensor_msgs/CompressedImage",
        "shape": [480, 640, 3],
        "unit": "rgb8",
        "align": "nearest",
        "rate_hz": 20,
    }
    joints = ["a", "b", "c", "d", "e", "f", "gripper"]
    data = {
        "schema": "vla_post/cell/1",
        "cell": "bench_cell",
        "robot": "bench_arm",
        "control_hz": HZ,
        "observations": {
            "observation.state": {
                "topic": "joint_states",
                "type": "sensor_msgs/JointState",
                "names": joints,
                "shape": [7],
                "unit": "rad",
                "rate_hz": HZ,
            }
        }
        | {
            f"observation.images.{name}": camera | {"topic": f"cameras/{name}/image_raw/compressed"}
            for name in ("front", "side", "wrist")
        },
        "actions": {
            "action": {
                "names": joints,
                "unit": "rad",
                "mode": "absolute",
                "limits": {"position": [[-2, 2]] * 7, "velocity": [1.0] * 7},
            }
        },
        "safety": {
            "joint_state_max_age_ms": 3000,
            "teleop_timeout_ms": 1000,
            "overrun_ticks": 100000,
        },
        "tasks": {"bench": {"instruction": "Do nothing", "time_limit_s": 10000}},
    }
    path = folder / "cell.yaml"
    path.write_text(json.dumps(data))
    return path


def play(path: str) -> None:
    """The cameras and the robot: what the arbiter sends is where the robot is."""
    import rclpy
    import simplejpeg
    from rclpy.executors import SingleThreadedExecutor
    from sensor_msgs.msg import CompressedImage, JointState
    from trajectory_msgs.msg import JointTrajectory

    from robot_bridge.dds import use_default_profile
    from robot_bridge.nodes.common import STEADY, reliable, set_stamp
    from trajectory_store import load_contract

    contract = load_contract(path)
    use_default_profile()
    rclpy.init()
    node = rclpy.create_node("player", namespace=f"/{contract.cell}")
    random = np.random.default_rng(0)
    small = random.integers(0, 255, (24, 32, 3), np.uint8)
    smooth = np.kron(small, np.ones((20, 20, 1), np.uint8))
    pictures = [
        array.array("B", simplejpeg.encode_jpeg(np.roll(smooth, 8 * i, 1), quality=90))
        for i in range(20)
    ]
    eyes = [
        node.create_publisher(CompressedImage, feature.topic, reliable(5))
        for feature in contract.images.values()
    ]
    voice = node.create_publisher(JointState, "joint_states", reliable(10))
    joints = JointState(name=list(contract.action.names), position=array.array("d", [0.0] * 7))
    frame = CompressedImage(format="jpeg")
    count = 0

    def look() -> None:
        nonlocal count
        count += 1
        set_stamp(frame.header.stamp, time.time_ns())
        frame.data = pictures[count % len(pictures)]
        for eye in eyes:
            eye.publish(frame)

    def speak() -> None:
        set_stamp(joints.header.stamp, time.time_ns())
        voice.publish(joints)

    def obey(message: Any) -> None:
        joints.position = message.points[0].positions

    node.create_timer(1 / 20, look, clock=STEADY)
    node.create_timer(1 / HZ, speak, clock=STEADY)
    node.create_subscription(JointTrajectory, "command", obey, reliable(1))
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    executor.spin()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentiles(values: Any) -> dict[str, float]:
    found = np.asarray(values, np.float64)
    if not len(found):
        return {}
    p50, p99 = np.percentile(found, [50, 99])
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "n": len(found)}


ROUND_TRIPS = """async (seconds) => {
  const app = window.vlaConsole, link = app.link, trips = [], moves = [];
  const sent = new Map();
  link.addEventListener('driven', (e) => {
    if (sent.has(e.detail.seq)) trips.push(performance.now() - sent.get(e.detail.seq));
  });
  const end = performance.now() + seconds * 1000;
  app.driver.press('bench');
  let sign = 1;
  while (performance.now() < end) {
    sign = -sign;
    const before = app.live.plan.rows.at(-1)?.executed[0] ?? 0;
    const from = performance.now();
    app.driver.press('bench', {a: sign});
    sent.set(link.seq - 1, from);
    while (performance.now() - from < 400) {
      await new Promise((done) => setTimeout(done, 2));
      const now = app.live.plan.rows.at(-1)?.executed[0] ?? 0;
      if (Math.sign(now - before) === sign) { moves.push(performance.now() - from); break; }
    }
    await new Promise((done) => setTimeout(done, 60));
  }
  app.driver.release('bench');
  return {trips, moves};
}"""


BOUNDS = {
    "drawn_per_s_and_camera": "20",
    "picture_age_ms": "p99 < 60",
    "server_cores_one_viewer": "< 0.15",
    "jog_page_server_teleop_page_ms": "p99 < 20",
    "jitter": "p99 < 4 ms, with any number of viewers",
}


def slowdown(seconds: float, viewers: int) -> dict[str, Any]:
    """Simulated seconds per second of the demonstration's cell, holding still, by viewers."""
    from playwright.sync_api import sync_playwright

    import sim
    from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
    from robot_bridge.client import CellClient
    from trajectory_store import load_contract

    folder = Path(tempfile.mkdtemp(prefix="bench_lockstep_"))
    data = load_contract(sim.CONTRACTS / "metaworld_pixels.yaml").to_dict()
    task = next(iter(data["tasks"]))
    data["tasks"][task]["time_limit_s"] = 1e6  # one episode lasts for all phases
    path, address = folder / "cell.yaml", folder / "address"
    path.write_text(json.dumps(data))
    console = {"port": 0, "address_file": str(address), "token_file": str(folder / "tokens")}
    specs = cell_nodes(CellConfig(contract=path, store=folder / "store", console=console))
    found: dict[str, list[float]] = {"nobody": [], "one": [], f"{viewers} viewers": []}
    with (
        ProcessGroup(specs, log_dir=folder / "logs") as group,
        CellClient(load_contract(path)) as cell,
        sync_playwright() as playwright,
    ):
        while not address.exists() or cell.state.mode != "HOLD":
            group.poll()
            time.sleep(0.1)
        reply = cell.request("start_episode", task=task, seed=0, timeout_s=60.0)
        if not reply.success:  # a lockstep cell stands still between episodes
            raise RuntimeError(f"no episode: {reply.message}")
        stamp = cell.state.stamp_ns
        while cell.state.stamp_ns - stamp < 1e8:  # the scene is reset first
            time.sleep(0.1)
        link = address.read_text().split()[0]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)

        def speed(count: int) -> float:
            pages = [
                browser.new_page(viewport={"width": 1440, "height": 900}) for _ in range(count)
            ]
            for page in pages:
                page.set_default_timeout(120_000)
                page.goto(link)
                page.wait_for_function("() => window.vlaConsole?.live?.cameras.stats.drawn > 2")
            begun, stamp = time.monotonic(), cell.state.stamp_ns
            time.sleep(seconds)
            passed, simulated = time.monotonic() - begun, cell.state.stamp_ns - stamp
            for page in pages:
                page.close()
            return round(simulated / 1e9 / passed, 3)

        for _ in range(2):
            for name, count in zip(found, (0, 1, viewers), strict=True):
                found[name].append(speed(count))
        browser.close()
    alone = float(np.mean(found["nobody"]))
    shares = {name: round(float(np.mean(v)) / alone, 3) for name, v in found.items()}
    return {"simulated_s_per_s": found, "of_the_speed_with_nobody": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--viewers", type=int, default=10)
    parser.add_argument("--play", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        play(options.play)
        return
    os.environ.setdefault("ROS_DOMAIN_ID", "91")
    from playwright.sync_api import sync_playwright

    from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
    from robot_bridge.client import CellClient
    from trajectory_store import load_contract

    folder = Path(tempfile.mkdtemp(prefix="bench_console_"))
    path = contract_of(folder)
    address = folder / "address"
    console = {"port": 0, "address_file": str(address), "token_file": str(folder / "tokens")}
    specs = cell_nodes(CellConfig(contract=path, simulated=False, console=console))
    player = subprocess.Popen([sys.executable, __file__, "--play", str(path)])
    result: dict[str, Any] = {"seconds": options.seconds, "load_before": os.getloadavg()}
    try:
        with (
            ProcessGroup(specs, log_dir=folder / "logs") as group,
            CellClient(load_contract(path)) as cell,
            sync_playwright() as playwright,
        ):
            while not address.exists() or cell.state.mode != "HOLD":
                group.poll()
                time.sleep(0.1)
            link = address.read_text().split()[0]
            pid = group.pids()["console"]
            stamps: list[float] = []

            def hear(kind: str, value: Any) -> None:
                if kind == "executed":
                    stamps.append(time.monotonic())

            cell.listen(hear)

            def jitter(seconds: float) -> dict[str, float]:
                stamps.clear()
                time.sleep(seconds)
                return percentiles(np.abs(np.diff(stamps) * 1e3 - 1e3 / HZ))

            result["jitter_ms_nobody"] = jitter(5.0)
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)

            def viewer() -> Any:
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                page.set_default_timeout(120_000)
                page.goto(link)
                page.wait_for_function("() => window.vlaConsole?.live?.cameras.stats.drawn > 5")
                return page

            page = viewer()
            page.evaluate(
                "() => Object.assign(window.vlaConsole.live.cameras.stats, {drawn: 0, ages: []})"
            )
            begun, used = time.monotonic(), cpu_s(pid)
            page.wait_for_timeout(options.seconds * 1e3)
            passed = time.monotonic() - begun
            server = (cpu_s(pid) - used) / passed
            stats = page.evaluate("() => window.vlaConsole.live.cameras.stats")
            result["drawn_per_s_and_camera"] = round(stats["drawn"] / 3 / passed, 1)
            result["picture_age_ms"] = percentiles(stats["ages"])
            result["server_cores_one_viewer"] = round(server, 3)
            page.click("[data-do=lease]")
            page.wait_for_function("() => window.vlaConsole.mine")
            trips = page.evaluate(ROUND_TRIPS, options.seconds)
            result["jog_page_server_teleop_page_ms"] = percentiles(trips["trips"])
            result["jog_page_arbiter_executed_page_ms"] = percentiles(trips["moves"])
            result["jitter_ms_one_viewer"] = jitter(options.seconds)
            others = [viewer() for _ in range(options.viewers - 1)]
            used, begun = cpu_s(pid), time.monotonic()
            result[f"jitter_ms_{len(others) + 1}_viewers"] = jitter(options.seconds)
            many = (cpu_s(pid) - used) / (time.monotonic() - begun)
            result[f"server_cores_{len(others) + 1}_viewers"] = round(many, 3)
            result["load_after"] = os.getloadavg()
            browser.close()
    finally:
        player.kill()
        player.wait()
    result["lockstep"] = slowdown(options.seconds / 2, options.viewers)
    result["bounds"] = BOUNDS
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
