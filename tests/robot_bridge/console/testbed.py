"""Real cells of processes, and the real console before them. Only the policy is a stand-in."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

import sim
from robot_bridge.bringup import CellConfig, ProcessGroup, cell_nodes
from robot_bridge.dds import use_default_profile
from trajectory_store.contract import Contract, load_contract
from vla_post.export.registry import Registry

from ..graph import checkpoint

Checkpoint = Callable[[Path, Contract, float], Path]
"""(folder, contract, a number that tells versions apart) -> the folder, with a checkpoint."""

DEADLINE_S = float(os.environ.get("VLA_POST_TEST_DEADLINE_S", "60"))
ARM_MODEL = "../franka_arm.xml"
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    deadline = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {deadline_s} s for {what}")
        time.sleep(0.05)
    return value


def arm(**changes: Any) -> Contract:
    """The simulated Franka in real time, patient enough for a busy machine; one small camera."""
    whole = load_contract(sim.CONTRACTS / "franka_joint.yaml")
    data = whole.to_dict()
    front = whole.view.cameras["observation.images.front"]
    focal = front.focal_px[0] * 96 / 128
    view = {"observation.images.front": front.model_copy(update={"focal_px": (focal, focal)})}
    camera = data["observations"]["observation.images.front"] | {
        "shape": [96, 128, 3],
        "rate_hz": 10,
        "min_rate_hz": 0,
    }
    for name in ("front", "side", "wrist"):
        del data["observations"][f"observation.images.{name}"]
    data["observations"]["observation.images.front"] = camera
    data["control_hz"] = 25
    for feature in ("observation.state", "observation.velocity"):
        data["observations"][feature] |= {"rate_hz": 25, "min_rate_hz": 0}
    data["safety"] |= {
        "joint_state_max_age_ms": 2000,
        "chunk_max_age_ms": 5000,
        "teleop_timeout_ms": 2000,
        "overrun_ticks": 1000,
        # Out of reach: it only says where the tool is, for the plan over the picture.
        "workspace": data["safety"]["workspace"]
        | {"low": [-9, -9, -9], "high": [9, 9, 9], "model": str(sim.CONTRACTS / ARM_MODEL)},
    }
    data["chunk_horizon"], data["execute_steps"] = 50, 10
    data["tasks"] = {
        "lift-cube": {"instruction": "Pick up the cube", "time_limit_s": 1000.0},
        "place-cube": {"instruction": "Put the cube on the spot", "time_limit_s": 1000.0},
    }
    return Contract.model_validate(data | {"view": {"cameras": view}} | changes)


def written(contract: Contract) -> str:
    """As the YAML file of a cell, which also says how people see it."""
    return json.dumps(contract.to_dict() | {"view": contract.view.model_dump(mode="json")})


def stepping(**changes: Any) -> Contract:
    """The simulated Sawyer in lockstep."""
    data = load_contract(sim.CONTRACTS / "metaworld_state.yaml").to_dict()
    tasks = {"reach": {"instruction": "Reach a goal position", "time_limit_s": 1000.0}}
    data["safety"]["teleop_timeout_ms"] = 2000
    return Contract.model_validate(data | {"tasks": tasks} | changes)


class Testbed:
    """Cells, their registry and store, and one console for all of them.

    Args:
        make: of the registry's versions; the policy of `wave_runner` by default.
        up: how many of the cells run; the others do not answer.
        runner: parameters of the real runner with these versions, in place of `wave_runner`.
    """

    __test__ = False  # pytest takes the name for a test's

    def __init__(
        self,
        folder: Path,
        contracts: list[Contract],
        *,
        make: Checkpoint = checkpoint,
        up: int = 2,
        runner: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.contracts = folder, contracts
        self.running, self.runner = contracts[:up], runner
        self.registry = Registry(folder / "registry")
        self.metrics = folder / "metrics.jsonl"
        self.token_file = folder / "tokens.json"
        self.logs = folder / "logs"
        use_default_profile()
        os.environ["OMP_NUM_THREADS"] = "1"
        for step in (0, 100, 200):
            source = make(folder / f"checkpoint{step}", contracts[0], 0.1 + step / 1000)
            self.registry.publish(
                source,
                contract=contracts[0],
                parent=len(self.registry.versions()) or None,
                learner_step=step,
                metrics={"success": 0.4 + step / 1000},
            )
        self._write_metrics()
        for contract in contracts:
            (folder / f"{contract.cell}.yaml").write_text(written(contract))
        self.groups = [self._group(contract, i == 0) for i, contract in enumerate(self.running)]
        self.server: subprocess.Popen[bytes] | None = None
        self.address = ""

    def _write_metrics(self) -> None:
        noise = random.Random(0)
        with self.metrics.open("w") as file:
            for update in range(1, 301):
                row = {
                    "time_s": update / 5,
                    "stamp_s": time.time(),
                    "update": update,
                    "loss": 0.6 * 0.992**update + noise.uniform(0, 0.05),
                    "online_share": 0.5,
                    # As the adaptive mixture writes them: two tasks alike, unlike inside.
                    "mix/lift-cube/online": 0.2,
                    "mix/lift-cube/offline": 0.3,
                    "mix/place-cube/online": 0.4,
                    "mix/place-cube/offline": 0.1,
                    "version": 1 + update // 100,
                }
                file.write(json.dumps(row) + "\n")
                if update % 100 == 0:
                    file.write(json.dumps({"first_batch_of": "e", "tick_to_batch_s": 9.0}) + "\n")
                    file.write(json.dumps({"running": 1, "update_to_robot_s": 21.0}) + "\n")
                    line = {"published": 1 + update // 100, "at_update": update}
                    file.write(json.dumps(line) + "\n")

    def _group(self, contract: Contract, versions: bool) -> ProcessGroup:
        path = self.folder / f"{contract.cell}.yaml"
        policy: dict[str, Any] = (
            {"registry": self.registry.root}
            if versions
            else {"policy": checkpoint(self.folder / f"policy_{contract.cell}", contract)}
        )
        specs = cell_nodes(
            CellConfig(
                contract=path,
                store=self.folder / "stores" / contract.cell,
                simulated=True,
                **policy,
            )
        )
        for i, spec in enumerate(specs):
            if spec.name == "runner" and self.runner is None:
                more = dict(spec.parameters) | {"insight_every": 1}
                specs[i] = dataclasses.replace(spec, module="wave_runner", parameters=more)
            elif spec.name == "runner":
                more = dict(spec.parameters) | dict(self.runner or {})
                specs[i] = dataclasses.replace(spec, parameters=more)
            elif spec.name == "arbiter":
                more = dict(spec.parameters) | {"lockstep_wait_s": 2.0}
                specs[i] = dataclasses.replace(spec, parameters=more)
        return ProcessGroup(
            specs,
            log_dir=self.logs / contract.cell,
            environment={"PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"},
        )

    def start_console(self, port: int = 0) -> None:
        ready = self.folder / "links.txt"
        ready.unlink(missing_ok=True)
        code = (
            "import sys, json, logging; from pathlib import Path\n"
            "from robot_bridge.console.server import *\n"
            "logging.basicConfig(level=logging.INFO)\n"
            "a = json.loads(sys.argv[1]); P = Path\n"
            "serve(ConsoleConfig(cells=tuple(CellAddress(contract=P(c)) for c in a['cells']),"
            "store=P(a['store']), registry=P(a['registry']), metrics=P(a['metrics']),"
            "port=a['port'], host_names=('127.0.0.2',),"
            "token_file=P(a['tokens']), address_file=P(a['ready'])), lambda l: 0)"
        )
        arguments = {
            "cells": [str(self.folder / f"{c.cell}.yaml") for c in self.contracts],
            "store": str(self.folder / "stores"),
            "registry": str(self.registry.root),
            "metrics": str(self.metrics),
            "tokens": str(self.token_file),
            "ready": str(ready),
            "port": port,
        }
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / "console.log").open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(arguments)],
                stdout=log,
                stderr=log,
                env=dict(os.environ),
            )
        server = self.server
        until(lambda: ready.exists() or server.poll() is not None, "the console")
        assert server.poll() is None, (self.logs / "console.log").read_text()
        self.operator_link, self.viewer_link = ready.read_text().split()
        self.address = self.operator_link.partition("/#")[0]
        self.port = int(self.address.rpartition(":")[2])
        until(self._answers, "the console's first answer")

    def _answers(self) -> bool:
        try:
            return httpx.get(self.address).status_code == 200
        except httpx.TransportError:
            return False

    def stop_console(self) -> None:
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(DEADLINE_S) == 0, (self.logs / "console.log").read_text()
            self.server = None

    def token(self, role: str = "operator") -> str:
        return json.loads(self.token_file.read_text())[role]

    def client(self, role: str = "operator") -> httpx.Client:
        """REST, with the role's token."""
        headers = {"authorization": f"Bearer {self.token(role)}"}
        return httpx.Client(base_url=self.address, headers=headers, timeout=DEADLINE_S)

    def poll(self) -> None:
        for group in self.groups:
            for ended in group.poll():
                assert ended.restarting, f"{ended.name}: {group.last_words(ended.name, 20)}"

    def quiet(self) -> None:
        """No episode, no stop, no lease; and the cells hold."""
        with self.client() as client:
            for contract in self.running:
                base = f"/api/cells/{contract.cell}"
                state = client.get(base).json()
                if not state.get("episode") and state.get("mode") == "HOLD" and not state["lease"]:
                    continue

                def mine(base: str = base) -> bool:
                    return client.post(f"{base}/lease", json={}).status_code == 200

                until(mine, f"the lease of {contract.cell}")
                if state.get("mode") == "FAULT":
                    client.post(f"{base}/reset_stop", json={})
                if client.get(base).json().get("episode"):
                    client.post(f"{base}/cancel", json={})
                client.post(f"{base}/hold", json={})
                client.post(f"{base}/release_lease", json={})

    def __enter__(self) -> "Testbed":
        try:
            for group in self.groups:
                group.start()
            self.start_console()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.server is not None:
                self.server.kill()
                self.server.wait()
        finally:
            for group in self.groups:
                group.stop()
