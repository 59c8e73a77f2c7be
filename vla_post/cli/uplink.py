"""`vla-post uplink`: delivers a robot's closed episodes to the fleet's store, each exactly once."""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from trajectory_store.uplink import Uplink, UplinkConfig, UplinkHealth, read_health
from vla_post.cli.errors import UserError
from vla_post.cli.signals import ends_in_order


@dataclass(frozen=True, kw_only=True)
class UplinkCommand:
    """Deliver the closed episodes of a local store (or a folder of stores) to DEST/NAME, each
    exactly once, until Ctrl-C. The robot records on its own disk meanwhile and needs nobody.

    DEST is a folder or s3://bucket/prefix; AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ... say where S3
    is and who asks.
    """

    store: Annotated[str, tyro.conf.Positional]
    dest: Annotated[str, tyro.conf.Positional] = ""
    name: str = ""
    """Of this robot at DEST; by default the store's folder name."""
    bandwidth_mbit_s: Annotated[float, tyro.conf.arg(aliases=["--bandwidth"])] = 0.0
    """Limit of what is sent, in megabits a second, on average. 0: none."""
    poll_s: float = 0.5
    """How often the local store is looked at."""
    take_over: bool = False
    """DEST/NAME was fed from a store that is gone for good (a new disk); go on in its place."""
    once: bool = False
    """Deliver what is closed now and end: status 0 when nothing is left, 1 otherwise."""
    status: bool = False
    """Only say what is delivered and what waits; status 1 when a delivery fails or stands still."""

    def run(self) -> None:
        if self.status:
            if not _show(list(read_health(self.store))):
                raise SystemExit(1)
            return
        if not self.dest:
            raise UserError(
                "no DEST: a folder or s3://bucket/prefix, as in `vla-post uplink "
                f"{self.store} s3://fleet/cells`"
            )
        config = UplinkConfig(
            store=self.store,
            dest=self.dest,
            name=self.name,
            bandwidth_mbit_s=self.bandwidth_mbit_s,
            poll_s=self.poll_s,
            take_over=self.take_over,
        )
        logging.basicConfig(level=logging.WARNING, format="uplink: %(message)s", stream=sys.stderr)
        uplink = Uplink(config)
        with ends_in_order():
            if not self.once:
                print(f"uplink: {self.store} to {self.dest}; Ctrl-C ends it", file=sys.stderr)
                try:
                    uplink.run()
                except KeyboardInterrupt:
                    uplink.end()
                return
            try:
                uplink.round()
            finally:
                uplink.close()
        if not uplink.routes:
            raise UserError(f"{self.store}: no trajectory store there")
        if not _show(uplink.health) or any(h.backlog_episodes for h in uplink.health):
            raise SystemExit(1)


def _show(found: Sequence[UplinkHealth]) -> bool:
    """Prints a line a route; True when all is well."""
    if not found:
        raise UserError("no uplink has delivered from here yet")
    fine = True
    for health in found:
        age_s = time.time() - health.updated_ns / 1e9
        waits = "nothing waits"
        if health.backlog_episodes:
            waits = (
                f"{health.backlog_episodes} episodes wait ({health.backlog_bytes / 1e6:.1f} MB, "
                f"the oldest began {health.oldest_s:.0f} s ago)"
            )
        print(f"{health.store} -> {health.dest}: {health.delivered} delivered, {waits}")
        if health.error:
            print(f"  {health.attempts_failed} attempts failed: {health.error}")
        if age_s > 10:
            print(
                f"  the uplink (process {health.pid} on {health.host}) last spoke {age_s:.0f} s ago"
            )
        fine &= health.ok and (age_s <= 10 or not health.backlog_episodes)
    return fine
