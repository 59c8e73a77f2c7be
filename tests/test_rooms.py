"""The rooms of docs/concepts.md: arrows point one way, and light imports stay light."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_import_rules_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["datasets", "launch"])
def test_folders_that_share_a_name_with_other_packages_are_not_packages(folder: str):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("trajectory_store", "torch rclpy lerobot mujoco transformers"),
        ("vla_post", "torch rclpy lerobot mujoco"),
        ("vla_post.export", "torch rclpy lerobot mujoco"),
        ("vla_post.cli.main", "torch rclpy lerobot mujoco matplotlib"),
        ("robot_bridge.core", "torch rclpy lerobot mujoco"),
        ("robot_bridge.bringup", "torch rclpy lerobot mujoco"),
        ("sim", "torch rclpy mujoco metaworld"),
    ],
)
def test_importing_a_room_stays_light(module: str, unwanted: str):
    code = f"import sys, {module}\nprint([m for m in {unwanted.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_hugging_face_datasets_is_not_shadowed():
    # lerobot's `import datasets` must find Hugging Face's package from our root as well.
    code = "import datasets; assert hasattr(datasets, 'Dataset'), datasets.__path__"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
