"""ROS 2 nodes of the simulated cell: `robot` and `operator`. Importing this loads no ROS."""
