# pyright: reportMissingParameterType=false
"""`vla-post fleet` with real processes: two cells, one operator."""

import json

import pytest

import sim
from trajectory_store import FleetView, Outcome, Source
from vla_post.cli.main import main

CONTRACT = str(sim.CONTRACTS / "metaworld_state.yaml")


@pytest.mark.ros
def test_two_cells_share_an_operator_and_both_get_their_episodes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("rclpy")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    main(
        [
            *("fleet", "--contract", CONTRACT, "--cells", "2", "--operators", "1", "--drive"),
            *("--episodes", "2", "--seed", "7", "--folder", str(tmp_path)),
        ]
    )
    card = json.loads((tmp_path / "fleet.json").read_text())
    assert set(card["cells"]) == {"sawyer_state_0", "sawyer_state_1"}
    for row in card["cells"].values():
        assert row["episodes"] == 2
    assert card["attention"]["operators"] == 1
    assert card["attention"]["attendances"] == 4
    assert card["attention"]["longest_wait_s"] > 0.0  # one always waits while the other is attended
    shown = capsys.readouterr().out
    assert "1 operators: busy" in shown
    view = FleetView(tmp_path / "stores")
    assert len(view.stores) == 2
    assert len(view.episodes) == 4
    for episode in view.episodes:
        assert episode.outcome is not Outcome.INTERRUPTED
        assert episode.ticks_by(Source.HUMAN) > 0.5 * len(episode)
    # The cells' scenes differ: another seed each.
    starts = [store.read("observation.environment_state", [0])[0] for store in view.stores]
    assert (starts[0] != starts[1]).any()


def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, problem in [
        (["--contract", "so101"], "no simulated cell"),
        (["--contract", CONTRACT], "pass --registry or --policy, or --drive"),
        (["--contract", CONTRACT, "--drive", "--cells", "0"], "cells is 0"),
        (
            ["--contract", CONTRACT, "--drive", "--console", "--first-domain", "3"],
            "a console sees one ROS domain",
        ),
        (
            ["--contract", CONTRACT, "--drive", "--console", "--ray", "local"],
            "which one console cannot see; drop --console",
        ),
    ]:
        with pytest.raises(SystemExit) as caught:
            main(["fleet", *words])
        assert caught.value.code == 1
        assert problem in capsys.readouterr().err
