"""`vla-post export`: a checkpoint as an ONNX folder that is proven equal to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vla_post.cli.errors import UserError
from vla_post.export.card import Layout, Precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trajectory_store.contract import Contract
    from vla_post.export.check import CheckReport


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a checkpoint to ONNX, and prove it equal on recorded observations.

    With --check alone: look at any ONNX file with ONNX's checker, ONNX Runtime and, where it is
    installed, TensorRT's own parser and builder.
    """

    checkpoint: Annotated[Path | None, tyro.conf.Positional] = None
    """A checkpoint folder, or a version of a registry (registry/v000012)."""
    store: str = ""
    """Trajectory store, or a folder of them, whose observations the comparison uses."""
    out: Path | None = None
    """Folder to write the graphs, policy.json and example.safetensors to."""
    layout: Layout = "unrolled"
    """One graph with all denoising steps, or an encoder and a step graph that is called n times."""
    precision: Precision = "fp32"
    dynamic_batch: bool = False
    """Any number of observations at once, instead of one."""
    denoising_steps: int | None = None
    """Fewer than the policy's own are faster and less exact."""
    observations: int = 32
    """How many recorded observations to compare (and to calibrate int8) on."""
    bound: float | None = None
    """Largest difference from PyTorch in action units. Default: 1e-4 for fp32, otherwise a share of
    the widest action's range."""
    episodes: int = 0
    """Also play so many simulated episodes a task with the export and with PyTorch, on the same
    seeds; needs a simulated cell. 0 plays none."""
    max_drop: float = 0.1
    """With --episodes: how much lower the export's success may be before it is refused."""
    seed: int = 60_000
    """With --episodes: of the first scene."""
    check: tuple[Path, ...] = ()
    """ONNX files to look at."""

    def __post_init__(self) -> None:
        if self.observations < 1:
            raise ValueError(f"observations is {self.observations}; it must be at least 1")
        if self.episodes < 0 or not 0.0 <= self.max_drop <= 1.0:
            raise ValueError(
                f"episodes is {self.episodes} and max-drop {self.max_drop}; expected at least 0 "
                "episodes and a drop between 0 and 1"
            )
        if self.denoising_steps is not None and self.denoising_steps < 1:
            raise ValueError(f"denoising-steps is {self.denoising_steps}; it must be at least 1")

    def run(self) -> None:
        if self.checkpoint is None and not self.check:
            raise UserError("name a checkpoint to export, or files to --check")
        if self.checkpoint is not None:
            self._export(self.checkpoint)
        bad = [file for file in self.check if not _check(file)]
        if bad:
            raise UserError(f"{', '.join(map(str, bad))}: not ready, see the lines marked error")

    def _export(self, checkpoint: Path) -> None:
        if self.out is None or not self.store:
            raise UserError(
                "an export needs --store (recorded observations to prove it on) and --out"
            )
        from trajectory_store import FleetView
        from vla_post.export.card import is_export, policy_contract

        if is_export(checkpoint):
            raise UserError(f"{checkpoint}: already an export; name the checkpoint it came from")
        contract = policy_contract(checkpoint)
        found = FleetView(self.store).stores
        stores = [s for s in found if contract.sha256 in s.contracts]
        if not any(store.episodes for store in stores):
            raise UserError(
                f"{self.store}: no recorded episode of cell {contract.cell!r} with the "
                "checkpoint's contract; parity is proven on recorded observations, so record or "
                f"import one{nearest(contract, [c for s in found for c in s.contracts.values()])}"
            )
        if self.episodes and not contract.sim:
            raise UserError(
                f"cell {contract.cell!r} is a real robot; --episodes plays simulated cells only"
            )
        from vla_post.export.onnx import ExportConfig, export_policy
        from vla_post.training.data import recorded_observations

        probes = recorded_observations(FleetView.of(stores), contract, self.observations)
        config = ExportConfig(
            layout=self.layout,
            precision=self.precision,
            dynamic_batch=self.dynamic_batch,
            bound=self.bound,
            denoising_steps=self.denoising_steps,
        )
        report = export_policy(checkpoint, self.out, probes, config)
        parity, latency = report.parity, report.card.latency_ms
        print(
            f"{self.out}: {report.card.kind}, {self.layout}, {self.precision}, opset "
            f"{report.card.opset}, {report.file_mb:.1f} MB, traced in {report.export_s:.0f} s"
        )
        print(
            f"parity on {parity.observations} recorded observations: max error "
            f"{parity.max_error:.2g} (bound {parity.bound:.2g}), mean {parity.mean_error:.2g}, "
            f"cosine {parity.cosine:.6f}"
        )
        print(
            f"latency of a chunk on one CPU thread: PyTorch {latency['torch']:.1f} ms, ONNX "
            f"Runtime {latency['onnx']:.1f} ms ({report.speedup:.1f}x)"
        )
        if self.episodes:
            self._play(checkpoint, self.out)

    def _play(self, checkpoint: Path, folder: Path) -> None:
        """Closed loop beside PyTorch; the outcome goes into the card, a drop refuses the export."""
        from vla_post.cli.evaluate import as_table, evaluate
        from vla_post.export.card import POLICY_CARD, read_policy_card, write_policy_card

        outcome = evaluate(
            {"pytorch": checkpoint, "export": folder}, episodes=self.episodes, seed=self.seed
        )
        print(as_table(outcome))
        pair = outcome["paired"]["all"]
        card = read_policy_card(folder)
        closed: dict[str, Any] = {
            "episodes": pair["episodes"],
            "seed": self.seed,
            "pytorch": pair["first"],
            "export": pair["last"],
            "difference": pair["difference"],
            "difference_interval": pair["difference_interval"],
            "p_value": pair["p_value"],
            "max_drop": self.max_drop,
        }
        write_policy_card(folder, card.model_copy(update={"closed_loop": closed}))
        if pair["difference"] < -self.max_drop:
            (folder / POLICY_CARD).rename(folder / "refused.json")
            raise UserError(
                f"{folder}: {pair['last']}/{pair['episodes']} episodes succeed, PyTorch has "
                f"{pair['first']}; a drop of {-pair['difference']:.0%} where "
                f"{self.max_drop:.0%} is allowed. Export in a higher precision or with more "
                "denoising steps; what was measured is in refused.json"
            )


def nearest(wanted: "Contract", found: "Sequence[Contract]") -> str:
    """How the most similar contract that was recorded differs, for an error; empty without any."""
    from trajectory_store.contract import diff

    others = [(diff(wanted, c), c.cell) for c in found if c.sha256 != wanted.sha256]
    if not others:
        return ""
    lines, cell = min(others, key=lambda other: len(other[0]))
    return f". What was recorded of {cell!r} differs in:\n  " + "\n  ".join(lines)


def _check(file: Path) -> bool:
    from vla_post.export.check import check_file

    report: CheckReport = check_file(file)
    print(f"{file}:")
    if report.facts:
        print(f"  inputs  {json.dumps(report.facts.get('inputs', {}))}")
        print(f"  outputs {json.dumps(report.facts.get('outputs', {}))}")
        some = list(report.facts.get("operators", {}).items())
        print("  operators " + ", ".join(f"{name} {count}" for name, count in some))
    for finding in report.findings:
        print(f"  {finding}")
    return report.ok
