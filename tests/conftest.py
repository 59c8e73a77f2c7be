"""Shared by all tests: offline hubs, shape checks on, one DDS domain per test worker."""

import os
import signal
from collections.abc import Iterator
from typing import Any

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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real S3 server in a process of its own."""
    pytest.importorskip("moto", reason="the dev extra is not installed")
    from .s3 import S3Server

    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A proxy in front of it that can be cut, named by AWS_*; the bucket `fleet` is empty."""
    import boto3

    from .s3 import Proxy, client_environment

    proxy = Proxy(s3_server.port)
    for name, value in client_environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.close()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_server.port}")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="fleet"):
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", ())]
        if keys:
            client.delete_objects(Bucket="fleet", Delete={"Objects": keys})
    client.close()
