"""A fleet's load on one machine: many writers beside one reader that samples, and unit costs.

    python benchmarks/bench_fleet.py --seconds 600      # 100 writers of states, 10 with a camera
    python benchmarks/bench_fleet.py costs              # bytes, requests and memory of a unit

`load`: every writer is a `StoreWriter` with a store of its own, paced by the wall clock, in a few
processes; the reader refreshes a `FleetView` every second and draws batches without a pause, as a
learner does. At the end each store is read back: every tick that was appended must be there once.
`costs` delivers episodes to a real S3 server and counts what that takes; docs/scale.md goes on from
these figures. Prints one JSON object.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import simplejpeg
import tyro

sys.path.insert(0, str(Path(__file__).parent))

from trajectory_store import (
    ChunkSampler,
    Contract,
    FleetView,
    NothingToSample,
    Source,
    Store,
    StoreWriter,
    Tick,
)
from trajectory_store.contract import parse_contract
from trajectory_store.uplink import Uplink, UplinkConfig

CAMERA = "observation.images.wrist"
STATE = """
schema: vla_post/cell/1
cell: load
robot: arm
control_hz: {hz}
chunk_horizon: 16
observations:
  observation.state:
    {{topic: joint_states, type: sensor_msgs/JointState, names: {names}, shape: [14], unit: rad}}
{camera}actions:
  action:
    names: {names}
    unit: rad
    mode: absolute
    limits: {{position: {limits}}}
tasks:
  pick: {{instruction: Pick it, time_limit_s: 60}}
"""
WITH_CAMERA = """\
  observation.images.wrist:
    {topic: cameras/wrist, type: sensor_msgs/CompressedImage, shape: [224, 224, 3], unit: rgb8,
     rate_hz: 30}
"""


def contract(hz: float, camera: bool) -> Contract:
    """Two arms of seven joints, and at times a camera."""
    names = [f"j{i}" for i in range(14)]
    text = STATE.format(
        hz=hz, names=names, limits=[[-9, 9]] * 14, camera=WITH_CAMERA if camera else ""
    )
    return parse_contract(text)


def pictures(n: int) -> list[bytes]:
    """JPEG, about 12 kB each: smooth shapes with a little noise, as a cell looks."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:224, :224]
    frames: list[bytes] = []
    for i in range(n):
        base = np.stack([x + 3 * i, y + i, (x + y) // 2 + 2 * i], -1) % 256
        noisy = np.clip(base + rng.normal(0, 6, base.shape), 0, 255).astype(np.uint8)
        frames.append(simplejpeg.encode_jpeg(noisy, quality=85))
    return frames


@dataclass(frozen=True, kw_only=True)
class Load:
    """Writers beside one reader."""

    seconds: float = 600.0
    writers: int = 100
    """State only: 14 joints, 14 actions."""
    cameras: int = 10
    """Writers with one camera of 224 x 224."""
    hz: float = 20.0
    """Ticks a second of each writer; the camera has as many frames."""
    episode_s: float = 20.0
    commit_s: float = 5.0
    """Between commits of a writer."""
    processes: int = 3
    """That hold the writers."""
    batch: int = 64
    pause_s: float = 0.05
    """Of the reader after each batch, in the place of an update; 0: none."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="bench-fleet-") as folder:
            report = self.measure(Path(folder) / "stores")
        print(json.dumps({"load": asdict(self)} | report, indent=2))

    def measure(self, folder: Path) -> dict[str, Any]:
        os.environ["XDG_STATE_HOME"] = str(folder.parent / "state")
        folder.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        ready = context.Barrier(self.processes + 1)
        answers = context.Queue()
        total = self.writers + self.cameras
        children = [
            context.Process(
                target=write, args=(self, folder, range(p, total, self.processes), ready, answers)
            )
            for p in range(self.processes)
        ]
        for child in children:
            child.start()
        ready.wait(timeout=600)
        report = self._read(folder)
        wrote = [answers.get(timeout=600) for _ in children]
        for child in children:
            child.join(timeout=600)
        appended = {name: n for one in wrote for name, n in one["appended"].items()}
        lost, doubled = check(folder, appended)
        return report | {
            "ticks": sum(appended.values()),
            "ticks_lost": lost,
            "ticks_doubled": doubled,
            "writer_lag_max_s": round(max(one["lag_s"] for one in wrote), 2),
            "writers_cpu_cores": round(sum(one["cpu_s"] for one in wrote) / self.seconds, 2),
            "append_p99_ms": round(max(one["append_p99_ms"] for one in wrote), 3),
        }

    def _read(self, folder: Path) -> dict[str, Any]:
        """The learner's side: batches of the states of all, and of the cameras' frames."""
        begun, before, cpu = time.monotonic(), rss_mb(), time.process_time()
        view = FleetView(folder)
        opened_s = time.monotonic() - begun
        refresh: list[float] = []
        renew: list[float] = []
        latency: dict[str, list[float]] = {"states": [], "camera": []}
        samplers: dict[str, ChunkSampler] = {}
        looked, seen = -1e9, 0
        while (now := time.monotonic()) - begun < self.seconds:
            if now - looked >= 1.0:
                looked = now
                found = view.refresh()
                refresh.append(time.monotonic() - now)
                n = len(view.episodes) if found else seen
                if n != seen:
                    seen, now = n, time.monotonic()
                    self._renew(samplers, view)
                    renew.append(time.monotonic() - now)
            for name, sampler in samplers.items():
                now = time.monotonic()
                next(sampler)
                latency[name].append(time.monotonic() - now)
            time.sleep(self.pause_s if samplers else 0.2)
        for sampler in samplers.values():
            sampler.close()
        return {
            "stores": len(view.stores),
            "episodes_seen": seen,
            "view_opened_s": round(opened_s, 3),
            "refresh_s": quantiles(refresh),
            "sampler_renewed_s": quantiles(renew),
            "batches": {name: len(found) for name, found in latency.items()},
            "batch_s": {name: quantiles(found) for name, found in latency.items()},
            "reader_cpu_cores": round((time.process_time() - cpu) / self.seconds, 2),
            "reader_rss_mb": {"before": before, "after": rss_mb(), "peak": peak_mb()},
        }

    def _renew(self, samplers: dict[str, ChunkSampler], view: FleetView) -> None:
        """As the learner does after new episodes; the view's stores have moved already."""
        cameras = [s for s in view.stores if s.frames]
        for name, stores, keys, batch in (
            ("states", view.stores, ["observation.state"], self.batch),
            ("camera", cameras, ["observation.state", CAMERA], self.batch // 4),
        ):
            if name in samplers:
                samplers.pop(name).close()
            with contextlib.suppress(NothingToSample):
                samplers[name] = ChunkSampler(
                    list(stores), horizon=16, batch_size=batch, seed=len(stores), keys=keys
                )


def write(
    load: Load, folder: Path, numbers: range, ready: Any, answers: "multiprocessing.Queue[Any]"
) -> None:
    """A process with some of the writers, a thread each."""
    frames = pictures(40) if load.cameras else []
    writers: list[tuple[int, StoreWriter]] = []
    for number in numbers:
        one = contract(load.hz, camera=number >= load.writers)
        path = folder / f"cell_{number:03d}"
        writers.append(
            (
                number,
                StoreWriter.create_or_open(
                    path, one, commit_interval_s=load.commit_s, durability="process"
                ),
            )
        )
    ready.wait(timeout=600)
    results: list[tuple[str, int, float, list[float]]] = []
    begun = time.monotonic()

    def go(number: int, writer: StoreWriter) -> None:
        rng = np.random.default_rng(number)
        values = rng.normal(size=(512, 14)).astype(np.float32)
        n, lag, took = 0, 0.0, []
        per_episode = int(load.episode_s * load.hz)
        phase = rng.random() / load.hz
        while (due := begun + phase + n / load.hz) - begun < load.seconds:
            now = time.monotonic()
            if due > now:
                time.sleep(due - now)
            lag = max(lag, time.monotonic() - due)
            if n % per_episode == 0:
                if n:
                    writer.end_episode("success")
                writer.begin_episode("pick")
            observation: dict[str, Any] = {"observation.state": values[n % 512]}
            if number >= load.writers:
                observation[CAMERA] = frames[n % 40]
            started = time.perf_counter()
            writer.append(
                Tick(
                    observation=observation,
                    action=values[(n + 1) % 512],
                    source=Source.HUMAN if n % 10 > 7 else Source.POLICY,
                    stamp_ns=(n % per_episode) * 1_000_000,
                    chunk_id=n,  # counts on, so that every tick can be told from every other
                )
            )
            took.append(time.perf_counter() - started)
            n += 1
        if n:
            writer.end_episode("success")
        writer.flush(timeout_s=300)
        writer.close()
        results.append((Path(writer.location).name, n, lag, took))

    cpu = time.process_time()
    threads = [threading.Thread(target=go, args=pair) for pair in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    appends = np.concatenate([np.asarray(took) for *_, took in results])
    answers.put(
        {
            "appended": {name: n for name, n, _, _ in results},
            "lag_s": max(lag for _, _, lag, _ in results),
            "cpu_s": time.process_time() - cpu,
            "append_p99_ms": float(np.quantile(appends, 0.99) * 1e3),
        }
    )


def check(folder: Path, appended: dict[str, int]) -> tuple[int, int]:
    """(ticks lost, ticks that are there twice), of all stores."""
    lost = doubled = 0
    for name, n in appended.items():
        found = Store(folder / name).read("chunk_id", slice(None))
        unique = np.unique(found)
        lost += n - len(unique[unique < n])
        doubled += len(found) - len(unique)
    return lost, doubled


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a unit costs: an episode's delivery to S3, an episode's place in an index."""

    episodes: int = 20
    seconds: float = 20.0
    """Of an episode."""
    hz: float = 30.0
    indexed: int = 4000
    """Episodes of the store whose index is weighed."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="bench-fleet-") as name:
            folder = Path(name)
            os.environ["XDG_STATE_HOME"] = str(folder / "state")
            report = {
                "costs": asdict(self),
                "delivery_states": self._delivery(folder / "a", camera=False),
                "delivery_one_camera": self._delivery(folder / "b", camera=True),
                "index": self._index(folder / "c"),
            }
        print(json.dumps(report, indent=2))

    def _delivery(self, folder: Path, *, camera: bool) -> dict[str, Any]:
        from s3_local import Proxy, S3Server, client_environment

        self._record(folder / "robot", contract(self.hz, camera), self.episodes, camera)
        with S3Server(folder / "s3") as server:
            proxy = Proxy(server.port)
            os.environ.update(client_environment(proxy.port))
            uplink = Uplink(UplinkConfig(store=folder / "robot", dest="s3://fleet/cells"))
            uplink.round()  # makes the store and delivers all
            health, sent = uplink.health[0], proxy.sent
            proxy.requests.clear()
            chunks, cpu, wall = health.delivered_bytes, 0.0, 0.0
            for _ in range(self.episodes):  # one by one, as a robot closes them
                self._record(folder / "robot", contract(self.hz, camera), 1, camera)
                cpu -= time.process_time()
                wall -= time.monotonic()
                assert uplink.round() == 1, health
                cpu += time.process_time()
                wall += time.monotonic()
            counted, sent = dict(proxy.requests), proxy.sent - sent
            chunks = health.delivered_bytes - chunks
            uplink.close()
            view = FleetView("s3://fleet/cells")
            before = proxy.requests.total()
            for _ in range(20):
                view.refresh()
            n = self.episodes
            report = {
                "ticks": int(self.seconds * self.hz),
                "requests_per_episode": {k: round(v / n, 1) for k, v in counted.items()},
                "sent_kb_per_episode": round(sent / n / 1e3, 1),
                "chunks_kb_per_episode": round(chunks / n / 1e3, 1),
                "cpu_ms_per_episode": round(cpu / n * 1e3, 1),
                "wall_ms_per_episode": round(wall / n * 1e3, 1),
                "idle_refresh_requests": (proxy.requests.total() - before) / 20,
            }
            proxy.close()
        return report

    def _record(self, path: Path, one: Contract, episodes: int, camera: bool) -> None:
        rng = np.random.default_rng(0)
        ticks = int(self.seconds * self.hz)
        frames = pictures(30)
        with StoreWriter.create_or_open(path, one, durability="process") as writer:
            for _ in range(episodes):
                walk = np.cumsum(rng.normal(0, 0.01, (ticks, 14)), axis=0).astype(np.float32)
                observation: dict[str, Any] = {"observation.state": walk}
                if camera:
                    observation[CAMERA] = [frames[i % 30] for i in range(ticks)]
                writer.write_episode("pick", observation, walk, outcome="success")
            writer.flush(timeout_s=600)

    def _index(self, path: Path) -> dict[str, Any]:
        one = contract(self.hz, camera=False)
        observation = {"observation.state": np.zeros((5, 14), np.float32)}
        with StoreWriter.create_or_open(path, one, durability="process") as writer:
            for _ in range(self.indexed):
                writer.write_episode(
                    "pick", observation, np.zeros((5, 14), np.float32), outcome="success"
                )
            writer.flush(timeout_s=600)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        store = Store(path)
        assert len(store.episodes) == self.indexed
        table = tracemalloc.get_traced_memory()[0]
        sampler = ChunkSampler(store, horizon=16, batch_size=64, seed=0)
        index = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        now = time.process_time()
        Store(path).episodes  # noqa: B018 - reads the table
        parsed = time.process_time() - now
        sampler.close()
        n = self.indexed
        return {
            "episodes": n,
            "table_bytes_per_episode": round((table - before) / n),
            "sampler_bytes_per_episode": round((index - table) / n),
            "read_us_per_episode": round(parsed / n * 1e6, 1),
        }


def quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4), "max": round(max(values), 4)}


def rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 1e6, 1)


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)


Command = (
    Annotated[Load, tyro.conf.subcommand("load")] | Annotated[Costs, tyro.conf.subcommand("costs")]
)

if __name__ == "__main__":
    words = sys.argv[1:]
    known = {"load", "costs", "-h", "--help"}
    tyro.cli(Command, args=words if words and words[0] in known else ["load", *words]).run()
