"""`vla-post store ...`: look at stores, check, repair, relabel, merge, convert."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from trajectory_store import (
    FleetView,
    Outcome,
    Store,
    copying,
    load_contract,
    maintenance,
    stats,
    verification,
)
from trajectory_store.schema import Episode, Source
from vla_post.cli.errors import UserError

Location = Annotated[str, tyro.conf.Positional]
"""A store: a local folder or s3://bucket/prefix."""


_Outcome = tyro.conf.EnumChoicesFromValues[Outcome]


class _Bar:
    """A progress bar on stderr, in the form that the store's functions call."""

    def __enter__(self) -> "_Bar":
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("")
        self._progress.start()
        return self

    def __call__(self, what: str, done: int, of: int) -> None:
        self._progress.update(self._task, description=what, completed=done, total=of)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _print(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> None:
    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(c) for c in row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(table)


def _when(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _state(e: Episode) -> str:
    marks = [m for m, on in (("deleted", e.deleted), ("damaged", e.damaged)) if on]
    return " ".join([e.outcome or "running", *marks])


@dataclass(frozen=True)
class Info:
    """What a store holds: episodes, features, size, snapshot."""

    store: Location
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        store = Store(self.store)
        table = store.table
        found = {
            "location": store.location,
            "writer": store.info.writer,
            "cell": store.contract.cell,
            "robot": store.contract.robot,
            "contract_sha256": store.contract.sha256,
            "snapshot": store.snapshot_id,
            "ticks": store.rows,
            "hours": round(sum(e.duration_s for e in table) / 3600, 4),
            "episodes": len(table),
            "outcomes": dict(Counter(_state(e) for e in table)),
            "tasks": dict(Counter(e.task for e in table)),
            "ticks_by_source": {
                s.name.lower(): n for s in Source if (n := sum(e.ticks_by(s) for e in table))
            },
            "features": {
                k: {"shape": list(f.shape), "unit": f.unit}
                for c in store.contracts.values()
                for k, f in c.observations.items()
            },
        }
        if self.json:
            _print(found)
            return
        for key, value in found.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
            print(f"{key:16} {value}")


@dataclass(frozen=True)
class Ls:
    """Episodes of the stores under a folder or prefix, the newest last."""

    store: Location
    task: str | None = None
    outcome: _Outcome | None = None
    all: bool = False
    """Also deleted, damaged and running ones."""
    json: bool = False
    """One JSON object a line."""

    def run(self) -> None:
        view = FleetView(self.store)
        if not view.stores:
            raise UserError(f"{self.store}: no store here or below")
        chosen = [
            (s, e)
            for s in view.stores
            for e in (s.table if self.all else s.episodes)
            if (self.task is None or e.task == self.task)
            and (self.outcome is None or e.outcome == self.outcome)
        ]
        chosen.sort(key=lambda pair: pair[1].created_ns)
        if self.json:
            for s, e in chosen:
                print(json.dumps({"store": s.location} | asdict(e)))
            return
        names = {s.location: Path(s.location).name for s in view.stores}
        _table(
            [
                (
                    names[s.location],
                    e.uuid[:8],
                    _when(e.created_ns),
                    e.task,
                    _state(e),
                    len(e),
                    f"{e.duration_s:.1f}",
                    e.interventions,
                    e.policy_version,
                    e.operator,
                )
                for s, e in chosen
            ],
            (
                "store",
                "episode",
                "recorded (UTC)",
                "task",
                "outcome",
                "ticks",
                "seconds",
                "takeovers",
                "version",
                "operator",
            ),
        )


@dataclass(frozen=True)
class Show:
    """Everything about one episode."""

    store: Location
    episode: Annotated[str, tyro.conf.Positional]
    """uuid, or its first characters."""

    def run(self) -> None:
        store = Store(self.store)
        e = store.episode(self.episode)
        late, dropped = store.read("late", e), store.read("dropped", e)
        features: dict[str, Any] = {}
        for bit, key in enumerate(store.info.features):
            age = store.read(f"{key}.age_ns", e) / 1e6
            features[key] = {
                "first_tick": dict(e.first_seen).get(key),
                "mean_age_ms": round(float(age.mean()), 3) if len(age) else None,
                "late_ticks": int(((late >> bit) & 1).sum()),
                "dropped_ticks": int(((dropped >> bit) & 1).sum()),
            }
            if key in store.frames:
                places = store.read(f"{key}.frame", e)[:, 0]
                features[key]["frames"] = len(set(places[places >= 0].tolist()))
        runs = [f"{Source(s).name.lower()} {a}-{b - 1}" for a, b, s in e.runs()]
        _print(asdict(e) | {"ticks": len(e), "runs": runs, "features": features})


@dataclass(frozen=True)
class Verify:
    """Recomputes every checksum; exits with 1 and lists what is damaged, per chunk and episode."""

    store: Location
    decode: bool = False
    """Also decode every frame."""

    def run(self) -> None:
        with _Bar() as bar:
            report = verification.verify(self.store, decode=self.decode, progress=bar)
        for d in report.damage:
            print(f"damaged  {d.chunk or d.array}  episodes {', '.join(d.episodes) or 'none'}")
            print(f"         {d.reason}")
        for uuid in report.open_episodes:
            print(f"open     episode {uuid}: running, or its writer died")
        print(f"{report.chunks} chunks, {report.frames} frames, snapshot {report.snapshot_id}")
        if report.damage:
            raise UserError(
                f"{report.location}: {len(report.damage)} damaged; "
                "`vla-post store repair` sets the episodes aside"
            )


@dataclass(frozen=True)
class Repair:
    """Closes interrupted episodes and sets damaged ones aside; deletes nothing."""

    store: Location

    def run(self) -> None:
        with _Bar() as bar:
            report = verification.repair(self.store, progress=bar)
        print(
            f"closed {len(report.open_episodes)} interrupted episodes, "
            f"set {len(report.damaged_episodes)} damaged ones aside"
        )


@dataclass(frozen=True)
class Gc:
    """Expires old snapshots and frees what only they, or deleted episodes, refer to."""

    store: Location
    keep_days: float = 7.0
    """Snapshots younger than this stay readable."""

    def run(self) -> None:
        r = maintenance.gc(self.store, keep_days=self.keep_days)
        print(
            f"expired {r.snapshots_expired} snapshots, purged {r.episodes_purged} episodes, "
            f"freed {r.bytes_deleted / 1e6:.1f} MB in {r.chunks_deleted} chunks"
        )


@dataclass(frozen=True)
class Relabel:
    """Changes the outcome, task, instruction or notes of episodes."""

    store: Location
    episodes: Annotated[tuple[str, ...], tyro.conf.Positional]
    outcome: _Outcome | None = None
    task: str | None = None
    instruction: str | None = None
    notes: str | None = None

    def run(self) -> None:
        if (self.outcome, self.task, self.instruction, self.notes) == (None,) * 4:
            raise UserError("nothing to change: give --outcome, --task, --instruction or --notes")
        for e in maintenance.relabel(
            self.store,
            self.episodes,
            outcome=self.outcome,
            task=self.task,
            instruction=self.instruction,
            notes=self.notes,
        ):
            print(f"{e.uuid}  {e.task}  {e.outcome}")


@dataclass(frozen=True)
class Delete:
    """Hides episodes; --undo brings them back until gc has run."""

    store: Location
    episodes: Annotated[tuple[str, ...], tyro.conf.Positional]
    undo: bool = False

    def run(self) -> None:
        change = maintenance.undelete if self.undo else maintenance.delete
        for e in change(self.store, self.episodes):
            print(f"{e.uuid}  {_state(e)}")


@dataclass(frozen=True)
class Merge:
    """Copies episodes of several stores into one, each exactly once; run again to go on."""

    target: Location
    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Stores, or folders with stores below."""

    def run(self) -> None:
        stores = [s for source in self.sources for s in FleetView(source).stores]
        if not stores:
            raise UserError(f"no store at or below {', '.join(self.sources) or 'nothing'}")
        with _Bar() as bar:
            copied = copying.merge(stores, self.target, progress=bar)
        print(f"copied {len(copied)} episodes into {self.target}")


@dataclass(frozen=True)
class Split:
    """Copies a store's episodes into several stores, one folder each."""

    store: Location
    target: Annotated[str, tyro.conf.Positional]
    by: Literal["task", "outcome", "operator", "policy_version", "fraction"] = "fraction"
    fraction: float = 0.9
    """Share of folder `a`, decided by each uuid's hash; `b` gets the rest."""

    def run(self) -> None:
        with _Bar() as bar:
            parts = copying.split(
                self.store, self.target, by=self.by, fraction=self.fraction, progress=bar
            )
        for name, uuids in parts.items():
            print(f"{self.target}/{name}  {len(uuids)} episodes copied")


@dataclass(frozen=True)
class Stats:
    """Normalisation statistics of vectors and the action, as JSON."""

    store: Location
    keys: tuple[str, ...] = field(default_factory=tuple)
    """Features to measure; default all vectors and the action."""

    def run(self) -> None:
        view = FleetView(self.store)
        found = stats.normalisation(view, keys=self.keys or None)
        _print({key: asdict(value) for key, value in found.items()})


@dataclass(frozen=True)
class Convert:
    """Converts between stores and LeRobot v3 datasets, diffusion_policy zarr folders, MCAP bags.

    After an interruption or a kill, the same command goes on.
    """

    kind: Annotated[
        Literal["to-lerobot", "from-lerobot", "to-zarr", "from-zarr", "from-mcap"],
        tyro.conf.Positional,
    ]
    source: Annotated[str, tyro.conf.Positional]
    target: Annotated[str, tyro.conf.Positional]
    force: bool = False
    """Overwrite what is at the target (outwards only)."""
    images: bool = False
    """to-lerobot: image files instead of video, exact and larger."""
    codec: Literal["jpeg", "png", "raw"] = "jpeg"
    """Into a store: how decoded images are kept."""
    outcome: _Outcome = Outcome.SUCCESS
    """Into a store: for data that does not say."""
    task: str = ""
    """from-zarr, from-mcap: for data that does not name one."""
    control_hz: float = 10.0
    """from-zarr: the format does not say."""
    contract: Path | None = None
    """from-mcap: the cell contract, which names the topics."""

    def run(self) -> None:
        with _Bar() as bar:
            done = self._convert(bar)
        print(f"{len(done)} episodes written to {self.target}")

    def _convert(self, bar: _Bar) -> list[str]:
        source, target = self.source, self.target
        if self.kind == "to-lerobot":
            from vla_post.convert.lerobot_dataset import to_lerobot

            view = FleetView(source)
            videos = not self.images
            return to_lerobot(view, target, use_videos=videos, force=self.force, progress=bar)
        if self.kind == "from-lerobot":
            from vla_post.convert.lerobot_dataset import from_lerobot

            return from_lerobot(
                source, target, outcome=self.outcome, codec=self.codec, progress=bar
            )
        if self.kind == "from-mcap":
            from vla_post.convert.mcap_bag import from_mcap

            if self.contract is None:
                raise UserError("from-mcap needs --contract: it names the topics of the cell")
            return from_mcap(
                source,
                target,
                load_contract(self.contract),
                task=self.task,
                outcome=self.outcome,
                progress=bar,
            )
        from vla_post.convert.diffusion_policy import from_zarr, to_zarr

        if self.kind == "to-zarr":
            return to_zarr(Store(source), target, force=self.force, progress=bar)
        return from_zarr(
            source,
            target,
            control_hz=self.control_hz,
            task=self.task or "task",
            outcome=self.outcome,
            codec=self.codec,
            progress=bar,
        )


sub = tyro.conf.subcommand
store_command = (
    Annotated[Info, sub("info")]
    | Annotated[Ls, sub("ls")]
    | Annotated[Show, sub("show")]
    | Annotated[Verify, sub("verify")]
    | Annotated[Repair, sub("repair")]
    | Annotated[Gc, sub("gc")]
    | Annotated[Relabel, sub("relabel")]
    | Annotated[Delete, sub("delete")]
    | Annotated[Merge, sub("merge")]
    | Annotated[Split, sub("split")]
    | Annotated[Stats, sub("stats")]
    | Annotated[Convert, sub("convert")]
)
