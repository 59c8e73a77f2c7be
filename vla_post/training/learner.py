"""The learner process: trains while robots work, and publishes versions that they adopt.

Several processes may be one learner (`vla_post.parallel`): the first leads, looks at the stores and
tells the others which snapshots to draw from; all make the same updates.

It follows the online stores, draws the mixture of demonstrations and interventions, and waits
politely while there is nothing new to learn from. SIGINT and SIGTERM end it in order: what was
learned is published, the state is saved for `resume`, and the exit status is 0.

    vla-post train hg-dagger --start CHECKPOINT --demonstrations STORE --online FOLDER \
        --registry FOLDER --run FOLDER
"""

import dataclasses
import json
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from trajectory_store import ChunkBatch, ChunkSampler, FleetView, NotAStore, StoreUnavailable
from vla_post import parallel
from vla_post.batch import Batch, NonFiniteLoss
from vla_post.critics.encoders import PolicyEncoder
from vla_post.critics.feature_cache import FeatureCache
from vla_post.critics.returns import Unrewarded
from vla_post.export.registry import SCORES, RegistryUnavailable, open_registry
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.training.adaptive import AdaptiveConfig, AdaptiveSampler, LossWindows
from vla_post.training.data import fixed_shares, mixture, rows_by
from vla_post.training.freshness import Freshness
from vla_post.training.gate import Judge, compare, require_judge
from vla_post.training.metrics import MetricsLog
from vla_post.training.operation import operation
from vla_post.training.trainer import Kept, TrainConfig, Trainer

log = logging.getLogger("vla_post.learner")

GATE_BATCHES = 4
"""Batches on which the gate compares two versions."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """A learner process. Paths are folders."""

    start: Path
    """Checkpoint to start from; published as the first version if the registry is empty."""
    demonstrations: Path
    """Stores that are never forgotten."""
    online: str | Path | None = None
    """Stores that robots write, or will write: a folder, or s3://bucket/prefix. Without it, learns
    from demonstrations alone."""
    registry: str | Path
    """Of the versions: a folder, or s3://bucket/prefix."""
    run: Path
    """Of `metrics.jsonl` and of the state for `resume`."""
    train: TrainConfig
    online_share: float = 0.5
    """Share of what robots recorded in each batch, once there is any; the rest: demonstrations."""
    mixing: Literal["fixed", "adaptive"] = "fixed"
    """`fixed` keeps to `online_share`; `adaptive` is SOP's: tasks alike, and within each task as
    much of what robots recorded as its loss asks for."""
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    publish_s: float = 10.0
    """Wall time between versions, at least."""
    publish_updates: int = 50
    """Updates between versions, at least."""
    refresh_s: float = 1.0
    """How often the online stores are looked at."""
    max_reuse: float = 40.0
    """How often each online step may be drawn on average before the learner waits for more.
    Keeps a fast learner from memorising what a slow robot gave it."""
    round_episodes: int = 0
    """Batch mode: wait until robots have finished so many new episodes, make `round_updates`
    updates, publish, and wait again. 0 trains continuously, while they work."""
    round_updates: int = 500
    """Of a round in batch mode; `max_reuse` and the periods of publishing do not apply there."""
    feature_cache: bool = True
    """Where a critic sees through the policy's encoder: run the frozen copy once per frame and keep
    what it says under `run`, instead of once per frame and update."""
    gate_margin: float | None = None
    """Robots adopt a version only if the critic values it this share above the one that runs; 0:
    strictly better. The others are published and held (`vla-post registry gate`). None adopts all,
    or keeps to the gate that the registry has."""
    max_updates: int = 0
    """Stop after so many; 0 goes on until it is told to stop."""
    shard: bool = False
    """Divide the policy's weights, gradients and optimiser state among the processes (FSDP)
    instead of keeping all of it in each: for policies that one device does not hold."""
    resume: bool = False
    """Continue the state in `run` instead of `start`."""
    mirror: bool = True
    """Mirror metrics to wandb, offline unless logged in."""
    threads: int = 1
    """Of the numerical library; the robot's processes want the other cores."""

    def __post_init__(self) -> None:
        if not 0.0 < self.online_share < 1.0:
            raise ValueError(
                f"online_share is {self.online_share}; expected a share between 0 and 1: "
                "demonstrations are never forgotten, interventions never ignored"
            )
        if self.publish_s < 0 or self.publish_updates < 1 or self.refresh_s <= 0:
            raise ValueError("publish_s, publish_updates and refresh_s must be positive")
        if self.round_episodes < 0 or self.round_updates < 1:
            raise ValueError(
                f"round_episodes {self.round_episodes}, round_updates {self.round_updates}: "
                "expected 0 or more episodes, and at least 1 update"
            )
        if self.round_episodes and self.online is None:
            raise ValueError("round_episodes waits for robots' episodes; give --online")


class LearnerProcess:
    """The loop of one learner; `run` returns when it is stopped or done."""

    def __init__(self, config: LearnerConfig, stop: threading.Event | None = None) -> None:
        import torch

        torch.set_num_threads(config.threads)
        self.config = config
        self.stop = stop or threading.Event()
        self.registry = open_registry(config.registry)
        self._state = config.run / "learner"
        self._restore()
        resuming = config.resume and (self._state / "state.json").exists()
        source = self._state / "policy" if resuming else config.start
        self.policy = _load(source)
        self._shard = parallel.rank(), parallel.world()
        if config.train.batch_size % parallel.world():
            raise ValueError(
                f"batch_size {config.train.batch_size} does not divide among {parallel.world()} "
                "processes; take a multiple of that number"
            )
        self.contract = self.policy.contract
        self.trainer = Trainer(self.policy, config.train, shard=config.shard)
        self.needs = config.train.algorithm.data(self.contract)
        if config.gate_margin is not None:
            if parallel.world() > 1:
                raise ValueError(
                    "gate_margin holds versions back by a comparison that one process makes; "
                    "train with --processes 1, or without the gate"
                )
            require_judge(self.trainer.learner)
            self.registry.set_gate(config.gate_margin)
        self._drawn = 0.0
        self._parent: int | None = None
        self._pending: dict[str, Any] | None = None
        """What was saved in order to be published, and is not known to be there yet."""
        self._published_at = 0
        self._round_left = 0
        """Batch mode: updates until this round is over."""
        self._trained_episodes = 0
        """Batch mode: finished episodes when the last round began."""
        self._windows = LossWindows(config.adaptive)
        self._freshness = Freshness()
        if resuming:
            extra = self.trainer.resume(self._state)
            self._windows.load_state_dict(extra.get("windows", {"kept": []}))
            self._freshness = Freshness(int(extra.get("saved_ns", 0)))
            for version in self.registry.versions():
                self._freshness.published(version.number, version.created_ns / 1e9)
            self._drawn, self._parent = float(extra["drawn"]), extra["parent"]
            self._pending = extra.get("pending")
            self._published_at = self.trainer.updates
            self._round_left = int(extra.get("round_left", 0))
            self._trained_episodes = int(extra.get("trained_episodes", 0))
        encoder = getattr(self.trainer.learner, "encoder", None)
        self._features: FeatureCache | None = None
        if config.feature_cache and isinstance(encoder, PolicyEncoder):
            folder = config.run / "features"
            self._features = FeatureCache(encoder, folder, device=encoder.device)
        self._sampler: ChunkSampler | AdaptiveSampler | None = None
        self._online: FleetView | None = None
        self._away = ""
        """What did not answer the last time."""
        self._news = False
        """There is a new sampler, of which the other processes do not know yet."""
        self._rows = 0
        self._looked = 0.0
        self.looks = 0
        """How often the online stores were looked at."""
        self._published_s = time.monotonic()

    def run(self) -> int:
        """Trains until stopped. Returns the number of updates.

        Raises:
            NonFiniteLoss: the batch is saved under `run`, the last good state too.
        """
        if parallel.rank():
            return self._follow()
        config = self.config
        for left in config.run.glob("publish_*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._publish_start()
        described: dict[str, Any] = {
            k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()
        }
        path = config.run / "metrics.jsonl"
        with MetricsLog(path, mirror=config.mirror, config=described) as metrics:
            metrics.write({"learner": "waiting", "update": self.trainer.updates})
            try:
                if self._pending is not None:  # the last process was killed on the way
                    self._look(metrics)  # for the gate, which compares on batches
                    self._publish(metrics)
                self._loop(metrics)
            finally:
                try:
                    if self._pending is not None or self.trainer.updates > self._published_at:
                        self._publish(metrics)
                    self._told_operation(metrics)
                    self._save()
                finally:  # last, since a sharded policy is gathered from all to be saved
                    parallel.tell({"do": "stop"})
                if self._sampler is not None:
                    self._sampler.close()
        return self.trainer.updates

    def _loop(self, metrics: MetricsLog) -> None:
        config = self.config
        waited_s = 0.0
        while not self.stop.is_set():
            if config.max_updates and self.trainer.updates >= config.max_updates:
                break
            if time.monotonic() - self._looked >= config.refresh_s:
                self._look(metrics)
            if not self._may_learn():
                parallel.tell({"do": "wait"})
                self.stop.wait(config.refresh_s / 4)
                waited_s += config.refresh_s / 4
                continue
            started = time.monotonic()
            chunk = self._draw()
            if chunk is None:
                parallel.tell({"do": "wait"})
                waited_s += time.monotonic() - started
                continue
            assert self._sampler is not None
            snapshots = self._sampler.snapshot_ids if self._news else None
            parallel.tell({"do": "update", "snapshots": snapshots})
            self._news = False
            loaded = time.monotonic()
            bad = config.run / "bad_batch.safetensors"
            row = self.trainer.step(chunk, save_bad_batch=bad)
            online = int((chunk.part > 0).sum())
            self._drawn += online * parallel.world()
            mix: dict[str, float] = {}
            if isinstance(self._sampler, AdaptiveSampler):
                mix = {f"mix/{name}": round(v, 4) for name, v in self._sampler.shares().items()}
                self._tell_losses(self._sampler, chunk)
            for found in self._freshness.drew(chunk):
                metrics.write(found)
            metrics.write(
                {
                    "update": self.trainer.updates,
                    **row,
                    **mix,
                    "online_share": online / len(chunk),
                    "online_rows": self._rows,
                    "load_s": round(loaded - started, 4),
                    "update_s": round(time.monotonic() - loaded, 4),
                    "waited_s": waited_s,
                    "version": self._parent,
                }
            )
            waited_s = 0.0
            if config.round_episodes:
                self._round_left -= 1
                due = self._round_left == 0
            else:
                due = time.monotonic() - self._published_s >= config.publish_s
                due &= self.trainer.updates - self._published_at >= config.publish_updates
            if due:
                self._publish(metrics)
                self._told_operation(metrics)

    def _draw(self) -> ChunkBatch | None:
        """None while the online stores do not answer."""
        assert self._sampler is not None
        try:
            chunk = next(self._sampler)
            if self._features is not None:
                chunk = self._features.add_to(chunk, self._sampler.stores)
            return chunk
        except StoreUnavailable as error:
            self._is_away(error)
            self.stop.wait(self.config.refresh_s)
            return None

    def _is_away(self, error: Exception) -> None:
        """The network or the object storage: they come back, and nothing is lost meanwhile."""
        if str(error) != self._away:
            log.warning("waiting: %s", error)
        self._away = str(error)

    def _follow(self) -> int:
        """The loop of a process that does not lead: its slice of the same updates, until told to
        stop."""
        while True:
            message = parallel.tell()
            if message["do"] == "stop":
                return self.trainer.updates
            if message["do"] == "wait":
                continue
            if message["do"] == "gather":
                self.trainer.tensors(message["kind"])
                continue
            chunk: ChunkBatch | None = None
            while chunk is None:  # the leader has its slice: this one comes when storage answers
                try:
                    if message["snapshots"] is not None:
                        self._go_to(message["snapshots"])
                        message["snapshots"] = None
                    chunk = self._draw()
                except StoreUnavailable as error:
                    self._is_away(error)
                    self.stop.wait(self.config.refresh_s)
            try:
                self.trainer.step(chunk)
            except NonFiniteLoss:
                continue  # the leader has it too, keeps its batch and ends the run
            if isinstance(self._sampler, AdaptiveSampler):
                self._tell_losses(self._sampler, chunk)

    def _go_to(self, snapshots: Mapping[str, str]) -> None:
        """A sampler of exactly what the leader sees."""
        if self._sampler is not None:
            self._sampler.close()

        # In the leader's order, which is part of what is drawn.
        order = list(snapshots)

        def view(prefix: str | Path) -> FleetView:
            stores = [s for s in FleetView(prefix).stores if s.location in snapshots]
            for store in stores:
                store.go_to(snapshots[store.location])
            return FleetView.of(sorted(stores, key=lambda s: order.index(s.location)))

        try:
            self._online = None if self.config.online is None else view(self.config.online)
        except NotAStore:
            self._online = None
        self._sampler = self._mixture(view(self.config.demonstrations))

    def _tell_losses(self, sampler: AdaptiveSampler, chunk: ChunkBatch) -> None:
        losses = self.trainer.item_losses()
        if losses is not None:
            sampler.learned(chunk, *losses)

    def _look(self, metrics: MetricsLog) -> None:
        """Sees what robots have finished recording since the last time."""
        try:
            self._see(metrics)
        except StoreUnavailable as error:
            self._is_away(error)

    def _see(self, metrics: MetricsLog) -> None:
        self._looked = time.monotonic()
        self.looks += 1
        if self.config.online is None:
            if self._sampler is None:
                self._use(metrics)
            return
        if self._online is None:
            try:
                self._online = FleetView(self.config.online)
            except NotAStore:
                return
            found = True
        else:
            found = self._online.refresh()
        if found:
            for row in self._freshness.saw(self._online.episodes, self._parent):
                metrics.write(row)
        rows = rows_by(self._online, self.needs.sources) if found else self._rows
        if rows == self._rows:
            return
        self._rows = rows
        # A new sampler per change: the mixture's parts may have appeared since, and it is cheap.
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
        try:
            self._use(metrics)
        except Unrewarded as error:
            log.info("waiting: %s", error)

    def _use(self, metrics: MetricsLog) -> None:
        """A sampler of what is there now. The shares of a fixed one are told once."""
        self._sampler, self._news = self._mixture(), True
        if isinstance(self._sampler, ChunkSampler):
            metrics.write({"mixing": "fixed", **fixed_shares(self._sampler)})

    def _mixture(self, demonstrations: FleetView | None = None) -> ChunkSampler | AdaptiveSampler:
        config = self.config
        demonstrations = demonstrations or FleetView(config.demonstrations)
        size, keys = config.train.batch_size, self.policy.observation_keys
        seed = config.train.seed * 1_000_003 + self.trainer.updates
        if config.mixing == "adaptive":
            return AdaptiveSampler(
                demonstrations,
                self._online,
                self.contract,
                self._windows,
                batch_size=size,
                needs=self.needs,
                seed=seed,
                keys=keys,
                shard=self._shard,
            )
        return mixture(
            demonstrations,
            self._online,
            self.contract,
            batch_size=size,
            online_share=config.online_share,
            needs=self.needs,
            seed=seed,
            keys=keys,
            shard=self._shard,
        )

    def _may_learn(self) -> bool:
        if self._sampler is None:
            return False
        if self.config.round_episodes:
            return self._in_round()
        offline = self.config.online is None
        return offline or self._drawn < self.config.max_reuse * self._rows

    def _in_round(self) -> bool:
        """Batch mode: inside a round, which begins when enough new episodes are there."""
        assert self._online is not None
        finished = len(self._online.episodes)
        if self._round_left == 0:
            if finished - self._trained_episodes < self.config.round_episodes:
                return False
            self._round_left, self._trained_episodes = self.config.round_updates, finished
        return True

    def _told_operation(self, metrics: MetricsLog) -> None:
        """How much each version needed people so far, one line a version."""
        if self._online is None:
            return
        found = operation(self._online.episodes, self.contract.control_hz)
        for version, one in found.items():
            metrics.write({"operation_of": version, **one.to_json()})

    def _publish_start(self) -> None:
        """Robots need a first version; a registry that has one keeps it."""
        if self._parent is not None:
            return
        active = self.registry.active()
        if active is None:
            active = self.registry.publish(
                self.config.start, contract=self.contract, metrics={"note": "start"}
            )
        self._parent = active.number
        self._freshness.published(active.number, active.created_ns / 1e9)

    def _save(self) -> None:
        """What `resume` needs; there whole, also if this process is killed meanwhile."""
        new, old = (self._state.with_suffix(s) for s in (".new", ".old"))
        shutil.rmtree(new, ignore_errors=True)
        self._gather("state")
        self.trainer.save(
            new,
            {
                "saved_ns": time.time_ns(),
                "windows": self._windows.state_dict(),
                "drawn": self._drawn,
                "parent": self._parent,
                "pending": self._pending,
                "round_left": self._round_left,
                "trained_episodes": self._trained_episodes,
            },
        )
        if self._state.exists():
            shutil.rmtree(old, ignore_errors=True)
            self._state.rename(old)
        new.rename(self._state)
        shutil.rmtree(old, ignore_errors=True)

    def _gather(self, kind: Kept) -> None:
        """The other processes give the leader their part of what is saved next."""
        if self.trainer.sharded:
            parallel.tell({"do": "gather", "kind": kind})

    def _restore(self) -> None:
        """A process that was killed between the two renames of `_save`."""
        old = self._state.with_suffix(".old")
        if old.exists() and not self._state.exists():
            old.rename(self._state)

    def _publish(self, metrics: MetricsLog) -> None:
        """Saved first, then published, under a name that is in the state: a learner that is killed
        in between publishes it when it resumes, and one that is killed later does not do so again.
        """
        if self._pending is None or self._pending["learner_step"] != self.trainer.updates:
            self._pending = {
                "publication": uuid4().hex,
                "learner_step": self.trainer.updates,
                "snapshots": {} if self._sampler is None else self._sampler.snapshot_ids,
                "metrics": {"online_rows": self._rows, "updates": self.trainer.updates},
            }
            self._save()
        folder = Path(tempfile.mkdtemp(prefix="publish_", dir=self.config.run))
        try:
            self._gather("policy")
            self.trainer.save_policy(folder)
            self._published_s = time.monotonic()  # an outage is tried again after `publish_s`
            scores = self._scores(folder)
            what = self._pending | {"metrics": self._pending["metrics"] | scores}
            version = self.registry.publish(
                folder, contract=self.contract, parent=self._parent, **what
            )
        except RegistryUnavailable as error:
            self._is_away(error)
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._parent, self._pending = version.number, None
        self._freshness.published(version.number)
        self._published_at, self._published_s = self.trainer.updates, time.monotonic()
        told = {key: version.metrics[key] for key in SCORES if key in version.metrics}
        metrics.write({"published": version.number, "at_update": self.trainer.updates} | told)
        log.info("published %s after %d updates", version.name, self.trainer.updates)

    def _scores(self, folder: Path) -> dict[str, float]:
        """What the registry's gate asks for; {} without a gate or a critic."""
        active, learner = self.registry.active(), self.trainer.learner
        if self.registry.gate is None or active is None or not isinstance(learner, Judge):
            return {}
        if self._sampler is None or parallel.world() > 1:
            return {}
        batches = [
            Batch.from_numpy(next(self._sampler), self.policy.device) for _ in range(GATE_BATCHES)
        ]
        candidate = LeRobotPolicy.load(folder)
        running = LeRobotPolicy.load(self.registry.path(active.number))
        return compare(learner, candidate, running, batches, against=active.number)


def _load(checkpoint: Path) -> LeRobotPolicy:
    """On a GPU of this process's own, where several processes train on GPUs."""
    if parallel.world() == 1:
        return LeRobotPolicy.load(checkpoint)
    device = json.loads((checkpoint / "config.json").read_text()).get("device") or "cpu"
    return LeRobotPolicy.load(checkpoint, device=parallel.device_for(device))


def run_until_stopped(config: LearnerConfig, stop: threading.Event | None = None) -> int:
    """Runs a learner with its log on stderr; a user's mistake is one line and a status above 0."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        LearnerProcess(config, stop).run()
    except NonFiniteLoss as error:
        print(f"learner: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"learner: {error}", file=sys.stderr)
        return 2
    return 0
