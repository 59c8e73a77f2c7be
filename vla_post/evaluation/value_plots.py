"""Figures of a critic: values along an episode beside what happened, and calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trajectory_store import Source
from vla_post.evaluation.plots import ACCENT, HUMAN, POLICY

DRIVERS = {Source.HUMAN: ("a person drives", HUMAN), Source.SCRIPTED: ("demonstration", ACCENT)}


@dataclass(frozen=True, kw_only=True)
class ValueTrace:
    """What a critic says along one episode; n judged ticks, T ticks, K heads."""

    title: str
    tick: np.ndarray
    """(n,) that were judged."""
    q: np.ndarray
    """(n, K) of the recorded chunk that begins there."""
    value: np.ndarray
    """(n,) of the policy's own chunks there."""
    realised: np.ndarray
    """(n,) return that the episode went on to get."""
    source: np.ndarray
    """(T,) `Source` of every tick."""
    control_hz: float
    frames: Sequence[np.ndarray] = ()
    """Pictures (height, width, 3), evenly spread over the episode."""
    states: np.ndarray | None = None
    """(T, D) to draw where there are no pictures."""
    state_names: Sequence[str] = ()


def value_trace(trace: ValueTrace, path: Path) -> Path:
    """Q and V along an episode, above its film strip or its state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    top, below = figure.subplots(2, 1, height_ratios=(3, 1.5 if len(trace.frames) else 2))
    seconds = trace.tick / trace.control_hz
    _shade(top, trace)
    q = trace.q.mean(axis=1)
    top.fill_between(seconds, trace.q.min(axis=1), trace.q.max(axis=1), color=POLICY, alpha=0.2)
    top.plot(seconds, q, color=POLICY, label="Q of what was done (heads: band)")
    top.plot(seconds, trace.value, color="#1b1f24", linestyle="--", label="V of the policy")
    top.plot(seconds, trace.realised, color="#8a949e", linewidth=0.9, label="return that followed")
    top.set(title=trace.title, ylabel="value", xlim=(0, len(trace.source) / trace.control_hz))
    top.legend(frameon=False, fontsize=8, loc="best")
    top.spines[["top", "right"]].set_visible(False)
    if len(trace.frames):
        strip = np.concatenate([np.asarray(f) for f in trace.frames], axis=1)
        below.imshow(strip, aspect="auto", extent=(0, len(trace.source) / trace.control_hz, 0, 1))
        below.set(yticks=[], xlabel="s")
    elif trace.states is not None:
        _shade(below, trace)
        every = np.arange(len(trace.states)) / trace.control_hz
        for column, name in zip(trace.states.T, trace.state_names, strict=False):
            below.plot(every, column, linewidth=1.0, label=name)
        below.set(xlabel="s", xlim=(0, len(trace.source) / trace.control_hz))
        below.legend(frameon=False, fontsize=7, ncols=4, loc="best")
        below.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def calibration_plot(
    bins: Sequence[tuple[float, float, int]], path: Path, *, title: str = ""
) -> Path:
    """Mean value against mean return of equally filled groups; calibrated means on the diagonal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes: Any = figure.subplots()
    value, realised, count = np.array(bins, float).T
    low, high = min(value.min(), realised.min()), max(value.max(), realised.max())
    axes.plot([low, high], [low, high], color="#b8c4cf", linewidth=1)
    axes.plot(value, realised, "o-", color=POLICY)
    axes.set(
        xlabel="value that the critic gave",
        ylabel="return that followed",
        title=title or f"{int(count.sum())} states",
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _shade(axes: Any, trace: ValueTrace) -> None:
    """Where a person or a script drove; each kind labelled once."""
    edges = np.flatnonzero(np.diff(trace.source.astype(int))) + 1
    for start, stop in zip((0, *edges), (*edges, len(trace.source)), strict=True):
        kind = DRIVERS.get(Source(int(trace.source[start])))
        if kind is not None:
            seen = {text for _, text in zip(*axes.get_legend_handles_labels(), strict=True)}
            label = kind[0] if kind[0] not in seen else None
            axes.axvspan(
                start / trace.control_hz,
                stop / trace.control_hz,
                color=kind[1],
                alpha=0.14,
                linewidth=0,
                label=label,
            )
