"""`vla-post uni-o4 ...`: one on-policy objective, offline on a data set and then online."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vla_post.cli.errors import UserError
from vla_post.learners.uni_o4.online import OnlineConfig
from vla_post.training.signals import StopRequest
from vla_post.training.uni_o4 import UniO4Config


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop() -> StopRequest:
    stop = StopRequest()
    stop.listen()
    stop.loading = False
    return stop


@dataclass(frozen=True, kw_only=True)
class World:
    """Where policies act: a gymnasium environment, or a task of a simulated cell."""

    env: str = ""
    """A gymnasium id such as Hopper-v5, or with --contract the name of a task."""
    contract: Path | None = None
    """Of a simulated cell."""

    def maker(self, scales: Any = None) -> Any:
        from trajectory_store import load_contract
        from vla_post.recipes.uni_o4_env import env_maker

        if not self.env:
            raise UserError("name an environment: --env Hopper-v5, or --contract CELL --env TASK")
        contract = load_contract(self.contract) if self.contract is not None else None
        if contract is not None:
            contract.task(self.env)
        return env_maker(self.env, contract=contract, scales=scales)


@dataclass(frozen=True, kw_only=True)
class Offline:
    """Fit values, clone an ensemble, fit the dynamics, and improve it offline behind AM-Q's gate.

    Called again after a stop, it goes on where it was.
    """

    data: Path
    """A .hdf5 or .npz file in D4RL's layout, or a trajectory store (or a folder of them)."""
    out: Path
    """The run's folder."""
    world: Annotated[World, tyro.conf.arg(name="")] = field(default_factory=World)
    """With --env, the rule by which a known task ends is used."""
    reward: Literal["success", "stored"] = "success"
    """Of a store: 1 at the end of a success, or what was recorded."""
    true_episodes: int = 0
    """Play this many episodes of every member in --env at every look of the gate, to see whether
    AM-Q tells the truth. The gate itself never uses them."""
    train: Annotated[UniO4Config, tyro.conf.arg(name="")] = field(default_factory=UniO4Config)

    def run(self) -> None:
        import torch

        from vla_post.learners.uni_o4.dynamics import termination_of
        from vla_post.recipes.uni_o4_env import Judge
        from vla_post.training.uni_o4 import OfflineRun

        torch.set_num_threads(1)
        stop = _stop()
        data = load_data(self.data, self.world.env if self.world.contract else None, self.reward)
        _say(
            f"{len(data)} transitions, {int(data.ends.sum())} episodes, mean return "
            f"{data.episode_returns().mean():.4g}"
        )
        judge = None
        if self.true_episodes:
            if self.world.contract is not None and self.train.horizon > 1:
                raise UserError("--true-episodes works with gymnasium environments and --horizon 1")
            judge = Judge(
                self.world.maker(),
                members=self.train.policy.members,
                episodes=self.true_episodes,
                seed=900_000 + self.train.seed,
            )
        try:
            agent = OfflineRun(
                self.train,
                data,
                self.out,
                termination=termination_of(self.world.env),
                true_returns=judge,
            ).run(stop=stop.is_set, say=_say)
        finally:
            if judge is not None:
                judge.close()
        if agent is None:
            raise SystemExit(130)
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class Online:
    """Go on from a run's agent with PPO in an environment; the same objective, the same units."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """The offline run."""
    out: Path
    """Folder of the online run."""
    world: Annotated[World, tyro.conf.arg(name="")] = field(default_factory=World)
    envs: int = 8
    """Environments side by side."""
    seed: int = 0
    scratch: bool = False
    """Start from random weights instead: plain PPO, with the run's sizes and units."""
    train: Annotated[OnlineConfig, tyro.conf.arg(name="")] = field(default_factory=OnlineConfig)

    def run(self) -> None:
        import torch

        from vla_post.recipes.uni_o4_env import vector_env
        from vla_post.training.uni_o4 import Agent, OnlineRun

        torch.set_num_threads(1)
        stop = _stop()
        agent = Agent.load(self.run_folder)
        if self.scratch:
            agent = agent.fresh(self.seed)
        env = vector_env(self.world.maker(agent.scales), self.envs)
        try:
            _require_fits(agent, env)
            found = OnlineRun(agent, env, self.train, self.out, self.seed).run(
                stop=stop.is_set, say=_say
            )
        finally:
            env.close()
        if found is None:
            raise SystemExit(130)
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Play episodes with a run's agent, without noise on its actions, and with the first clone."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """An offline or online run."""
    world: Annotated[World, tyro.conf.arg(name="")] = field(default_factory=World)
    episodes: int = 20
    seed: int = 1_000_000
    """Of the first episode."""

    def run(self) -> None:
        import torch

        from vla_post.learners.uni_o4.rollouts import true_returns
        from vla_post.recipes.uni_o4_env import vector_env
        from vla_post.training.uni_o4 import Agent

        torch.set_num_threads(1)
        found: dict[str, Any] = {}
        for name in ("agent", "cloned"):
            if name == "cloned" and not (self.run_folder / "cloned.json").exists():
                continue
            agent = Agent.load(self.run_folder, name)
            env = vector_env(self.world.maker(agent.scales), self.episodes)
            try:
                _require_fits(agent, env)
                returns = true_returns(agent.policy, agent.scales, env, seed=self.seed)[0]
            finally:
                env.close()
            error = float(returns.std()) / self.episodes**0.5
            found[name] = {"return": float(returns.mean()), "standard_error": error}
        print(json.dumps(found, indent=2))


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What the gate of an offline run saw: AM-Q, who was accepted, and, if they were played, the
    true returns."""

    run_folder: Annotated[Path, tyro.conf.Positional]

    def run(self) -> None:
        from vla_post.learners.uni_o4.offline import gate_summary
        from vla_post.training.uni_o4 import read_looks

        looks = read_looks(self.run_folder)
        if not looks:
            raise UserError(f"{self.run_folder}: no offline steps yet")
        for row in looks:
            print(json.dumps(row))
        print(json.dumps(gate_summary(looks)))


def load_data(path: Path, task: str | None, reward: Literal["success", "stored"]) -> Any:
    """Transitions from a file, or from every store below a folder."""
    from vla_post.learners.uni_o4.data import Transitions

    if not path.is_dir():
        return Transitions.load(path)
    from trajectory_store import FleetView
    from vla_post.convert.d4rl import from_stores

    view = FleetView(path)
    if not view.stores:
        raise UserError(f"{path}: no store here or below")
    return from_stores(view, task=task, reward=reward)


def _require_fits(agent: Any, env: Any) -> None:
    states, actions = env.single_observation_space.shape, env.single_action_space.shape
    wanted = ((agent.policy.state_size,), agent.policy.action_size)
    size = 1
    for number in actions:
        size *= number
    if states != wanted[0] or size != wanted[1]:
        raise UserError(
            f"the agent takes observations {wanted[0]} and gives {wanted[1]} numbers; the "
            f"environment has observations {states} and actions {actions}"
        )


sub = tyro.conf.subcommand
uni_o4_command = (
    Annotated[Offline, sub("offline")]
    | Annotated[Online, sub("online")]
    | Annotated[Evaluate, sub("eval")]
    | Annotated[Gate, sub("gate")]
)
