"""Records what passes through stable-baselines3's vectorised environments."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sim.locomotion.trajectory import Trajectory


class Recorder(VecEnvWrapper):
    """Keeps what passes through a vectorised environment, per environment and in order.

    It sits below the normalisation of observations and rewards, so it sees raw ones.
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self._rows: list[list[tuple[np.ndarray, np.ndarray, float]]] = []
        self._ended: list[list[Trajectory]] = []
        self._seen: Float32[np.ndarray, "B D"] = np.zeros((0, 0), np.float32)
        self._sent: Float32[np.ndarray, "B A"] = np.zeros((0, 0), np.float32)

    def reset(self) -> VecEnvObs:
        """Starts over; what was not taken is forgotten."""
        self._rows = [[] for _ in range(self.num_envs)]
        self._ended = [[] for _ in range(self.num_envs)]
        self._seen = _plain(self.venv.reset())
        return self._seen

    def step_async(self, actions: np.ndarray) -> None:
        self._sent = np.array(actions, np.float32)
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        observation, reward, done, infos = self.venv.step_wait()
        for i, rows in enumerate(self._rows):
            rows.append((self._seen[i], self._sent[i], float(reward[i])))
            if done[i]:
                info: Mapping[str, Any] = infos[i]
                terminated = not info.get("TimeLimit.truncated", False)
                last = np.array(info["terminal_observation"], np.float32)
                self._ended[i].append(_trajectory(rows, last, terminated=terminated, complete=True))
                rows.clear()
        self._seen = _plain(observation)
        return observation, reward, done, infos

    def completed(self) -> list[int]:
        """Episodes that have ended, per environment."""
        return [len(ended) for ended in self._ended]

    def take(self) -> list[list[Trajectory]]:
        """Everything since the reset, per environment; running episodes are cut off here."""
        for rows, ended, last in zip(self._rows, self._ended, list(self._seen), strict=True):
            if rows:
                ended.append(_trajectory(rows, last, terminated=False, complete=False))
                rows.clear()
        taken, self._ended = self._ended, [[] for _ in range(self.num_envs)]
        return taken


def _plain(observation: VecEnvObs) -> Float32[np.ndarray, "B D"]:
    assert isinstance(observation, np.ndarray)
    return observation.astype(np.float32)


def _trajectory(
    rows: Sequence[tuple[np.ndarray, np.ndarray, float]],
    last: np.ndarray,
    *,
    terminated: bool,
    complete: bool,
) -> Trajectory:
    observation, action, reward = zip(*rows, strict=True)
    return Trajectory(
        observation=np.stack(observation),
        action=np.stack(action),
        reward=np.array(reward, np.float32),
        last_observation=last,
        terminated=terminated,
        complete=complete,
    )
