"""Every family that exports, by hand: tracing them takes minutes on a busy machine."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from trajectory_store.contract import Contract
from vla_post.export.card import Layout
from vla_post.export.check import graph_stage, tensorrt_stage
from vla_post.export.onnx import ExportConfig, ExportError, export_policy
from vla_post.export.onnx_policy import OnnxPolicy
from vla_post.export.parity import Probe
from vla_post.export.runtime import TorchPolicy

from ..policies.cells import PIXELS, build

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
@pytest.mark.parametrize(
    ("kind", "layout", "dynamic"),
    [
        ("demo", "unrolled", False),
        ("act_tiny", "unrolled", False),
        ("diffusion_tiny", "unrolled", False),
        ("pi0_tiny", "unrolled", False),
        ("chunk_flow_transformer", "unrolled", False),
        ("smolvla_tiny", "steps", False),
        ("pi0_tiny", "steps", False),
        ("chunk_flow_transformer", "steps", True),
    ],
)
def test_kinds_with_cameras_export_into_clean_graphs(
    kind: str, layout: Layout, dynamic: bool, tmp_path: Path
):
    """Equal to PyTorch, afresh and continuing a running chunk; nothing that TensorRT lacks or is
    slow at: no control flow, no int64 or float64 arithmetic, no ScatterND."""
    checkpoint = DEMO if kind == "demo" else build(kind, PIXELS).save(tmp_path / "checkpoint")
    reference = TorchPolicy(checkpoint)
    contract = reference.policy.contract
    config = ExportConfig(layout=layout, dynamic_batch=dynamic)
    report = export_policy(checkpoint, tmp_path / "export", probes(contract), config)
    print(f"{kind} {layout}: {report.parity}, traced in {report.export_s:.0f} s")
    assert report.parity.max_error < 1e-4
    assert report.parity.cosine > 0.99999
    assert report.card.takes_previous == (kind not in ("act_tiny", "diffusion_tiny"))

    levels = {"ok", "warning"} if dynamic else {"ok"}
    for name in report.card.graphs:
        file = tmp_path / "export" / name
        onnx.checker.check_model(onnx.load(file), full_check=True)
        findings, facts = graph_stage(file)
        assert {f.level for f in findings} <= levels, [str(f) for f in findings]
        assert [f.text for f in findings if f.level == "warning" and "dynamic" not in f.text] == []
        assert "ScatterND" not in facts["operators"]
        findings, facts = tensorrt_stage(file)  # "skipped" without the extra
        print(f"{kind} {name}: {facts} {[str(f) for f in findings]}")
        assert all(f.level != "error" for f in findings), [str(f) for f in findings]

    exported = OnnxPolicy(tmp_path / "export", contract=contract)
    observation, text = probes(contract, 1)[0]
    overlaps: list[dict[str, Any]] = [{}]
    if report.card.takes_previous:
        overlaps.append({"previous": np.full((10, contract.action.size), 0.3, np.float32)})
        overlaps.append(overlaps[1] | {"delay": 4})
    chunks = [exported.act(observation, text, 9, **overlap) for overlap in overlaps]
    for overlap, chunk in zip(overlaps, chunks, strict=True):
        expected = reference.act(observation, text, 9, **overlap)
        np.testing.assert_allclose(chunk, expected, atol=1e-4)
    for free, led in pairwise(chunks):
        assert np.abs(free - led).max() > 1e-2
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
