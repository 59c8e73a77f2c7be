"""MuJoCo work cells behind gymnasium, scripted operators, and the simulated robot's ROS nodes.

Importing this package registers the cells and loads neither MuJoCo nor ROS.
"""

from pathlib import Path

import gymnasium

CONTRACTS = Path(__file__).parent / "contracts"
"""Folder of the shipped cell contracts."""

gymnasium.register(id="vla_post/MetaWorld-v0", entry_point="sim.metaworld_cell:MetaWorldCell")
gymnasium.register(id="vla_post/Franka-v0", entry_point="sim.franka_cell:FrankaCell")
