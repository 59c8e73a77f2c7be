"""`vla-post operate`: what the operator asks of a cell, from a terminal."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vla_post.cli.errors import UserError

if TYPE_CHECKING:
    from robot_bridge.client import CellClient

Action = Literal[
    "status", "watch", "start", "success", "failure", "cancel", "reset-done", "takeover",
    "hand-back", "resume", "estop", "reset-estop", "shadow",
]  # fmt: skip
REQUESTS = {"start": "start_episode", "resume": "resume_policy"}


@dataclass(frozen=True, kw_only=True)
class Operate:
    """Start and label episodes, take over, resume, stop, run a shadow; see what a cell does.

    status prints one JSON object and watch every event as a line; the rest are requests to the
    cell's supervisor, which end with status 1 when they are refused.
    """

    action: Annotated[Action, tyro.conf.Positional]
    contract: Path
    """The cell's YAML file, or the name of a shipped one."""
    task: str | None = None
    """With start: a task of the contract."""
    seed: int | None = None
    """With start: of the scene, on simulated cells."""
    operator: str | None = None
    """With start: who is there, for the record."""
    instruction: str | None = None
    """With start: other words than the task's."""
    version: str = ""
    """With shadow: a version of the registry or `newest`, to run beside the active policy without
    moving anything; empty ends it. `status` tells how they compare."""
    namespace: str = ""
    """Of the cell; empty: the contract's name."""
    timeout_s: float = 10.0
    """How long to wait for the cell."""

    def run(self) -> None:
        from robot_bridge.client import CellClient
        from vla_post.cli.contract import find

        contract = find(self.contract)
        with CellClient(contract, namespace=self.namespace, name="operate") as client:
            if self.action == "status":
                self._status(client)
            elif self.action == "watch":
                self._watch(client)
            else:
                self._request(client)

    def _request(self, client: "CellClient") -> None:
        name = REQUESTS.get(self.action, self.action.replace("-", "_"))
        if self.action == "shadow":
            reply = client.shadow(self.version, timeout_s=self.timeout_s).result()
        else:
            reply = client.request(
                name,
                task=self.task,
                seed=self.seed,
                operator=self.operator,
                instruction=self.instruction,
                timeout_s=self.timeout_s,
            )
        if not reply.success:
            raise UserError(f"{self.action}: {reply.message}")
        print(reply.message)

    def _status(self, client: "CellClient") -> None:
        if not client.wait_until(
            lambda: client.caught_up and client.health, timeout_s=self.timeout_s
        ):
            raise UserError(
                f"nothing was heard of the cell {client.namespace} for {self.timeout_s:g} s; is it "
                "up, and in this ROS domain (ROS_DOMAIN_ID)?"
            )
        state = client.state
        joints = client.joints
        print(
            json.dumps(
                {
                    "cell": client.namespace,
                    "mode": state.mode,
                    "reason": state.reason,
                    "operator": state.operator,
                    "policy": dict(client.policy),
                    "episode": client.episode and dict(client.episode),
                    "doubt": {
                        key: health.values[key]
                        for health in client.health.values()
                        for key in ("doubt", "doubt_threshold", "hint")
                        if key in health.values
                    },
                    "shadow": {
                        key.removeprefix("shadow_"): value
                        for health in client.health.values()
                        for key, value in health.values.items()
                        if key.startswith("shadow_")
                    },
                    "clipped": {k: v for k, v in state.clipped.items() if v},
                    "joints": joints
                    and dict(zip(joints.names, joints.position.round(4).tolist(), strict=False)),
                    "nodes": {
                        name: health.message or ("ok", "warning", "error", "stale")[health.level]
                        for name, health in sorted(client.health.items())
                    },
                },
                indent=2,
            )
        )

    def _watch(self, client: "CellClient") -> None:
        def say(kind: str, value: Any) -> None:
            if kind == "event":
                print(value.to_json(), flush=True)

        client.listen(say)
        print(f"events of {client.namespace}; Ctrl-C ends it", file=sys.stderr)
        while True:
            client.wait_until(lambda: False, timeout_s=3600.0)
