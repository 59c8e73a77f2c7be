"""A study in seconds: it resumes, refuses to mix settings, and its critic can be seen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_post.cli.critic import Calibrate, Show
from vla_post.cli.errors import UserError
from vla_post.critics.saved import CriticMissing
from vla_post.recipes.study_aloe import AloeStudy, read_results, run_study
from vla_post.recipes.study_report import as_text, difference, summary

TINY = AloeStudy(
    tasks=("reach",),
    seeds=(0,),
    methods=("dagger", "aloe"),
    demonstrations=2,
    old_failures=2,
    corrected=2,
    old_updates=5,
    start_updates=30,
    rounds=1,
    episodes=2,
    updates=8,
    critic_updates=8,
    batch_size=16,
    evaluation_episodes=3,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("study")
    run_study(TINY, out)
    return out


def test_every_method_plays_the_same_scenes_and_nothing_runs_twice(study: Path):
    results = read_results(study / "results.jsonl")
    assert [r["method"] for r in results] == ["start", "dagger", "aloe"]
    assert all(len(r["success"]) == 3 for r in results)
    aloe = results[-1]
    assert aloe["robot_steps"] > 0
    assert np.isfinite(aloe["last_metrics"]["critic/loss"])
    assert {"value/absolute_error", "value/calibration"} <= aloe["last_metrics"].keys()
    said: list[str] = []
    assert run_study(TINY, study, say=said.append) == results
    assert said == []


def test_results_of_other_settings_are_not_mixed_in(study: Path):
    with pytest.raises(ValueError, match="choose another folder"):
        run_study(replace(TINY, updates=9), study)


def test_the_critic_of_a_checkpoint_draws_an_episode(study: Path, capsys: Any):
    run = study / "reach_0"
    out = study / "critic.png"
    checkpoint = run / "aloe" / "policy"
    Show(checkpoint=checkpoint, store=run / "aloe" / "online", out=out, every=8).run()
    assert out.stat().st_size > 10_000
    capsys.readouterr()
    Calibrate(checkpoint=checkpoint, store=run / "shared" / "old", every=20).run()
    report = json.loads(capsys.readouterr().out)
    assert report["episodes"] == 2
    assert sum(b["count"] for b in report["bins"]) == report["states"]


def test_what_has_no_critic_says_so(study: Path):
    run = study / "reach_0"
    with pytest.raises(CriticMissing, match="vla-post train aloe"):
        Show(checkpoint=run / "dagger" / "policy", store=run / "dagger" / "online").run()
    with pytest.raises(UserError, match="no finished episode"):
        Show(checkpoint=run / "aloe" / "policy", store=run, episode="zzz").run()


def result(method: str, seed: int, success: list[bool]) -> dict[str, Any]:
    numbers = {"takeovers": 3, "human_steps": 10, "robot_steps": 40, "train_s": 1.0, "wall_s": 2.0}
    return {"task": "reach", "seed": seed, "method": method, "success": success} | numbers


def test_differences_are_paired_by_scene_and_only_over_cells_that_both_have():
    results = [
        result("dagger", 0, [True, False, False, False]),
        result("dagger", 1, [False, False, False, False]),
        result("aloe", 0, [True, True, True, False]),
    ]
    found = difference(results, "dagger", "aloe")
    assert (found["cells"], found["difference"]) == (1, 0.5)
    whole = summary(results)
    assert whole["methods"]["dagger"]["success"] == 1 / 8
    assert whole["methods"]["aloe"]["human_share"] == 0.25
    assert "| aloe - dagger | 1 | +50 |" in as_text(whole)


def test_settings_that_make_no_study_are_refused():
    with pytest.raises(ValueError, match="no method"):
        AloeStudy(methods=("sarsa",))
    with pytest.raises(ValueError, match="at least 1"):
        AloeStudy(episodes=0)
