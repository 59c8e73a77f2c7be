"""An operator's device as a process of its own: deadman held, a joint target at 50 Hz.

python teleop.py NAMESPACE JOINT... ; killed by the test.
"""

import array
import sys

import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState, Joy

from robot_bridge.dds import use_default_profile
from robot_bridge.nodes.common import reliable, set_stamp


def main(namespace: str, names: list[str]) -> None:
    use_default_profile()
    rclpy.init()
    sim_time = [Parameter("use_sim_time", value=True)]
    node = rclpy.create_node("teleop", namespace=namespace, parameter_overrides=sim_time)
    joy = node.create_publisher(Joy, "teleop/joy", reliable(1))
    target = node.create_publisher(JointState, "teleop/joint_target", reliable(1))

    def say() -> None:
        now = node.get_clock().now().nanoseconds
        command = JointState(name=names, position=array.array("d", [0.0] * len(names)))
        set_stamp(command.header.stamp, now)
        target.publish(command)
        held = Joy(buttons=[1])
        set_stamp(held.header.stamp, now)
        joy.publish(held)

    node.create_timer(0.02, say, clock=Clock(clock_type=ClockType.STEADY_TIME))
    rclpy.spin(node)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
