"""`pip install vla-post[robot]`: runs an export and asks a server, has no torch, stays small."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LARGEST_MB = 500

USE = """
import importlib.util as util
import pathlib, sys
heavy = [n for n in ("torch", "lerobot", "transformers", "onnx", "scipy") if util.find_spec(n)]
assert not heavy, heavy
import rclpy, onnxruntime, numpy as np
from trajectory_store import StoreWriter
from vla_post.export import load_policy
import vla_post.export.remote, robot_bridge.nodes.runner, robot_bridge.nodes.arbiter
policy = load_policy(sys.argv[1])
observation = {key: np.zeros(f.shape, f.dtype) for key, f in policy.card.observations.items()}
chunk = policy.act(observation, next(iter(policy.card.instructions)))
assert chunk.shape == (policy.horizon, policy.action_size), chunk.shape
files = [f for f in pathlib.Path(sys.prefix).rglob("*") if f.is_file() and not f.is_symlink()]
# Installed, without what Python compiles on first use and without pip itself.
ours = [f for f in files if not {"__pycache__", "pip"} & set(f.parts)]
print(sum(f.stat().st_size for f in ours) / 1e6)
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_robots_extra_is_light_and_enough(tmp_path: Path):
    """Needs the package index. The export comes from the full environment, as on a robot."""
    export = tmp_path / "export"
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path), str(export)], check=True, cwd=ROOT)
    environment = tmp_path / "robot"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [
            *(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("-c", str(ROOT / "constraints.txt"), f"{ROOT}[robot]"),
        ],
        check=True,
    )
    done = subprocess.run(
        [str(python), "-c", USE, str(export)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    size_mb = float(done.stdout.split()[-1])
    print(f"{size_mb:.0f} MB")
    assert size_mb < LARGEST_MB


MAKE = """
import sys
from pathlib import Path
import numpy as np
from trajectory_store.contract import load_contract
from vla_post.export.onnx import export_policy
from vla_post.policies.build import build_policy

contract = load_contract("sim/contracts/metaworld_state.yaml")
sizes = {key: f.shape for key, f in contract.vectors.items()} | {"action": (contract.action.size,)}
ones = {
    key: {"mean": np.zeros(s), "std": np.ones(s), "min": -np.ones(s), "max": np.ones(s)}
    for key, s in sizes.items()
}
folder = build_policy("chunk_flow", contract, ones).save(Path(sys.argv[1]) / "checkpoint")
seen = {key: np.zeros(f.shape, np.float32) for key, f in contract.observations.items()}
export_policy(folder, sys.argv[2], [(seen, contract.tasks["reach"].instruction)])
"""
