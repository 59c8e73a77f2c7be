"""The real runner node with a policy that does what its instruction says."""

import re
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from robot_bridge.nodes.common import run
from robot_bridge.nodes.runner import RunnerNode
from trajectory_store.contract import Contract


class ObedientPolicy:
    """Constant actions of the size that the checkpoint holds; misbehaves on request."""

    takes_previous = False

    def __init__(self, path: Path, contract: Contract) -> None:
        self.contract_sha256 = contract.sha256
        self.observation_keys = tuple(contract.observations)
        self.horizon = contract.chunk_horizon
        self._shape = (contract.chunk_horizon, contract.action.size)
        self._value = float(load_file(path / "model.safetensors")["value"][0])

    def act(self, observation, instruction, seed=0):
        assert {k: np.asarray(v).ndim for k, v in observation.items()}
        if instruction == "raise":
            raise RuntimeError("the network is on fire")
        if instruction == "hang":
            time.sleep(600)
        if instruction == "hang in C":
            # An exponential search that keeps the interpreter's lock: no other thread runs.
            re.match("(a+)+$", "a" * 60 + "b")
        sign = -1.0 if instruction == "waver" and seed % 2 else 1.0
        chunk = np.full(self._shape, sign * self._value, np.float32)
        if instruction == "nan":
            chunk[3, 1] = np.nan
        return chunk[:2] if instruction == "shape" else chunk

    def close(self):
        pass


class FakeRunner(RunnerNode):
    def load(self, path):
        return ObedientPolicy(path, self.contract)


if __name__ == "__main__":
    sys.exit(run(FakeRunner, sys.argv))
