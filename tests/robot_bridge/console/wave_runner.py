"""The real runner node with a policy that sways: its chunks move, and its versions differ."""

import sys
from typing import Any

import numpy as np

from robot_bridge.nodes.common import run
from robot_bridge.nodes.runner import RunnerNode


class SwayingPolicy:
    """Stands in for a network: small sines around where the robot is."""

    def __init__(self, contract: Any) -> None:
        self.contract_sha256 = contract.sha256
        self.observation_keys = ("observation.state",)
        self.horizon = contract.chunk_horizon
        self.takes_previous = False
        self._contract, self._calls = contract, 0

    def act(self, observation: Any, instruction: Any, seed: Any = 0):
        self._calls += 1
        contract = self._contract
        time_s = np.arange(self.horizon) / contract.control_hz + 0.2 * self._calls
        sway = np.sin(1.5 * time_s)[:, None] * np.ones(contract.action.size)
        if contract.action.mode == "delta":
            return (0.3 * sway).astype(np.float32)
        state = np.asarray(observation["observation.state"], np.float32)
        low, high = np.array(contract.action.limits.position, np.float32).T
        return np.clip(state + 0.1 * sway, low, high).astype(np.float32)

    def act_batch(self, observation: Any, instructions: Any, seeds: Any):
        """Samples that agree, unless the instruction is a doubtful one."""
        spread = 0.2 if "doubtful" in instructions[0] else 0.02
        signs = np.where(np.arange(len(seeds)) % 2, spread, -spread)
        shape = (len(seeds), self.horizon, self._contract.action.size)
        return np.broadcast_to(signs[:, None, None], shape).astype(np.float32)

    def close(self):
        pass


class SwayingRunner(RunnerNode):
    def load(self, path: Any) -> Any:
        return SwayingPolicy(self.contract)


if __name__ == "__main__":
    sys.exit(run(SwayingRunner, sys.argv))
