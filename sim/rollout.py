"""Closed-loop episodes without ROS: many at once, one batched inference for all of them.

For evaluation and for prototypes of learners. The rules are those of the lockstep graph: a chunk is
inferred from the observation of its first tick, `execute_steps` of it run, hand-back means a HOLD
tick and a fresh inference. Every episode is a generator that yields its observation when it needs a
chunk, so all live episodes always wait at an inference together, whatever their phases.
"""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sim.cell import Cell, Observation, make_cell
from sim.episode import Episode, EpisodeRecorder
from sim.operator import Mode, OperatorConfig, Request, ScriptedOperator
from trajectory_store import Contract, Source

BatchPolicy = Callable[..., Float[np.ndarray, "B H A"]]
"""`policy(observation {key: (B, ...)}, instructions)` -> chunks in robot units.

Vectors are float32, images (B, height, width, 3) uint8 as stored. A policy with a parameter
`seeds` also gets int64 (B,), equal for equal (seed of the case, inference number): noise drawn from
it makes an episode independent of what else is in the batch, and pairs two policies.
"""


@dataclass(frozen=True)
class Case:
    """One episode to run: a scene and who plays it."""

    task: str
    seed: int
    """Of the scene; cases of equal task and seed start equal."""
    policy: str = "policy"
    """Key into `policies`."""


@dataclass(frozen=True)
class Result:
    """How a case went."""

    case: Case
    success: bool
    steps: int
    """Control steps until success or the time limit."""
    human_steps: int
    takeovers: int
    inferences: int
    episode: Episode | None
    """Every row, if recording was asked for."""
    frames: tuple[np.ndarray, ...] = ()
    """Pictures for people, if asked for."""

    @property
    def human_share(self) -> float:
        return self.human_steps / max(self.steps, 1)


def rollout(
    policies: Mapping[str, BatchPolicy] | BatchPolicy,
    contract: Contract,
    cases: Sequence[Case],
    *,
    operator: OperatorConfig | None = None,
    record: bool = False,
    frames_every: int = 0,
    slots: int = 16,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Plays every case to success or its time limit.

    Args:
        policies: by the names that cases use; a bare callable is called `policy`.
        operator: takes over as configured; None leaves the policy alone.
        record: keep every row (draws every frame that is due; otherwise only those that a policy
            looks at).
        frames_every: keep a (240, 320, 3) picture of every n-th step and of the last; 0 keeps none.
        slots: episodes at a time, hence the largest batch. Each holds about 20 MB.
        on_result: called as each case ends, in order of ending.

    Returns:
        One result per case, in the order of `cases`.

    Raises:
        KeyError: a case names a policy that is not there.
        ValueError: chunks of a wrong shape or not finite.
    """
    if callable(policies):
        policies = {"policy": policies}
    unknown = sorted({case.policy for case in cases} - policies.keys())
    if unknown:
        raise KeyError(f"no policy {unknown}; there are {sorted(policies)}")
    wants_seeds = {name: _takes_seeds(policy) for name, policy in policies.items()}
    stage = _Stage(contract, slots)
    results: dict[int, Result] = {}
    waiting = list(enumerate(cases))[::-1]
    live: list[tuple[int, str, _Play, _Need]] = []

    def keep(number: int, result: Result) -> None:
        results[number] = result
        if on_result is not None:
            on_result(result)

    def advance(number: int, name: str, play: _Play, chunk: np.ndarray | None) -> None:
        """Runs an episode to its next inference, or to its end."""
        try:
            need = play.send(chunk)
        except StopIteration as end:
            keep(number, end.value)
        else:
            live.append((number, name, play, need))

    try:
        while waiting or live:
            while waiting and len(live) < slots:
                number, case = waiting.pop()
                play = _play(stage, case, operator, record, frames_every)
                advance(number, case.policy, play, None)
            batch, live = live, []
            for name in dict.fromkeys(entry[1] for entry in batch):
                group = [entry for entry in batch if entry[1] == name]
                chunks = _infer(policies[name], wants_seeds[name], [e[3] for e in group], contract)
                for (number, _, play, _), chunk in zip(group, chunks, strict=True):
                    advance(number, name, play, chunk)
    finally:
        stage.close()
    return [results[number] for number in range(len(cases))]


@dataclass(frozen=True)
class _Need:
    """An episode that waits for a chunk."""

    observation: Observation
    instruction: str
    seed: int


_Play = Generator[_Need, Any, Result]


def _infer(
    policy: BatchPolicy, wants_seeds: bool, needs: Sequence[_Need], contract: Contract
) -> Float[np.ndarray, "B H A"]:
    observation = {
        key: np.stack([need.observation[key] for need in needs]) for key in needs[0].observation
    }
    instructions = [need.instruction for need in needs]
    extra = {"seeds": np.array([need.seed for need in needs], np.int64)} if wants_seeds else {}
    chunks = np.asarray(policy(observation, instructions, **extra), np.float64)
    least = (len(needs), contract.execute_steps, contract.action.size)
    if chunks.ndim != 3 or chunks.shape[::2] != least[::2] or chunks.shape[1] < least[1]:
        raise ValueError(
            f"the policy returned shape {chunks.shape}; expected (B, H, A) = ({least[0]}, at least "
            f"{least[1]}, {least[2]})"
        )
    if not np.isfinite(chunks).all():
        raise ValueError("the policy returned NaN or infinite actions")
    return chunks


def _play(
    stage: "_Stage",
    case: Case,
    operator_config: OperatorConfig | None,
    record: bool,
    frames_every: int,
) -> _Play:
    contract = stage.contract
    task = contract.task(case.task)
    cell = stage.cell(case.task)
    _, info = cell.reset(seed=case.seed, options={"task": case.task})
    operator = None
    if operator_config is not None:
        operator = ScriptedOperator(contract, cell.scene_names, operator_config)
        operator.begin(case.task, case.seed)
    recorder = None
    if record:
        recorder = EpisodeRecorder(case.task, task.instruction, case.seed, contract.action.size)

    mode, chunk, step, inferences, human_steps = Mode.POLICY, None, 0, 0, 0
    frames: list[np.ndarray] = []
    sent: np.ndarray | None = None
    over = False
    while not over:
        human = None
        if operator is not None:
            said = operator.step(info["scene"], sent, mode)
            if said.deadman and said.command is not None:
                mode, human = Mode.HUMAN, said.command
            elif mode is Mode.HUMAN:
                mode = Mode.HOLD
            elif Request.RESUME in said.requests:
                mode, chunk = Mode.POLICY, None
        if mode is Mode.POLICY and (chunk is None or step >= contract.execute_steps):
            seed = _noise_seed(case.seed, inferences)
            chunk = yield _Need(stage.observation(cell), task.instruction, seed)
            step, inferences = 0, inferences + 1
        if recorder is not None:
            images = {key: cell.jpeg(key) for key in contract.images}
            recorder.see({key: cell.vector(key) for key in contract.vectors}, images)
        if frames_every and cell.tick % frames_every == 0:
            frames.append(cell.render())

        proposal = chunk[step] if chunk is not None and step < len(chunk) else None
        if mode is Mode.POLICY:
            assert proposal is not None
            action, source = proposal, Source.POLICY
        elif mode is Mode.HUMAN and human is not None:
            action, source = human, Source.HUMAN
            human_steps += 1
        else:
            action, source = cell.hold_command(sent), Source.HOLD
        sent = stage.clip(action)
        _, _, terminated, truncated, info = cell.step(sent)
        over = terminated or truncated
        if recorder is not None:
            recorder.act(
                sent,
                source,
                policy=proposal,
                human=human,
                chunk_id=inferences if proposal is not None else 0,
                chunk_step=step if proposal is not None else 0,
                task_reward=info["task_reward"],
            )
        step += 1
    if frames_every:
        frames.append(cell.render())
    takeovers = operator.takeovers if operator is not None else 0
    steps, success = cell.tick, cell.success
    stage.give_back(cell)
    return Result(
        case=case,
        success=success,
        steps=steps,
        human_steps=human_steps,
        takeovers=takeovers,
        inferences=inferences,
        episode=recorder.finish(success, takeovers) if recorder is not None else None,
        frames=tuple(frames),
    )


class _Stage:
    """Cells that wait for their next episode; a cell keeps its task, since models are large."""

    def __init__(self, contract: Contract, slots: int) -> None:
        self.contract = contract
        self._slots = slots
        self._idle: dict[str, list[Cell]] = {}
        low, high = np.array(contract.action.limits.position, np.float64).T
        self.clip: Callable[[np.ndarray], np.ndarray] = lambda action: np.clip(action, low, high)

    def cell(self, task: str) -> Cell:
        idle = self._idle.get(task)
        if idle:
            return idle.pop()
        return make_cell(self.contract, task)

    def give_back(self, cell: Cell) -> None:
        if sum(map(len, self._idle.values())) >= self._slots:
            for task, idle in self._idle.items():
                if idle and task != cell.task:
                    idle.pop().close()
                    break
        self._idle.setdefault(cell.task, []).append(cell)

    def observation(self, cell: Cell) -> Observation:
        images = {key: cell.image(key) for key in self.contract.images}
        return {key: cell.vector(key) for key in self.contract.vectors} | images

    def close(self) -> None:
        for idle in self._idle.values():
            for cell in idle:
                cell.close()


def _takes_seeds(policy: BatchPolicy) -> bool:
    try:
        return "seeds" in inspect.signature(policy).parameters
    except (TypeError, ValueError):
        return False


def _noise_seed(seed: int, inference: int) -> int:
    low, high = np.random.SeedSequence([seed, inference]).generate_state(2)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32
