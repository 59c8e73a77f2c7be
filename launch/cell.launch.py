"""A cell with a real robot, whose driver or ros2_control runs already.

    ros2 launch vla_post cell.launch.py contract:=my_cell.yaml registry:=runs/registry \
        store:=runs/store command_topic:=/joint_trajectory_controller/joint_trajectory
"""

from robot_bridge.launching import ARGUMENTS, REAL, declare, describe, nodes


def generate_launch_description():
    return describe([*declare(ARGUMENTS, REAL), nodes(False, ARGUMENTS, REAL)])
