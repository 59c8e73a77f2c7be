"""Latency of eager PyTorch, torch.compile and ONNX Runtime (1 and 2 threads), in one run.

    OMP_NUM_THREADS=1 python benchmarks/bench_export.py --kinds chunk_flow smolvla_tiny

The ways are measured in turns, one chunk each, so that other load on the machine hits them alike;
ratios of medians of one run are comparable, bare times say more about the machine. Policies have
random weights: the speed does not depend on them. Writes a Markdown table to stdout.
"""

import argparse
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTRACTS = Path(__file__).parents[1] / "sim" / "contracts"
SEES_VECTORS = ("chunk_flow",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["chunk_flow", "smolvla_tiny"])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(
        "| policy | steps | way | p50 ms | p99 ms | chunks/s | x eager | export s | MB | RSS MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        for steps in options.steps:
            try:
                rows = measure(kind, steps, options.repeats, compiled=not options.no_compile)
            except Exception as error:  # one policy that does not export must not hide the others
                print(
                    f"| {kind} | {steps} | {type(error).__name__}: {str(error)[:120]} |", flush=True
                )
                continue
            for row in rows:
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


def measure(kind: str, steps: int, repeats: int, *, compiled: bool) -> list[tuple[Any, ...]]:
    import torch

    from trajectory_store.contract import load_contract
    from vla_post.export.onnx import ExportConfig, export_policy
    from vla_post.export.onnx_policy import OnnxPolicy
    from vla_post.export.runtime import TorchPolicy
    from vla_post.policies.build import build_policy

    torch.set_num_threads(1)
    file = "metaworld_state.yaml" if kind in SEES_VECTORS else "metaworld_pixels.yaml"
    contract = load_contract(CONTRACTS / file)
    random = np.random.default_rng(0)
    sizes = {k: f.shape for k, f in contract.vectors.items()} | {"action": (contract.action.size,)}
    statistics = {
        key: {
            "mean": np.zeros(size),
            "std": np.ones(size),
            "min": -np.ones(size),
            "max": np.ones(size),
            "q01": -np.ones(size),
            "q99": np.ones(size),
        }
        for key, size in sizes.items()
    }
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
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        checkpoint = build_policy(kind, contract, statistics).save(Path(folder) / "checkpoint")
        ways: dict[str, Callable[[int], Any]] = {}
        exports: dict[str, tuple[float, float]] = {}
        eager = TorchPolicy(checkpoint)
        eager.policy.head.denoising_steps = steps

        def ask(policy: Any) -> Callable[[int], Any]:
            return lambda seed: policy.act(*probes[seed % len(probes)], seed)

        ways["eager"] = ask(eager)
        for layout in ("unrolled", "steps"):
            config = ExportConfig(layout=layout, denoising_steps=steps)
            if layout == "steps" and not eager.takes_previous:
                continue
            report = export_policy(checkpoint, Path(folder) / layout, probes, config)
            exports[layout] = (report.export_s, report.file_mb)
            for threads in (1, 2):
                name = f"onnx {layout}, {threads} thread{'s' if threads > 1 else ''}"
                ways[name] = ask(OnnxPolicy(report.folder, threads=threads))
        if compiled:
            try:
                ways["torch.compile"] = compile_policy(checkpoint, steps, ask)
            except Exception as error:
                print(f"{kind}: torch.compile: {type(error).__name__}", file=sys.stderr)
        times = {name: np.zeros(repeats) for name in ways}
        for repeat in range(-3, repeats):
            for name, way in ways.items():
                started = time.perf_counter()
                way(repeat % 1000)
                if repeat >= 0:
                    times[name][repeat] = time.perf_counter() - started
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    base = float(np.median(times["eager"]))
    rows: list[tuple[Any, ...]] = []
    for name, seconds in times.items():
        p50, p99 = np.quantile(seconds, [0.5, 0.99])
        export_s, mb = next((v for k, v in exports.items() if k in name), (0.0, 0.0))
        extra = (f"{export_s:.0f}", f"{mb:.1f}") if mb else ("", "")
        rows.append(
            (
                *(kind, steps, name, f"{p50 * 1e3:.2f}", f"{p99 * 1e3:.2f}"),
                *(f"{1 / seconds.mean():.0f}", f"{base / p50:.1f}", *extra, f"{rss:.0f}"),
            )
        )
    return rows


def compile_policy(
    checkpoint: Path, steps: int, ask: Callable[[Any], Callable[[int], Any]]
) -> Callable[[int], Any]:
    """The velocity through torch.compile: the part that runs once per denoising step."""
    import torch

    from vla_post.export.runtime import TorchPolicy

    policy = TorchPolicy(checkpoint)
    head: Any = policy.policy.head
    head.denoising_steps = steps
    name = "velocity" if hasattr(head, "velocity") else "sample"
    setattr(head, name, torch.compile(getattr(head, name)))
    way = ask(policy)
    way(0)
    return way


if __name__ == "__main__":
    main()
