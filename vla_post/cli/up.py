"""`vla-post up`: the processes of a cell on this machine, without the ROS launch packages."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robot_bridge.bringup import BringupError, CellConfig, ProcessGroup, Value, cell_nodes
from trajectory_store.contract import Contract, load_contract, parse_contract
from vla_post.cli.console import ConsoleLink
from vla_post.cli.contract import path_of
from vla_post.cli.errors import UserError
from vla_post.cli.signals import ends_in_order
from vla_post.export.registry import open_registry
from vla_post.policies.checkpoint import read_card


@dataclass(frozen=True, kw_only=True)
class Up:
    """Run a cell: supervisor, arbiter, recorder, policy runner, and for a simulated cell its robot.

    The same node list and parameters as the launch files. Crashed nodes are restarted. Ctrl-C ends
    everything; what was recorded stays readable.
    """

    contract: Path
    """The cell's YAML file, or the name of a shipped one."""
    command_topic: str = ""
    """Real robots: the controller's, e.g. /joint_trajectory_controller/joint_trajectory."""
    joint_states_topic: str = ""
    """Real robots: where the joint states come from, e.g. /joint_states."""
    namespace: str = ""
    """Of the cell's topics; empty: the contract's name."""
    registry: str | None = None
    """Run the active version of this registry (folder or s3://), and follow it between episodes."""
    policy: Path | None = None
    """Run this checkpoint (or export folder, with --backend onnx), whatever is published."""
    store: Path | None = None
    """Record into this trajectory store; nothing is recorded without it."""
    uplink: str = ""
    """Deliver closed episodes of --store to this prefix of the fleet: a folder or s3://bucket/prefix
    (see docs/fleet.md)."""
    uplink_name: str = ""
    """Of this cell there; by default the store's folder name."""
    uplink_mbit_s: float = 0.0
    """Limit of what is sent, in megabits a second; 0: none."""
    backend: Literal["torch", "onnx"] = "torch"
    server: str = ""
    """Ask this policy server (`vla-post serve`): ws://HOST:PORT, or wss:// with TLS."""
    bag: Path | None = None
    """Record every topic as MCAP files into this folder, beside the store."""
    shadow: str = ""
    """A candidate beside the policy that moves nothing: a folder, a version, or `newest`."""
    shadow_log: Path | None = None
    """Write what the candidate would have done otherwise to this file, one JSON line a chunk."""
    insight_every: int = 0
    """Show the policy's doubt, and its critic's value, of every k-th chunk in the console."""
    operator: Literal["none", "scripted"] = "none"
    """scripted: simulated cells only; runs --episodes episodes, then everything ends."""
    teleop: Literal["none", "gamepad", "spacemouse", "leader"] = "none"
    """A person's device on this machine; for the keyboard run `vla-post teleop` beside this."""
    teleop_map: str = ""
    """Key map (YAML) of that device; its own by default."""
    console: bool = True
    """Serve the operator's web console on this machine; the address is printed."""
    console_port: int = 8765
    """The next free one is used when it is taken; 0 takes any."""
    episodes: int = 10
    """Of the scripted operator."""
    seed: int = 0
    """Of the scripted operator's scenes."""
    takeovers: bool = True
    """False: the scripted operator only starts and labels episodes."""
    real_time_factor: float = 1.0
    """Speed of a simulated cell that is not in lockstep."""
    logs: Path = Path("logs")
    """Folder for one log per process."""
    events_log: Path | None = None
    """Write every event of the cell to this file, one JSON line each."""

    def run(self) -> None:
        path = path_of(self.contract)
        contract = load_contract(path)
        simulated = bool(contract.sim)
        if self.operator == "scripted" and not simulated:
            raise UserError("the scripted operator drives simulated cells only")
        for name, place in (("registry", self.registry), ("policy", self.policy)):
            if place is not None and "://" not in str(place) and not Path(place).is_dir():
                raise UserError(f"--{name} {place}: no such folder")
        self._require_policy(contract)
        if sum(bool(source) for source in (self.registry, self.policy, self.server)) > 1:
            raise UserError("name one of --registry, --policy and --server")
        operator = {
            "episodes": self.episodes,
            "seed": self.seed,
            "policy_only": not self.takeovers,
        }
        teleop = {"device": self.teleop, "map": self.teleop_map}
        topics = {"command": self.command_topic, "joint_states": self.joint_states_topic}
        nodes = cell_nodes(
            CellConfig(
                contract=path,
                registry=self.registry,
                policy=self.policy,
                backend=self.backend,
                server=self.server,
                bag=self.bag,
                shadow=self.shadow,
                shadow_log=self.shadow_log,
                insight_every=self.insight_every,
                store=self.store,
                uplink=self.uplink,
                uplink_name=self.uplink_name,
                uplink_mbit_s=self.uplink_mbit_s,
                simulated=simulated,
                real_time_factor=self.real_time_factor,
                operator=operator if self.operator == "scripted" else None,
                teleop=teleop if self.teleop != "none" else None,
                remappings={source: target for source, target in topics.items() if target},
                namespace=self.namespace,
                events_log=self.events_log,
                console=self._console() if self.console else None,
            )
        )
        try:
            with (
                ends_in_order(),
                ProcessGroup(nodes, log_dir=self.logs, echo=sys.stderr) as group,
            ):
                self._watch(group)
        except BringupError as error:
            raise UserError(str(error)) from error

    def _console(self) -> dict[str, Value]:
        return {
            "port": self.console_port,
            "address_file": str((self.logs / "console.address").resolve()),
        }

    def _require_policy(self, contract: Contract) -> None:
        """Before anything starts: the runner would refuse it again and again, in its log."""
        if self.registry is not None:
            registry = open_registry(self.registry)
            active = registry.active()
            if active is None:
                raise UserError(
                    f"--registry {self.registry}: no active version yet; `vla-post train` publishes"
                )
            registry.verify(active.number, contract=contract)
        elif self.policy is not None and self.backend == "torch":
            made_for = parse_contract(read_card(self.policy)["contract"], name=str(self.policy))
            contract.require_same(made_for, here=str(self.contract), there=str(self.policy))

    def _watch(self, group: ProcessGroup) -> None:
        names = ", ".join(group.pids())
        domain = os.environ.get("ROS_DOMAIN_ID", "0")
        print(f"up: {names} in ROS domain {domain}; Ctrl-C ends it", file=sys.stderr)
        link = ConsoleLink(self.logs / "console.address", lambda text: print(text, file=sys.stderr))
        while True:
            for ended in group.poll():
                if ended.name == "operator" and ended.status == 0:
                    return
                if not ended.restarting and ended.essential:
                    raise BringupError(
                        f"{ended.name} ended with status {ended.status}, see {ended.log}:\n"
                        + group.last_words(ended.name)
                    )
                what = "starting it again" if ended.restarting else "the cell goes on without it"
                print(f"up: {ended.name} ended with status {ended.status}; {what}", file=sys.stderr)
            link.look()
            time.sleep(0.1)
