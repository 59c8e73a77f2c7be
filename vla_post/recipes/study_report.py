"""Tables of a study: success with intervals, paired differences, what people and machine spent.

Two intervals of each difference: Newcombe's over the paired scenes, and a bootstrap over the
(task, seed) cells, which is the honest one where a method's luck in training is shared by all
scenes of a cell.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_post.evaluation.paired import PairedResult, wilson_interval

Results = Sequence[dict[str, Any]]


def summary(results: Results) -> dict[str, Any]:
    """{method: success, interval, by task, takeovers, human share, seconds} and paired differences
    of every method against the last one run, over the cells that both have."""
    methods = list(dict.fromkeys(r["method"] for r in results))
    tasks = list(dict.fromkeys(r["task"] for r in results))
    rows: dict[str, Any] = {}
    for method in methods:
        mine = [r for r in results if r["method"] == method]
        outcomes = [s for r in mine for s in r["success"]]
        steps = sum(r["robot_steps"] for r in mine)
        rows[method] = {
            "cells": len(mine),
            "success": float(np.mean(outcomes)),
            "interval": wilson_interval(sum(outcomes), len(outcomes)),
            "by_task": {
                t: float(np.mean([s for r in mine if r["task"] == t for s in r["success"]]))
                for t in tasks
                if any(r["task"] == t for r in mine)
            },
            "takeovers": float(np.mean([r["takeovers"] for r in mine])),
            "human_share": sum(r["human_steps"] for r in mine) / steps if steps else None,
            "train_s": float(np.mean([r["train_s"] for r in mine])),
            "wall_s": float(np.mean([r["wall_s"] for r in mine])),
        }
    pairs = {
        f"{last} - {first}": difference(results, first, last)
        for place, last in enumerate(methods)
        for first in methods[:place]
        if first != "start"
    }
    return {"tasks": tasks, "methods": rows, "paired": pairs}


def difference(results: Results, first: str, last: str) -> dict[str, Any]:
    """Paired difference in success of two methods over the cells that both have played."""
    by_cell = {(r["task"], r["seed"], r["method"]): r["success"] for r in results}
    cells = [
        (task, seed)
        for task, seed, method in by_cell
        if method == first and (task, seed, last) in by_cell
    ]
    a = [by_cell[t, s, first] for t, s in cells]
    b = [by_cell[t, s, last] for t, s in cells]
    pair = PairedResult.from_outcomes([s for x in a for s in x], [s for y in b for s in y])
    gaps = np.array([np.mean(y) - np.mean(x) for x, y in zip(a, b, strict=True)])
    random = np.random.default_rng(0)
    means = gaps[random.integers(len(gaps), size=(4000, len(gaps)))].mean(axis=1) if cells else gaps
    return {
        "cells": len(cells),
        "difference": pair.difference,
        "interval_scenes": pair.difference_interval(),
        "interval_cells": tuple(np.quantile(means, (0.025, 0.975)).tolist()) if cells else None,
        "p_value": pair.p_value,
    }


def as_text(found: dict[str, Any]) -> str:
    """Markdown tables."""
    tasks: list[str] = found["tasks"]
    head = ["method", "success (95 %)", *tasks, "takeovers", "human share", "training s", "wall s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in found["methods"].items():
        low, high = row["interval"]
        share = row["human_share"]
        cells = [
            name,
            f"{row['success']:.2f} ({low:.2f}-{high:.2f})",
            *(f"{row['by_task'][t]:.2f}" if t in row["by_task"] else "" for t in tasks),
            f"{row['takeovers']:.0f}",
            "" if share is None else f"{share:.0%}",
            f"{row['train_s']:.0f}",
            f"{row['wall_s']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| difference | cells | points | scenes (95 %) | cells (95 %) | p |"]
    lines.append("|" + "---|" * 6)
    for name, row in found["paired"].items():
        both = [row["interval_scenes"], row["interval_cells"] or (float("nan"),) * 2]
        spans = [f"{100 * low:+.0f} to {100 * high:+.0f}" for low, high in both]
        points = f"{100 * row['difference']:+.0f}"
        cells = [name, str(row["cells"]), points, *spans, f"{row['p_value']:.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
