"""`vla-post registry ...`: list, show, activate, try out, roll back, compare, prune and guard
policy versions, in a folder or under s3://."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vla_post.cli.errors import UserError
from vla_post.cli.signals import ends_in_order
from vla_post.export.registry import (
    Registry,
    RegistryError,
    Version,
    open_registry,
    parse_version,
    version_name,
)

if TYPE_CHECKING:
    from vla_post.evaluation.guard import Verdict

Root = Annotated[str, tyro.conf.Positional]
Which = Annotated[str, tyro.conf.Positional]


def _open(root: str) -> Registry:
    if "://" not in root and not Path(root).is_dir():
        raise UserError(f"{root}: no such registry; a run keeps its own in runs/NAME/registry")
    return open_registry(root)


@dataclass(frozen=True, kw_only=True)
class List:
    """All versions, oldest first; the active one is marked with *."""

    root: Root
    """The registry's folder, or s3://bucket/prefix."""

    def run(self) -> None:
        registry = _open(self.root)
        active = registry.active()
        versions = registry.versions()
        if not versions:
            raise UserError(f"{self.root}: holds no version yet")
        canary, rejected = registry.canary, set(registry.rejected)
        print(f"  {'version':<9} {'parent':<9} {'update':>7}  {'made':<19}  metrics")
        for version in versions:
            mark = "*" if active is not None and version.number == active.number else " "
            if canary is not None and version.number == canary.version:
                mark = "c"
            elif version.number in rejected:
                mark = "x"
            parent = version_name(version.parent) if version.parent else "-"
            made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(version.created_ns / 1e9))
            print(
                f"{mark} {version.name:<9} {parent:<9} {version.learner_step:>7}  {made:<19}  "
                + _metrics(version)
            )
        if canary is not None:
            print(f"c: a canary, on {canary.share:.0%} of the cells{_named(canary.cells)}")
        if rejected:
            print("x: rolled back, or failed as a canary")
        if registry.pinned:
            print("pinned: new versions wait until somebody promotes one")


@dataclass(frozen=True, kw_only=True)
class Show:
    """Manifest and history of one version."""

    root: Root
    version: Which

    def run(self) -> None:
        registry = _open(self.root)
        version = registry.version(parse_version(self.version))
        print(f"{version.name}  parent {version.parent}  update {version.learner_step}")
        print(f"contract {version.contract_sha256}")
        for store, snapshot in version.snapshots.items():
            print(f"snapshot {snapshot}  {store}")
        print(f"metrics {_metrics(version)}")
        for name, digest in version.files.items():
            how = "  as a difference" if version.stored.get(name, "").startswith("deltas/") else ""
            print(f"{digest[:16]}  {name}{how}")
        if version.sent_bytes:
            print(f"{version.sent_bytes / 1e6:.2f} MB to download for who has the version before")
        for entry in registry.history():
            if entry["version"] == version.number:
                when = time.strftime("%H:%M:%S", time.localtime(entry["stamp_ns"] / 1e9))
                print(f"{when} {entry['action']} {entry['reason']}".rstrip())


@dataclass(frozen=True, kw_only=True)
class Promote:
    """Make a version the active one, after checking it. Robots adopt it between episodes."""

    root: Root
    version: Which
    reason: str = ""
    pin: bool = False
    """Keep it active when the learner publishes newer ones."""
    force: bool = False
    """Past the registry's gate."""

    def run(self) -> None:
        number = parse_version(self.version)
        registry = _open(self.root)
        version = registry.promote(number, reason=self.reason, pin=self.pin, force=self.force)
        print(f"{version.name} is active{' and pinned' if self.pin else ''}")


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Let some cells run a version while the others stay with the active one."""

    root: Root
    version: Which
    share: float = 0.0
    """Of the cells, chosen by their names' hash."""
    cells: tuple[str, ...] = ()
    """Names (ROS namespaces without the slash), whatever the share."""
    reason: str = ""

    def run(self) -> None:
        number = parse_version(self.version)
        canary = _open(self.root).start_canary(
            number, share=self.share, cells=self.cells, reason=self.reason
        )
        print(
            f"{version_name(number)} is a canary on {canary.share:.0%} of the cells"
            f"{_named(canary.cells)}; `registry promote` or `registry withdraw` ends that"
        )


@dataclass(frozen=True, kw_only=True)
class Withdraw:
    """End the canary: its cells go back to the active version."""

    root: Root
    reason: str = ""

    def run(self) -> None:
        canary = _open(self.root).end_canary(reason=self.reason)
        print(f"{version_name(canary.version)} is no canary any more")


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Delete old versions. The active one, the canary and where a rollback leads stay."""

    root: Root
    keep: int = 20
    """The newest so many stay."""

    def run(self) -> None:
        gone = _open(self.root).prune(self.keep)
        print(f"{len(gone)} versions deleted: {', '.join(map(version_name, gone)) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Back to the version that was active before (or --to); it stays pinned there."""

    root: Root
    to: str | None = None
    reason: str = ""

    def run(self) -> None:
        target = parse_version(self.to) if self.to is not None else None
        version = _open(self.root).rollback(to=target, reason=self.reason)
        print(f"{version.name} is active and pinned; `registry promote` lets versions move again")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check the files and weights of one version, or of all."""

    root: Root
    version: str | None = None

    def run(self) -> None:
        registry = _open(self.root)
        if self.version is not None:
            numbers = [parse_version(self.version)]
        else:
            numbers = [version.number for version in registry.versions()]
        for number in numbers:
            version = registry.verify(number)
            print(f"{version.name}: {len(version.files)} files match, weights are finite")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What differs between two versions: lineage, data, metrics, files."""

    root: Root
    first: Which
    last: Which

    def run(self) -> None:
        registry = _open(self.root)
        a, b = (registry.version(parse_version(v)) for v in (self.first, self.last))
        rows: list[tuple[str, Any, Any]] = [
            ("version", a.name, b.name),
            ("parent", a.parent, b.parent),
            ("update", a.learner_step, b.learner_step),
            ("contract", a.contract_sha256[:12], b.contract_sha256[:12]),
        ]
        for key in sorted(a.metrics.keys() | b.metrics.keys()):
            rows.append((key, _short(a.metrics.get(key)), _short(b.metrics.get(key))))
        for key in sorted(a.snapshots.keys() | b.snapshots.keys()):
            rows.append((f"snapshot of {key}", a.snapshots.get(key), b.snapshots.get(key)))
        for name, left, right in rows:
            print(f"{name:<24} {left!s:<24} {right}")
        same = sum(a.files.get(name) == digest for name, digest in b.files.items())
        print(f"{'files that are equal':<24} {same} of {len(a.files.keys() | b.files.keys())}")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a version must show before robots adopt it: a value, estimated by the learner's critic,
    that beats the active version's by a margin. Held versions can run as a shadow (`up --shadow`).
    """

    root: Root
    margin: float | None = None
    """Share of the active version's value, such as 0.05; 0 asks for strictly better."""
    off: bool = False
    """Adopt every version again."""

    def run(self) -> None:
        if self.off and self.margin is not None:
            raise UserError("give --margin or --off, not both")
        registry = _open(self.root)
        if self.off or self.margin is not None:
            registry.set_gate(None if self.off else self.margin)
        gate = registry.gate
        print("no gate: every version is adopted" if gate is None else f"margin {gate:.0%}")
        for version in registry.versions():
            held = registry.held(version)
            if held is not None:
                print(f"{version.name} held: {held}")


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Watch the fleet's episodes, and take a version back when failures or interventions rise by
    more than --margin above what was before. Prints a JSON line for all that it does; Ctrl-C ends
    it. vla_post/evaluation/guard.py says what is computed.
    """

    root: Root
    stores: str
    """Of the fleet: a folder or s3://bucket/prefix."""
    margin: float = 0.1
    """A rate may rise by so much above the upper confidence limit of the baseline's."""
    false_alarm: float = 0.05
    """Probability of taking back a version that did not exceed that, at most."""
    accept_after: int = 30
    """Episodes without an alarm after which a version counts as good."""
    canary_share: float = 0.0
    """Above 0: every new version runs on this share of the cells first, and is promoted when it
    counts as good."""
    poll_s: float = 5.0
    once: bool = False
    """Look once, print what is seen, and end."""

    def run(self) -> None:
        from trajectory_store import FleetView
        from vla_post.evaluation.guard import Guard as TheGuard
        from vla_post.evaluation.guard import GuardConfig

        config = GuardConfig(
            margin=self.margin,
            false_alarm=self.false_alarm,
            accept_after=self.accept_after,
            canary_share=self.canary_share,
        )
        guard = TheGuard(_open(self.root), FleetView(self.stores), config)
        with ends_in_order():
            try:
                while True:
                    try:
                        self._say(guard.look())
                    except RegistryError as error:
                        if self.once:
                            raise
                        print(f"guard: {error}", file=sys.stderr)
                    if self.once:
                        return
                    time.sleep(self.poll_s)
            except KeyboardInterrupt:
                return

    def _say(self, verdict: "Verdict") -> None:
        if self.once or verdict.action not in ("waits", "watches"):
            print(json.dumps(asdict(verdict)), flush=True)


registry_command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Promote, tyro.conf.subcommand("promote")]
    | Annotated[Promote, tyro.conf.subcommand("activate")]
    | Annotated[Canary, tyro.conf.subcommand("canary")]
    | Annotated[Withdraw, tyro.conf.subcommand("withdraw")]
    | Annotated[Rollback, tyro.conf.subcommand("rollback")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Gate, tyro.conf.subcommand("gate")]
    | Annotated[Prune, tyro.conf.subcommand("prune")]
    | Annotated[Guard, tyro.conf.subcommand("guard")]
)


def _named(cells: tuple[str, ...]) -> str:
    return f" and on {', '.join(cells)}" if cells else ""


def _metrics(version: Version) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in version.metrics.items()) or "-"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
