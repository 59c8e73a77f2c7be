"""The report is one file that shows what it was given, escaped, without outside references."""

from pathlib import Path

import numpy as np
import pytest

from vla_post.evaluation import plots
from vla_post.evaluation.plots import EpisodeSummary
from vla_post.evaluation.report import Figure, Report, Strip, film_strip, write_report

FRAMES = [np.full((24, 32, 3), 10 * i, np.uint8) for i in range(20)]


def test_a_film_strip_spreads_over_the_episode_and_ends_at_its_end():
    import io

    from PIL import Image

    image = np.asarray(Image.open(io.BytesIO(film_strip(FRAMES, count=5, gap=2))))
    assert image.shape == (24, 5 * 34 - 2, 3)
    assert image[0, 0, 0] == 0
    assert image[0, -1, 0] == 190
    assert film_strip(FRAMES[:1], count=5)
    with pytest.raises(ValueError, match="without frames"):
        film_strip([])


def test_the_report_holds_everything_in_one_escaped_file(tmp_path: Path):
    episodes = [
        EpisodeSummary(
            task="reach", version=1 + i // 4, success=i > 2, takeovers=i % 2, human_share=0.1
        )
        for i in range(9)
    ]
    curve = plots.learning_curve(episodes, tmp_path / "curve.svg")
    loss = plots.loss_curve([1, 2, 3], [3.0, 2.0, 1.0], [2], tmp_path / "loss.svg")
    bars = plots.success_bars(
        ["reach"], [(0.2, 0.1, 0.4)], [(1.0, 0.8, 1.0)], tmp_path / "bars.svg", labels=("a", "b")
    )
    row = {
        "name": "reach",
        "total": False,
        "episodes": 9,
        "first": "20%",
        "first_interval": "10 to 40 %",
        "last": "100%",
        "last_interval": "80 to 100 %",
        "difference": "+80",
        "difference_interval": "+50 to +90",
        "p_value": "0.001",
    }
    report = Report(
        title="a run <script>alert(1)</script>",
        verdict={"text": "It rose.", "conclusion": "Shown.", "improved": True},
        summary="nine episodes",
        first=1,
        last=3,
        evaluation=[row],
        evaluation_note="note",
        versions=[],
        command="vla-post demo --seed 3",
        facts={"commit": "abc"},
        figures=[Figure(heading="h", svg=path, caption="c") for path in (curve, loss, bars)],
        strips=[Strip(frames=FRAMES, caption="strip", alt="frames")],
    )
    page = write_report(report, tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 3
    assert "data:image/png;base64," in page
    for text in ("vla-post demo --seed 3", "+50 to +90", "nine episodes", "abc"):
        assert text in page
    for outside in ('src="http', 'href="http', "@import", "url(http"):
        assert outside not in page
