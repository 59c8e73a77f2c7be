"""Memory of a sampler over more images than fit in memory.

`python benchmarks/sparse_store.py write FOLDER GB [EPISODES]` records a store of raw 640 x 480
frames with the real writer and copies it until the fleet has that many 10^9 bytes. The frames are
zeros, but for a number at their start, and the zeros are punched out of the files: the files have
their real size, the disk holds a sixtieth. `... sample FOLDER` draws batches with images and prints
the peak memory of its process as JSON.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from trajectory_store import ChunkSampler, FleetView, Source, StoreWriter, Tick
from trajectory_store.contract import parse_contract

HEIGHT, WIDTH = 480, 640
FRAME_BYTES = HEIGHT * WIDTH * 3
CAMERA = "observation.images.front"
CONTRACT = f"""
schema: vla_post/cell/1
cell: sparse
robot: arm
control_hz: 30
observations:
  observation.state: {{topic: s, type: sensor_msgs/JointState, names: [a], shape: [1], unit: rad}}
  {CAMERA}:
    {{topic: c, type: sensor_msgs/Image, shape: [{HEIGHT}, {WIDTH}, 3], unit: rgb8, codec: raw}}
actions:
  action: {{names: [a], unit: rad, mode: absolute, limits: {{position: [[-9, 9]]}}}}
tasks:
  pick: {{instruction: Pick it, time_limit_s: 1000}}
"""
EPISODE_FRAMES = 640
_PUNCH_AND_KEEP_SIZE = 3
_libc = ctypes.CDLL(None, use_errno=True)


def peak_mb() -> float:
    """Of this program's own memory; `ru_maxrss` would count what its parent held when it forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def punch(path: Path) -> None:
    """Frees the zeros of a shard; what reads back is the same."""
    size = path.stat().st_size
    handle = os.open(path, os.O_RDWR)
    try:
        for start in range(0, size - FRAME_BYTES, FRAME_BYTES + 4):
            first = start + 4096
            args = [ctypes.c_long(first), ctypes.c_long(FRAME_BYTES - 8192)]
            if _libc.fallocate(handle, _PUNCH_AND_KEEP_SIZE, *args) != 0:
                raise OSError(ctypes.get_errno(), "this file system cannot punch holes", str(path))
    finally:
        os.close(handle)


EPISODE_GIGABYTES = EPISODE_FRAMES * FRAME_BYTES / 1e9


def write(folder: Path, gigabytes: float, episodes: int = 3) -> None:
    """Stores `000`, `001`, ... of `episodes` each, with about that many 10^9 bytes of frames."""
    record(folder / "000", episodes)
    for number in range(1, round(gigabytes / EPISODE_GIGABYTES / episodes)):
        copy = ["cp", "-r", "--sparse=always", folder / "000", folder / f"{number:03}"]
        subprocess.run(copy, check=True)


def record(folder: Path, episodes: int) -> None:
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    number = frame.reshape(-1)[:8].view(np.int64)
    chunks, done = folder / "chunks", set[str]()
    contract = parse_contract(CONTRACT)
    # No syncs: the zeros are to be gone before the disk sees them.
    with StoreWriter.create_or_open(folder, contract, durability="process") as writer:
        for episode in range(episodes):
            writer.begin_episode("pick")
            for i in range(EPISODE_FRAMES):
                number[0] = episode * EPISODE_FRAMES + i + 1
                writer.append(
                    Tick(
                        {"observation.state": number[:1].astype(np.float32), CAMERA: frame},
                        np.zeros(1),
                        Source.HUMAN,
                        i + 1,
                    )
                )
                if i % 64 == 63:
                    writer.flush()
                    for name in set(os.listdir(chunks)) - done:
                        done.add(name)
                        if (chunks / name).stat().st_size > FRAME_BYTES:
                            punch(chunks / name)
            writer.end_episode("success")


def sample(folder: Path, batches: int = 20) -> dict[str, float]:
    """Draws batches of 16 with images now and next, two threads; checks each frame's number."""
    fleet = FleetView(folder)
    rows = sum(s.rows for s in fleet.stores)
    start = time.perf_counter()
    with ChunkSampler(fleet, horizon=16, batch_size=16, workers=2, prefetch=1, seed=0) as sampler:
        for _ in range(batches):
            batch = next(sampler)
            numbers = batch.observation[CAMERA].reshape(16, -1)[:, :8].copy().view(np.int64)[:, 0]
            assert (numbers == batch.provenance.row + 1).all()
    return {
        "stores": len(fleet.stores),
        "rows": rows,
        "gigabytes": rows * FRAME_BYTES / 1e9,
        "disk_gigabytes": sum(f.stat().st_blocks * 512 for f in folder.glob("*/chunks/*")) / 1e9,
        "peak_mb": peak_mb(),
        "items_per_s": batches * 16 / (time.perf_counter() - start),
    }


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
    else:
        print(json.dumps(sample(Path(sys.argv[2]))))
