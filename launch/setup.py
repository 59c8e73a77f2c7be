"""The ROS 2 package `vla_post`: launch files and executables; the code is the Python package."""

from glob import glob

from setuptools import setup

setup(
    name="vla_post",
    version="0.1.0",
    packages=[],
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/vla_post"]),
        ("share/vla_post", ["package.xml"]),
        ("share/vla_post/launch", glob("*.launch.py")),
        ("share/vla_post/config", glob("config/*.yaml")),
        ("lib/vla_post", glob("scripts/*")),
    ],
    zip_safe=True,
)
