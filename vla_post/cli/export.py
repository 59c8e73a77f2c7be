"""`vla-post export`: a checkpoint as an ONNX file that is proven equal to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trajectory_store import FleetView
from trajectory_store.contract import parse_contract
from vla_post.cli.errors import UserError
from vla_post.policies.checkpoint import CARD, read_card


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a checkpoint to ONNX, and prove it equal on recorded observations."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint folder, or a version of a registry (registry/v000012)."""
    store: str
    """Trajectory store, or a folder of them, whose observations the comparison uses."""
    out: Path
    """Folder to write policy.onnx, policy.json and example.npz to."""
    observations: int = 32
    bound: float = 1e-4
    """Largest difference between ONNX Runtime and PyTorch, in action units."""

    def run(self) -> None:
        contract = parse_contract(
            read_card(self.checkpoint)["contract"], name=str(self.checkpoint / CARD)
        )
        stores = [s for s in FleetView(self.store).stores if contract.sha256 in s.contracts]
        if not any(store.episodes for store in stores):
            raise UserError(
                f"{self.store}: no recorded episode of cell {contract.cell!r} with the "
                "checkpoint's contract; parity is proven on recorded observations, so record or "
                "import one"
            )
        from vla_post.export.onnx import export_policy
        from vla_post.training.data import recorded_observations

        probes = recorded_observations(FleetView.of(stores), contract, self.observations)

        report = export_policy(self.checkpoint, self.out, probes, bound=self.bound)
        parity = report.parity
        print(f"{self.out}: {report.file_mb:.1f} MB, opset {report.opset}")
        print(
            f"parity on {parity.observations} recorded observations: max error "
            f"{parity.max_error:.2g} (bound {parity.bound:.2g}), mean {parity.mean_error:.2g}"
        )
        print(
            f"latency of a chunk on one CPU thread: PyTorch {report.torch_ms:.1f} ms, ONNX Runtime "
            f"{report.onnx_ms:.1f} ms ({report.speedup:.1f}x)"
        )
