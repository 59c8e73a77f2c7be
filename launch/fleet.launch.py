"""Several simulated cells of one contract in namespaces CELL_0, CELL_1, ..., with shared operators.

    ros2 launch vla_post fleet.launch.py contract:=sim/contracts/metaworld_state.yaml cells:=4 \
        registry:=runs/registry store:=runs/stores episodes:=20 operators:=2
"""

from robot_bridge.launching import ARGUMENTS, FLEET, SIMULATED, declare, describe, fleet


def generate_launch_description():
    return describe([*declare(ARGUMENTS, SIMULATED, FLEET), fleet(ARGUMENTS, SIMULATED, FLEET)])
