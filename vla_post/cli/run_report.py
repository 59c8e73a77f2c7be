"""From a demonstration's run folder to its report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trajectory_store import FleetView, Outcome, Source
from vla_post.evaluation import plots
from vla_post.evaluation.plots import EpisodeSummary
from vla_post.evaluation.report import Figure, Report, Strip, write_report
from vla_post.export.registry import Registry, Version

if TYPE_CHECKING:
    from vla_post.recipes.demo import DemoRecipe


def write_run_report(
    folder: Path,
    *,
    recipe: "DemoRecipe",
    outcome: Mapping[str, Any],
    stages: Mapping[str, float],
    total_s: float,
) -> Path:
    """Writes `report.html` and its figures; returns its path.

    Args:
        outcome: of `vla_post.cli.evaluate.evaluate`, first against last version.
        stages: seconds of each stage.
    """
    card = json.loads((folder / "run.json").read_text())
    episodes = session_episodes(folder / "stores" / "online")
    registry = Registry(folder / "registry")
    versions = registry.versions()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in metrics if "loss" in row]
    pooled = outcome["paired"]["all"]
    first, last = (int(name.removeprefix("v")) for name in outcome["policies"])
    n = pooled["episodes"]
    improved = pooled["difference_interval"][0] > 0
    conclusion = (
        "The interval of the difference excludes zero: it improved."
        if improved
        else "The interval of the difference includes zero: this run does not show an improvement."
    )
    tasks = "task" if len(recipe.tasks) == 1 else "tasks"
    human_ticks = sum(e.human_share for e in episodes) / max(len(episodes), 1)
    report = Report(
        title=f"vla_post demo, {recipe.name.removeprefix('demo_')}, seed {card['seed']}",
        verdict={
            "text": f"Success went from {pooled['first']}/{n} ({pooled['first'] / n:.0%}) to "
            f"{pooled['last']}/{n} ({pooled['last'] / n:.0%}) on {len(recipe.tasks)} {tasks}.",
            "conclusion": conclusion,
            "improved": improved,
        },
        summary=f"{len(episodes)} episodes on the robot, {len(updates)} updates of the learner, "
        f"{len(versions)} versions; the operator drove {human_ticks:.0%} of the ticks; "
        f"{total_s / 60:.1f} minutes altogether.",
        first=first,
        last=last,
        evaluation=[_row(name, pair) for name, pair in _worth_showing(outcome["paired"])],
        evaluation_note="Both versions played the same scenes from the same seeds, alone. Wilson "
        "intervals for the rates, Newcombe's interval for the paired difference, exact McNemar "
        "test. Evaluation scenes are not among those of the demonstrations or of the session.",
        versions=_versions(versions, episodes),
        command=card["command"],
        facts=_facts(card, stages, total_s),
        figures=_figures(folder, outcome, episodes, updates, metrics, first, last),
        strips=_strips(folder / "frames.npz", first, last),
        export=_export(folder / "export" / "policy.json"),
    )
    return write_report(report, folder / "report.html")


def session_episodes(store: Path) -> list[EpisodeSummary]:
    """What the robot did, from its store; interrupted episodes are left out."""
    episodes = [e for e in FleetView(store).episodes if e.outcome is not Outcome.INTERRUPTED]
    return [
        EpisodeSummary(
            task=e.task,
            version=e.policy_version,
            success=e.outcome is Outcome.SUCCESS,
            takeovers=e.interventions,
            human_share=e.ticks_by(Source.HUMAN) / max(len(e), 1),
        )
        for e in sorted(episodes, key=lambda e: e.created_ns)
    ]


def _worth_showing(paired: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every task and their sum; with one task the sum says nothing new."""
    return [(name, pair) for name, pair in paired.items() if name != "all" or len(paired) > 2]


def _row(name: str, pair: Mapping[str, Any]) -> dict[str, Any]:
    n = pair["episodes"]
    return {
        "name": "all tasks" if name == "all" else name,
        "total": name == "all",
        "episodes": n,
        "first": f"{pair['first'] / n:.0%}",
        "first_interval": _interval(pair["first_interval"]),
        "last": f"{pair['last'] / n:.0%}",
        "last_interval": _interval(pair["last_interval"]),
        "difference": f"{pair['difference'] * 100:+.0f}",
        "difference_interval": _interval(pair["difference_interval"], sign=True),
        "p_value": f"{pair['p_value']:.2g}",
    }


def _interval(bounds: tuple[float, float], *, sign: bool = False) -> str:
    low, high = (f"{bound * 100:{'+' if sign else ''}.0f}" for bound in bounds)
    return f"{low} to {high}" + ("" if sign else " %")


def _versions(versions: list[Version], episodes: list[EpisodeSummary]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for version in versions:
        mine = [e for e in episodes if e.version == version.number]
        share = sum(e.human_share for e in mine) / len(mine) if mine else None
        rows.append(
            {
                "version": version.number,
                "step": version.learner_step,
                "episodes": len(mine) or "-",
                "unaided": f"{sum(e.unaided for e in mine)}/{len(mine)}" if mine else "-",
                "takeovers": sum(e.takeovers for e in mine) if mine else "-",
                "human_share": f"{share:.0%}" if share is not None else "-",
            }
        )
    return rows


def _figures(
    folder: Path,
    outcome: Mapping[str, Any],
    episodes: list[EpisodeSummary],
    updates: list[dict[str, Any]],
    metrics: list[dict[str, Any]],
    first: int,
    last: int,
) -> list[Figure]:
    paired = _worth_showing(outcome["paired"])
    names = ["all tasks" if name == "all" else name for name, _ in paired]
    sides = [
        [(pair[side] / pair["episodes"], *pair[f"{side}_interval"]) for _, pair in paired]
        for side in ("first", "last")
    ]
    images = folder / "figures"
    bars = plots.success_bars(
        names, sides[0], sides[1], images / "success.svg", labels=(f"v{first}", f"v{last}")
    )
    out = [
        Figure(
            heading="Success by task",
            svg=bars,
            caption="Bars: share of the evaluation scenes solved alone. Lines: 95 % Wilson "
            "intervals.",
        )
    ]
    if episodes:
        curve = plots.learning_curve(episodes, images / "learning_curve.svg")
        caption = (
            "Every episode of the session, in order. The robot was at work the whole time; dots at "
            "the top are episodes solved without help."
        )
        out.append(Figure(heading="Learning curve", svg=curve, caption=caption))
    if updates:
        published = [int(row["at_update"]) for row in metrics if "published" in row]
        loss = plots.loss_curve(
            [int(row["update"]) for row in updates],
            [float(row["loss"]) for row in updates],
            published,
            images / "loss.svg",
        )
        caption = (
            "Flow-matching loss on the mixture of demonstrations and interventions. It moves with "
            "the data as well as with the policy: new interventions come from hard situations."
        )
        out.append(Figure(heading="Learner", svg=loss, caption=caption))
    return out


def _strips(path: Path, first: int, last: int) -> list[Strip]:
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as data:
        about = json.loads(str(data["about"]))
        strips: list[Strip] = []
        for side, version in (("first", first), ("last", last)):
            success, steps = about[side]
            how = f"success after {steps} steps" if success else f"no success in {steps} steps"
            strips.append(
                Strip(
                    frames=list(data[side]),
                    caption=f"v{version}: {about['task']}, scene {about['seed']}: {how}",
                    alt=f"Film strip of version {version} at {about['task']}: {how}",
                )
            )
    return strips


def _export(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    card = json.loads(path.read_text())
    parity, latency = card["parity"], card["latency_ms"]
    return {
        "file": f"{path.with_name('policy.onnx')} (opset {card['opset']})",
        "parity with PyTorch": f"largest error {parity['max_error']:.2g}, mean "
        f"{parity['mean_error']:.2g} in action units on {parity['observations']} recorded "
        f"observations (bound {parity['bound']:.0e})",
        "latency of a chunk": f"PyTorch {latency['torch']:.1f} ms, ONNX Runtime "
        f"{latency['onnx']:.1f} ms ({latency['torch'] / latency['onnx']:.1f}x), one thread each",
    }


def _facts(card: Mapping[str, Any], stages: Mapping[str, float], total_s: float) -> dict[str, str]:
    return {
        "commit": card["commit"],
        "machine": card["machine"],
        "versions": ", ".join(f"{k} {v}" for k, v in card["versions"].items())
        + f", Python {card['python']}",
        "contract": card["contract_sha256"],
        "time": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages.items())
        + f"; altogether {total_s:.0f} s",
        "files": "run.json, metrics.jsonl, events.jsonl, evaluation.json, stores/, registry/, "
        "export/, logs/",
    }
