"""Fault drill of a fleet: real cells, uplinks, learner and S3 server, and what goes wrong there.

    python benchmarks/drill_fleet.py --folder runs/drill --away-s 600

On the state cell of the simulator, one after the other, for `away_s` each and until every cell has
closed at least one more episode meanwhile:

1. the learner is killed (SIGKILL) and resumes: at the step of its last checkpoint, and not another;
2. the network between everybody and the object storage is cut;
3. the S3 server is stopped and started again;
4. a cell is killed, with all its processes, in the middle of an episode, and started again; only
   its bag may end in order, because it is the witness;
5. versions are published whose bytes are damaged, and whose weights are finite nonsense, and made
   active: the cells refuse both and go on with the last good one.

At the end every episode in the fleet's stores is compared with the cell's own store, value for
value, and every tick in it with the MCAP bag of the topics, which another process recorded.
`--short` leaves out learner and policies (an operator drives), for the tests. Prints one JSON
object; any broken promise is an AssertionError.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from s3_local import Proxy, S3Server, client_environment

import sim
from trajectory_store import Episode, Outcome, Source, Store, StoreError, load_contract
from trajectory_store.uplink import read_health

CONTRACT = sim.CONTRACTS / "metaworld_state.yaml"
CELLS, REGISTRY = "s3://fleet/cells", "s3://fleet/registry"
NAME = "sawyer_state_0"
"""Of each cell within its own processes; it is also the name of its store's folder."""


@dataclass(frozen=True, kw_only=True)
class Drill:
    """See the module."""

    folder: Path
    """Is made; must not exist."""
    cells: int = 2
    away_s: float = 600.0
    """At least, of each outage."""
    learner_away_s: float | None = None
    """Of the learner's; None: `away_s`."""
    short: bool = False
    """No learner and no policy: what moves episodes, and nothing else."""
    steps: tuple[Literal["learner", "network", "server", "cell", "poison"], ...] = (
        "learner",
        "network",
        "server",
        "cell",
        "poison",
    )
    patience_s: float = 600.0
    """For anything that has to happen; a busy machine is slow."""
    first_domain: int | None = None
    """ROS domain of the first cell, 1 to 101; the others follow. By default the environment's."""

    def run(self) -> None:
        self.folder.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            report = _Drill(self, stack).run()
        print(json.dumps(report, indent=2))


class _Drill:
    def __init__(self, config: Drill, stack: contextlib.ExitStack) -> None:
        self.config, self.stack = config, stack
        self.folder = config.folder
        self.learner: subprocess.Popen[bytes] | None = None
        self.report: dict[str, Any] = {"cells": config.cells, "away_s": config.away_s}
        self.begun = time.monotonic()
        self.server = stack.enter_context(S3Server(self.folder / "s3"))
        self.proxy = Proxy(self.server.port)
        stack.callback(self.proxy.close)
        os.environ.update(client_environment(self.proxy.port))
        os.environ["XDG_STATE_HOME"] = str(self.folder.absolute() / "state")

    def run(self) -> dict[str, Any]:
        short = self.config.short
        if not short:
            self._prepare()
            self.learner = self._start_learner()
            self._until(lambda: self._versions() > 0, "the learner published no first version")
        self.cells = [self._start_cell(i) for i in range(self.config.cells)]
        self._everybody_closes(1, "no episode was closed")
        self._delivered()
        steps = {
            "learner": self._kill_learner,
            "network": self._cut,
            "server": self._restart_server,
            "cell": self._kill_cell,
            "poison": self._poison,
        }
        for name, step in steps.items():
            if name in self.config.steps and not (short and name in ("learner", "poison")):
                step()
                print(json.dumps({name: self.report[name]}), file=sys.stderr, flush=True)
        if self.learner is not None:
            self._end(self.learner, "learner")
        for i, process in enumerate(self.cells):
            self._end(process, f"cell_{i}")
        self._last_deliveries()
        self._compare()
        return self.report | {"wall_s": round(time.monotonic() - self.begun, 1)}

    # Processes

    def _start_cell(self, i: int) -> subprocess.Popen[bytes]:
        """A cell of its own: processes, ROS domain, folder, and place at the fleet."""
        first = self.config.first_domain or int(os.environ.get("ROS_DOMAIN_ID") or 41)
        words = ["fleet", "--contract", str(CONTRACT), "--cells", "1", "--bag"]
        words += ["--folder", str(self._cell(i)), "--uplink", f"{CELLS}/cell_{i}"]
        words += ["--first-domain", str((first + i - 1) % 101 + 1), "--episodes", "1000000"]
        words += ["--seed", str(1000 * i)]
        policy = ["--drive"] if self.config.short else ["--registry", REGISTRY]
        return self._start(f"cell_{i}", *words, *policy)

    def _cache(self, name: str) -> Path:
        """Everybody has a disk of their own, and downloads what the others have."""
        return self.folder.absolute() / "cache" / name

    def _cell(self, i: int) -> Path:
        return self.folder / f"cell_{i}"

    def _prepare(self) -> None:
        """Demonstrations, and a checkpoint that was hardly trained: people will have to help."""
        from sim.demonstrations import write_demonstrations
        from trajectory_store import FleetView
        from vla_post.learners.hg_dagger import HgDaggerConfig
        from vla_post.policies.build import build_policy
        from vla_post.training.data import mixture, statistics
        from vla_post.training.trainer import TrainConfig, Trainer

        contract = load_contract(CONTRACT)
        write_demonstrations(self.folder / "demonstrations", contract, episodes_per_task=2)
        view = FleetView(self.folder / "demonstrations")
        policy = build_policy("chunk_flow", contract, statistics(view, contract))
        trainer = Trainer(policy, TrainConfig(algorithm=HgDaggerConfig(), batch_size=64))
        sampler = mixture(view, None, contract, batch_size=64, online_share=0.5)
        for _ in range(100):
            trainer.step(next(sampler))
        sampler.close()
        trainer.save_policy(self.folder / "start")

    def _start_learner(self, *more: str) -> subprocess.Popen[bytes]:
        folder = self.folder
        words = [
            "train",
            "hg-dagger",
            "--start",
            str(folder / "start"),
            "--run",
            str(folder / "run"),
        ]
        words += ["--demonstrations", str(folder / "demonstrations"), "--online", CELLS]
        words += ["--registry", REGISTRY, "--publish-s", "5", "--publish-updates", "20"]
        return self._start("learner", *words, "--max-reuse", "1e9", "--no-mirror", *more)

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            process = subprocess.Popen(
                # Dies with us, however we die.
                [
                    *(sys.executable, "-m", "robot_bridge.child", str(os.getpid())),
                    *("vla_post.cli.main", *words),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"XDG_CACHE_HOME": str(self._cache(name))},
            )
        self.stack.callback(self._clean, process)
        return process

    @staticmethod
    def _clean(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _end(self, process: subprocess.Popen[bytes], name: str) -> None:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=self.config.patience_s)
        status = process.returncode
        assert status in (0, 130), f"{name} ended with {status}: {self._last_words(name)}"

    def _last_words(self, name: str) -> str:
        return "\n".join((self.folder / f"{name}.log").read_text().splitlines()[-15:])

    # Watching

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.config.patience_s
        while not condition():
            running = {f"cell_{i}": p for i, p in enumerate(getattr(self, "cells", []))}
            if self.learner is not None:
                running["learner"] = self.learner
            for name, process in running.items():
                if process.poll() not in (None, -signal.SIGKILL):
                    raise AssertionError(f"{name} ended: {self._last_words(name)}")
            assert time.monotonic() < deadline, what
            time.sleep(0.2)

    def _closed(self) -> dict[int, list[dict[str, Any]]]:
        """Cell -> its episode_end events, as its supervisor wrote them."""
        found: dict[int, list[dict[str, Any]]] = {}
        for i in range(self.config.cells):
            path = self._cell(i) / "events" / f"{NAME}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            events = [json.loads(line) for line in lines if line.endswith("}")]
            found[i] = [e for e in events if e["type"] == "episode_end"]
        return found

    def _everybody_closes(self, more: int, what: str) -> int:
        """Waits until each cell has closed so many more episodes; returns how many all did."""
        before = {cell: len(ends) for cell, ends in self._closed().items()}

        def enough() -> bool:
            return all(len(ends) >= before[c] + more for c, ends in self._closed().items())

        self._until(enough, what)
        return sum(len(ends) - before[c] for c, ends in self._closed().items())

    def _outage(self, what: str, away_s: float | None = None) -> int:
        """For `away_s`, and until every cell has closed an episode; how many they closed."""
        away_s = self.config.away_s if away_s is None else away_s
        begun, before = time.monotonic(), sum(map(len, self._closed().values()))
        self._everybody_closes(1, f"{what}: a cell stopped working")
        while time.monotonic() - begun < away_s:
            self._until(lambda: True, "")
            time.sleep(min(1.0, away_s))
        return sum(map(len, self._closed().values())) - before

    def _backlog(self) -> int:
        cells = range(self.config.cells)
        return sum(h.backlog_episodes for i in cells for h in read_health(self._cell(i) / "stores"))

    def _delivered(self) -> None:
        """What is closed now is delivered."""
        wanted = [{e.uuid for e in s.table if not e.is_open} for s in self._local()]

        def there() -> bool:
            try:
                found = [{e.uuid for e in s.table} for s in self._remote()]
            except StoreError:
                return False
            return all(a <= b for a, b in zip(wanted, found, strict=True))

        self._until(there, "the backlog was not delivered")

    def _local(self) -> list[Store]:
        return [Store(self._cell(i) / "stores" / NAME) for i in range(self.config.cells)]

    def _remote(self) -> list[Store]:
        return [Store(f"{CELLS}/cell_{i}/{NAME}") for i in range(self.config.cells)]

    # Learner

    def _registry(self, name: str = "drill") -> Any:
        from vla_post.export.bucket import BucketRegistry

        return BucketRegistry(REGISTRY, cache=self._cache(name))

    def _versions(self) -> int:
        return len(self._registry().numbers())

    def _learner_lines(self) -> list[dict[str, Any]]:
        lines = (self.folder / "run/metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _kill_learner(self) -> None:
        assert self.learner is not None
        saved = self.folder / "run/learner/state.json"
        self._until(saved.exists, "the learner published nothing new")
        os.killpg(self.learner.pid, signal.SIGKILL)
        self.learner.wait()
        closed = self._outage("learner killed", self.config.learner_away_s)
        lines = len(self._learner_lines())
        self.learner = self._start_learner("--resume")

        def updates() -> list[int]:
            return [row["update"] for row in self._learner_lines()[lines:] if "loss" in row]

        self._until(lambda: bool(updates()), "the learner did not resume")
        new = self._learner_lines()[lines:]
        resumed = next(row["update"] for row in new if row.get("learner") == "waiting")
        following = updates()[0]
        published = [v.learner_step for v in self._registry().versions()]
        assert resumed in published, (resumed, published)
        assert len(published) == len(set(published)), f"published twice: {published}"
        assert following == resumed + 1
        self.report["learner"] = {
            "away_s": self.config.learner_away_s or self.config.away_s,
            "episodes_meanwhile": closed,
            "resumed_at": resumed,
            "next_update": following,
            "published_steps": published,
        }

    # Faults

    def _cut(self) -> None:
        self.proxy.mode = "cut"
        closed = self._outage("network cut")
        self._until(lambda: self._backlog() > 0, "the backlog does not show")
        backlog = self._backlog()
        self.proxy.mode = "open"
        self._delivered()
        self.report["network"] = {"episodes_meanwhile": closed, "backlog": backlog}

    def _restart_server(self) -> None:
        self.server.stop()
        closed = self._outage("server away")
        self.server.start()
        self._delivered()
        self.report["server"] = {"episodes_meanwhile": closed}

    def _kill_cell(self) -> None:
        """In the middle of an episode, with rows of it in the store."""
        store = self._local()[0]

        def running() -> bool:
            store.refresh()
            return bool(store.table) and store.table[-1].is_open and len(store.table[-1]) > 5

        self._until(running, "no episode was running")
        victim = store.table[-1]
        killed: list[str] = []
        for pid, words in processes_below(self.cells[0].pid):
            node = next((w for w in words if w.startswith(("robot_bridge.nodes", "sim.nodes"))), "")
            if node and not node.endswith(".bag"):
                killed.append(node.rpartition(".")[2])
                os.kill(pid, signal.SIGKILL)
        bags = [pid for pid, _ in processes_below(self.cells[0].pid)]
        self.cells[0].kill()
        self.cells[0].wait()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in bags):
            assert time.monotonic() < deadline, "the bag did not end"
            time.sleep(0.1)
        self.cells[0] = self._start_cell(0)
        self._everybody_closes(2, "the killed cell did not come back")
        store.refresh()
        ended = store.episode(victim.uuid)
        assert ended.outcome is Outcome.INTERRUPTED
        assert len(ended) >= len(victim)
        self._delivered()
        self.report["cell"] = {
            "killed": sorted(killed),
            "rows_before": len(victim),
            "rows_kept": len(ended),
        }

    def _poison(self) -> None:
        """Two bad versions become active; no cell ever runs them."""
        registry = self._registry()
        number = registry.active().number
        good = registry.path(number)
        registry.promote(number, reason="drill", pin=True)
        bad: list[int] = []
        # Bytes that changed in the bucket after they were published.
        from safetensors.numpy import load_file, save_file

        for scale in (1.0001, 1e4):
            poisoned = self.folder / f"poisoned-{scale}"
            shutil.copytree(good, poisoned)
            (poisoned / "manifest.json").unlink()
            weights = load_file(good / "model.safetensors")
            # Nonsense, but every number is finite and every hash is right.
            weights = {k: (v * scale).astype(v.dtype) for k, v in weights.items()}
            save_file(weights, poisoned / "model.safetensors")
            version = registry.publish(poisoned, contract=load_contract(CONTRACT), promote=False)
            if scale < 2:
                key = version.stored["model.safetensors"]
                data = bytearray(registry._objects.get(key) or b"")
                data[len(data) // 2] ^= 0xFF
                registry._objects.put(key, bytes(data))
            registry.promote(version.number, reason="drill: poisoned", pin=True)
            bad.append(version.number)
            refused = f"version {version.number} refused"
            logs = [self._cell(i) / f"logs/{NAME}/runner.log" for i in self._closed()]
            self._until(
                lambda r=refused, found=logs: all(r in path.read_text() for path in found),
                f"a cell did not refuse version {version.number}",
            )
        closed = self._everybody_closes(2, "the cells stopped at the poisoned versions")
        ran = {e.policy_version for s in self._local() for e in s.table}
        assert not ran & set(bad), f"a cell ran a poisoned version: {ran} and {bad}"
        # By somebody who has not seen them: past the damaged one.
        assert self._registry("person").rollback(reason="drill").number == number
        self.report["poison"] = {"versions": bad, "episodes_meanwhile": closed}

    # The end

    def _last_deliveries(self) -> None:
        """The uplinks ended with their cells; what was closed last goes now."""
        for i in range(self.config.cells):
            words = ["uplink", str(self._cell(i) / "stores"), f"{CELLS}/cell_{i}", "--once"]
            command = [sys.executable, "-m", "vla_post.cli.main", *words]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

    def _compare(self) -> None:
        episodes = ticks = unseen = 0
        outcomes: dict[str, int] = {}
        closed = self._closed()
        for i, (here, there) in enumerate(zip(self._local(), self._remote(), strict=True)):
            whole = [e for e in here.table if not e.is_open]
            delivered = [e.uuid for e in there.table]
            assert len(delivered) == len(set(delivered)), f"cell {i}: delivered twice"
            assert set(delivered) == {e.uuid for e in whole}, f"cell {i}: lost, or made up"
            # The supervisor's own list: all that ended was recorded.
            missing = {e["episode"] for e in closed[i]} - set(delivered)
            assert not missing, f"cell {i}: ended and not recorded: {missing}"
            ran = [e.policy_version for e in whole]
            assert ran == sorted(ran), f"cell {i}: versions went back: {ran}"
            sent = executed(self._cell(i) / "bags" / NAME)
            for a in whole:
                b = there.episode(a.uuid)
                require_same(here, a, there, b)
                drove = there.read("source", b) == Source.POLICY
                versions = set(there.read("policy_version", b)[drove].tolist())
                assert versions <= {b.policy_version}, f"cell {i}: {b.uuid} ran {versions}"
                rows = zip(there.read("stamp_ns", b).tolist(), there.read("action", b), strict=True)
                lacks = sum(
                    not any(np.array_equal(action, command) for command in sent.get(stamp, ()))
                    for stamp, action in rows
                )
                # A bag that is told to end stops a moment before the recorder's last commit.
                cut = (Outcome.INTERRUPTED, Outcome.ABORTED)
                assert not lacks or a.outcome in cut, (
                    f"cell {i}: {lacks} ticks of {b.uuid} were never sent to the robot"
                )
                unseen += lacks
                episodes, ticks = episodes + 1, ticks + len(a)
                outcomes[str(a.outcome)] = outcomes.get(str(a.outcome), 0) + 1
        assert outcomes.get(Outcome.SUCCESS, 0) > 0
        self.report |= {
            "episodes_compared": episodes,
            "ticks_compared": ticks,
            "ticks_found_in_bags": ticks - unseen,
            "outcomes": outcomes,
            "lost": 0,
            "doubled": 0,
        }


def require_same(here: Store, a: Episode, there: Store, b: Episode) -> None:
    assert b == a.replace(first_row=b.first_row, end_row=b.end_row), (a, b)
    for name in here.columns:
        np.testing.assert_array_equal(here.read(name, a), there.read(name, b), err_msg=name)


def executed(bags: Path) -> dict[int, list[np.ndarray]]:
    """Stamp -> commands that were sent to the robot at it, from the bag of `arbiter/executed`."""
    from mcap.reader import NonSeekingReader
    from mcap_ros2.decoder import DecoderFactory

    found: dict[int, list[np.ndarray]] = {}
    for path in sorted(bags.glob("*.mcap")):
        with path.open("rb") as file:
            reader = NonSeekingReader(file, decoder_factories=[DecoderFactory()])
            for _, channel, _, message in reader.iter_decoded_messages():
                if channel.topic.endswith("arbiter/executed"):
                    stamp = message.header.stamp
                    command = np.asarray(message.position, np.float32)
                    found.setdefault(stamp.sec * 10**9 + stamp.nanosec, []).append(command)
    assert found, f"{bags}: no bag"
    return found


def processes_below(pid: int) -> Iterator[tuple[int, list[str]]]:
    """(process, words of its command line) of all descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    below = {pid}
    while more := {p for p, parent in parents.items() if parent in below} - below:
        below |= more
    for child in below - {pid}:
        with contextlib.suppress(OSError):
            words = (Path("/proc") / str(child) / "cmdline").read_bytes().split(b"\0")
            yield child, [w.decode(errors="replace") for w in words]


if __name__ == "__main__":
    tyro.cli(Drill).run()
