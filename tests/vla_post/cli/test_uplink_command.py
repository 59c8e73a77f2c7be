"""`vla-post uplink` as a person or a timer calls it."""

import json
import os

import numpy as np
import pytest

import sim
from trajectory_store import Store, StoreWriter, load_contract
from vla_post.cli.main import main


@pytest.fixture
def robot(tmp_path):
    """A store with three episodes that are closed and one that runs."""
    contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    observation = {k: np.zeros((4, *f.shape)) for k, f in contract.vectors.items()}
    folder = tmp_path / "stores" / "cell_1"
    with StoreWriter.create_or_open(folder, contract) as writer:
        for i in range(3):
            writer.write_episode(
                next(iter(contract.tasks)),
                observation,
                np.full((4, contract.action.size), i),
                outcome="success",
            )
        writer.begin_episode(next(iter(contract.tasks)))
        writer.flush()
        yield folder
        writer.end_episode("aborted")


def test_once_and_status(robot, tmp_path, capsys):
    fleet = str(tmp_path / "fleet")
    with pytest.raises(SystemExit):
        main(["uplink", str(robot), "--status"])
    assert "no uplink has delivered" in capsys.readouterr().err
    main(["uplink", str(robot), fleet, "--once", "--bandwidth", "100"])
    assert "3 delivered, nothing waits" in capsys.readouterr().out
    main(["uplink", str(robot.parent), fleet, "--once"])  # the folder: every store in it
    assert "0 delivered, nothing waits" in capsys.readouterr().out
    assert len(Store(tmp_path / "fleet" / "cell_1").episodes) == 3
    main(["uplink", str(robot), "--status"])
    assert "nothing waits" in capsys.readouterr().out
    health = next(robot.parent.glob(".cell_1.uplink-*.json"))
    assert json.loads(health.read_text())["ok"]


def test_a_destination_that_cannot_be_written_is_one_line_and_status_1(robot, tmp_path, capsys):
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("in the way")
        dest = tmp_path / "file"
    else:
        dest = tmp_path / "closed"
        dest.mkdir(mode=0o500)
    with pytest.raises(SystemExit) as caught:
        main(["uplink", str(robot), str(dest), "--once"])
    assert caught.value.code == 1
    shown = capsys.readouterr()
    assert "3 episodes wait" in shown.out
    assert "Traceback" not in shown.out + shown.err
    with pytest.raises(SystemExit) as caught:
        main(["uplink", str(robot), "--status"])
    assert caught.value.code == 1


def test_mistakes_are_one_line(tmp_path, capsys):
    for words, problem in [
        ([str(tmp_path / "none")], "no DEST"),
        ([str(tmp_path / "none"), str(tmp_path / "x"), "--once"], "no trajectory store there"),
        (["s3://a/b", str(tmp_path)], "reads a local store"),
        ([str(tmp_path), "gs://a/b", "--once"], "another scheme"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main(["uplink", *words])
        assert caught.value.code == 1
        assert problem in capsys.readouterr().err
