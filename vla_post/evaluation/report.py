"""The HTML report of a run: one file without outside references, readable in ten years."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Frames of one episode, side by side."""

    frames: Sequence[UInt8[np.ndarray, "height width 3"]]
    caption: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    heading: str
    svg: Path
    caption: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page shows; strings are shown as they are, escaped by the template."""

    title: str
    verdict: Mapping[str, Any]
    """`text`, `conclusion`, `improved` (bool)."""
    summary: str
    first: int
    last: int
    evaluation: Sequence[Mapping[str, Any]]
    evaluation_note: str
    versions: Sequence[Mapping[str, Any]]
    command: str
    facts: Mapping[str, Any]
    figures: Sequence[Figure] = field(default_factory=tuple)
    strips: Sequence[Strip] = field(default_factory=tuple)
    export: Mapping[str, Any] = field(default_factory=dict)


def film_strip(
    frames: Sequence[UInt8[np.ndarray, "height width 3"]], *, count: int = 8, gap: int = 2
) -> bytes:
    """PNG of `count` frames spread evenly over the episode, the last one always included."""
    from PIL import Image

    if not frames:
        raise ValueError("an episode without frames has no film strip")
    picks = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    height, width, _ = frames[0].shape
    canvas = np.full((height, len(picks) * (width + gap) - gap, 3), 255, np.uint8)
    for place, index in enumerate(picks):
        left = place * (width + gap)
        canvas[:, left : left + width] = frames[index]
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_report(report: Report, path: Path) -> Path:
    """Renders `report` to `path`; figures and strips are embedded."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("vla_post.evaluation", "."),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
    )
    page = environment.get_template("report.html").render(
        title=report.title,
        verdict=report.verdict,
        summary=report.summary,
        first=report.first,
        last=report.last,
        evaluation=report.evaluation,
        evaluation_note=report.evaluation_note,
        versions=report.versions,
        command=report.command,
        facts=report.facts,
        export=report.export,
        figures=[
            # Our own drawing: the SVG element without the XML header that matplotlib writes.
            {
                "heading": f.heading,
                "caption": f.caption,
                "svg": Markup(f.svg.read_text()[f.svg.read_text().index("<svg") :]),
            }
            for f in report.figures
        ],
        strips=[
            {
                "png": base64.b64encode(film_strip(s.frames)).decode(),
                "caption": s.caption,
                "alt": s.alt,
            }
            for s in report.strips
        ],
    )
    path.write_text(page, encoding="utf-8")
    return path
