"""A simulated cell, with a scripted operator if `episodes` is given.

    ros2 launch vla_post sim_cell.launch.py contract:=sim/contracts/metaworld_state.yaml \
        registry:=runs/registry store:=runs/store episodes:=20
"""

from robot_bridge.launching import ARGUMENTS, SIMULATED, declare, describe, nodes


def generate_launch_description():
    return describe([*declare(ARGUMENTS, SIMULATED), nodes(True, ARGUMENTS, SIMULATED)])
