"""An episode in memory, row by row as the store keeps it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from trajectory_store import Source


@dataclass
class Episode:
    """Row k holds what was seen at tick k, what was sent then, and what that led to. T rows."""

    task: str
    instruction: str
    seed: int
    success: bool
    observation: dict[str, Float[np.ndarray, "T D"]]
    """Vectors, float32."""
    jpeg: dict[str, list[bytes]]
    """Images as JPEG, one entry a row; a frame repeats until the next one was due."""
    action: Float[np.ndarray, "T A"]
    """What was sent, float32."""
    action_policy: Float[np.ndarray, "T A"]
    """NaN where the policy proposed nothing."""
    action_human: Float[np.ndarray, "T A"]
    """NaN where nobody drove."""
    source: Int[np.ndarray, " T"]
    """`trajectory_store.Source`."""
    chunk_id: Int[np.ndarray, " T"]
    """Of the inference behind `action_policy`, counted from 1 in each episode; 0 for none."""
    chunk_step: Int[np.ndarray, " T"]
    task_reward: Float[np.ndarray, " T"]
    """The simulator's dense reward after each row's action."""
    takeovers: int = 0

    def __len__(self) -> int:
        return len(self.action)

    @property
    def truncated(self) -> bool:
        """Ended by the clock: every episode of a simulated cell that is not a success."""
        return not self.success

    @property
    def reward(self) -> Float[np.ndarray, " T"]:
        """1 at the last row of a success, else 0."""
        out = np.zeros(len(self), np.float32)
        out[-1] = self.success
        return out

    @property
    def terminated(self) -> Bool[np.ndarray, " T"]:
        out = np.zeros(len(self), bool)
        out[-1] = self.success
        return out

    @property
    def human_share(self) -> float:
        """Part of the rows in which the operator drove."""
        return float(np.mean(self.source == Source.HUMAN))


class EpisodeRecorder:
    """Collects one episode's rows; `finish` makes the arrays."""

    def __init__(self, task: str, instruction: str, seed: int, action_size: int) -> None:
        self._head = (task, instruction, seed)
        self._nothing = np.full(action_size, np.nan, np.float32)
        self._vectors: dict[str, list[np.ndarray]] = {}
        self._jpeg: dict[str, list[bytes]] = {}
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, int, int, int]] = []
        self._task_reward: list[float] = []

    def see(self, vectors: dict[str, np.ndarray], jpeg: dict[str, bytes]) -> None:
        """What is observed at a tick."""
        for key, value in vectors.items():
            self._vectors.setdefault(key, []).append(value)
        for key, value in jpeg.items():
            self._jpeg.setdefault(key, []).append(value)

    def act(
        self,
        action: np.ndarray,
        source: Source,
        *,
        policy: np.ndarray | None = None,
        human: np.ndarray | None = None,
        chunk_id: int = 0,
        chunk_step: int = 0,
        task_reward: float = 0.0,
    ) -> None:
        """What was sent at that tick, and the dense reward that followed."""
        sent, policy, human = (
            self._nothing if p is None else np.asarray(p, np.float32)
            for p in (action, policy, human)
        )
        self._rows.append((sent, policy, human, int(source), chunk_id, chunk_step))
        self._task_reward.append(task_reward)

    def finish(self, success: bool, takeovers: int = 0) -> Episode:
        action, policy, human, source, chunk_id, chunk_step = zip(*self._rows, strict=True)
        task, instruction, seed = self._head
        return Episode(
            task=task,
            instruction=instruction,
            seed=seed,
            success=success,
            observation={key: np.stack(values) for key, values in self._vectors.items()},
            jpeg=self._jpeg,
            action=np.stack(action),
            action_policy=np.stack(policy),
            action_human=np.stack(human),
            source=np.array(source, np.uint8),
            chunk_id=np.array(chunk_id, np.uint32),
            chunk_step=np.array(chunk_step, np.uint16),
            task_reward=np.array(self._task_reward, np.float32),
            takeovers=takeovers,
        )
