"""A behaviour agent: stable-baselines3's PPO, trained in rounds until it reaches a level.

A round begins with freshly reset environments and its own seed, and ends with an evaluation and a
checkpoint. So a run that was stopped goes on exactly as it would have without the stop: the same
numbers on the same machine and library versions. What training saw until the medium level is kept
as well; it is the medium-replay data.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sim.locomotion.config import PpoConfig
from sim.locomotion.facts import environment, normalised_score
from sim.locomotion.recorder import Recorder
from sim.locomotion.trajectory import (
    Trajectory,
    episode_returns,
    load_trajectories,
    save_trajectories,
)

log = logging.getLogger(__name__)

Say = Callable[[str], None]


class LevelNotReached(ValueError):
    """The agent's budget of steps is spent; the message says how far it came and what to do."""


class OtherAgent(ValueError):
    """The folder holds an agent of another configuration; the message names what differs."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """How the agent stood after a round."""

    number: int
    steps: int
    """Of all environments together, since training began."""
    mean_return: float
    score: float
    """D4RL's normalised score of `mean_return`."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A named level, and the round that reached it."""

    name: str
    target: float
    reached: Round


class Agent:
    """PPO with its environments, observation statistics and folder.

    `agent.pt` is the newest round, `best.pt` the best one, `medium.pt` and so on the first that
    reached a level; `rounds/` holds what training saw until `medium`.
    """

    def __init__(self, folder: Path, env: str, config: PpoConfig, *, seed: int = 0) -> None:
        """Makes the folder, or goes on with what is in it.

        Raises:
            UnknownEnvironment
            OtherAgent: the folder holds an agent of another environment, seed or configuration.
        """
        environment(env)
        (folder / "rounds").mkdir(parents=True, exist_ok=True)
        _require_same(folder / "config.json", {"env": env, "seed": seed} | asdict(config))
        self.folder, self.env, self.seed, self.config = folder, env, seed, config
        self.rounds: list[Round] = []
        torch.set_num_threads(1)  # the networks are small, and one thread is the same everywhere
        self._recorder = Recorder(_environments(env, config.envs))
        self._normaliser = VecNormalize(self._recorder, gamma=config.discount)
        self._ppo = PPO(
            "MlpPolicy",
            self._normaliser,
            n_steps=config.rollout_steps,
            batch_size=config.batch_size,
            n_epochs=config.epochs,
            learning_rate=config.learning_rate,
            gamma=config.discount,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip,
            policy_kwargs={
                "net_arch": list(config.hidden),
                "log_std_init": config.initial_log_std,
            },
            seed=seed,
            device="cpu",
        )
        if (folder / "agent.pt").exists():
            self._load("agent")
        else:
            self._save("agent")

    def close(self) -> None:
        self._normaliser.close()

    def reach(self, name: str, target: float, *, max_steps: int, say: Say = log.info) -> Level:
        """Trains until the evaluated score is at least `target`, and loads the policy that did it.

        A level that was reached before is only loaded.

        Raises:
            LevelNotReached: not within `max_steps` of all environments together.
            OtherAgent: the level was reached before with another target.
        """
        level = self.level(name)
        if level is None:
            found = self._train(name, target, max_steps, say)
            level = Level(name=name, target=target, reached=found)
            self._save(name)
            _write_json(self.folder / f"{name}.json", asdict(level))
        elif level.target != target:
            raise OtherAgent(
                f"{self.folder}: this agent reached its level {name!r} with the target "
                f"{level.target:g}, and {target:g} is asked; use that, or another folder"
            )
        self._load(name)
        return level

    def level(self, name: str) -> Level | None:
        """The level, if it was reached."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return Level(**found | {"reached": Round(**found["reached"])})

    def replay(self) -> list[Trajectory]:
        """What training saw until the medium level was reached, in order; it must have been."""
        level = self.level("medium")
        assert level is not None
        return [
            trajectory
            for number in range(1, level.reached.number + 1)
            for trajectory in load_trajectories(self._round_path(number))
        ]

    def roll_out(self, steps: int, *, seed: int, say: Say = log.info) -> list[Trajectory]:
        """At least `steps` steps of the loaded policy with sampled actions, in fresh environments.

        Every environment takes the same number, and its running episode is then cut off.
        """
        each = -(-steps // self.config.envs)

        def enough(count: int, _: Sequence[int]) -> bool:
            if count and count % max(each // 10, 1) == 0:
                say(f"{self.env}: {count * self.config.envs:,} steps recorded")
            return count >= each

        return [part for run in self._play(seed, enough) for part in run]

    def evaluate(self, episodes: int, *, seed: int) -> float:
        """Mean return over whole episodes of the loaded policy with sampled actions.

        Each environment plays the same number, so that short episodes do not count more.
        """
        each = -(-episodes // self.config.envs)
        taken = self._play(seed, lambda _, completed: min(completed) >= each)
        return float(np.mean([episode_returns(run)[:each] for run in taken]))

    # ---------------------------------------------------------------------------------------------

    def _train(self, name: str, target: float, max_steps: int, say: Say) -> Round:
        """Rounds from the newest on, until one reaches the target; that one is then loaded."""
        self._load("agent")
        best = max(self.rounds, key=lambda r: r.score, default=None)
        if best is not None and best.score >= target:
            self._load("best")
            return best
        while len(self.rounds) * self.config.round_steps < max_steps:
            found = self._round(keep=self.level("medium") is None)
            say(
                f"{self.env}: {found.steps:,} steps, return {found.mean_return:.0f}, "
                f"score {found.score:.1f}; {name} is {target:g}"
            )
            if found.score >= target:
                return found
            best = found if best is None or found.score > best.score else best
        score = f"{best.score:.1f} after {best.steps:,} steps" if best else "of no round"
        raise LevelNotReached(
            f"{self.env}: level {name!r} is a score of {target:g}; the best within "
            f"{max_steps:,} steps was {score}. Give more --max-steps, or ask for less "
            f"(--{name}-score); what was learned is kept in {self.folder}"
        )

    def _round(self, *, keep: bool) -> Round:
        number, config = len(self.rounds) + 1, self.config
        self._ppo.set_random_seed(_seed(self.seed, number, 0))
        self._ppo.learn(config.round_steps)
        taken = self._recorder.take()
        if keep:
            save_trajectories(self._round_path(number), [part for run in taken for part in run])
        value = self.evaluate(config.evaluation_episodes, seed=_seed(self.seed, number, 1))
        found = Round(
            number=number,
            steps=number * config.round_steps,
            mean_return=value,
            score=float(normalised_score(self.env, value)),
        )
        self.rounds.append(found)
        if found.score == max(r.score for r in self.rounds):
            self._save("best")
        self._save("agent")
        return found

    def _play(
        self, seed: int, enough: Callable[[int, Sequence[int]], bool]
    ) -> list[list[Trajectory]]:
        """Steps fresh environments until `enough(steps of each, whole episodes of each)`."""
        recorder = Recorder(_environments(self.env, self.config.envs))
        try:
            set_random_seed(seed)
            recorder.seed(seed)
            observation = recorder.reset()
            count = 0
            while not enough(count, recorder.completed()):
                assert isinstance(observation, np.ndarray)
                seen = self._normaliser.normalize_obs(observation)
                action, _ = self._ppo.predict(seen, deterministic=False)
                observation = recorder.step(action)[0]
                count += 1
            return recorder.take()
        finally:
            recorder.close()

    def _round_path(self, number: int) -> Path:
        return self.folder / "rounds" / f"{number:05d}.npz"

    @property
    def _statistics(self) -> dict[str, RunningMeanStd]:
        seen = self._normaliser.obs_rms
        assert isinstance(seen, RunningMeanStd)
        return {"observation": seen, "return": self._normaliser.ret_rms}

    def _save(self, name: str) -> None:
        """Parameters, optimiser, statistics and rounds, whole or not at all."""
        path = self.folder / f"{name}.pt"
        partial = path.with_name(path.name + ".partial")
        statistics = {
            key: (torch.as_tensor(s.mean), torch.as_tensor(s.var), float(s.count))
            for key, s in self._statistics.items()
        }
        rounds = [asdict(r) for r in self.rounds]
        parameters = self._ppo.get_parameters()
        torch.save({"parameters": parameters, "statistics": statistics, "rounds": rounds}, partial)
        partial.replace(path)

    def _load(self, name: str) -> None:
        saved = torch.load(self.folder / f"{name}.pt", weights_only=True)
        self._ppo.set_parameters(saved["parameters"], device="cpu")
        for key, statistics in self._statistics.items():
            mean, variance, count = saved["statistics"][key]
            statistics.mean, statistics.var = mean.numpy(), variance.numpy()
            statistics.count = count
        self.rounds = [Round(**r) for r in saved["rounds"]]


def _environments(env: str, count: int) -> VecEnv:
    return DummyVecEnv([lambda: gymnasium.make(env)] * count)


def _seed(*numbers: int) -> int:
    """One seed of 31 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def _require_same(path: Path, config: dict[str, Any]) -> None:
    """Writes the configuration, or compares it with what is there."""
    asked: dict[str, Any] = json.loads(json.dumps(config))
    if not path.exists():
        _write_json(path, asked)
        return
    found: dict[str, Any] = json.loads(path.read_text())
    wrong = [
        f"{key} {found.get(key)!r}, asked {asked.get(key)!r}"
        for key in sorted(found.keys() | asked.keys())
        if found.get(key) != asked.get(key)
    ]
    if wrong:
        raise OtherAgent(
            f"{path.parent} holds another agent ({'; '.join(wrong)}); name another folder, or "
            "give the same options"
        )


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
