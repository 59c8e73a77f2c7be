"""Speed of the store, each as a ratio within this run. `python benchmarks/bench_store.py
[--quick]`.

Images are 224 x 224 JPEG (quality 90), random access. LeRobotDataset reads the same frames,
converted from the same store (PNG files and video), with its own reader.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg

from trajectory_store import ChunkSampler, FleetView, Source, Store, StoreWriter, Tick
from trajectory_store.contract import parse_contract

CONTRACT = """
schema: vla_post/cell/1
cell: bench
robot: arm
control_hz: 30
observations:
  observation.state:
    {topic: s, type: sensor_msgs/JointState, names: [a, b, c, d, e, f, g], shape: [7], unit: rad}
%s
actions:
  action:
    names: [a, b, c, d, e, f, g]
    unit: rad
    mode: absolute
    limits: {position: [%s]}
tasks:
  pick: {instruction: Pick it, time_limit_s: 100}
"""
CAMERA = """\
  observation.images.%s:
    {topic: %s, type: sensor_msgs/CompressedImage, shape: [%d, %d, 3], unit: rgb8, rate_hz: 30}
"""


def contract(cameras=(), size=(224, 224)):
    blocks = "".join(CAMERA % (c, c, *size) for c in cameras)
    return parse_contract(CONTRACT % (blocks, ", ".join(["[-9, 9]"] * 7)))


def picture(i: int, size=(224, 224)) -> bytes:
    """Smooth shapes and some noise: about 10 kB at 224 x 224."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    base = np.stack([np.sin((x + 5 * i) / 30), np.cos((y - 3 * i) / 40), np.sin((x + y) / 50)], -1)
    noise = np.random.default_rng(i).normal(0, 3, base.shape)
    image = np.clip(base * 90 + 128 + noise, 0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=90)


def rates(work, seconds: float) -> np.ndarray:
    """Calls per second of wall time, and of CPU time of all threads; after one call to warm up.

    On a busy machine only the second says something about the code.
    """
    work()
    n, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.process_time() - cpu < seconds or n == 0:
        work()
        n += 1
    return n / np.array([time.perf_counter() - wall, time.process_time() - cpu])


def both(name: str, found: np.ndarray) -> dict[str, float]:
    return {f"{name}_per_s": found[0], f"{name}_per_cpu_s": found[1]}


def bench_images(folder: Path, seconds: float, lerobot: bool) -> dict[str, float]:
    frames = [picture(i) for i in range(600)]
    with StoreWriter.create_or_open(folder / "images", contract(["front"])) as writer:
        for k in range(6):
            n = 100
            writer.write_episode(
                "pick",
                {
                    "observation.state": np.zeros((n, 7)),
                    "observation.images.front": frames[k * n : (k + 1) * n],
                },
                np.zeros((n, 7)),
                outcome="success",
            )
    out = {"jpeg_bytes": float(np.mean([len(f) for f in frames]))}
    cores = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(cores)
    rng = np.random.default_rng(0)

    def decode_some(numbers) -> None:
        for i in numbers:
            simplejpeg.decode_jpeg(frames[i])

    def bare() -> None:
        list(pool.map(decode_some, rng.integers(0, 600, (cores * 2, 32))))

    options = {"horizon": 16, "batch_size": 64, "next_observation": False}
    store = Store(folder / "images")
    # Alternated, so that a neighbour on the machine slows both alike.
    bares, ours = [], []
    with ChunkSampler(store, workers=cores, prefetch=2, **options) as sampler:
        for _ in range(3):
            bares.append(rates(bare, seconds) * cores * 64)
            ours.append(rates(lambda: next(sampler), seconds) * 64)
    out |= both("bare_decode_frames", np.median(bares, 0))
    out |= both("sampler_items", np.median(ours, 0))
    wall, cpu = np.median(np.array(ours) / np.array(bares), 0)
    out |= {"sampler_over_bare_decode": wall, "sampler_over_bare_decode_of_cpu": cpu}
    if lerobot:
        import torch
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        from vla_post.convert.lerobot_dataset import to_lerobot

        # One thread each: torch's second one would spin on a busy core and inflate its CPU time.
        torch.set_num_threads(1)
        # With the chunk of 16 actions, as our items have it, and as frames alone, which is less
        # work than ours. Turns, as above.
        chunk = {"action": [i / 30 for i in range(16)]}
        datasets = {}
        for kind in ("image", "video"):
            target = folder / kind
            to_lerobot(store, target, use_videos=kind == "video")
            datasets[kind] = LeRobotDataset("local/bench", root=target)
            datasets[f"{kind}_chunk"] = LeRobotDataset(
                "local/bench", root=target, delta_timestamps=chunk
            )
        theirs: dict[str, list[np.ndarray]] = {kind: [] for kind in datasets}
        mine = []
        with ChunkSampler(store, **options) as sampler:
            for _ in range(3):
                mine.append(rates(lambda: next(sampler), seconds) * 64)
                for kind, dataset in datasets.items():
                    one = lambda d=dataset: d[int(rng.integers(0, 600))]  # noqa: E731
                    theirs[kind].append(rates(one, seconds))
        out |= both("sampler_items_one_thread", np.median(mine, 0))
        for kind, found in theirs.items():
            out |= both(f"lerobot_{kind}_items", np.median(found, 0))
        ours_cpu = np.median(mine, 0)[1]
        best = {kind: np.median(found, 0)[1] for kind, found in theirs.items()}
        out["sampler_over_lerobot_chunks_of_cpu"] = ours_cpu / max(
            best["image_chunk"], best["video_chunk"]
        )
        out["sampler_over_lerobot_frames_of_cpu"] = ours_cpu / max(best["image"], best["video"])
    return out


def bench_state(folder: Path, seconds: float) -> dict[str, float]:
    rng = np.random.default_rng(0)
    with StoreWriter.create_or_open(folder / "state", contract()) as writer:
        for _ in range(40):
            values = rng.normal(size=(1000, 7)).clip(-9, 9)
            writer.write_episode("pick", {"observation.state": values}, values, outcome="success")
    with ChunkSampler(Store(folder / "state"), horizon=16, batch_size=256) as sampler:
        return both("state_steps", rates(lambda: next(sampler), seconds) * 256 * 16)


def bench_open(folder: Path) -> dict[str, float]:
    tiny = contract()
    with StoreWriter.create_or_open(folder / "many", tiny, commit_interval_s=60) as writer:
        for _ in range(1000):
            writer.begin_episode("pick")
            writer.append(Tick({"observation.state": np.zeros(7)}, np.zeros(7), Source.HUMAN, 1))
            writer.end_episode("success")
    start = time.perf_counter()
    assert len(Store(folder / "many").episodes) == 1000
    opened = time.perf_counter() - start
    with StoreWriter.create_or_open(folder / "fleet" / "r0", tiny) as writer:
        writer.write_episode(
            "pick", {"observation.state": np.zeros((5, 7))}, np.zeros((5, 7)), outcome="success"
        )
    for i in range(1, 100):
        shutil.copytree(folder / "fleet" / "r0", folder / "fleet" / f"r{i}")
    view = FleetView(folder / "fleet")
    start = time.perf_counter()
    assert not view.refresh()
    return {"open_1000_episodes_s": opened, "refresh_100_idle_s": time.perf_counter() - start}


def bench_append(folder: Path, seconds: float) -> dict[str, float]:
    """3 cameras at 30 Hz, 640 x 480, and 50 Hz ticks, in real time."""
    size = (480, 640)
    cell = contract(["a", "b", "c"], size)
    frames = [picture(i, size) for i in range(8)]
    times: list[float] = []
    with StoreWriter.create_or_open(folder / "append", cell) as writer:
        writer.begin_episode("pick")
        start = time.perf_counter()
        cpu = time.process_time()
        shown = -1
        for i in range(int(seconds * 50)):
            left = start + i / 50 - time.perf_counter()
            if left > 0:
                time.sleep(left)
            observation = {"observation.state": np.full(7, 0.1)}
            if (frame := i * 30 // 50) != shown:
                shown = frame
                observation |= {
                    f"observation.images.{c}": frames[(frame + k) % 8] for k, c in enumerate("abc")
                }
            tick = Tick(observation, np.zeros(7), Source.POLICY, i + 1)
            before = time.perf_counter()
            writer.append(tick)
            times.append(time.perf_counter() - before)
        cpu = (time.process_time() - cpu) / (time.perf_counter() - start)
        writer.end_episode("success")
    p50, p99, worst = np.percentile(times, [50, 99, 100]) * 1e3
    return {"append_p50_ms": p50, "append_p99_ms": p99, "append_max_ms": worst, "core_share": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a second per figure")
    parser.add_argument("--images-only", action="store_true", help="only the image figures")
    parser.add_argument("--no-lerobot", action="store_true", help="skip the comparison")
    arguments = parser.parse_args()
    seconds = 1.0 if arguments.quick else 5.0
    folder = Path(tempfile.mkdtemp())
    try:
        found: dict[str, float] = {}
        if not arguments.images_only:
            found |= bench_append(folder, 4 * seconds)
            found |= bench_open(folder)
            found |= bench_state(folder, seconds)
        found |= bench_images(folder, seconds, not arguments.no_lerobot)
    finally:
        shutil.rmtree(folder)
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["cores"] = len(os.sched_getaffinity(0))
    found["load"] = os.getloadavg()[0]
    rounded = {k: round(float(v), 4) for k, v in found.items()}
    print(json.dumps(rounded | {"python": platform.python_version()}, indent=1))


if __name__ == "__main__":
    main()
