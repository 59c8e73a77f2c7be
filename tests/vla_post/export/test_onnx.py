"""The exported file equals the policy, and refuses what it was not made for."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trajectory_store.contract import load_contract
from vla_post.export.onnx import ExportError, export_policy
from vla_post.export.runtime import OnnxPolicy, PolicyInputError, TorchPolicy, load_policy
from vla_post.policies.build import build_policy
from vla_post.policies.checkpoint import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")

CONTRACT = load_contract(Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml")
TEXT = CONTRACT.tasks["reach"].instruction


def observation(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        key: random.normal(size=feature.shape).astype(np.float32)
        for key, feature in CONTRACT.observations.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with random weights and odd statistics, and its export."""
    root = tmp_path_factory.mktemp("export")
    random = np.random.default_rng(0)
    statistics: dict[str, dict[str, Any]] = {
        key: {
            "mean": random.normal(size=shape),
            "std": random.uniform(0.5, 2.0, size=shape),
            "min": -np.ones(shape),
            "max": np.ones(shape),
        }
        for key, shape in [
            *((key, feature.shape) for key, feature in CONTRACT.vectors.items()),
            ("action", (CONTRACT.action.size,)),
        ]
    }
    checkpoint = build_policy("chunk_flow", CONTRACT, statistics).save(root / "checkpoint")
    probes = [
        (observation(i), task.instruction)
        for i, task in enumerate(list(CONTRACT.tasks.values())[:6])
    ]
    report = export_policy(checkpoint, root / "onnx", probes)
    assert report.parity.ok
    assert report.parity.observations == 6
    return checkpoint, root / "onnx"


def test_both_backends_give_one_chunk_for_one_seed(folders: tuple[Path, Path]):
    torch_policy, onnx_policy = TorchPolicy(folders[0]), OnnxPolicy(folders[1])
    for seed in range(5):
        a = torch_policy.act(observation(100 + seed), TEXT, seed)
        b = onnx_policy.act(observation(100 + seed), TEXT, seed)
        assert a.shape == (CONTRACT.chunk_horizon, CONTRACT.action.size)
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.abs(a - torch_policy.act(observation(104), TEXT, 77)).max() > 1e-3
    assert np.abs(a - torch_policy.act(observation(104), "Press a button", 4)).max() > 1e-4


def test_an_item_does_not_depend_on_its_batch(folders: tuple[Path, Path]):
    policy = TorchPolicy(folders[0])
    items = [observation(i) for i in range(4)]
    batch = {key: np.stack([item[key] for item in items]) for key in items[0]}
    together = policy.act_batch(batch, [TEXT] * 4, np.arange(4))
    for seed, item in enumerate(items):
        np.testing.assert_allclose(together[seed], policy.act(item, TEXT, seed), atol=1e-5)


def test_wrong_inputs_are_named(folders: tuple[Path, Path]):
    for policy in (load_policy(folders[0]), load_policy(folders[1], "onnx")):
        good = observation(0)
        with pytest.raises(PolicyInputError, match=r"lacks 'observation\.state'"):
            policy.act({k: v for k, v in good.items() if k != "observation.state"}, TEXT)
        with pytest.raises(PolicyInputError, match=r"expected \(4,\)"):
            policy.act(good | {"observation.state": np.zeros(5, np.float32)}, TEXT)
        with pytest.raises(PolicyInputError, match="NaN"):
            policy.act(good | {"observation.state": np.full(4, np.nan, np.float32)}, TEXT)
    with pytest.raises(PolicyInputError, match="knows no instruction 'Fly'"):
        OnnxPolicy(folders[1]).act(observation(0), "Fly")


def test_damaged_exports_are_refused(folders: tuple[Path, Path], tmp_path: Path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders[1], tmp_path / name))

    cut = copy("cut")
    data = (cut / "policy.onnx").read_bytes()
    (cut / "policy.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot load"):
        OnnxPolicy(cut)

    other = copy("other")
    example = dict(np.load(other / "example.npz"))
    example["action"] = example["action"] + 0.01
    np.savez(other / "example.npz", **example)
    with pytest.raises(CheckpointError, match="its own example differs"):
        OnnxPolicy(other)

    card = copy("card")
    text = json.loads((card / "policy.json").read_text()) | {"format": "vla_post/export/9"}
    (card / "policy.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="expected format"):
        OnnxPolicy(card)
    with pytest.raises(CheckpointError, match="not an exported policy"):
        OnnxPolicy(tmp_path)


def test_an_export_without_recorded_observations_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
):
    with pytest.raises(ExportError, match="no recorded observation"):
        export_policy(folders[0], tmp_path / "x", [])


def test_reload_takes_other_weights(folders: tuple[Path, Path], tmp_path: Path):
    policy = TorchPolicy(folders[0])
    before = policy.act(observation(0), TEXT, 0)
    other = Path(shutil.copytree(folders[0], tmp_path / "other"))
    from safetensors.numpy import load_file, save_file

    weights = load_file(other / "model.safetensors")
    save_file({k: v * 0.5 for k, v in weights.items()}, other / "model.safetensors")
    policy.reload(other)
    assert np.abs(policy.act(observation(0), TEXT, 0) - before).max() > 1e-3
    policy.reload(folders[0])
    np.testing.assert_array_equal(policy.act(observation(0), TEXT, 0), before)


def test_a_checkpoint_continues_a_running_chunk(folders: tuple[Path, Path]):
    """Rows that will have run when the new chunk arrives stay nearly as they were."""
    previous = np.full((5, CONTRACT.action.size), 0.8, np.float32)
    for form in ("identity", "jacobian"):
        policy = load_policy(folders[0], rtc_form=form)
        free = policy.act(observation(1), TEXT, 3)
        follows = policy.act(observation(1), TEXT, 3, previous=previous, delay=3)
        assert follows.shape == free.shape
        assert np.abs(follows[:3] - 0.8).mean() < 0.2 * np.abs(free[:3] - 0.8).mean()
        assert np.isfinite(follows).all()
