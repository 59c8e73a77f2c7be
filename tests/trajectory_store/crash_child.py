"""The process that tests kill, or whose power they cut: records once it reads a line on stdin.

`check` compares what it left behind with what it had to write.
"""

import os
import sys
from pathlib import Path
from uuid import UUID, uuid5

import numpy as np
import simplejpeg

from trajectory_store import Source, Store, StoreWriter, Tick
from trajectory_store.contract import parse_contract

NAMES = UUID(int=1)
CAMERA = "observation.images.wrist"


def expected(life: int, episode: int, n: int) -> dict[str, np.ndarray]:
    """Every value of an episode follows from its number."""
    rng = np.random.default_rng([life, episode])
    return {
        "observation.state": rng.normal(size=(5000, 3)).astype(np.float32)[:n],
        "action": rng.normal(size=(5000, 2)).astype(np.float32)[:n],
        "reward": rng.normal(size=5000).astype(np.float32)[:n],
        "source": rng.integers(0, 4, 5000).astype(np.uint8)[:n],
        "stamp_ns": np.cumsum(rng.integers(1, 10**8, 5000))[:n],
    }


def picture(i: int) -> bytes:
    image = np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image.repeat(4, 0).repeat(4, 1)), 80)


def check(store: Store, newest: int | None = None) -> None:
    """Every row (of the newest episodes) is what its life and episode say."""
    known = {
        str(uuid5(NAMES, f"{life}/{episode}")): (life, episode)
        for life in range(201)
        for episode in range(60)
    }
    frames = [picture(i) for i in range(16)]
    row = 0
    for e in store.table:
        assert (e.first_row, e.uuid in known) == (row, True)
        row = e.end_row
        if newest is not None and e not in store.table[-newest:]:
            continue
        for key, wanted in expected(*known[e.uuid], len(e)).items():
            np.testing.assert_array_equal(store.read(key, e), wanted, err_msg=key)
        if len(e):
            assert store.read_encoded(CAMERA, e) == [frames[i // 3 % 16] for i in range(len(e))]
    assert row == store.rows


def live(path: str, text: str, life: int, progress: int) -> None:
    """Records as fast as it can and writes down, into the file `progress`, what is safe."""
    frames = [picture(i) for i in range(16)]
    writer = StoreWriter.create_or_open(
        path, parse_contract(text), commit_interval_s=0.02, writer=f"life {life}"
    )
    safe = 0
    for episode in range(1000):
        n = 40 + (life * 7 + episode * 13) % 300
        values = expected(life, episode, n)
        writer.begin_episode("pick", uuid=str(uuid5(NAMES, f"{life}/{episode}")))
        for i in range(n):
            writer.append(
                Tick(
                    observation={
                        "observation.state": values["observation.state"][i],
                        CAMERA: frames[i // 3 % 16],
                    },
                    action=values["action"][i],
                    source=Source(int(values["source"][i])),
                    reward=float(values["reward"][i]),
                    stamp_ns=int(values["stamp_ns"][i]),
                )
            )
            health = writer.health
            if health.committed_ticks > safe:
                safe = health.committed_ticks
                os.pwrite(progress, safe.to_bytes(8, "little"), 0)
        writer.end_episode("success")


def main() -> None:
    path, contract, folder, life = sys.argv[1:]
    sys.stdin.readline()  # imported everything; the parent says when to begin
    progress = os.open(f"{folder}/{life}", os.O_RDWR | os.O_CREAT)
    live(path, Path(contract).read_text(), int(life), progress)


if __name__ == "__main__":
    main()
