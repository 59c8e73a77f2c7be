"""Recorded runs: the form between the environments and the files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32


@dataclass(frozen=True)
class Trajectory:
    """One episode, or the part of it that was recorded."""

    observation: Float32[np.ndarray, "T D"]
    action: Float32[np.ndarray, "T A"]
    """As the environment received it, inside its limits."""
    reward: Float32[np.ndarray, " T"]
    last_observation: Float32[np.ndarray, " D"]
    """What the last step led to, before any reset."""
    terminated: bool
    """The last step ended the task (the robot fell); else it was stopped."""
    complete: bool
    """Ended by the environment; False where the recording stopped first."""

    def __len__(self) -> int:
        return len(self.action)

    @property
    def next_observation(self) -> Float32[np.ndarray, "T D"]:
        return np.concatenate([self.observation[1:], self.last_observation[None]])

    @property
    def episode_return(self) -> float:
        return float(self.reward.sum(dtype=np.float64))


def save_trajectories(path: Path, trajectories: Sequence[Trajectory]) -> None:
    """One uncompressed npz file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **join(trajectories))
    partial.replace(path)


def load_trajectories(path: Path) -> list[Trajectory]:
    """What `save_trajectories` wrote."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    ends = np.cumsum(found["length"])
    return [
        Trajectory(
            observation=found["observation"][start:end],
            action=found["action"][start:end],
            reward=found["reward"][start:end],
            last_observation=found["last_observation"][i],
            terminated=bool(found["terminated"][i]),
            complete=bool(found["complete"][i]),
        )
        for i, (start, end) in enumerate(zip(ends - found["length"], ends, strict=True))
    ]


def join(trajectories: Sequence[Trajectory]) -> dict[str, np.ndarray]:
    """Steps one after the other, and a row per trajectory of the rest."""
    return {
        "observation": np.concatenate([t.observation for t in trajectories]),
        "action": np.concatenate([t.action for t in trajectories]),
        "reward": np.concatenate([t.reward for t in trajectories]),
        "last_observation": np.stack([t.last_observation for t in trajectories]),
        "length": np.array([len(t) for t in trajectories], np.int64),
        "terminated": np.array([t.terminated for t in trajectories], np.bool_),
        "complete": np.array([t.complete for t in trajectories], np.bool_),
    }


def episode_returns(trajectories: Sequence[Trajectory]) -> Float[np.ndarray, " N"]:
    """Of the complete ones."""
    return np.array([t.episode_return for t in trajectories if t.complete], np.float64)
