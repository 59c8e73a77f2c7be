"""A sampler's memory does not grow with the images of its stores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sparse_store.py"


def test_memory_is_bounded_by_batches_not_by_images(tmp_path):
    """11 GB of frames, in sparse files; the process that samples them stays below 0.6 GB."""
    done = subprocess.run([sys.executable, SCRIPT, "write", tmp_path / "fleet", "11"], text=True)
    if done.returncode:
        pytest.skip("this file system cannot punch holes into files")
    sampled = subprocess.run(
        [sys.executable, SCRIPT, "sample", tmp_path / "fleet"],
        check=True,
        text=True,
        capture_output=True,
    )
    found = json.loads(sampled.stdout)
    assert found["gigabytes"] > 10
    assert found["peak_mb"] < 600
