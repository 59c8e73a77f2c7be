"""One cell as a list of nodes, and a group of processes that runs such a list.

`cell_nodes` is data: `vla-post up` starts it as processes, the launch files as launch_ros nodes.
Neither needs ROS to be imported here.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal, Self

from robot_bridge.dds import LOOPBACK, use_default_profile
from robot_bridge.dds.leftovers import clean_shared_memory
from trajectory_store.contract import Contract, load_contract
from trajectory_store.repository import normalise

Value = bool | int | float | str | list[str]
Restart = Literal["always", "never"]

USER_MISTAKE = 2
"""Exit status of a node that was started with wrong parameters: starting it again will not help."""


class BringupError(RuntimeError):
    """A process could not be started or ended for good; the message ends with its last words."""


@dataclass(frozen=True, kw_only=True)
class CellConfig:
    """What runs on one cell."""

    contract: Path
    registry: str | Path | None = None
    """Folder or s3:// prefix of policy versions; the runner follows the active one."""
    policy: Path | None = None
    """A fixed checkpoint folder instead of a registry. Neither: no runner (teleoperation only)."""
    backend: Literal["torch", "onnx"] = "torch"
    server: str = ""
    """URL of a policy server, instead of a registry or a policy."""
    shadow: str = ""
    """A candidate beside the active policy that moves nothing: a folder, a version of the registry,
    or `newest`. Its comparison is on `policy/shadow`."""
    shadow_log: Path | None = None
    """A file that gets every comparison of the shadow as one JSON line."""
    insight_every: int = 0
    """Tell the doubt of the policy, and the value of the critic in its folder, of every k-th chunk
    (in /diagnostics, drawn by the console), and hint when the doubt exceeds what people let pass.
    0: never."""
    infer_while_human: bool = False
    """Let the policy propose while a human drives, for `action.policy` in the store."""
    store: Path | None = None
    """Trajectory store to record into. None: no recorder."""
    uplink: str = ""
    """Deliver the store's closed episodes to this prefix of the fleet: a folder or s3://.... Empty:
    they stay here."""
    uplink_name: str = ""
    """Of this cell there; empty: the store's folder name."""
    uplink_mbit_s: float = 0.0
    """Limit of what is sent, in megabits a second; 0: none."""
    bag: Path | None = None
    """Folder for MCAP files with every topic as it went over the wire, beside the store."""
    simulated: bool = True
    """Start the simulated robot of `sim`; otherwise a real driver is expected on the topics."""
    real_time_factor: float = 1.0
    """Speed of a simulated cell that is not in lockstep."""
    operator: Mapping[str, Value] | None = None
    """Parameters of the scripted operator (`episodes`, `tasks`, `seed`, ...). None: nobody."""
    teleop: Mapping[str, Value] | None = None
    """Parameters of `robot_bridge.nodes.teleop` (`device`: gamepad, spacemouse or leader, `path`,
    `map`, ...). None: nobody. A keyboard needs a terminal: `vla-post teleop`."""
    console: Mapping[str, Value] | None = None
    """Parameters of the operator's web console (`port`, `metrics`, ...). None: no console."""
    auto_resume: bool = False
    """Episodes start with the policy driving; for runs without an operator."""
    events_log: Path | None = None
    """A file that gets every event as one JSON line."""
    remappings: Mapping[str, str] = field(default_factory=dict[str, str])
    """Topic of the contract -> topic of the robot, e.g. of a ros2_control controller."""
    namespace: str = ""
    """Empty: the contract's `cell`."""

    def __post_init__(self) -> None:
        if self.registry is not None and self.policy is not None:
            raise ValueError("both a registry and a fixed policy were given; the runner runs one")
        if self.uplink and self.store is None:
            raise ValueError(f"nothing is recorded that could go to {self.uplink}; name a store")
        if self.real_time_factor <= 0:
            raise ValueError(f"real_time_factor is {self.real_time_factor}; it must be > 0")

    @property
    def takeovers(self) -> Path | None:
        """Keeps the doubts at takeovers: beside the store, else beside the events. None: neither is
        written, and the threshold is learned anew by each runner."""
        beside = self.store or self.events_log
        if beside is None:
            return None
        beside = beside.resolve()
        return beside.with_name(f".{beside.name}.doubt.json")


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """One process."""

    name: str
    module: str
    """Run as `python -m MODULE`; `launch/scripts` holds an executable of the node's name."""
    namespace: str
    parameters: Mapping[str, Value]
    remappings: Mapping[str, str] = field(default_factory=dict[str, str])
    restart: Restart = "always"
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """On top of the group's, e.g. a ROS domain of its own."""
    essential: bool = True
    """Without it the cell cannot work; False for what only shows it."""

    def arguments(self) -> list[str]:
        """For the node's command line."""
        out = ["--ros-args", "-r", f"__ns:={self.namespace}"]
        for source, target in self.remappings.items():
            out += ["-r", f"{source}:={target}"]
        for name, value in self.parameters.items():
            # JSON is YAML, and quotes keep "1e3" or "on" a string.
            out += ["-p", f"{name}:={json.dumps(value)}"]
        return out


def cell_nodes(config: CellConfig) -> list[NodeSpec]:
    """The nodes of a cell, in the order in which they start.

    Raises:
        ContractError: the contract is missing or wrong.
    """
    contract: Contract = load_contract(config.contract)
    lockstep = bool(contract.sim.get("lockstep", False))
    namespace = config.namespace or f"/{contract.cell}"
    namespace = namespace if namespace.startswith("/") else f"/{namespace}"
    common: dict[str, Value] = {
        "contract": str(config.contract.resolve()),
        "use_sim_time": config.simulated,
    }
    managed: list[str] = []

    def spec(
        name: str, module: str, parameters: Mapping[str, Value], restart: Restart = "always"
    ) -> NodeSpec:
        return NodeSpec(
            name=name,
            module=module,
            namespace=namespace,
            parameters=common | dict(parameters),
            remappings=config.remappings,
            restart=restart,
        )

    nodes: list[NodeSpec] = []
    if config.store is not None:
        managed.append("recorder")
        nodes.append(
            spec("recorder", "robot_bridge.nodes.recorder", {"store": str(config.store.resolve())})
        )
    managed.append("arbiter")
    nodes.append(
        spec(
            "arbiter",
            "robot_bridge.nodes.arbiter",
            {
                "real_time_factor": float(config.real_time_factor),
                # A controller refuses a point whose time has passed; zero means "from now on".
                "stamp_commands": config.simulated,
            },
        )
    )
    if config.registry is not None or config.policy is not None or config.server:
        managed.append("runner")
        source = {"backend": "remote", "policy": config.server}
        if config.registry is not None:
            source = {"backend": config.backend, "registry": normalise(config.registry)}
        elif config.policy is not None:
            source = {"backend": config.backend, "policy": str(config.policy.resolve())}
        nodes.append(
            spec(
                "runner",
                "robot_bridge.nodes.runner",
                source
                | {
                    "infer_while_human": config.infer_while_human,
                    "insight_every": config.insight_every,
                    "shadow": config.shadow,
                    "shadow_log": str(config.shadow_log.resolve()) if config.shadow_log else "",
                    "takeovers": str(config.takeovers or ""),
                },
            )
        )
    if config.bag is not None:
        managed.append("bag")
        nodes.append(spec("bag", "robot_bridge.nodes.bag", {"bag": str(config.bag.resolve())}))
    supervision: dict[str, Value] = {
        "manage": True,
        "managed_nodes": managed,
        "auto_resume": config.auto_resume,
    }
    if config.events_log is not None:
        supervision["events_log"] = str(config.events_log.resolve())
    nodes.insert(0, spec("supervisor", "robot_bridge.nodes.supervisor", supervision))
    if config.simulated:
        speed: dict[str, Value] = (
            {} if lockstep else {"real_time_factor": float(config.real_time_factor)}
        )
        nodes.append(spec("robot", "sim.nodes.robot", speed))
    if config.teleop is not None:
        nodes.append(spec("teleop", "robot_bridge.nodes.teleop", config.teleop))
    if config.console is not None:
        shown: dict[str, Value] = {
            name: normalise(place)
            for name, place in (("store", config.store), ("registry", config.registry))
            if place is not None
        }
        console = spec("console", "robot_bridge.nodes.console", shown | dict(config.console))
        nodes.append(replace(console, essential=False))
    if config.uplink:
        assert config.store is not None
        delivery: dict[str, Value] = {
            "store": str(config.store.resolve()),
            "dest": normalise(config.uplink),
            "name": config.uplink_name,
            "bandwidth_mbit_s": float(config.uplink_mbit_s),
        }
        uplink = spec("uplink", "robot_bridge.nodes.uplink", delivery)
        nodes.append(replace(uplink, essential=False))
    if config.operator is not None:
        nodes.append(spec("operator", "sim.nodes.operator", config.operator, restart="never"))
    return nodes


@dataclass(frozen=True)
class Ended:
    """A process ended by itself."""

    name: str
    status: int
    """Exit status; negative is a signal's number."""
    restarting: bool
    log: Path
    essential: bool = True


@dataclass
class _Child:
    spec: NodeSpec
    log: Path
    process: subprocess.Popen[bytes] | None = None
    pump: threading.Thread | None = None
    restarts: list[float] = field(default_factory=list[float])
    due_s: float | None = None
    """When to start it again."""


class ProcessGroup:
    """Runs nodes as processes, restarts what crashes, and leaves nothing behind.

    Use it from one thread that lives as long as the group does: the kernel ties the children to the
    thread that started them. As a context manager it stops the group on the way out, also on
    Ctrl-C.

    Args:
        log_dir: gets NAME.log of each process.
        echo: also copy prefixed lines there (sys.stderr); None for silence.
        environment: on top of ours.
        patience_s: between SIGINT and SIGTERM, and between SIGTERM and SIGKILL.
        max_restarts: of one process within a minute; after that it stays down.
    """

    def __init__(
        self,
        specs: Sequence[NodeSpec],
        *,
        log_dir: Path,
        echo: IO[str] | None = None,
        environment: Mapping[str, str] | None = None,
        dds_profile: str = LOOPBACK,
        patience_s: float = 8.0,
        max_restarts: int = 5,
    ) -> None:
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise ValueError(f"two processes share a name: {', '.join(sorted(names))}")
        self._log_dir = log_dir
        self._echo = echo
        self._environment = dict(os.environ) | dict(environment or {})
        use_default_profile(dds_profile, self._environment)
        # One thread for BLAS in each node: several would fight for the cores of the control loop.
        self._environment.setdefault("OMP_NUM_THREADS", "1")
        self._environment["PYTHONUNBUFFERED"] = "1"
        self._patience_s, self._max_restarts = patience_s, max_restarts
        self._children = {s.name: _Child(s, log_dir / f"{s.name}.log") for s in specs}
        self._last_status: dict[str, int] = {}
        self._stopping = False

    def start(self) -> None:
        """Raises BringupError when a process cannot be started at all."""
        for child in self._children.values():
            child.log.parent.mkdir(parents=True, exist_ok=True)
            self._spawn(child)

    def pids(self) -> dict[str, int]:
        """Of the processes that run now."""
        return {
            name: child.process.pid
            for name, child in self._children.items()
            if child.process is not None and child.process.poll() is None
        }

    def returncode(self, name: str) -> int | None:
        """None while it runs."""
        process = self._children[name].process
        return None if process is None else process.poll()

    def last_words(self, name: str, lines: int = 5) -> str:
        """The end of a process's log, for an error message."""
        log = self._children[name].log
        if not log.exists():
            return ""
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])

    def poll(self) -> list[Ended]:
        """Notices ended processes, and restarts those that should run. Call it regularly."""
        ended: list[Ended] = []
        now = time.monotonic()
        for child in self._children.values():
            if child.due_s is not None:
                if now >= child.due_s and not self._stopping:
                    child.due_s = None
                    self._spawn(child)
                continue
            process = child.process
            if process is None or (status := process.poll()) is None:
                continue
            child.process = None
            self._kill_group(process.pid)
            child.restarts = [t for t in child.restarts if now - t < 60.0]
            again = (
                child.spec.restart == "always"
                and not self._stopping
                and status != USER_MISTAKE
                and len(child.restarts) < self._max_restarts
            )
            if again:
                child.due_s = now + min(0.5 * 2 ** len(child.restarts), 8.0)
                child.restarts.append(now)
            self._last_status[child.spec.name] = status
            ended.append(Ended(child.spec.name, status, again, child.log, child.spec.essential))
        return ended

    def wait(self, name: str, timeout_s: float | None = None) -> int:
        """Until the process ends by itself; its exit status. Keeps the others running meanwhile.

        Raises:
            BringupError: another process is down for good, or the time is over.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            for ended in self.poll():
                if ended.name == name:
                    return ended.status
                if not ended.restarting and ended.essential:
                    raise BringupError(
                        f"{ended.name} ended with status {ended.status}, see {ended.log}:\n"
                        + self.last_words(ended.name)
                    )
            if deadline is not None and time.monotonic() > deadline:
                raise BringupError(f"{name} still runs after {timeout_s:.0f} s")
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGINT, then SIGTERM, then SIGKILL to every process group; returns when all are gone."""
        self._stopping = True
        with _deaf_to_interrupts():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                running = [c.process for c in self._children.values() if c.process is not None]
                for process in running:
                    if process.poll() is None:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(process.pid, number)
                deadline = time.monotonic() + self._patience_s
                for process in running:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.0, deadline - time.monotonic()))
                if all(process.poll() is not None for process in running):
                    break
            for child in self._children.values():
                if child.process is not None:
                    self._kill_group(child.process.pid)
                if child.pump is not None:
                    child.pump.join(timeout=2.0)
            clean_shared_memory()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def status(self, name: str) -> int | None:
        """Exit status of the last time the process ended; None if it never did."""
        return self._last_status.get(name)

    def _spawn(self, child: _Child) -> None:
        spec = child.spec
        command = [
            sys.executable,
            "-m",
            "robot_bridge.child",
            str(os.getpid()),
            spec.module,
            *spec.arguments(),
        ]
        try:
            child.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment | dict(spec.environment),
                start_new_session=True,
            )
        except OSError as error:
            raise BringupError(f"cannot start {spec.name}: {error}") from error
        child.pump = threading.Thread(
            target=self._copy, args=(child, child.process.stdout), daemon=True
        )
        child.pump.start()

    def _copy(self, child: _Child, stream: IO[bytes] | None) -> None:
        assert stream is not None
        with stream, child.log.open("ab") as log:
            for line in stream:
                log.write(line)
                log.flush()
                if self._echo is not None:
                    text = line.decode(errors="replace").rstrip()
                    print(f"[{child.spec.name}] {text}", file=self._echo, flush=True)

    @staticmethod
    def _kill_group(pid: int) -> None:
        """What a dead process left running in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Generator[None]:
    """A second Ctrl-C must not leave half of the group running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
