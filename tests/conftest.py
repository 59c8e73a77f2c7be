"""Shared by all tests: offline hubs, shape checks on, one DDS domain per test worker."""

import os
import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Two workers of one run never share a domain; runs side by side on one machine rarely do. Domains
# above 101 would need ports that the kernel also hands out to others.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
os.environ["ROS_DOMAIN_ID"] = str(1 + (_run * 7 + _worker) % 101)

import pytest  # noqa: E402 (the environment comes first)
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

settings.register_profile("busy", deadline=None)  # a busy machine is no failure
settings.load_profile("busy")

# Checks every annotated shape while testing; on a robot the annotations cost nothing.
install_import_hook(["vla_post.critics", "vla_post.learners"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Graphs of real processes share their cores with whatever else runs: such a test may try
    again, and pytest's summary counts it as a rerun. Everything else has one try."""
    for item in items:
        if item.get_closest_marker("ros"):
            item.add_marker(pytest.mark.flaky(reruns=2))
