"""Work spread over a Ray cluster: episodes of an evaluation, cells of a fleet.

Ray (extra `ray`) finds machines, starts workers and notices dead ones; here a list of items is cut
into shards, one task each. A shard whose worker dies is tried again elsewhere, as Ray does by
default. `local` starts a cluster on this machine and ends it; any other address is that of a
cluster that runs already and stays.
"""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vla_post.cli.errors import UserError


@contextmanager
def cluster(address: str) -> Generator[Any]:
    """Connected to a cluster; gives the module `ray`.

    Args:
        address: `local`, `auto` (the cluster of this machine), HOST:PORT or ray://HOST:PORT.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray: pip install 'vla-post[ray]'") from None
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        settings |= {"include_dashboard": False, "object_store_memory": 100_000_000}
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--ray {address}: no Ray cluster answers ({said}). `ray start --head` starts one; "
            "`--ray local` needs none"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def spread(address: str, shards: int | None = None) -> Callable[..., list[Any]]:
    """A function that plays items on the cluster: `play(work, items, arguments, on_done=None)`
    calls `work(shard of items, *arguments)`, one CPU each, and gives the results in the items'
    order. `on_done` is told how many have come.

    Args:
        shards: how many tasks; by default one for each CPU of the cluster.
    """

    def play(
        work: Callable[..., list[Any]],
        items: Sequence[Any],
        arguments: tuple[Any, ...] = (),
        *,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Any]:
        with cluster(address) as ray:
            count = shards or int(ray.cluster_resources().get("CPU", 1))
            count = max(1, min(count, len(items)))
            task = ray.remote(num_cpus=1)(_in_folder)
            here = str(Path.cwd())
            # Every n-th item: neighbours differ less in length than the two ends of the list.
            places = {task.remote(here, work, items[k::count], arguments): k for k in range(count)}
            results: list[Any] = [None] * len(items)
            waiting = list(places)
            while waiting:
                (ready,), waiting = ray.wait(waiting)
                try:
                    found = ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    cause = error.as_instanceof_cause()
                    raise UserError(f"a shard failed on the cluster: {cause}") from error
                results[places[ready] :: count] = found
                if on_done is not None:
                    on_done(len(found))
            return results

    return play


def _in_folder(
    folder: str, work: Callable[..., list[Any]], items: Sequence[Any], arguments: tuple[Any, ...]
) -> list[Any]:
    """In the driver's working folder, which relative paths mean; Ray's workers start elsewhere."""
    os.chdir(folder)
    return work(items, *arguments)
