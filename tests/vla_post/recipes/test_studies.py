"""Rows of a study: resumed, and never mixed with those of other settings."""

import json
from pathlib import Path

import numpy as np
import pytest

from vla_post.recipes.studies.common import Results, settings_of
from vla_post.recipes.studies.interventions import Study
from vla_post.recipes.studies.transitions import auroc


def test_rows_of_other_settings_never_mix_in(tmp_path: Path):
    study = Study(out=tmp_path / "rows.jsonl", online_share=0.6)
    settings = settings_of(study, "out", "show", "tasks", "seeds", "arms")
    first = Results(study.out, ("task", "arm"), settings)
    first.add({"task": "reach", "arm": "iwr", "success": 0.5})
    again = Results(study.out, ("task", "arm"), settings)
    assert again.has(task="reach", arm="iwr")
    assert not again.has(task="reach", arm="sirius")
    for other in (settings | {"online_share": 0.7}, settings | {"batch_size": 64}):
        with pytest.raises(ValueError, match=r"its rows have .* give the same settings"):
            Results(study.out, ("task", "arm"), other)
    # Rows that do not say how they were measured belong to no study that does.
    row = json.dumps({"task": "push", "arm": "iwr"})
    study.out.write_text(study.out.read_text() + row + "\n")
    with pytest.raises(ValueError, match="None"):
        Results(study.out, ("task", "arm"), settings)


def test_auroc_counts_ties_half():
    assert auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auroc(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5
    assert auroc(np.array([1.0, 2.0]), np.array([1.0, 3.0])) == 0.375
