"""`vla-post fleet`: several simulated cells and a few scripted operators on this machine."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robot_bridge.bringup import BringupError, CellConfig, ProcessGroup, Value
from robot_bridge.fleet import HIGHEST_DOMAIN, FleetConfig, fleet_nodes
from trajectory_store.contract import load_contract
from vla_post.cli.console import ConsoleLink
from vla_post.cli.contract import path_of
from vla_post.cli.errors import UserError
from vla_post.cli.signals import ends_in_order


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Run N simulated cells, each in its own namespace, until every operator played its episodes.

    The same nodes as fleet.launch.py. With fewer operators than cells, takeovers queue: an
    operator attends one cell at a time. Ends with a table; data goes to FOLDER/stores/CELL.
    """

    contract: Path
    """A simulated cell's YAML file, or the name of a shipped one."""
    cells: int = 2
    operators: int = 0
    """0: one for each cell."""
    episodes: int = 5
    """Of each cell."""
    registry: str | None = None
    policy: Path | None = None
    backend: Literal["torch", "onnx"] = "torch"
    seed: int = 0
    drive: bool = False
    """The operators drive whole episodes, as when demonstrations are collected; needs no policy."""
    real_time_factor: float = 1.0
    """Speed of cells that are not in lockstep."""
    console: bool = False
    """Serve one web console for all cells while they run; the address is printed. Off by default,
    because this is a batch run that ends by itself."""
    console_port: int = 8765
    """The next free one is used when it is taken; 0 takes any."""
    insight_every: int = 0
    """Show the policy's doubt, and its critic's value, of every k-th chunk in the console, and hint
    when it is more than operators let pass."""
    first_domain: int | None = None
    """Give cell i the ROS domain FIRST_DOMAIN + i, rather than one domain to all."""
    uplink: str = ""
    """Deliver every cell's closed episodes to this prefix: a folder or s3://bucket/prefix."""
    bag: bool = False
    """Record every topic of each cell as MCAP files, too (FOLDER/bags)."""
    folder: Path = Path("runs/fleet")
    """Gets stores, events, logs and fleet.json."""
    ray: str = ""
    """Spread the cells over a Ray cluster: its address (`auto`, HOST:PORT, ray://HOST:PORT), or
    `local` for one on this machine (extra `ray`). FOLDER, registry and policy must be visible on
    all machines."""
    shards: int = 1
    """With --ray: into how many fleets, each on one machine with its own ROS domain, the cells and
    operators are divided; an operator attends the cells of one of them. Data goes to
    FOLDER/shard_K/stores/CELL, so FOLDER is what a learner follows."""

    def run(self) -> None:
        if self.ray:
            self._spread()
            return
        contract = path_of(self.contract)
        if not load_contract(contract).sim:
            raise UserError(f"{contract}: no simulated cell (it has no `sim` section)")
        if not self.drive and self.registry is None and self.policy is None:
            raise UserError("no policy: pass --registry or --policy, or --drive for operators only")
        events, figures = self.folder / "events", self.folder / "attention.json"
        events.mkdir(parents=True, exist_ok=True)
        config = FleetConfig(
            cell=CellConfig(
                contract=contract,
                registry=self.registry,
                policy=self.policy,
                backend=self.backend,
                store=self.folder / "stores",
                uplink=self.uplink,
                bag=self.folder / "bags" if self.bag else None,
                events_log=events,
                real_time_factor=self.real_time_factor,
                insight_every=self.insight_every,
                console=self._console() if self.console else None,
                operator={
                    "episodes": self.episodes,
                    "seed": self.seed,
                    "drive_from_start": self.drive,
                },
            ),
            cells=self.cells,
            operators=self.operators,
            first_domain=self.first_domain,
            figures=figures,
        )
        before = {name: _lines(events / f"{name.strip('/')}.jsonl") for name in config.namespaces}
        link = ConsoleLink(self._address_file, lambda text: print(text, file=sys.stderr))
        begun = time.monotonic()
        try:
            with (
                ends_in_order(),
                ProcessGroup(fleet_nodes(config), log_dir=self.folder / "logs") as group,
            ):
                print(f"up: {len(group.pids())} processes; Ctrl-C ends them", file=sys.stderr)
                self._watch(group, link, {f"{n.strip('/')}/operator" for n in config.namespaces})
        except BringupError as error:
            raise UserError(str(error)) from error
        table = {
            name.strip("/"): _figures(events / f"{name.strip('/')}.jsonl", before[name])
            for name in config.namespaces
        }
        card: dict[str, object] = {"wall_s": round(time.monotonic() - begun, 1), "cells": table}
        if config.shared and figures.exists():
            card["attention"] = json.loads(figures.read_text())
        (self.folder / "fleet.json").write_text(json.dumps(card, indent=2) + "\n")
        _show(card)

    def _spread(self) -> None:
        from vla_post.cli.ray_cluster import spread

        if not 1 <= self.shards <= self.cells:
            raise UserError(f"{self.shards} shards of {self.cells} cells; at least one cell each")
        if 0 < self.operators < self.shards:
            raise UserError(f"{self.operators} operators for {self.shards} shards; one each")
        if self.first_domain is not None:
            raise UserError("--ray gives every shard a ROS domain of its own; drop --first-domain")
        if self.console:
            raise UserError(
                "--ray spreads the cells over machines and ROS domains, which one console cannot "
                "see; drop --console"
            )
        path_of(self.contract)
        begun = time.monotonic()
        parts = [self._part(k) for k in range(self.shards)]
        cards = spread(self.ray, self.shards)(_play_shard, parts)
        table = {
            f"shard_{k}/{name}": row for k, one in enumerate(cards) for name, row in one.items()
        }
        card: dict[str, object] = {"wall_s": round(time.monotonic() - begun, 1), "cells": table}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "fleet.json").write_text(json.dumps(card, indent=2) + "\n")
        _show(card)

    def _part(self, k: int) -> tuple[list[str], Path, int]:
        """(words of `vla-post fleet`, folder, ROS domain) of the k-th shard."""

        def share(total: int) -> int:
            return (k + 1) * total // self.shards - k * total // self.shards

        folder = self.folder / f"shard_{k}"
        words = ["--contract", str(path_of(self.contract)), "--folder", str(folder)]
        words += ["--cells", str(share(self.cells)), "--operators", str(share(self.operators))]
        words += ["--episodes", str(self.episodes), "--backend", self.backend]
        # Cells of one fleet are 10,000 seeds apart.
        words += ["--seed", str(self.seed + 10_000 * (k * self.cells // self.shards))]
        words += ["--real-time-factor", str(self.real_time_factor)]
        words += ["--insight-every", str(self.insight_every)]
        words += ["--drive"] if self.drive else []
        for name, path in (("--registry", self.registry), ("--policy", self.policy)):
            words += [] if path is None else [name, str(path)]
        first = int(os.environ.get("ROS_DOMAIN_ID", "1"))
        return words, folder, 1 + (first - 1 + k) % HIGHEST_DOMAIN

    def _console(self) -> dict[str, Value]:
        return {"port": self.console_port, "address_file": str(self._address_file.resolve())}

    @property
    def _address_file(self) -> Path:
        return self.folder / "logs" / "console.address"

    def _watch(self, group: ProcessGroup, link: ConsoleLink, playing: set[str]) -> None:
        while playing:
            link.look()
            for ended in group.poll():
                if ended.name in playing and ended.status == 0:
                    playing.discard(ended.name)
                elif not ended.restarting and ended.essential:
                    raise BringupError(
                        f"{ended.name} ended with status {ended.status}, see {ended.log}:\n"
                        + group.last_words(ended.name)
                    )
                elif not ended.restarting:
                    print(
                        f"{ended.name} ended with status {ended.status}, see {ended.log}; the "
                        "cells go on without it",
                        file=sys.stderr,
                    )
            time.sleep(0.1)


def _play_shard(parts: list[tuple[list[str], Path, int]]) -> list[dict[str, Any]]:
    """On a worker: each part as a fleet of its own, which ends with the worker."""
    rows: list[dict[str, Any]] = []
    for words, folder, domain in parts:
        command = [sys.executable, "-m", "robot_bridge.child", str(os.getpid())]
        done = subprocess.run(
            [*command, "vla_post.cli.main", "fleet", *words],
            env=os.environ | {"ROS_DOMAIN_ID": str(domain)},
            capture_output=True,
            text=True,
            start_new_session=True,
        )
        if done.returncode:
            raise UserError(f"{folder.name}: {(done.stderr or done.stdout).strip()[-2000:]}")
        rows.append(json.loads((folder / "fleet.json").read_text())["cells"])
    return rows


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def _figures(path: Path, skip: int) -> dict[str, int]:
    """What a cell's events say, after the first `skip` lines."""
    events = [json.loads(line) for line in path.read_text().splitlines()[skip:]]
    ends = [event for event in events if event["type"] == "episode_end"]
    return {
        "episodes": len(ends),
        "success": sum(event["outcome"] == "success" for event in ends),
        "takeovers": sum(event["type"] == "takeover" for event in events),
        "nodes_lost": sum(e["type"] == "node" and e["state"] == "lost" for e in events),
    }


def _show(card: dict[str, object]) -> None:
    cells = card["cells"]
    assert isinstance(cells, dict)
    print(f"{'cell':<20} episodes  success  takeovers  nodes lost")
    for name, row in cells.items():
        print(
            f"{name:<20} {row['episodes']:>8} {row['success']:>8} {row['takeovers']:>10} "
            f"{row['nodes_lost']:>11}"
        )
    attention = card.get("attention")
    if isinstance(attention, dict):
        print(
            f"{attention['operators']} operators: busy {attention['busy']:.0%} of the time, "
            f"{attention['attendances']} attendances, waited {attention['mean_wait_s']:.1f} s on "
            f"average and {attention['longest_wait_s']:.1f} s at most"
        )
    print(f"{card['wall_s']} s")
