"""Latency of eager PyTorch, torch.compile and ONNX Runtime (1 and 2 threads), in one run.

    OMP_NUM_THREADS=1 python benchmarks/bench_export.py                       # under ten minutes
    OMP_NUM_THREADS=1 python benchmarks/bench_export.py --policies pi0_tiny:5:10 --budget-s 3600

The ways of one policy are measured in turns, one chunk each, so that other load on the machine hits
them alike: ratios of medians of one run are comparable, bare times say more about the machine. Then
each runs by itself (`alone`): its caches are warm, as on a robot that runs nothing else.
Memory is the peak of a fresh process that loads the policy and makes a few chunks. Policies have
random weights: the speed does not depend on them. What the budget has no time for is listed at the
end. Writes one Markdown table to stdout, progress to stderr.
"""

import argparse
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CONTRACTS = Path(__file__).parents[1] / "sim" / "contracts"
SEES_VECTORS = ("chunk_flow",)
POLICIES = (
    "chunk_flow:5:10",
    "smolvla_tiny:5:10",
    "act_tiny:1",
    "chunk_flow_transformer:5",
    "pi0_tiny:5",
    "diffusion_tiny:10",
)
"""KIND:STEPS[:STEPS]: the first number of denoising steps is exported in both layouts, others in
layout `steps` alone, whose graphs are the same for any number."""
EXPORT_S = {"pi0_tiny": 150.0, "diffusion_tiny": 150.0, "smolvla_tiny": 120.0}
"""What tracing takes at least on a busy core; a policy is not begun without that much time left."""
MEMORY = """
import sys
import numpy as np
from vla_post.export import load_policy
observation, text = np.load(sys.argv[2], allow_pickle=False), sys.argv[3]
policy = load_policy(sys.argv[1])
for seed in range(5):
    policy.act({key: observation[key] for key in policy.observation_keys}, text, seed)
# Not ru_maxrss: that of a child begins with its parent's.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""
HEAD = (
    *("policy", "steps", "way", "p50 ms", "p99 ms", "chunks/s", "x eager"),
    *("alone p50 ms", "x eager alone"),
    *("export s", "file MB", "process MB", "max error"),
)


@dataclass
class Way:
    """One way to make a chunk, and what it cost to get there."""

    act: Callable[[int], Any]
    path: Path
    export_s: float | None = None
    file_mb: float | None = None
    max_error: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="KIND:STEPS")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the exports, which are else deleted")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    end = time.monotonic() + options.budget_s
    rows: list[list[str]] = []
    left_out: list[str] = []
    for text in options.policies:
        kind, *numbers = text.split(":")
        if end - time.monotonic() < EXPORT_S.get(kind, 40.0):
            left_out.append(f"{kind}: no time left of --budget-s {options.budget_s:g}")
            continue
        print(f"{kind} ...", file=sys.stderr, flush=True)
        try:
            with tempfile.TemporaryDirectory(prefix="bench_export_") as temporary:
                folder = Path(temporary) if options.keep is None else options.keep / kind
                folder.mkdir(parents=True, exist_ok=True)
                steps = [int(n) for n in numbers]
                compiled = not options.no_compile
                rows += measure(kind, steps, options.repeats, end, compiled, folder)
        except Exception as error:  # one policy that does not export must not hide the others
            left_out.append(f"{kind}: {type(error).__name__}: {str(error)[:200]}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}\n")  # fmt: skip
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    for line in left_out:
        print(f"\nNot measured: {line}")


def measure(
    kind: str, numbers: list[int], repeats: int, end: float, compiled: bool, folder: Path
) -> list[list[str]]:
    """Rows of the table for one policy."""
    import torch

    from vla_post.export.onnx import ExportConfig, export_policy
    from vla_post.export.onnx_policy import OnnxPolicy
    from vla_post.export.runtime import TorchPolicy

    torch.set_num_threads(1)
    rows: list[list[str]] = []
    checkpoint, probes = make_policy(kind, folder / "checkpoint")
    np.savez(folder / "probe.npz", allow_pickle=False, **probes[0][0])
    eager = TorchPolicy(checkpoint)
    memory: dict[Path, str] = {}

    def ask(policy: Any) -> Callable[[int], Any]:
        return lambda seed: policy.act(*probes[seed % len(probes)], seed)

    def peak_mb(path: Path) -> str:
        if path not in memory:
            words = [sys.executable, "-c", MEMORY, str(path), str(folder / "probe.npz")]
            done = subprocess.run([*words, probes[0][1]], capture_output=True, text=True)
            if done.returncode:
                print(f"{path.name}: no memory figure: {done.stderr[-500:]}", file=sys.stderr)
            memory[path] = "?" if done.returncode else f"{float(done.stdout.split()[-1]):.0f}"
        return memory[path]

    for steps in numbers:
        eager.policy.head.denoising_steps = steps
        ways = {"PyTorch eager": Way(ask(eager), checkpoint)}
        layouts = ["unrolled"] if steps == numbers[0] else []
        if eager.takes_previous:
            layouts.append("steps")
        for layout in layouts:
            place = folder / f"{layout}{steps}"
            config = ExportConfig(layout=layout, denoising_steps=steps)  # type: ignore[arg-type]
            report = export_policy(checkpoint, place, probes, config)
            for threads in (1, 2):
                way = Way(
                    ask(OnnxPolicy(place, threads=threads)), place,
                    report.export_s, report.file_mb, report.parity.max_error,
                )  # fmt: skip
                ways[f"ONNX Runtime {layout}, {threads} thread{'s' * (threads > 1)}"] = way
        if compiled and steps == numbers[0] and end - time.monotonic() > 90.0:
            try:
                ways["torch.compile"] = Way(compile_policy(checkpoint, steps, ask), checkpoint)
            except Exception as error:  # no compiler, or a graph that it does not take
                print(f"{kind}: torch.compile: {type(error).__name__}: {str(error)[:200]}",
                      file=sys.stderr)  # fmt: skip
        times = time_in_turns(ways, repeats, end)
        alone = {name: median_alone(way, repeats) for name, way in ways.items()}
        base = float(np.median(times["PyTorch eager"]))
        for name, way in ways.items():
            p50, p99 = np.quantile(times[name], [0.5, 0.99])
            rows.append(
                [
                    *(kind, str(steps), name, f"{p50 * 1e3:.2f}", f"{p99 * 1e3:.2f}"),
                    *(f"{1 / times[name].mean():.0f}", f"{base / p50:.1f}"),
                    *(f"{alone[name] * 1e3:.2f}", f"{alone['PyTorch eager'] / alone[name]:.1f}"),
                    "" if way.export_s is None else f"{way.export_s:.0f}",
                    "" if way.file_mb is None else f"{way.file_mb:.1f}",
                    "" if name == "torch.compile" else peak_mb(way.path),
                    "" if way.max_error is None else f"{way.max_error:.1g}",
                ]
            )
    return rows


def time_in_turns(ways: dict[str, Way], repeats: int, end: float) -> dict[str, np.ndarray]:
    """Seconds of every way, one chunk each in turn; at least ten rounds, then until the end."""
    rounds: list[list[float]] = []
    for repeat in range(-3, repeats):
        if repeat >= 10 and time.monotonic() > end:
            break
        row: list[float] = []
        for way in ways.values():
            started = time.perf_counter()
            way.act(repeat % 1000)
            row.append(time.perf_counter() - started)
        if repeat >= 0:
            rounds.append(row)
    return dict(zip(ways, np.array(rounds).T, strict=True))


def median_alone(way: Way, repeats: int) -> float:
    """Seconds of a chunk when nothing else runs in between."""
    times: list[float] = []
    for repeat in range(-3, repeats):
        started = time.perf_counter()
        way.act(repeat % 1000)
        if repeat >= 0:
            times.append(time.perf_counter() - started)
    return float(np.median(times))


def make_policy(kind: str, folder: Path) -> tuple[Path, list[tuple[dict[str, np.ndarray], str]]]:
    """A checkpoint with random weights, and observations with instructions to ask it."""
    import torch

    from trajectory_store.contract import load_contract
    from vla_post.policies.build import build_policy

    file = "metaworld_state.yaml" if kind in SEES_VECTORS else "metaworld_pixels.yaml"
    contract = load_contract(CONTRACTS / file)
    random = np.random.default_rng(0)
    sizes = {k: f.shape for k, f in contract.vectors.items()} | {"action": (contract.action.size,)}
    ones = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
    statistics = {
        key: {name: np.full(size, value) for name, value in ones.items()}
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
    torch.manual_seed(0)
    return build_policy(kind, contract, statistics).save(folder), probes


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
