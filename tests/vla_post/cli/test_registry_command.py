"""`vla-post registry` for people: what it shows and what it refuses."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import sim
from trajectory_store.contract import load_contract
from vla_post.cli.main import main
from vla_post.export.registry import Registry
from vla_post.policies.checkpoint import write_card


@pytest.fixture
def root(tmp_path) -> str:
    """Four versions; the third is active."""
    contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    registry = Registry(tmp_path / "registry")
    for i in range(4):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file({"w": np.full(3, i, np.float32)}, folder / "model.safetensors")
        write_card(folder, kind="test", contract=contract, statistics={})
        registry.publish(folder, contract=contract, learner_step=10 * i, promote=i < 3)
    return str(registry.root)


def test_a_version_from_canary_to_rollback(root, capsys):
    def say(*words: str) -> str:
        main(["registry", words[0], root, *words[1:]])
        return capsys.readouterr().out

    assert "v000004 is a canary on 50% of the cells and on cell_9" in say(
        "canary", "4", "--share", "0.5", "--cells", "cell_9"
    )
    shown = say("list")
    marks = {line.split()[1]: line[0] for line in shown.splitlines() if line[2:3] == "v"}
    assert marks["v000003"] == "*"
    assert marks["v000004"] == "c"
    assert "on 50% of the cells" in shown
    assert "no canary any more" in say("withdraw", "--reason", "slow")
    assert "x v000004" in say("list")
    assert "v000004 is active" in say("activate", "v4")
    assert "v000003 is active and pinned" in say("rollback", "--reason", "worse")
    assert "x v000004" in say("list")
    assert "rollback worse" in say("show", "3")
    # The newest stays, the active one, and the one that a rollback would lead to.
    assert "1 versions deleted: v000001" in say("prune", "--keep", "1")
    assert Registry(root).numbers() == [2, 3, 4]


def test_mistakes_are_one_line(root, capsys):
    for words, problem in [
        (["canary", root, "4"], "a canary needs a share"),
        (["canary", root, "3", "--share", "1"], "beside itself"),
        (["canary", root, "9", "--share", "1"], "no version v000009"),
        (["withdraw", root], "no canary is out"),
        (["prune", root, "--keep", "0"], "keep is 0"),
        (["list", root + "-none"], "no such registry"),
        (["list", "gs://bucket/x"], "a store is a local folder or s3://"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main(["registry", *words])
        assert caught.value.code == 1
        shown = capsys.readouterr().err
        assert problem in shown
        assert "Traceback" not in shown
