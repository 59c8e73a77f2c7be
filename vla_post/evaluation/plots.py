"""The figures of a run, as SVG files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

POLICY, HUMAN, ACCENT = "#30506b", "#c46a1b", "#0b6e4f"
"""Apart for colour-blind readers too; the same meaning in every figure."""


@dataclass(frozen=True, kw_only=True)
class EpisodeSummary:
    """One episode of a session, in the order of recording."""

    task: str
    version: int
    success: bool
    takeovers: int
    human_share: float
    """Of its control ticks."""

    @property
    def unaided(self) -> bool:
        return self.success and self.takeovers == 0


def learning_curve(episodes: Sequence[EpisodeSummary], path: Path, *, window: int = 12) -> Path:
    """Unaided success and human share over the episodes of a session.

    Args:
        window: episodes that each point of the running means looks back on.
    """
    figure, axes = _figure()
    number = np.arange(1, len(episodes) + 1)
    unaided = np.array([e.unaided for e in episodes], float)
    human = np.array([e.human_share for e in episodes])
    axes.plot(number, _running_mean(unaided, window), color=POLICY, label="success without help")
    axes.plot(number, _running_mean(human, window), color=HUMAN, label="human share of the ticks")
    axes.scatter(number, np.where(unaided > 0, 1.04, -0.04), c=POLICY, s=9, alpha=0.5, linewidths=0)
    for index in range(1, len(episodes)):
        if episodes[index].version != episodes[index - 1].version:
            axes.axvline(index + 0.5, color="#d5dae0", linewidth=0.8, zorder=0)
    axes.set(
        xlabel=f"episode (running mean over {window}; grey lines: the robot adopts a version)",
        ylim=(-0.09, 1.09),
        xlim=(0.5, max(len(episodes), 2) + 0.5),
    )
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    return _save(figure, path)


def loss_curve(
    update: Sequence[int], loss: Sequence[float], published: Sequence[int], path: Path
) -> Path:
    """The learner's loss; marks where versions were published."""
    figure, axes = _figure()
    values = np.asarray(loss, float)
    axes.plot(update, values, color="#b8c4cf", linewidth=0.7)
    axes.plot(update, _running_mean(values, 25), color=POLICY, label="loss, mean over 25 updates")
    for place in published:
        axes.axvline(place, color=ACCENT, linewidth=0.6, alpha=0.5, zorder=0)
    top = float(np.quantile(values, 0.99)) if len(values) else 1.0
    axes.set(xlabel="update (green lines: a version is published)", ylim=(0, 1.1 * top))
    axes.legend(frameon=False)
    return _save(figure, path)


def success_bars(
    names: Sequence[str],
    first: Sequence[tuple[float, float, float]],
    last: Sequence[tuple[float, float, float]],
    path: Path,
    *,
    labels: tuple[str, str],
) -> Path:
    """Success of two versions side by side; each entry is (rate, low, high)."""
    figure, axes = _figure(height=2.8)
    place = np.arange(len(names))
    for shift, side, color, label in (
        (-0.19, first, "#9db2c4", labels[0]),
        (0.19, last, ACCENT, labels[1]),
    ):
        rate, low, high = np.array(side).T
        axes.bar(place + shift, rate, 0.36, color=color, label=label)
        axes.errorbar(
            place + shift,
            rate,
            yerr=[np.maximum(rate - low, 0), np.maximum(high - rate, 0)],
            fmt="none",
            ecolor="#1b1f24",
            elinewidth=1,
            capsize=3,
        )
    axes.set(xticks=place, xticklabels=names, ylim=(0, 1.05), ylabel="success")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    return _save(figure, path)


def _figure(height: float = 3.0):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, of fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def _save(figure: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})  # type: ignore[attr-defined]
    # matplotlib's licence block names addresses; a report refers to nothing outside itself.
    path.write_text(re.sub(r"<metadata>.*?</metadata>", "", path.read_text(), flags=re.DOTALL))
    return path
