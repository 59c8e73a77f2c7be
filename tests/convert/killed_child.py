"""Conversions that tests kill: `Conversions` starts them, each forked off one process that has
imported the slow packages, all but icechunk, whose threads would not survive the fork."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path


class Conversions:
    """Runs `vla-post store convert ...`, one after the other; used by the tests."""

    def __init__(self, errors: Path, *slow: str) -> None:
        """`slow` are packages to import beforehand."""
        self._errors = errors
        with errors.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *slow],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                text=True,
            )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        answer = self._process.stdout.readline()
        assert answer, self._errors.read_text()
        return answer

    def run(
        self,
        *arguments: str | Path,
        kill_before: tuple[str, str] | None = None,
    ) -> int:
        """The exit status of a conversion, -9 if it was killed.

        Args:
            kill_before: (audit event, end of one of its paths): SIGKILL at the first such event.
                ("commit", N): when N ticks of an episode, and not more, are safe in the store.
        """
        assert self._process.stdin
        told = {"arguments": [str(a) for a in arguments], "kill_before": kill_before}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def convert(arguments: list[str], kill_before: list[str] | None) -> None:
    from vla_post.cli import main
    from vla_post.convert import diffusion_policy, lerobot_dataset

    lerobot_dataset.SEGMENT_EPISODES = 2
    diffusion_policy.ROWS = 8

    def watch(event: str, values: tuple[object, ...]) -> None:
        if kill_before is None or event != kill_before[0]:
            return
        if any(str(v).endswith(kill_before[1]) for v in values if isinstance(v, str | Path)):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if kill_before is not None and kill_before[0] == "commit":
        _kill_at_commit(int(kill_before[1]))
    sys.argv = ["vla-post", "store", "convert", *arguments]
    main.main()


def _kill_at_commit(ticks: int) -> None:
    from trajectory_store import StoreWriter

    append = StoreWriter.append

    def counted(writer: StoreWriter, tick: object) -> None:
        append(writer, tick)  # pyright: ignore[reportArgumentType]
        counts[writer.episode_uuid] += 1
        if counts[writer.episode_uuid] == ticks:
            writer.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    counts: Counter[str | None] = Counter()
    StoreWriter.append = counted


def serve() -> None:
    for name in sys.argv[1:]:
        __import__(name)
    assert "icechunk" not in sys.modules, "its threads would not survive the fork"
    print("ready", flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(2, 1)
            try:
                convert(**told)
            except SystemExit as end:
                os._exit(int(end.code or 0))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
