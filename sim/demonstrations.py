"""Demonstrations by the scripted experts: in memory, or into a trajectory store."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sim.cell import Cell, make_cell
from sim.episode import Episode, EpisodeRecorder
from sim.expert import Expert, make_expert
from trajectory_store import Contract, Outcome, Source, StoreWriter, Tick

OPERATOR = "scripted-expert"
"""Who drove, in the episode table."""


class ExpertFailed(RuntimeError):
    """The script fails this task far too often to collect what was asked for."""


def demonstrate(cell: Cell, expert: Expert, task: str, seed: int, *, noise: float = 0.0) -> Episode:
    """One episode driven by the expert, success or not. `action` holds what was sent."""
    contract = cell.contract
    random = np.random.default_rng([seed, 0xDE30])
    low, high = np.array(contract.action.limits.position, np.float64).T
    _, info = cell.reset(seed=seed, options={"task": task})
    recorder = EpisodeRecorder(task, contract.task(task).instruction, seed, len(low))
    terminated = truncated = False
    while not (terminated or truncated):
        images = {key: cell.jpeg(key) for key in contract.images}
        recorder.see({key: cell.vector(key) for key in contract.vectors}, images)
        command = expert.act(info["scene"])
        if noise > 0:
            command = command + random.normal(0.0, noise, command.shape) * (high - low) / 2
        command = np.clip(command, low, high)
        _, _, terminated, truncated, info = cell.step(command)
        recorder.act(command, Source.SCRIPTED, task_reward=info["task_reward"])
    return recorder.finish(terminated)


def collect(
    contract: Contract, task: str, n: int, seed: int = 0, *, noise: float = 0.0
) -> list[Episode]:
    """`n` successful episodes of a task, from seeds `seed`, `seed + 1`, ...; failures are skipped.

    Raises:
        UnknownTask: the contract or the simulator has no such task.
        ExpertFailed: more than 2 n + 10 seeds failed.
    """
    return list(_successes(contract, task, n, seed, noise))


def write_demonstrations(
    store: str | Path,
    contract: Contract,
    *,
    tasks: Sequence[str] | None = None,
    episodes_per_task: int = 5,
    seed: int = 0,
    noise: float = 0.0,
    failures: bool = False,
    on_episode: Callable[[Episode], None] | None = None,
) -> int:
    """Adds successful demonstrations of each task to the store at `store`, made if it is missing.

    Args:
        tasks: all of the contract's by default.
        noise: standard deviation of the commands, in units of half the action's range.
        failures: keep what failed too, as part of `episodes_per_task`: data to learn values from.

    Returns:
        The number of rows written, all of them committed.

    Raises:
        UnknownTask, ExpertFailed: see `collect`.
        StoreError: see `StoreWriter`.
    """
    rows = 0
    with StoreWriter.create_or_open(store, contract, writer=OPERATOR) as writer:
        for task in tasks if tasks is not None else contract.tasks:
            some = _attempts if failures else _successes
            for episode in some(contract, task, episodes_per_task, seed, noise):
                write_episode(writer, episode, operator=OPERATOR)
                rows += len(episode)
                if on_episode is not None:
                    on_episode(episode)
    return rows


def write_episode(
    writer: StoreWriter, episode: Episode, *, operator: str = "", policy_version: int = 0
) -> str:
    """Adds a finished episode, of an expert or of a rollout; committed in the background.

    Frames are stored once, with the stamp of their exposure. A failure ran out of time, so its last
    row is truncated.

    Returns:
        The uuid in the store.
    """
    contract = writer.contract
    uuid = writer.begin_episode(
        episode.task, episode.instruction, operator, policy_version, notes=f"seed {episode.seed}"
    )
    shown: dict[str, bytes] = {}
    exposed: dict[str, int] = {}
    reward, terminated = episode.reward, episode.terminated
    last = len(episode) - 1
    for k in range(len(episode)):
        stamp_ns = k * contract.dt_ns
        observation: dict[str, Any] = {key: v[k] for key, v in episode.observation.items()}
        for key, frames in episode.jpeg.items():
            if frames[k] is not shown.get(key):
                shown[key] = observation[key] = frames[k]
                exposed[key] = stamp_ns
        source = Source(int(episode.source[k]))
        writer.append(
            Tick(
                observation=observation,
                action=episode.action[k],
                source=source,
                stamp_ns=stamp_ns,
                stamps=dict(exposed),
                action_policy=_present(episode.action_policy[k]),
                action_human=_present(episode.action_human[k]),
                policy_version=policy_version,
                chunk_id=int(episode.chunk_id[k]),
                chunk_step=int(episode.chunk_step[k]),
                reward=float(reward[k]),
                terminated=bool(terminated[k]),
                truncated=k == last and episode.truncated,
            )
        )
    writer.end_episode(Outcome.SUCCESS if episode.success else Outcome.FAILURE)
    return uuid


def _present(action: np.ndarray) -> np.ndarray | None:
    return None if np.isnan(action).any() else action


def _successes(contract: Contract, task: str, n: int, seed: int, noise: float) -> Iterator[Episode]:
    expert = make_expert(contract, task)
    cell = make_cell(contract, task)
    found = failed = 0
    try:
        while found < n:
            episode = demonstrate(cell, expert, task, seed + found + failed, noise=noise)
            if episode.success:
                found += 1
                yield episode
            else:
                failed += 1
                if failed > 2 * n + 10:
                    raise ExpertFailed(
                        f"the script of {task!r} failed {failed} of {found + failed} scenes within "
                        f"{contract.task(task).time_limit_s} s; raise the task's time limit"
                    )
    finally:
        cell.close()


def _attempts(contract: Contract, task: str, n: int, seed: int, noise: float) -> Iterator[Episode]:
    """The same scenes, whatever came of them."""
    expert = make_expert(contract, task)
    cell = make_cell(contract, task)
    try:
        for number in range(n):
            yield demonstrate(cell, expert, task, seed + number, noise=noise)
    finally:
        cell.close()
