"""`vla-post eval`: two policies on the same scenes and seeds, with honest statistics."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trajectory_store.contract import Contract
from vla_post.cli.errors import UserError
from vla_post.export.card import policy_contract
from vla_post.export.registry import open_registry, parse_version

if TYPE_CHECKING:
    from sim.rollout import Case, Result


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Play two policies (or one) on the same seeds and initial states, and compare.

    Name them as versions of a registry (--registry DIR --first 1 --last 12; by default the first
    and the active one) or as folders of checkpoints or exports (--checkpoints A B).
    """

    registry: str | None = None
    first: str | None = None
    last: str | None = None
    checkpoints: tuple[Path, ...] = ()
    """One or two folders of checkpoints or exports, instead of a registry."""
    tasks: tuple[str, ...] = ()
    """All of the contract's tasks by default."""
    episodes: int = 15
    """Per task and policy."""
    seed: int = 50_000
    """Of the first scene of each task; the next ones follow."""
    out: Path | None = None
    """Write the outcome as JSON here too."""
    frames: Path | None = None
    """Write pictures of one episode that changed from failure to success (npz)."""
    threads: int = 1
    ray: str = ""
    """Spread the episodes over a Ray cluster: its address (`auto`, HOST:PORT, ray://HOST:PORT), or
    `local` for one on this machine (extra `ray`). Checkpoints must be visible on all machines."""
    shards: int = 0
    """With --ray: how many tasks share the episodes; 0: one for each CPU of the cluster."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"episodes is {self.episodes}; it must be at least 1")
        if self.shards < 0 or (self.shards and not self.ray):
            raise ValueError(f"shards is {self.shards}; it splits what --ray plays, or is 0")

    def run(self) -> None:
        folders = self._folders()
        outcome = evaluate(
            folders,
            tasks=self.tasks,
            episodes=self.episodes,
            seed=self.seed,
            threads=self.threads,
            frames=self.frames,
            ray=self.ray,
            shards=self.shards,
        )
        if self.out is not None:
            self.out.write_text(json.dumps(outcome, indent=2) + "\n")
        print(as_table(outcome))

    def _folders(self) -> dict[str, Path]:
        """Name -> checkpoint folder, in the order first, last."""
        if bool(self.checkpoints) == (self.registry is not None):
            raise UserError("name either --registry DIR, or --checkpoints A [B]")
        if self.checkpoints:
            if len(self.checkpoints) > 2:
                raise UserError(f"{len(self.checkpoints)} checkpoints; at most two are compared")
            return {
                f"{name}: {folder.name}": folder
                for name, folder in zip("ab", self.checkpoints, strict=False)
            }
        assert self.registry is not None
        registry = open_registry(self.registry)
        active = registry.active()
        if active is None:
            raise UserError(f"{self.registry}: no active version to evaluate")
        last = parse_version(self.last) if self.last is not None else active.number
        first = parse_version(self.first) if self.first is not None else 1
        versions = [registry.verify(number) for number in dict.fromkeys((first, last))]
        return {version.name: registry.path(version.number) for version in versions}


def evaluate(
    folders: Mapping[str, Path],
    *,
    tasks: Sequence[str] = (),
    episodes: int,
    seed: int,
    threads: int = 1,
    frames: Path | None = None,
    ray: str = "",
    shards: int = 0,
) -> dict[str, Any]:
    """Runs every case with every policy; see `Evaluate`.

    Noise comes from each scene's seed, so how the cases are spread changes no outcome.

    Returns:
        `policies`, `tasks` {task: {policy: [outcomes]}}, and with two policies `paired`
        {task or "all": PairedResult.to_dict()}.
    """
    from sim.rollout import Case
    from vla_post.evaluation.paired import PairedResult, wilson_interval

    contract = _common_contract(folders)
    names = list(folders)
    chosen = list(tasks) or list(contract.tasks)
    for task in chosen:
        contract.task(task)
    cases = [
        Case(task, seed + number, name)
        for number in range(episodes)
        for task in chosen
        for name in names
    ]
    done = 0

    def count(number: int = 1) -> None:
        nonlocal done
        done += number
        if sys.stderr.isatty():
            print(f"\r{done}/{len(cases)} episodes", end="", file=sys.stderr, flush=True)

    if ray:
        from vla_post.cli.ray_cluster import spread

        play = spread(ray, shards or None)
        results = play(_play, cases, (dict(folders), threads), on_done=count)
    else:
        results = _play(cases, folders, threads, on_result=lambda _: count())
    if sys.stderr.isatty():
        print(file=sys.stderr)
    by_task: dict[str, dict[str, list[bool]]] = {t: {n: [] for n in names} for t in chosen}
    steps: dict[str, list[int]] = {n: [] for n in names}
    for result in results:
        by_task[result.case.task][result.case.policy].append(result.success)
        if result.success:
            steps[result.case.policy].append(result.steps)
    outcome: dict[str, Any] = {
        "cell": contract.cell,
        "contract_sha256": contract.sha256,
        "policies": names,
        "episodes_per_task": episodes,
        "seed": seed,
        "tasks": by_task,
        "rates": {
            name: _rate([s for t in chosen for s in by_task[t][name]], wilson_interval)
            for name in names
        },
        "median_steps_of_successes": {
            name: float(np.median(values)) if values else None for name, values in steps.items()
        },
    }
    if len(names) == 2:
        pairs: dict[str, PairedResult] = {
            task: PairedResult.from_outcomes(by_task[task][names[0]], by_task[task][names[1]])
            for task in chosen
        }
        pooled = PairedResult.from_outcomes(
            [s for t in chosen for s in by_task[t][names[0]]],
            [s for t in chosen for s in by_task[t][names[1]]],
        )
        outcome["paired"] = {task: pair.to_dict() for task, pair in pairs.items()}
        outcome["paired"]["all"] = pooled.to_dict()
        if frames is not None:
            _film(frames, _load(folders, threads), contract, names, by_task, seed)
    return outcome


def _load(folders: Mapping[str, Path], threads: int) -> dict[str, Any]:
    from vla_post.export.runtime import load_policy

    return {n: load_policy(p, threads=threads).act_batch for n, p in folders.items()}


def _play(
    cases: "Sequence[Case]",
    folders: Mapping[str, Path],
    threads: int,
    on_result: "Callable[[Result], None] | None" = None,
) -> "list[Result]":
    """One result per case, in their order."""
    from sim.rollout import rollout

    contract = _common_contract(folders)
    return rollout(_load(folders, threads), contract, cases, on_result=on_result)


def as_table(outcome: Mapping[str, Any]) -> str:
    """The outcome as a plain table for a terminal."""
    names: list[str] = outcome["policies"]
    lines: list[str] = []
    if "paired" not in outcome:
        name = names[0]
        for task, sides in outcome["tasks"].items():
            lines.append(f"{task:<24} {sum(sides[name])}/{len(sides[name])}")
        low, high = outcome["rates"][name]["interval"]
        rate = outcome["rates"][name]["rate"]
        lines.append(f"{name:<24} {rate:.0%}  95 % interval {low:.0%} to {high:.0%}")
        return "\n".join(lines)
    lines.append(f"{'task':<24} {names[0]:>12} {names[1]:>12}  difference (95 % interval), p")
    for task, pair in outcome["paired"].items():
        n = pair["episodes"]
        low, high = pair["difference_interval"]
        lines.append(
            f"{task:<24} {pair['first']:>9}/{n:<2} {pair['last']:>9}/{n:<2}  "
            f"{pair['difference']:+.0%} ({low:+.0%} to {high:+.0%}), p = {pair['p_value']:.2g}"
        )
    return "\n".join(lines)


def _common_contract(folders: Mapping[str, Path]) -> Contract:
    """The cell that all checkpoints were made for."""
    contract: Contract | None = None
    first = ""
    for name, folder in folders.items():
        found = policy_contract(folder)
        if contract is None:
            contract, first = found, name
        contract.require_same(found, here=first, there=name)
    assert contract is not None
    if not contract.sim:
        raise UserError(
            f"cell {contract.cell!r} is a real robot: evaluate on it with `vla-post up` and the "
            "operator's labels; this command plays simulated cells only"
        )
    return contract


def _rate(outcomes: list[bool], interval: Any) -> dict[str, Any]:
    return {
        "successes": sum(outcomes),
        "episodes": len(outcomes),
        "rate": sum(outcomes) / max(len(outcomes), 1),
        "interval": interval(sum(outcomes), len(outcomes)),
    }


def _film(
    path: Path,
    policies: Mapping[str, Any],
    contract: Contract,
    names: Sequence[str],
    by_task: Mapping[str, Mapping[str, Sequence[bool]]],
    seed: int,
) -> None:
    """Pictures of one case before and after: one that changed to success, if there is one."""
    from sim.rollout import Case, rollout

    every = [(task, number) for task in by_task for number in range(len(by_task[task][names[0]]))]
    gained = [(t, i) for t, i in every if not by_task[t][names[0]][i] and by_task[t][names[1]][i]]
    task, number = (gained or every)[0]
    cases = [Case(task, seed + number, name) for name in names]
    first, last = rollout(policies, contract, cases, frames_every=5)
    np.savez_compressed(
        path,
        first=np.stack(first.frames),
        last=np.stack(last.frames),
        about=json.dumps(
            {
                "task": task,
                "seed": seed + number,
                "first": [first.success, first.steps],
                "last": [last.success, last.steps],
            }
        ),
    )
