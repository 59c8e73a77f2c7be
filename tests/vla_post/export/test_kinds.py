"""Every family that exports, by hand: tracing them takes minutes on a busy machine."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from trajectory_store.contract import Contract
from vla_post.export.check import graph_stage
from vla_post.export.onnx import ExportConfig, ExportError, export_policy
from vla_post.export.onnx_policy import OnnxPolicy
from vla_post.export.parity import Probe
from vla_post.export.runtime import TorchPolicy

from ..policies.cells import build

pytestmark = pytest.mark.filterwarnings("ignore")

DEMO = Path(__file__).parents[3] / "vla_post" / "recipes" / "assets" / "demo_pixels"


def probes(contract: Contract, count: int = 4) -> list[Probe]:
    """Noise for pictures: harder than recorded ones for parity, which is what is under test."""
    random = np.random.default_rng(0)
    texts = [task.instruction for task in contract.tasks.values()]
    return [
        (
            {
                key: random.integers(256, size=f.shape, dtype=np.uint8)
                if f.is_image
                else random.normal(size=f.shape).astype(np.float32)
                for key, f in contract.observations.items()
            },
            texts[number % len(texts)],
        )
        for number in range(count)
    ]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_demos_smolvla_exports_into_a_clean_graph(tmp_path: Path):
    reference = TorchPolicy(DEMO)
    contract = reference.policy.contract
    report = export_policy(DEMO, tmp_path / "export", probes(contract))
    assert report.parity.max_error < 1e-4
    assert report.parity.cosine > 0.99999

    findings, facts = graph_stage(tmp_path / "export" / "policy.onnx")
    assert {f.level for f in findings} == {"ok"}, [str(f) for f in findings]
    assert "ScatterND" not in facts["operators"]
    assert facts["inputs"]["observation.images.corner"] == "uint8 (1, 64, 64, 3)"

    exported = OnnxPolicy(tmp_path / "export", contract=contract)
    observation, text = probes(contract, 1)[0]
    previous = np.full((10, 4), 0.3, np.float32)
    for overlap in ({}, {"previous": previous, "delay": 4}):
        np.testing.assert_allclose(
            exported.act(observation, text, 9, **overlap),
            reference.act(observation, text, 9, **overlap),
            atol=1e-4,
        )


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("act_tiny", "unrolled"),
        ("diffusion_tiny", "unrolled"),
        ("pi0_tiny", "unrolled"),
        ("smolvla_tiny", "steps"),
        ("pi0_tiny", "steps"),
    ],
)
def test_other_kinds_and_layouts_export(kind: str, layout: str, tmp_path: Path):
    checkpoint = build(kind).save(tmp_path / "checkpoint")
    contract = TorchPolicy(checkpoint).policy.contract
    config = ExportConfig(layout=layout)
    report = export_policy(checkpoint, tmp_path / "export", probes(contract), config)
    assert report.parity.max_error < 1e-4
    assert report.card.takes_previous == (kind not in ("act_tiny", "diffusion_tiny"))
    for name in report.card.graphs:
        onnx.checker.check_model(onnx.load(tmp_path / "export" / name), full_check=True)
    if not report.card.takes_previous:
        steps = ExportConfig(layout="steps")
        with pytest.raises(ExportError, match="no step graph"):
            export_policy(checkpoint, tmp_path / "x", probes(contract), steps)


@pytest.mark.long
def test_pi05_is_refused_with_the_reason(tmp_path: Path):
    checkpoint = build("pi05_tiny").save(tmp_path / "checkpoint")
    contract = TorchPolicy(checkpoint).policy.contract
    with pytest.raises(ExportError, match="writes the robot's state into its prompt"):
        export_policy(checkpoint, tmp_path / "export", probes(contract))
