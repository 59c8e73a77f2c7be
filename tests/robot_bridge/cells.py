"""Contracts for the tests of this room."""

from typing import Any

from trajectory_store.contract import Contract, parse_contract

BASE: dict[str, Any] = {
    "schema": "vla_post/cell/1",
    "cell": "test_cell",
    "robot": "test_arm",
    "tasks": {"reach": {"instruction": "Reach the goal", "time_limit_s": 1.0}},
}


def arm(**changes: Any) -> Contract:
    """Two position-controlled joints at 50 Hz with velocity, acceleration and jerk limits."""
    action = {
        "names": ["a", "b"],
        "unit": "rad",
        "mode": "absolute",
        "limits": {
            "position": [[-1.0, 1.0], [-2.0, 2.0]],
            "velocity": [1.0, 1.5],
            "acceleration": [5.0, 8.0],
            "jerk": [200.0, 300.0],
        },
    }
    state = {
        "topic": "joint_states",
        "type": "sensor_msgs/JointState",
        "names": ["a", "b"],
        "shape": [2],
        "unit": "rad",
        "rate_hz": 50,
    }
    data = BASE | {
        "control_hz": 50,
        "chunk_horizon": 8,
        "execute_steps": 4,
        "observations": {"observation.state": state},
        "actions": {"action": action | changes.pop("action", {})},
        "safety": {"blend_ms": 100} | changes.pop("safety", {}),
    }
    return Contract.model_validate(data | changes)


def cartesian(**changes: Any) -> Contract:
    """Displacements of a tool and a gripper at 80 Hz, in lockstep, with a camera at 20 Hz."""
    data = BASE | {
        "control_hz": 80,
        "chunk_horizon": 8,
        "execute_steps": 4,
        "observations": {
            "observation.state": {
                "topic": "joint_states",
                "type": "sensor_msgs/JointState",
                "names": ["ee_x", "ee_y", "ee_z", "gripper"],
                "shape": [4],
                "unit": "m",
                "rate_hz": 80,
                "min_rate_hz": 60,
            },
            "observation.images.corner": {
                "topic": "cameras/corner/image_raw/compressed",
                "type": "sensor_msgs/CompressedImage",
                "shape": [16, 16, 3],
                "unit": "rgb8",
                "rate_hz": 20,
                "min_rate_hz": 10,
            },
        },
        "actions": {
            "action": {
                "names": ["ee_dx", "ee_dy", "ee_dz", "gripper"],
                "unit": "normalised",
                "mode": "delta",
                "held": ["gripper"],
                "limits": {"position": [[-1, 1]] * 4} | changes.pop("limits", {}),
            }
        },
        "safety": {
            "blend_ms": 0,
            "workspace": {
                "low": [-0.5, 0.0, 0.0],
                "high": [0.5, 1.0, 0.5],
                "names": ["ee_x", "ee_y", "ee_z"],
            },
        }
        | changes.pop("safety", {}),
        "sim": {"lockstep": True},
    }
    return Contract.model_validate(data | changes)


def one_axis() -> Contract:
    """The smallest lockstep cell: displacements of one axis at 100 Hz."""
    return parse_contract("""
schema: vla_post/cell/1
cell: bench
robot: arm
control_hz: 100
chunk_horizon: 8
execute_steps: 4
observations:
  observation.state:
    {topic: joint_states, type: sensor_msgs/JointState, names: [x], shape: [1], unit: m}
actions:
  action: {names: [dx], unit: m, mode: delta, limits: {position: [[-1, 1]]}}
tasks:
  push: {instruction: Push, time_limit_s: 5}
sim: {lockstep: true}
""")
