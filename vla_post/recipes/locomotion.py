"""`vla-post data locomotion`: data like D4RL's, from an agent that is trained to a stated level.

In the output folder: `transitions.hdf5` (D4RL's layout), `store/` (a trajectory store of the same
episodes), `about.json` (levels, seed, versions; written last), and `agent/` unless it is elsewhere.
"""

import importlib.util
import json
import platform
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Bool

from sim.locomotion.config import PpoConfig
from sim.locomotion.facts import TASK, Environment, environment, normalised_score
from trajectory_store import Outcome, Source, StoreWriter

if TYPE_CHECKING:
    from sim.locomotion.agent import Agent, Level
    from sim.locomotion.trajectory import Trajectory
    from vla_post.learners.uni_o4.data import Transitions

Quality = Literal["medium", "medium-replay", "medium-expert"]
Say = Callable[[str], None]

PACKAGES = ("stable-baselines3", "gymnasium", "mujoco", "torch", "numpy", "h5py")
OURS = ("transitions.hdf5", "store", ".store.lock", "about.json", "agent")
"""What a run writes into its folder, and what `force` removes."""


class UnknownQuality(ValueError):
    """Not one of `Quality`; the message lists them."""


class ExtraMissing(ValueError):
    """Packages of the extra `locomotion` are not installed; the message says how to get them."""


class AlreadyThere(ValueError):
    """The output folder holds something already."""


@dataclass(frozen=True, kw_only=True)
class LocomotionData:
    """Which data set, and how much may be spent on it."""

    env: str
    """Hopper-v5, Walker2d-v5 or HalfCheetah-v5."""
    quality: Quality
    """medium: a policy about a third as good as D4RL's expert. medium-replay: all that training saw
    until it was that good. medium-expert: half from that policy, half from a far better one."""
    seed: int = 0
    transitions: int = 200_000
    """Recorded with each policy (D4RL has a million); medium-replay has what training took."""
    medium_score: float = 33.0
    """D4RL's normalised score, averaged over evaluation episodes, at which a policy is medium."""
    expert_score: float = 90.0
    """At which it is an expert; PPO may need a lower one, see docs/data.md."""
    max_steps: int = 3_000_000
    """Of training, all environments together."""
    ppo: PpoConfig = field(default_factory=PpoConfig)

    def __post_init__(self) -> None:
        environment(self.env)
        if self.quality not in get_args(Quality):
            raise UnknownQuality(
                f"no quality {self.quality!r}; choose one of {', '.join(get_args(Quality))}"
            )
        if self.transitions < 1:
            raise ValueError(f"transitions is {self.transitions}; it must be at least 1")
        if not self.medium_score < self.expert_score:
            raise ValueError(
                f"medium_score is {self.medium_score:g} and expert_score {self.expert_score:g}; "
                "an expert must be the better one"
            )


@dataclass(frozen=True)
class _Part:
    """What one policy did."""

    level: "Level"
    trajectories: Sequence["Trajectory"]
    name: str


def make_dataset(
    options: LocomotionData,
    out: Path,
    *,
    agent_folder: Path | None = None,
    force: bool = False,
    say: Say,
) -> dict[str, Any]:
    """Trains or continues the agent, records, and writes `out`; a stopped run goes on where it was.

    Returns:
        What `about.json` holds.

    Raises:
        AlreadyThere: `out` is finished, or holds other things, and not `force`.
        ExtraMissing
        LevelNotReached, OtherAgent: see `sim.locomotion.agent`.
    """
    _require_extra()
    from sim.locomotion.agent import Agent

    _prepare(out, force)
    facts = environment(options.env)
    agent = Agent(agent_folder or out / "agent", options.env, options.ppo, seed=options.seed)
    try:
        parts = _record(agent, options, say)
    finally:
        agent.close()
    about = _about(options, facts, parts)
    say(f"writing {about['transitions']:,} transitions of {about['episodes']} episodes to {out}")
    _write_store(out / "store", options, facts, parts)
    _write_file(out / "transitions.hdf5", parts, about)
    (out / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


def as_transitions(trajectories: Sequence["Trajectory"]) -> "Transitions":
    """In D4RL's layout; a cut or timed-out episode ends in a timeout, a fall in a terminal."""
    from vla_post.learners.uni_o4.data import Transitions

    ends = np.cumsum([len(t) for t in trajectories]) - 1
    terminals = np.zeros(ends[-1] + 1, np.bool_)
    terminals[ends] = [t.terminated for t in trajectories]
    timeouts = np.zeros_like(terminals)
    timeouts[ends] = [not t.terminated for t in trajectories]
    return Transitions(
        observations=np.concatenate([t.observation for t in trajectories]),
        actions=np.concatenate([t.action for t in trajectories]),
        rewards=np.concatenate([t.reward for t in trajectories]),
        terminals=terminals,
        timeouts=timeouts,
        next_observations=np.concatenate([t.next_observation for t in trajectories]),
    )


def _require_extra() -> None:
    missing = [
        package
        for package, module in (("stable-baselines3", "stable_baselines3"), ("h5py", "h5py"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ExtraMissing(
            f"locomotion data needs {' and '.join(missing)}, not installed here: "
            "pip install 'vla-post[locomotion]' -c constraints.txt"
        )


def _prepare(out: Path, force: bool) -> None:
    """Refuses a folder that is finished or somebody else's; clears it if `force`."""
    if out.is_file():
        raise AlreadyThere(f"{out} is a file; name a folder")
    present = {path.name for path in out.iterdir()} if out.exists() else set[str]()
    others = sorted(present - set(OURS))
    if others:
        raise AlreadyThere(
            f"{out} holds other things ({', '.join(others[:3])}); name a new or empty folder"
        )
    if force:
        for name in present:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif "about.json" in present:
        raise AlreadyThere(
            f"{out} holds a finished data set; name another folder, or give --force to make it anew"
        )
    out.mkdir(parents=True, exist_ok=True)


def _record(agent: "Agent", options: LocomotionData, say: Say) -> list[_Part]:
    medium = agent.reach("medium", options.medium_score, max_steps=options.max_steps, say=say)
    if options.quality == "medium-replay":
        return [_Part(medium, agent.replay(), "replay")]
    seeds = np.random.SeedSequence([options.seed, 0xDA7A]).generate_state(2) >> 1
    parts = [
        _Part(medium, agent.roll_out(options.transitions, seed=int(seeds[0]), say=say), "medium")
    ]
    if options.quality == "medium-expert":
        expert = agent.reach("expert", options.expert_score, max_steps=options.max_steps, say=say)
        recorded = agent.roll_out(options.transitions, seed=int(seeds[1]), say=say)
        parts.append(_Part(expert, recorded, "expert"))
    return parts


def _about(options: LocomotionData, facts: Environment, parts: Sequence[_Part]) -> dict[str, Any]:
    every = [t for part in parts for t in part.trajectories]
    whole = [t.episode_return for t in every if t.complete]
    return {
        "env": options.env,
        "quality": options.quality,
        "seed": options.seed,
        "transitions": sum(map(len, every)),
        "episodes": len(every),
        "terminals": sum(t.terminated for t in every),
        "levels": {part.level.name: asdict(part.level) for part in parts},
        "mean_return_of_whole_episodes": float(np.mean(whole)) if whole else None,
        "normalised_score_of_whole_episodes": (
            float(normalised_score(options.env, float(np.mean(whole)))) if whole else None
        ),
        "references": {"random": facts.random_return, "expert": facts.expert_return},
        "options": asdict(options),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
    }


def _write_store(
    path: Path, options: LocomotionData, facts: Environment, parts: Sequence[_Part]
) -> None:
    """Episodes with the round of the policy as their version, under uuids made of the options.

    A fall is a failure, a full-length run a success, a run that the recording cut off is aborted.
    """
    shutil.rmtree(path, ignore_errors=True)  # of a run that was stopped here
    name = f"{options.env} {options.quality} {options.seed}"
    with StoreWriter.create_or_open(
        path, facts.contract(), writer="locomotion", durability="process"
    ) as writer:
        number = 0
        for part in parts:
            for t in part.trajectories:
                outcome = Outcome.FAILURE if t.terminated else Outcome.SUCCESS
                writer.write_episode(
                    TASK,
                    {"observation.state": t.observation},
                    t.action,
                    outcome=outcome if t.complete else Outcome.ABORTED,
                    source=Source.POLICY,
                    reward=t.reward,
                    terminated=_last(len(t), t.terminated),
                    truncated=_last(len(t), not t.terminated),
                    operator=f"ppo {part.name}",
                    policy_version=part.level.reached.number,
                    uuid=str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name} {number}")),
                )
                number += 1
        writer.flush(timeout_s=600.0)


def _last(length: int, value: bool) -> Bool[np.ndarray, " T"]:
    """False but for the last."""
    flags = np.zeros(length, np.bool_)
    flags[-1] = value
    return flags


def _write_file(path: Path, parts: Sequence[_Part], about: dict[str, Any]) -> None:
    """D4RL's arrays, with `about` as JSON in the file's attributes."""
    import h5py

    as_transitions([t for part in parts for t in part.trajectories]).save(path)
    with h5py.File(path, "r+") as file:
        file.attrs["about"] = json.dumps(about)
