"""Imperfect data on purpose: episodes by clumsy, hesitant or mistaken demonstrators, and spoiled
records, for studies of learning from mixed data.

Behaviours play in the cell: what they record is what happened. Spoilers change a finished record:
what they leave is not what happened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from sim.cell import Cell, make_cell
from sim.episode import Episode, EpisodeRecorder
from sim.expert import make_expert
from trajectory_store import Contract, Source

PAUSE = (10, 25)
"""Ticks that a hesitating demonstrator stands still for, from and to."""
WRONG_GOAL_M = 0.15
"""How far off a mistaken demonstrator takes the goal to be."""


@dataclass(frozen=True)
class Marked:
    """An episode, what is wrong with it, and where."""

    episode: Episode
    kind: str
    bad: Bool[np.ndarray, " T"]
    """Ticks that should not be imitated."""


def behave(contract: Contract, task: str, kind: str, n: int, seed: int) -> list[Marked]:
    """`n` episodes of a task by one kind of demonstrator.

    Args:
        kind: `expert` (successes only); `gentle`, an expert of another style who moves at 60 % of
            the speed (successes only); `noisy`, whose hand trembles by half of the action's half
            range; `hesitating`, who stops now and then; `wrong-goal`, who is mistaken about where
            the goal is.

    Raises:
        ValueError: no such kind.
        RuntimeError: an expert failed far too often.
    """
    if kind not in ("expert", "gentle", "noisy", "hesitating", "wrong-goal"):
        raise ValueError(
            f"no demonstrator {kind!r}; there are expert, gentle, noisy, hesitating, wrong-goal"
        )
    cell = make_cell(contract, task)
    found: list[Marked] = []
    try:
        scene = seed
        while len(found) < n:
            marked = _play(cell, contract, task, kind, scene)
            scene += 1
            if marked.episode.success or kind in ("noisy", "hesitating", "wrong-goal"):
                found.append(marked)
            elif scene - seed > 3 * n + 10:
                raise RuntimeError(f"the {kind} script of {task!r} failed {scene - seed} scenes")
    finally:
        cell.close()
    return found


def _play(cell: Cell, contract: Contract, task: str, kind: str, seed: int) -> Marked:
    random = np.random.default_rng([seed, 0xBAD])
    low, high = np.array(contract.action.limits.position, np.float64).T
    unit = (high - low) / 2
    expert = make_expert(contract, task)
    goal = [cell.scene_names.index(f"goal_{axis}") for axis in "xyz"]
    angle = random.uniform(0.0, 2.0 * np.pi)
    shift = WRONG_GOAL_M * np.array([np.cos(angle), np.sin(angle), 0.0])
    _, info = cell.reset(seed=seed, options={"task": task})
    recorder = EpisodeRecorder(task, contract.task(task).instruction, seed, len(low))
    bad: list[bool] = []
    paused, over = 0, False
    while not over:
        images = {key: cell.jpeg(key) for key in contract.images}
        recorder.see({key: cell.vector(key) for key in contract.vectors}, images)
        scene = np.array(info["scene"])
        if kind == "wrong-goal":
            scene[goal] += shift
        command = np.array(expert.act(scene), np.float64)
        if kind == "gentle":
            command[:3] *= 0.6
        elif kind == "noisy":
            command += random.normal(0.0, 0.5, command.shape) * unit
        elif kind == "hesitating":
            if paused == 0 and random.random() < 0.04:
                paused = int(random.integers(*PAUSE))
            if paused > 0:
                paused -= 1
                command[:3] = 0.0
        still = kind == "hesitating" and not command[:3].any()
        bad.append(kind in ("noisy", "wrong-goal") or still)
        command = np.clip(command, low, high)
        _, _, terminated, truncated, info = cell.step(command)
        over = terminated or truncated
        recorder.act(command, Source.SCRIPTED, task_reward=info["task_reward"])
    return Marked(recorder.finish(cell.success), kind, np.array(bad))


Spoiler = Callable[[Marked, np.random.Generator], Marked]


def action_noise(contract: Contract, sigma: float = 0.1) -> Spoiler:
    """Adds noise to the recorded commands, in units of half the action's range."""
    low, high = np.array(contract.action.limits.position, np.float64).T

    def spoil(marked: Marked, random: np.random.Generator) -> Marked:
        action = marked.episode.action
        noise = random.normal(0.0, sigma, action.shape) * (high - low) / 2
        noisy = np.clip(action + noise, low, high).astype(np.float32)
        return Marked(replace(marked.episode, action=noisy), "action-noise", _all(noisy))

    return spoil


def truncation(share: tuple[float, float] = (0.4, 0.7)) -> Spoiler:
    """Cuts the record to a share of its length between these; it then never reaches the goal."""

    def spoil(marked: Marked, random: np.random.Generator) -> Marked:
        e = marked.episode
        keep = max(2, round(len(e) * random.uniform(*share)))
        rows = ("action", "action_policy", "action_human", "source", "chunk_id", "chunk_step")
        cut = replace(
            e,
            success=False,
            observation={key: v[:keep] for key, v in e.observation.items()},
            jpeg={key: v[:keep] for key, v in e.jpeg.items()},
            task_reward=e.task_reward[:keep],
            **{name: getattr(e, name)[:keep] for name in rows},
        )
        return Marked(cut, "truncated", _all(cut.action))

    return spoil


def mislabelled(contract: Contract, tasks: Sequence[str]) -> Spoiler:
    """Files the record under another of `tasks`."""

    def spoil(marked: Marked, random: np.random.Generator) -> Marked:
        others = [task for task in tasks if task != marked.episode.task]
        task = others[int(random.integers(len(others)))]
        text = contract.task(task).instruction
        e = replace(marked.episode, task=task, instruction=text)
        return Marked(e, "mislabelled", _all(e.action))

    return spoil


def misjoined(episodes: Sequence[Marked]) -> Spoiler:
    """Puts the commands of another of `episodes` beside what the sensors saw, as when two logs are
    joined wrongly; a shorter one is repeated."""

    def spoil(marked: Marked, random: np.random.Generator) -> Marked:
        others = [m for m in episodes if m.episode.seed != marked.episode.seed]
        other = (others or list(episodes))[int(random.integers(len(others or episodes)))].episode
        action = np.resize(other.action, marked.episode.action.shape)
        return Marked(replace(marked.episode, action=action), "misjoined", _all(action))

    return spoil


def spoil_some(
    episodes: Sequence[Marked], parts: Sequence[tuple[Spoiler, float]], seed: int
) -> list[Marked]:
    """Spoils the given share of the episodes by each spoiler, independently of one another; the
    last one that struck names the kind."""
    random = np.random.default_rng([seed, 0x5B011])
    out = list(episodes)
    for spoil, share in parts:
        struck = random.permutation(len(out))[: round(share * len(out))]
        for k in struck.tolist():
            out[k] = spoil(out[k], random)
    return out


def _all(action: np.ndarray) -> Bool[np.ndarray, " T"]:
    return np.ones(len(action), bool)
