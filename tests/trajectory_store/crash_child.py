"""The process that tests kill, or whose power they cut, and `Recorder`, which starts it.

It is forked off a process that has imported the slow packages, all but icechunk, whose threads
would not survive the fork. `check` compares what it left behind with what it had to write.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid5

import imagecodecs.zarr  # noqa: F401 - imported here so that no life has to
import numpy as np
import pydantic  # noqa: F401
import simplejpeg
import zarr.codecs  # noqa: F401

if TYPE_CHECKING:
    from trajectory_store import Store

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


def check(store: "Store", newest: int | None = None) -> None:
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
    """Records, a tick a millisecond at most, and writes down, into the file `progress`, what is
    safe. Without the pause most episodes would be over before the first commit of them is."""
    from trajectory_store import Source, StoreWriter, Tick
    from trajectory_store.contract import parse_contract

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
            time.sleep(0.001)
        writer.end_episode("success")


class Recorder:
    """Lives of a recording process, one after the other; used by the tests."""

    def __init__(self, path: Path, contract: str, folder: Path, **environment: str) -> None:
        """`folder` takes a file per life, with how many ticks are safe, and the errors."""
        self.folder = folder
        folder.mkdir()
        (folder / "contract.json").write_text(contract)
        with (folder / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, path, folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | environment,
            )
        self.life = -1
        self.pid = 0

    def start(self) -> None:
        """The next life begins to record."""
        self.life += 1
        self.pid = int(self._ask(f"{self.life}\n"))

    def _ask(self, line: str) -> bytes:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line.encode())
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "errors").read_text()
        return answer

    def safe(self) -> int:
        """Ticks of this life that the writer has called committed."""
        try:
            return int.from_bytes((self.folder / str(self.life)).read_bytes(), "little")
        except FileNotFoundError:
            return 0

    def wait_for_commit(self) -> None:
        deadline = time.monotonic() + 120
        while self.safe() == 0:
            assert os.path.exists(f"/proc/{self.pid}"), (self.folder / "errors").read_text()
            assert time.monotonic() < deadline, "the writer committed nothing"
            time.sleep(0.002)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.process.stdout
        assert int(self.process.stdout.readline()) == -signal.SIGKILL

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def main() -> None:
    path, folder = sys.argv[1:]
    contract = Path(folder, "contract.json").read_text()
    assert len(os.listdir("/proc/self/task")) == 1, "threads would not survive the fork"
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            progress = os.open(f"{folder}/{int(line)}", os.O_RDWR | os.O_CREAT)
            live(path, contract, int(line), progress)
            os._exit(1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
