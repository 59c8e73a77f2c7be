"""The study of ALOE against AWR, DAgger and cloning, on state cells with a scripted operator.

Every method of one (task, seed) starts from the same policy, cloned from a few demonstrations, and
the same buffer: those demonstrations, failures of an older policy, and episodes in which the
operator corrected the starting policy. Then each improves on what it has, works under the
operator's eye for a fixed number of episodes, and so on; at the end all play the same scenes alone.
Cloning the demonstrations for as many updates is the control: it needs no robot.

Results are JSON lines, one per (task, seed, method); what is there is not run again.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import sim
from sim.demonstrations import write_demonstrations, write_episode
from sim.operator import OperatorConfig
from sim.rollout import Case, Result, rollout
from trajectory_store import ChunkSampler, Filter, FleetView, Part, Source, StoreWriter
from trajectory_store.contract import Contract, load_contract
from vla_post.batch import Algorithm
from vla_post.critics.networks import CriticConfig
from vla_post.learners.aloe import AloeConfig
from vla_post.learners.awr import AwrConfig
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.learners.weighting import WeightConfig

START_BATCH = 128
"""Chunks per update of the starting policy."""


@dataclass(frozen=True, kw_only=True)
class AloeStudy:
    """One study; the numbers are per (task, seed)."""

    tasks: tuple[str, ...] = ("peg-insert-side", "soccer", "reach", "basketball", "push")
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ("bc", "dagger", "awr", "aloe")
    """Of `METHODS`."""
    contract: Path = sim.CONTRACTS / "metaworld_state.yaml"
    demonstrations: int = 5
    old_failures: int = 6
    """Episodes of a policy of `old_updates` updates, alone."""
    corrected: int = 4
    """Episodes of the starting policy with the operator."""
    old_updates: int = 200
    start_updates: int = 1500
    rounds: int = 4
    episodes: int = 8
    """Of each round, with the operator."""
    updates: int = 400
    """Of the policy, before each round and after the last."""
    critic_updates: int = 800
    """Of a critic or value, before those of the policy: the paper's stages."""
    batch_size: int = 64
    learning_rate: float = 5e-4
    demonstration_share: float = 0.4
    """Of each batch, whatever the method; the rest comes from the robot."""
    intervention_share: float = 0.3
    """Of each batch: chunks that a person commanded, drawn beside everything that the robot did, as
    HIL-SERL's second buffer (arXiv:2410.21845), for methods that learn from both. In the order of
    their number they are few, and a weight near 1 on the policy's own chunks drowns them."""
    evaluation_episodes: int = 30
    evaluation_seed: int = 50_000
    operator: OperatorConfig = field(default_factory=OperatorConfig)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - METHODS.keys())
        if unknown:
            raise ValueError(f"no method {unknown}; there are {', '.join(METHODS)}")
        for name in ("demonstrations", "old_failures", "corrected", "episodes", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.demonstration_share <= 1.0 - self.intervention_share < 1.001:
            raise ValueError(
                f"demonstration_share is {self.demonstration_share} and intervention_share "
                f"{self.intervention_share}; expected shares that leave some of 1 to the robot"
            )

    def settings(self) -> str:
        """Hash of everything that a result depends on beside task, seed and method."""
        known = asdict(self) | {"tasks": (), "seeds": (), "methods": (), "contract": ""}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]


_WEIGHTS = WeightConfig(beta=0.3)
_ALOE = AloeConfig(weights=_WEIGHTS, target_rate=0.05, value_samples=2)
METHODS: dict[str, Algorithm] = {
    "bc": HgDaggerConfig(),
    "dagger": HgDaggerConfig(),
    "awr": AwrConfig(weights=_WEIGHTS),
    "aloe": _ALOE,
    "aloe-h4": replace(_ALOE, chunk=4),
    "aloe-mean": replace(_ALOE, target="mean", pessimism="mean"),
    "aloe-whole-chunks": replace(_ALOE, bootstrap="whole_chunks"),
    "aloe-no-done": replace(_ALOE, done_factor=False),
    "aloe-categorical": replace(_ALOE, critic=CriticConfig(output="hl_gauss")),
    "aloe-transformer": replace(_ALOE, critic=CriticConfig(trunk="transformer")),
}
"""By name: the algorithm of each, which differ in nothing else. After `aloe` come ablations."""


def run_study(
    study: AloeStudy, out: Path, *, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Runs what is missing and returns all results.

    Raises:
        ValueError: `out` holds results of another study.
    """
    import torch

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    results = read_results(path)
    other = {r["settings"] for r in results} - {study.settings()}
    if other:
        raise ValueError(
            f"{path}: holds results of other settings ({', '.join(sorted(other))}, this study is "
            f"{study.settings()}); choose another folder, since such results cannot be pooled"
        )
    done = {(r["task"], r["seed"], r["method"]) for r in results}
    for seed in study.seeds:
        for task in study.tasks:
            for method in ("start", *study.methods):
                if (task, seed, method) in done:
                    continue
                result = _Run(study, task, seed, method, out).play()
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                results.append(result)
                say(
                    f"{task} seed {seed} {method}: {sum(result['success'])}/"
                    f"{len(result['success'])} alone, {result['takeovers']} takeovers, "
                    f"{result['wall_s']:.0f} s"
                )
    return results


def read_results(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a results file; [] where there is none."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class _Run:
    """One method on one task with one seed."""

    def __init__(self, study: AloeStudy, task: str, seed: int, method: str, out: Path) -> None:
        self.study, self.task, self.seed, self.method = study, task, seed, method
        self.contract: Contract = load_contract(study.contract)
        self.contract.task(task)
        self.shared = out / f"{task}_{seed}" / "shared"
        self.folder = out / f"{task}_{seed}" / method
        self.takeovers = self.human_steps = self.robot_steps = 0
        self.rounds: list[dict[str, float]] = []

    def play(self) -> dict[str, Any]:
        from vla_post.policies.lerobot_adapter import LeRobotPolicy
        from vla_post.training.trainer import TrainConfig, Trainer

        study = self.study
        _prepare(self)
        shutil.rmtree(self.folder, ignore_errors=True)  # what an interrupted run left
        started = time.monotonic()
        train_s = 0.0
        extra: dict[str, Any] = {}
        checkpoint = self.shared / "start"
        if self.method != "start":
            algorithm = replace(  # pyright: ignore[reportCallIssue]
                METHODS[self.method],
                learning_rate=study.learning_rate,  # pyright: ignore[reportCallIssue]
            )
            policy = LeRobotPolicy.load(checkpoint)
            config = TrainConfig(
                algorithm=algorithm, batch_size=study.batch_size, seed=1000 + self.seed
            )
            trainer = Trainer(policy, config)
            online = self.method != "bc"
            checkpoint = self.folder / "policy"
            for number in range(study.rounds + 1):
                began = time.monotonic()
                extra = self._improve(trainer, number)
                train_s += time.monotonic() - began
                trainer.save_policy(checkpoint)
                if online and number < study.rounds:
                    self._collect(checkpoint, number)
            if hasattr(trainer.learner, "value") and self.method.startswith("aloe"):
                extra["trainer"] = trainer
        results = self._evaluate(checkpoint)
        trainer = extra.pop("trainer", None)
        if trainer is not None:
            extra |= _off_policy_error(trainer.learner, results)
        return {
            "task": self.task,
            "seed": self.seed,
            "method": self.method,
            "settings": study.settings(),
            "success": [r.success for r in results],
            "success_steps": float(np.median([r.steps for r in results if r.success] or [0])),
            "takeovers": self.takeovers,
            "human_steps": self.human_steps,
            "robot_steps": self.robot_steps,
            "rounds": self.rounds,
            "train_s": round(train_s, 1),
            "wall_s": round(time.monotonic() - started, 1),
            "last_metrics": extra,
        }

    def _improve(self, trainer: Any, number: int) -> dict[str, Any]:
        """Evaluate, then improve, on everything so far; returns the last metrics of both."""
        study, learner = self.study, trainer.learner
        trainer.policy.module.train()
        sampler = self._sampler(trainer, number)
        metrics: dict[str, Any] = {}
        if hasattr(learner, "evaluate"):
            for _ in range(study.critic_updates):
                metrics |= learner.evaluate(_batch(trainer, sampler))
            if hasattr(learner, "begin_improvement"):
                learner.begin_improvement()
        step = getattr(learner, "improve", learner.update)
        for _ in range(study.updates):
            metrics |= step(_batch(trainer, sampler))
            trainer.ema.update(trainer.policy.module)
        sampler.close()
        return metrics

    def _sampler(self, trainer: Any, number: int) -> ChunkSampler:
        study = self.study
        needs = trainer.config.algorithm.data(self.contract)
        demonstrations = FleetView(self.shared / "demonstrations")
        parts = [Part(data=demonstrations, name="demonstrations")]
        if self.method != "bc":
            folders = [self.shared / "old", self.shared / "corrected"]
            if (self.folder / "online").exists():
                folders.append(self.folder / "online")
            robot = Part(
                data=FleetView(folders), name="online", filter=Filter(sources=needs.sources)
            )
            left = 1.0 - study.demonstration_share
            parts = [replace(parts[0], weight=study.demonstration_share)]
            if needs.sources is None and study.intervention_share > 0:
                left -= study.intervention_share
                people = Filter(sources=[Source.HUMAN])
                parts.append(
                    replace(robot, name="human", weight=study.intervention_share, filter=people)
                )
            parts.append(replace(robot, weight=left))
        return ChunkSampler(
            parts,
            horizon=self.contract.chunk_horizon,
            batch_size=study.batch_size,
            seed=1 + 1000 * self.seed + number,
            next_observation=needs.next_observation,
            backup=needs.backup,
        )

    def _collect(self, checkpoint: Path, number: int) -> None:
        study = self.study
        seeds = range(
            _scene(self.seed, 200 + number * study.episodes),
            _scene(self.seed, 200 + (number + 1) * study.episodes),
        )
        results = _record(self, checkpoint, self.folder / "online", seeds, study.operator, number)
        self.takeovers += sum(r.takeovers for r in results)
        self.human_steps += sum(r.human_steps for r in results)
        self.robot_steps += sum(r.steps for r in results)
        self.rounds.append(
            {
                "unaided": float(np.mean([r.success and r.takeovers == 0 for r in results])),
                "success": float(np.mean([r.success for r in results])),
                "human_share": float(np.mean([r.human_share for r in results])),
            }
        )

    def _evaluate(self, checkpoint: Path) -> list[Result]:
        study = self.study
        cases = [
            Case(self.task, study.evaluation_seed + 1000 * self.seed + k)
            for k in range(study.evaluation_episodes)
        ]
        record = self.method.startswith("aloe")
        return rollout(_player(checkpoint), self.contract, cases, record=record, slots=40)


def _scene(seed: int, number: int) -> int:
    """Scenes of different seeds and purposes never meet."""
    return 200_000 + 10_000 * seed + number


def _batch(trainer: Any, sampler: Iterator[Any]) -> Any:
    from vla_post.batch import Batch

    return Batch.from_numpy(next(sampler), trainer.policy.device)


def _player(checkpoint: Path) -> Any:
    from vla_post.export.runtime import load_policy

    return load_policy(checkpoint).act_batch


def _record(
    run: _Run,
    checkpoint: Path,
    store: Path,
    seeds: Sequence[int],
    operator: OperatorConfig | None,
    version: int,
) -> list[Result]:
    cases = [Case(run.task, seed) for seed in seeds]
    results = rollout(
        _player(checkpoint), run.contract, cases, operator=operator, record=True, slots=40
    )
    with StoreWriter.create_or_open(store, run.contract, writer=store.name) as writer:
        for result in results:
            assert result.episode is not None
            write_episode(writer, result.episode, policy_version=version)
    return results


def _prepare(run: _Run) -> None:
    """What all methods share: demonstrations, the starting policy, the initial buffer."""
    import torch

    from vla_post.policies.build import build_policy
    from vla_post.training.data import mixture, statistics
    from vla_post.training.trainer import TrainConfig, Trainer, cosine

    study, shared = run.study, run.shared
    if (shared / "ready").exists():
        return
    shutil.rmtree(shared, ignore_errors=True)
    write_demonstrations(
        shared / "demonstrations",
        run.contract,
        tasks=[run.task],
        episodes_per_task=study.demonstrations,
        seed=_scene(run.seed, 0),
        noise=0.05,
    )
    view = FleetView(shared / "demonstrations")
    torch.manual_seed(run.seed)
    policy = build_policy("chunk_flow", run.contract, statistics(view, run.contract))
    train = TrainConfig(
        algorithm=HgDaggerConfig(learning_rate=1e-3), batch_size=START_BATCH, seed=run.seed
    )
    trainer = Trainer(policy, train)
    sampler = mixture(
        view, None, run.contract, batch_size=START_BATCH, online_share=0.5, seed=run.seed
    )
    for number in range(study.start_updates):
        trainer.learner.rate_scale = cosine(number / study.start_updates, 0.1)
        trainer.step(next(sampler))
        if number + 1 == study.old_updates:
            trainer.save_policy(shared / "older")
    trainer.save_policy(shared / "start")
    first = _scene(run.seed, 100)
    old = range(first, first + study.old_failures)
    _record(run, shared / "older", shared / "old", old, None, 0)
    corrected = range(first + 50, first + 50 + study.corrected)
    _record(run, shared / "start", shared / "corrected", corrected, study.operator, 0)
    (shared / "ready").touch()


def _off_policy_error(learner: Any, results: Sequence[Result]) -> dict[str, Any]:
    """V of the critic against what the evaluated policy then got, over its evaluation episodes."""
    import torch

    from vla_post.critics.diagnostics import calibration, correlation
    from vla_post.critics.returns import monte_carlo_return

    values: list[torch.Tensor] = []
    realised: list[torch.Tensor] = []
    for result in results:
        episode = result.episode
        assert episode is not None
        ticks = np.arange(0, len(episode), 8)
        observation = {k: torch.from_numpy(v[ticks]) for k, v in episode.observation.items()}
        values.append(learner.value(observation, [episode.instruction] * len(ticks)))
        outcome = torch.full((len(ticks),), 1 if episode.success else -1)
        left = torch.from_numpy(len(episode) - ticks)
        realised.append(monte_carlo_return(left, outcome, learner.config.rewards))
    value, got = torch.cat(values), torch.cat(realised)
    return {
        "value/mean": float(value.mean()),
        "value/realised_mean": float(got.mean()),
        "value/absolute_error": float((value - got).abs().mean()),
        "value/correlation": correlation(value, got),
        "value/calibration": calibration(value, got),
    }
