"""Fast DDS profiles, as package data, and the environment that selects them."""

import os
from collections.abc import MutableMapping
from importlib.resources import files

LOOPBACK = "loopback"
"""This computer only. The default."""
NETWORK = "network"
"""Several hosts; see docs/robot.md before using it."""

_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")


def profile_path(name: str = LOOPBACK) -> str:
    """Raises ValueError for a name that is not shipped."""
    if name not in (LOOPBACK, NETWORK):
        raise ValueError(f"no DDS profile {name!r}; shipped are {LOOPBACK!r} and {NETWORK!r}")
    return str(files("robot_bridge.dds") / f"{name}.xml")


def use_default_profile(
    name: str = LOOPBACK, environment: MutableMapping[str, str] | None = None
) -> str:
    """Selects a profile before `rclpy.init`, unless the user selected one already.

    Also picks Fast DDS where no RMW was chosen. Returns the path of the profile in force.
    """
    env = os.environ if environment is None else environment
    chosen = next((env[v] for v in _VARIABLES if env.get(v)), None)
    path = chosen or profile_path(name)
    for variable in _VARIABLES:
        env.setdefault(variable, path)
    env.setdefault("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp")
    return path
