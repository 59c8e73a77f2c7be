"""`vla-post doctor`: is this machine ready? One line a check: ok, or what to do."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vla_post.cli.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    required: bool = True
    """False: something that the demo and the tests do without."""

    def __str__(self) -> str:
        mark = "ok  " if self.ok else ("FAIL" if self.required else "note")
        line = f"{mark}  {self.name:<14} {self.found}"
        return line if self.ok or not self.remedy else f"{line}\n      -> {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine: Python, ROS 2, DDS, shared memory, OpenGL, GPU, disk, clock."""

    def run(self) -> None:
        checks = run_checks()
        for check in checks:
            print(check)
        failed = [c.name for c in checks if c.required and not c.ok]
        if failed:
            raise UserError(f"not ready: {', '.join(failed)} (see the remedies above)")
        print("ready: vla-post demo")


def run_checks() -> list[Check]:
    """Every check, in the order printed. A check that breaks is itself reported as failed."""
    probes: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("packages", _packages),
        ("ros", _ros),
        ("rmw", _rmw),
        ("dds profile", _dds_profile),
        ("shared memory", _shared_memory),
        ("opengl", _opengl),
        ("gpu", _gpu),
        ("disk", _disk),
        ("clock", _clock),
    ]
    out: list[Check] = []
    for name, probe in probes:
        try:
            out.append(probe())
        except Exception as error:
            found = f"the check itself failed: {type(error).__name__}: {error}"
            out.append(Check(name=name, ok=False, found=found))
    return out


def _python() -> Check:
    version = platform.python_version()
    return Check(
        name="python",
        ok=(3, 12) <= sys.version_info[:2] < (3, 14),
        found=f"{version} at {sys.executable}",
        remedy="install CPython 3.12 and run `make setup PYTHON=/path/to/python3.12`",
    )


def _packages() -> Check:
    wanted = ("torch", "lerobot", "mujoco", "metaworld", "zarr", "icechunk", "onnxruntime")
    versions: list[str] = []
    missing: list[str] = []
    for name in wanted:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return Check(
        name="packages",
        ok=not missing,
        found=", ".join(versions) + (f"; missing: {', '.join(missing)}" if missing else ""),
        remedy="run `make setup`, or `pip install 'vla-post[all]' -c constraints.txt`",
    )


def _ros() -> Check:
    try:
        rclpy = importlib.import_module("rclpy")
    except Exception as error:
        return Check(
            name="ros",
            ok=False,
            found=f"rclpy does not import ({error})",
            remedy="`pip install 'vla-post[ros]'` (x86_64), or source /opt/ros/jazzy/setup.bash",
        )
    try:
        found = f"rclpy {importlib.metadata.version('ros-jazzy-rclpy')} from wheels"
    except importlib.metadata.PackageNotFoundError:
        found = f"{os.environ.get('ROS_DISTRO', 'unknown distribution')} at {rclpy.__path__[0]}"
    return Check(name="ros", ok=True, found=found)


def _rmw() -> Check:
    rmw = importlib.import_module("rclpy.utilities").get_rmw_implementation_identifier()
    return Check(
        name="rmw",
        ok=rmw == "rmw_fastrtps_cpp",
        found=rmw,
        remedy="other middlewares work, but only Fast DDS was measured: "
        "export RMW_IMPLEMENTATION=rmw_fastrtps_cpp",
        required=False,
    )


def _dds_profile() -> Check:
    from robot_bridge.dds import use_default_profile

    path = Path(use_default_profile())
    return Check(
        name="dds profile",
        ok=path.is_file(),
        found=str(path),
        remedy="FASTRTPS_DEFAULT_PROFILES_FILE names a file that does not exist; unset it",
    )


def _shared_memory() -> Check:
    shm = Path("/dev/shm")
    free = shutil.disk_usage(shm).free / 2**20 if shm.is_dir() else 0.0
    return Check(
        name="shared memory",
        ok=free > 512 and os.access(shm, os.W_OK),
        found=f"/dev/shm, {free:.0f} MB free",
        remedy="a ROS process takes 35 MB of it: mount a larger /dev/shm "
        "(containers: --shm-size=1g), or remove what dead processes left: fastdds shm clean",
    )


def _opengl() -> Check:
    # In a process of its own: a failing OpenGL library may abort rather than raise.
    code = (
        "from sim.headless import check; report = check(); "
        "print(report.detail, report.remedy); raise SystemExit(not report.ok)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return Check(
        name="opengl",
        ok=done.returncode == 0,
        found=lines[-1] if lines else f"exit status {done.returncode}",
        remedy="apt install libegl1 libopengl0 libgl1 (or libosmesa6), "
        "or `pip install lavavu-osmesa`",
    )


def _gpu() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check(name="gpu", ok=True, found="none; everything runs on the CPU", required=False)
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    return Check(
        name="gpu",
        ok=done.returncode == 0,
        found=done.stdout.strip() or done.stderr.strip(),
        remedy="the driver does not answer; the CPU is used instead",
        required=False,
    )


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Check(
        name="disk",
        ok=free > 2,
        found=f"{free:.0f} GB free in {Path.cwd()}",
        remedy="a demo run takes under 1 GB; free some space",
    )


def _clock() -> Check:
    """A wall clock that jumps or runs at another pace than the monotonic one breaks stamps."""
    wall, steady = time.time_ns(), time.monotonic_ns()
    time.sleep(0.2)
    drift_ms = abs((time.time_ns() - wall) - (time.monotonic_ns() - steady)) / 1e6
    return Check(
        name="clock",
        ok=drift_ms < 5.0 and time.time() > 1.6e9,
        found=f"wall and monotonic clock differ by {drift_ms:.2f} ms in 200 ms",
        remedy="something steps the clock (two time daemons?); use one, e.g. chrony, slewing",
    )
