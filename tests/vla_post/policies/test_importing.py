"""lerobot's own directories as checkpoints for a cell."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trajectory_store.contract import load_contract
from vla_post.cli.main import main
from vla_post.policies.checkpoint import CheckpointError, read_card
from vla_post.policies.heads import UnsupportedPolicy
from vla_post.policies.importing import import_lerobot
from vla_post.policies.lerobot_adapter import LeRobotPolicy

from .cells import PIXELS, SHIPPED, build, draw, sample

OURS, THEIRS = "observation.images.corner", "observation.images.top"


def lerobots(kind: str, folder: Path) -> LeRobotPolicy:
    """Written by lerobot alone, with another name for the camera."""
    policy = build(kind)
    features = {k.replace(OURS, THEIRS): f for k, f in policy.config.input_features.items()}
    policy = build(kind, input_features=features)
    module: Any = policy.module
    module.save_pretrained(folder)
    policy.preprocess.save_pretrained(folder)
    policy.postprocess.save_pretrained(folder)
    return policy


@pytest.mark.parametrize("kind", ["smolvla_tiny", "pi0_tiny", "act_tiny", "diffusion_tiny"])
def test_an_imported_policy_acts_as_in_lerobot(kind: str, tmp_path: Path):
    source = lerobots(kind, tmp_path / "lerobot")
    contract = load_contract(SHIPPED / PIXELS)
    policy = import_lerobot(
        tmp_path / "lerobot",
        contract,
        rename={THEIRS: OURS},
        vlm_folder=source.vlm_folder,
    )
    assert policy.observation_keys == ["observation.state", OURS]
    batch = sample(contract, 2)
    noise, _ = draw(policy, batch, 1)
    ours = policy.act(batch.observation, batch.instruction, noise=noise)
    named = {k.replace(OURS, THEIRS): v for k, v in batch.observation.items()}
    theirs = source.act(named, batch.instruction, noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    again = LeRobotPolicy.load(policy.save(tmp_path / "ours"))
    same = again.act(batch.observation, batch.instruction, noise=noise)
    torch.testing.assert_close(same, ours, rtol=0, atol=0)
    mean = read_card(tmp_path / "ours")["statistics"]["action"]["mean"]
    assert mean == pytest.approx(source.statistics["action"]["mean"].tolist(), rel=1e-6)


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path):
    lerobots("act_tiny", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["input_features"]["observation.state"]["shape"] = [7]
    config["output_features"]["action"]["shape"] = [6]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as refused:
        import_lerobot(tmp_path, load_contract(SHIPPED / PIXELS), rename={"nose": OURS})
    text = str(refused.value)
    assert "--rename names 'nose'" in text
    assert f"--rename {THEIRS}=NAME" in text
    assert "observation.state: the policy sees (7,), the cell declares (4,)" in text
    assert "action: the policy has (6,), the cell (4,)" in text


def test_other_types_and_incomplete_folders_are_refused_with_a_reason(tmp_path: Path):
    contract = load_contract(SHIPPED / PIXELS)
    with pytest.raises(CheckpointError, match="no such folder"):
        import_lerobot(tmp_path / "nowhere", contract)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="migrate_policy_normalization"):
        import_lerobot(tmp_path, contract)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="not the configuration"):
        import_lerobot(tmp_path, contract)
    action = {"action": {"type": "ACTION", "shape": [4]}}
    config = {"type": "tdmpc", "input_features": {}, "output_features": action}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedPolicy, match="world model"):
        import_lerobot(tmp_path, contract)


def test_a_tokenizer_that_is_not_here_is_asked_for(tmp_path: Path):
    lerobots("pi0_tiny", tmp_path)
    steps = json.loads((tmp_path / "policy_preprocessor.json").read_text())
    for step in steps["steps"]:
        if "tokenizer_name" in step["config"]:
            step["config"]["tokenizer_name"] = "google/paligemma-3b-pt-224"
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps(steps))
    with pytest.raises(CheckpointError, match="give --vlm DIR"):
        import_lerobot(tmp_path, load_contract(SHIPPED / PIXELS), rename={THEIRS: OURS})


def test_the_command_imports_freezes_and_shows(tmp_path: Path, capsys):
    source = lerobots("smolvla_tiny", tmp_path / "lerobot")
    arguments = ["policy", "import", str(tmp_path / "lerobot"), "--contract",
                 str(SHIPPED / PIXELS), "--out", str(tmp_path / "ours"), "--rename",
                 f"{THEIRS}={OURS}", "--vlm", str(source.vlm_folder), "--freeze",
                 "model.vlm_with_expert.vlm.*", "--precision", "bfloat16"]  # fmt: skip
    main(arguments)
    main(["policy", "show", str(tmp_path / "ours")])
    shown = capsys.readouterr().out
    assert "smolvla" in shown
    assert shown.splitlines()[1].startswith("kind")  # after the folder; lerobot prints elsewhere
    assert "observation.state" in shown
    assert OURS in shown
    assert "model.vlm_with_expert.vlm.*" in shown
    assert "bfloat16" in shown
    with pytest.raises(SystemExit):
        main(arguments)  # the folder is there now
    assert "not empty" in capsys.readouterr().err
