"""Uni-O4 against cloning and IQL offline, and against PPO from scratch and IQL online.

    python -m vla_post.recipes.studies.uni_o4 --env Hopper-v5 --data DATA/transitions.hdf5 \\
        --work WORK --out results/uni_o4.jsonl
    python -m vla_post.recipes.studies.uni_o4 --env Hopper-v5 --out results/uni_o4.jsonl --show
    python -m vla_post.recipes.studies.uni_o4 --contract CELL.yaml --env push --data push.hdf5 ...

For each seed: an ensemble is cloned (`bc`: its members as they are) and improved offline behind the
gate (`uni-o4`); `iql` has values and policy of the same sizes. Then each goes on online, beside PPO
from random weights (`ppo`) with the same code, networks, units and number of steps. Every arm is
judged by its mean action on the same episodes. What is in --out is not run again. On a cell the
score is the share of episodes that succeed, in per cent.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from gymnasium import spaces

from sim.locomotion.facts import ENVIRONMENTS, normalised_score
from trajectory_store import load_contract
from vla_post.batch import Metrics
from vla_post.learners.uni_o4.amq import GateConfig
from vla_post.learners.uni_o4.cloning import CloningConfig
from vla_post.learners.uni_o4.data import Transitions
from vla_post.learners.uni_o4.dynamics import DynamicsConfig, termination_of
from vla_post.learners.uni_o4.iql import IqlOnline, IqlOnlineConfig, IqlPolicy, IqlPolicyConfig
from vla_post.learners.uni_o4.offline import OfflineConfig, gate_summary
from vla_post.learners.uni_o4.online import OnlineConfig, OnlinePpo
from vla_post.learners.uni_o4.policies import Policies, PolicyConfig, build_policies
from vla_post.learners.uni_o4.rollouts import commands, true_returns
from vla_post.learners.uni_o4.samples import Scales, prepare, scales_of
from vla_post.learners.uni_o4.values import ValueConfig, ValueFit, Values
from vla_post.recipes.studies.common import Results
from vla_post.recipes.uni_o4_env import Judge, env_maker, vector_env
from vla_post.training.uni_o4 import (
    Agent,
    OfflineRun,
    OnlineRun,
    UniO4Config,
    fresh_agent,
    read_looks,
)

JUDGED = 700_000
"""First seed of the episodes that arms are judged on."""

SIZES = UniO4Config(
    policy=PolicyConfig(members=4, width=64, layers=2),
    # The target follows ten times as fast as in the paper, for a few thousand updates must do.
    values=ValueConfig(
        updates=4000, width=64, batch_size=256, learning_rate=1e-3, target_rate=0.05
    ),
    cloning=CloningConfig(updates=3000, batch_size=256, learning_rate=1e-3),
    dynamics=DynamicsConfig(
        members=4, elites=3, width=96, layers=2, batch_size=256, max_updates=2500
    ),
    offline=OfflineConfig(
        updates=1500,
        batch_size=512,
        learning_rate=3e-4,
        gate=GateConfig(every=100, horizon=50, starts=128),
    ),
)
"""A few hundredths of the paper's updates, of smaller networks: minutes on one core."""


@dataclass(frozen=True, kw_only=True)
class Study:
    out: Path
    """File of results."""
    env: str = "Hopper-v5"
    """A gymnasium id, or with --contract the name of a task."""
    contract: Path | None = None
    """Of a simulated cell, with reward 1 at a success; `--train.horizon` is its chunks' length."""
    data: Path | None = None
    """Transitions. If the file is not there, --behaviour makes it."""
    behaviour: float = 0.0
    """Train PPO from scratch until its episodes return this much, and record it: for environments
    that `vla-post data locomotion` does not know."""
    behaviour_transitions: int = 20_000
    work: Path = Path("runs/uni_o4_study")
    """Runs in the making, which resume."""
    seeds: tuple[int, ...] = (0, 1, 2)
    online_arms: tuple[str, ...] = ("uni-o4", "ppo", "iql")
    episodes: int = 20
    """That an arm is judged on."""
    look_episodes: int = 3
    """Of each member at each look of the gate, to see whether the gate tells the truth."""
    train: UniO4Config = SIZES
    iql_policy: IqlPolicyConfig = field(
        default_factory=lambda: IqlPolicyConfig(updates=4000, learning_rate=1e-3)
    )
    online: OnlineConfig = field(default_factory=lambda: OnlineConfig(steps=60_000))
    scratch_learning_rate: float = 3e-4
    """Of PPO from scratch, with the usual clip of 0.2: small steps, which keep what is known, would
    only slow it down."""
    judge_every: int = 20_000
    """Online steps between two evaluations."""
    envs: int = 8
    show: bool = False

    def run(self) -> None:
        torch.set_num_threads(1)
        results = Results(self.out, ("env", "seed", "arm", "steps"))
        if self.show:
            print(tables([r for r in results.rows if r["env"] == self.env]))
            return
        if self.data is None:
            raise SystemExit("--data FILE: transitions to learn from")
        if self.behaviour and not self.data.exists():
            record_behaviour(self).save(self.data)
        data = Transitions.load(self.data)
        for seed in self.seeds:
            Seed(self, data, seed, results).run()


class Seed:
    """All arms of one seed."""

    def __init__(self, study: Study, data: Transitions, seed: int, results: Results) -> None:
        self.study, self.data, self.seed, self.results = study, data, seed, results
        self.folder = study.work / study.env / str(seed)
        self.config = replace(study.train, seed=seed)
        self.scales = scales_of(data, discount=study.train.discount, horizon=study.train.horizon)
        contract = None if study.contract is None else load_contract(study.contract)
        self.make = env_maker(study.env, contract=contract, scales=self.scales)

    def run(self) -> None:
        self.offline()
        if not self.has("iql", 0) or "iql" in self.study.online_arms:
            self.iql()
        for arm in self.study.online_arms:
            if arm != "iql" and not self.has(arm, self.study.online.steps):
                self.online(arm)

    def has(self, arm: str, steps: int) -> bool:
        return self.results.has(env=self.study.env, seed=self.seed, arm=arm, steps=steps)

    def offline(self) -> None:
        if self.has("uni-o4", 0):
            return
        started = time.process_time()
        judge = Judge(
            self.make,
            members=self.config.policy.members,
            episodes=self.study.look_episodes,
            seed=JUDGED + 50_000,
        )
        run = OfflineRun(
            self.config,
            self.data,
            self.folder / "offline",
            termination=termination_of(self.study.env),
            true_returns=judge,
        )
        agent = run.run(say=self.say)
        judge.close()
        assert agent is not None
        told = gate_summary(read_looks(self.folder / "offline"))
        clone = Agent.load(self.folder / "offline", "cloned")
        self.keep("bc", 0, clone.policy, clone.scales)
        spent = round(time.process_time() - started, 1)
        self.keep("uni-o4", 0, agent.policy, agent.scales, gate=told, cpu_s=spent)

    def iql(self) -> None:
        study, seed = self.study, self.seed
        if self.has("iql", study.online.steps):
            return
        torch.manual_seed(seed)
        scales = self.scales
        samples = prepare(self.data, scales)
        values = Values(
            self.data.state_size, scales.chunk_size, replace(self.config.values, kind="iql")
        )
        policy = build_policies(
            replace(self.config.policy, members=1), self.data.state_size, scales.chunk_size
        )
        returns = self.data.episode_returns()
        unit = scales.reward * 1000.0 / max(float(np.ptp(returns)), 1e-6)
        fit = ValueFit(values, samples, seed)
        extraction = IqlPolicy(policy, values, samples, study.iql_policy, unit=unit, seed=seed)
        while not fit.done:
            fit.update()
        while not extraction.done:
            extraction.update()
        if not self.has("iql", 0):
            self.keep("iql", 0, policy, scales)
        if "iql" not in study.online_arms:
            return
        env = vector_env(self.make, study.envs)
        stage = IqlOnline(
            fit, extraction, scales, env, IqlOnlineConfig(steps=study.online.steps), seed
        )
        due = study.judge_every
        while not stage.done:
            stage.update()
            if stage.steps >= due or stage.done:
                self.keep("iql", min(due, study.online.steps), policy, scales)
                due += study.judge_every
        env.close()

    def online(self, arm: str) -> None:
        study = self.study
        agent = Agent.load(self.folder / "offline")
        config = study.online
        if arm == "ppo":
            agent = agent.fresh(self.seed)
            config = replace(config, learning_rate=study.scratch_learning_rate, clip=0.2)
            self.keep(arm, 0, agent.policy, agent.scales)
        env = vector_env(self.make, study.envs)
        run = OnlineRun(agent, env, config, self.folder / f"online_{arm}", self.seed)
        due = study.judge_every

        def judge(ppo: Any) -> Metrics:
            nonlocal due
            if ppo.steps >= due or ppo.done:
                self.keep(arm, min(due, config.steps), ppo.policy, ppo.scales)
                due += study.judge_every
            return {}

        run.run(say=self.say, on_update=judge)
        env.close()

    def keep(self, arm: str, steps: int, policy: Policies, scales: Scales, **told: Any) -> None:
        if self.has(arm, steps):
            return
        env = vector_env(self.make, self.study.episodes)
        returns = true_returns(policy, scales, env, seed=JUDGED)[0].tolist()
        env.close()
        row = {
            "env": self.study.env,
            "seed": self.seed,
            "arm": arm,
            "steps": steps,
            "return": float(np.mean(returns)),
            "score": self.score(returns),
        } | told
        self.results.add(row | {"returns": returns})
        self.say(str(row))

    def score(self, returns: list[float]) -> float:
        if self.study.contract is not None:
            return 100.0 * float(np.mean(np.array(returns) > 0.0))
        return score(self.study.env, float(np.mean(returns)))

    def say(self, line: str) -> None:
        print(f"{self.study.env} seed {self.seed}: {line}", flush=True)


def record_behaviour(study: Study) -> Transitions:
    """Plain PPO up to `behaviour`, then its noisy actions, to whole rounds of `study.envs`."""
    env = vector_env(env_maker(study.env), study.envs)
    size, actions = env.single_observation_space.shape, env.single_action_space
    assert size is not None
    assert isinstance(actions, spaces.Box)
    env.reset(seed=0)
    # Units from a few random actions, as PPO knows no data.
    seen = [env.step(env.action_space.sample()) for _ in range(500)]
    states = np.stack([step[0] for step in seen]).reshape(-1, *size)
    scales = Scales(
        state_mean=tuple(states.mean(axis=0).tolist()),
        state_std=tuple(np.maximum(states.std(axis=0), 1e-2).tolist()),
        action_low=tuple(actions.low.tolist()),
        action_high=tuple(actions.high.tolist()),
        reward=max(float(np.std([step[1] for step in seen])) * 10.0, 1e-3),
        discount=study.train.discount,
        horizon=1,
    )
    agent = fresh_agent(scales, replace(study.train, seed=12_345))
    config = replace(
        study.online, steps=10**6, anneal=False, clip=0.2, learning_rate=study.scratch_learning_rate
    )
    ppo = OnlinePpo(agent.policy, agent.value, scales, env, config, 12_345)
    reached = -np.inf
    while reached < study.behaviour:
        reached = ppo.update().get("online/return", reached)
        print(f"behaviour: {ppo.steps} steps, return {reached:.4g}", flush=True)
        if ppo.done:
            raise SystemExit(f"return {study.behaviour:g} was not reached in {ppo.steps} steps")
    ppo.config = replace(config, batch_steps=study.behaviour_transitions)
    ppo.observation = None
    found = ppo.collect(torch.Generator().manual_seed(1))
    env.close()

    def rows(value: Any) -> np.ndarray:
        return np.asarray(value).swapaxes(0, 1).reshape(-1, *np.shape(value)[2:])

    ended = np.asarray(found.ended)
    ended[-1] = True
    real = rows(found.terminated)
    return Transitions(
        observations=rows(scales.raw_state(found.state)),
        actions=rows(
            commands(scales, found.chain[:, :, -1].flatten(0, 1)).reshape(*ended.shape, -1)
        ),
        rewards=rows(found.reward) * np.float32(scales.reward),
        terminals=real,
        timeouts=rows(ended) & ~real,
        next_observations=rows(scales.raw_state(found.next_state)),
        action_low=actions.low,
        action_high=actions.high,
    )


def score(env: str, value: float) -> float:
    """D4RL's normalised score, 0 for random and 100 for expert; the return itself elsewhere."""
    if env not in ENVIRONMENTS:
        return value
    return float(normalised_score(env, value))


def tables(rows: list[dict[str, Any]]) -> str:
    """Mean score over seeds with Student's 95 % interval, by arm and online steps; the gate's."""
    from scipy.stats import t

    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        cells[row["arm"], row["steps"]].append(row["score"])
    steps = sorted({row["steps"] for row in rows})
    lines = ["| arm | " + " | ".join(f"{n} steps" if n else "offline" for n in steps) + " |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        told: list[str] = []
        for n in steps:
            found = cells.get((arm, n), [])
            if len(found) > 1:
                width = t.ppf(0.975, len(found) - 1) * np.std(found, ddof=1) / len(found) ** 0.5
                told.append(f"{np.mean(found):.1f} ± {width:.1f} (n={len(found)})")
            else:
                told.append(f"{found[0]:.1f} (n=1)" if found else "-")
        lines.append(f"| {arm} | " + " | ".join(told) + " |")
    gates = [row["gate"] for row in rows if "gate" in row]
    for name in ("gate/accepted_rose", "gate/rank_correlation", "gate/accepted_count"):
        found = [f"{gate[name]:.2f}" for gate in gates if name in gate]
        lines.append(f"{name} by seed: {', '.join(found) or '-'}")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(Study).run()
