"""A SmolVLA of the published size (random weights: the hub is not needed) exports and is equal."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trajectory_store.contract import load_contract
from vla_post.export.check import check_file
from vla_post.export.onnx import ExportConfig, export_policy
from vla_post.export.onnx_policy import OnnxPolicy
from vla_post.policies.lerobot_adapter import LeRobotPolicy, parse_features
from vla_post.policies.smolvla_tiny import TinyVlmConfig, write_vlm_folder

from ..policies.cells import SHIPPED, statistics

pytestmark = pytest.mark.filterwarnings("ignore")


def write_full_size_vlm(folder: Path) -> Path:
    """SmolVLM2-500M's configuration, with our small tokenizer in front of its vocabulary."""
    write_vlm_folder(folder, TinyVlmConfig(image_size=512, patch_size=16, pixel_shuffle=4))
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["vision_config"] |= {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    config["text_config"] |= {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "vocab_size": 49280,
        "max_position_embeddings": 8192,
    }
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_smolvla_of_the_published_size_exports(tmp_path: Path):
    import torch
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    whole = load_contract(SHIPPED / "metaworld_pixels.yaml")
    contract = whole.model_copy(update={"chunk_horizon": 50})
    torch.manual_seed(0)
    inputs, outputs = parse_features(contract)
    config = SmolVLAConfig(
        input_features=inputs,
        output_features=outputs,
        device="cpu",
        push_to_hub=False,
        vlm_model_name=str(write_full_size_vlm(tmp_path / "vlm")),
        load_vlm_weights=False,
        chunk_size=50,
        n_action_steps=contract.execute_steps,
        tokenizer_max_length=48,
    )
    policy = LeRobotPolicy.build(
        config, contract, statistics(contract), vlm_folder=tmp_path / "vlm"
    )
    parameters = sum(p.numel() for p in policy.module.parameters())
    assert 4e8 < parameters < 5e8, parameters
    checkpoint = policy.save(tmp_path / "checkpoint")
    del policy

    random = np.random.default_rng(0)
    probes = [
        (
            {
                key: random.integers(256, size=f.shape, dtype=np.uint8)
                if f.is_image
                else random.normal(size=f.shape).astype(np.float32)
                for key, f in contract.observations.items()
            },
            task.instruction,
        )
        for task in list(contract.tasks.values())[:3]
    ]
    report = export_policy(checkpoint, tmp_path / "export", probes, ExportConfig(layout="steps"))
    print(
        f"{parameters / 1e6:.0f} M parameters, traced in {report.export_s:.0f} s, "
        f"{report.file_mb:.0f} MB, {report.parity}, {report.card.latency_ms}"
    )
    assert report.parity.max_error < 1e-4
    shutil.rmtree(checkpoint)
    exported = OnnxPolicy(tmp_path / "export", contract=contract)
    assert np.isfinite(exported.act(*probes[0])).all()
    for name in report.card.graphs:
        found = check_file(tmp_path / "export" / name)
        print(name, *found.findings, sep="\n  ")
        assert found.ok
