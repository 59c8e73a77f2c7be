"""Runs the stages of Uni-O4 in order, each resumed from its checkpoint, and logs what they say.

A run folder holds `config.json`, `metrics.jsonl`, one `STAGE.safetensors` + `STAGE.json` a stage,
and `agent.safetensors` + `agent.json`: the chosen policy with its V and its units, which is what
the online phase, an evaluation or a robot's side needs.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_post.batch import Metrics
from vla_post.critics.networks import EnsembleLinear, InputSize, ValueNet
from vla_post.learners.uni_o4.cloning import Cloning, CloningConfig
from vla_post.learners.uni_o4.data import Transitions, check
from vla_post.learners.uni_o4.dynamics import (
    Dynamics,
    DynamicsConfig,
    DynamicsFit,
    Termination,
)
from vla_post.learners.uni_o4.offline import OfflineConfig, OfflinePpo, TrueReturns
from vla_post.learners.uni_o4.online import OnlineConfig, OnlinePpo
from vla_post.learners.uni_o4.policies import Policies, PolicyConfig, build_policies
from vla_post.learners.uni_o4.rollouts import VectorEnvironment
from vla_post.learners.uni_o4.samples import Scales, prepare, scales_of
from vla_post.learners.uni_o4.stage import Stage
from vla_post.learners.uni_o4.values import ValueConfig, ValueFit, Values
from vla_post.training.metrics import MetricsLog
from vla_post.training.state import load_state, save_state

Stop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class UniO4Config:
    """The offline phase."""

    discount: float = 0.99
    """gamma, per control step."""
    horizon: int = 1
    """H, control steps of a chunk; 1 is the paper's setting. A chunk runs open loop."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    values: ValueConfig = field(default_factory=ValueConfig)
    cloning: CloningConfig = field(default_factory=CloningConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    offline: OfflineConfig = field(default_factory=OfflineConfig)
    seed: int = 0
    log_every: int = 100
    """Updates between two lines of metrics; looks of the gate are always logged."""
    save_every_s: float = 60.0
    """Seconds between two saves within a stage."""


class OtherRun(ValueError):
    """The folder holds a run with other settings or data; the message names what differs."""


@dataclass(frozen=True, kw_only=True)
class Agent:
    """What a run has learned: one policy, V, and the units of both."""

    policy: Policies
    value: ValueNet
    scales: Scales

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Observations (B, S) of the environment to (B, A), or (B, H, A) for chunks; mu(s)."""
        with torch.no_grad():
            state = self.scales.state(torch.from_numpy(np.asarray(observation, np.float32)))
            noise = torch.Generator().manual_seed(0)
            command = self.scales.command(self.policy.act(state, noise)[0])
        return command[:, 0] if self.scales.horizon == 1 else command

    @property
    def value_size(self) -> dict[str, int]:
        """`width` and `layers` of V."""
        linear = [m for m in self.value.net.modules() if isinstance(m, EnsembleLinear)]
        return {"width": linear[0].weight.shape[-1], "layers": len(linear) - 1}

    def fresh(self, seed: int) -> "Agent":
        """Random weights of the same sizes in the same units: where plain PPO starts."""
        size = self.value_size
        values = ValueConfig(width=size["width"], layers=size["layers"])
        config = UniO4Config(seed=seed, policy=self.policy.config, values=values)
        return fresh_agent(self.scales, config)

    def save(self, folder: Path, name: str = "agent") -> None:
        sizes = {"state": self.policy.state_size, "action": self.policy.action_size}
        state = {
            "policy": self.policy.state_dict(),
            "value": self.value.state_dict(),
            "config": asdict(self.policy.config),
            "value_size": self.value_size,
            "sizes": sizes,
            "scales": self.scales.as_json(),
        }
        save_state(folder, name, state)

    @classmethod
    def load(cls, folder: Path, name: str = "agent") -> "Agent":
        """Raises FileNotFoundError when the run has not come so far."""
        if not (folder / f"{name}.json").exists():
            raise FileNotFoundError(
                f"{folder / name}.json: no agent; `vla-post uni-o4 offline` writes one at its end"
            )
        state = load_state(folder, name)
        found: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in state["config"].items()
        }
        sizes = state["sizes"]
        policy = build_policies(PolicyConfig(**found), sizes["state"], sizes["action"])
        policy.load_state_dict(state["policy"])
        inputs = InputSize(tokens=0, features=0, proprioception=sizes["state"])
        value = ValueNet(inputs, None, **state["value_size"])
        value.load_state_dict(state["value"])
        return cls(policy=policy, value=value, scales=Scales.from_json(state["scales"]))


def fresh_agent(scales: Scales, config: UniO4Config) -> Agent:
    """Random weights in the given units."""
    torch.manual_seed(config.seed)
    states = len(scales.state_mean)
    one = replace(config.policy, members=1)
    inputs = InputSize(tokens=0, features=0, proprioception=states)
    value = ValueNet(inputs, None, width=config.values.width, layers=config.values.layers)
    policy = build_policies(one, states, scales.chunk_size)
    return Agent(policy=policy, value=value, scales=scales)


class OfflineRun:
    """Values, cloning, dynamics, offline steps; `run` goes on where the folder's run was.

    Args:
        termination: the rule by which the task ends; learned from the data without.
        true_returns: makes the simulator's judge of an ensemble, once units are known; for
            diagnostics and the final choice, never for the gate.

    Raises:
        BadTransitions: from this data nothing can be learned; see `data.check`.
        OtherRun: the folder holds another run.
    """

    def __init__(
        self,
        config: UniO4Config,
        data: Transitions,
        folder: Path,
        *,
        termination: Termination | None = None,
        true_returns: Callable[[Scales], TrueReturns] | None = None,
    ) -> None:
        most = max(
            config.values.batch_size, config.cloning.batch_size, config.dynamics.batch_size,
            config.offline.batch_size,
        )  # fmt: skip
        check(data, batch_size=most)
        self.config, self.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)
        require_same(folder / "config.json", asdict(config) | {"data": fingerprint(data)})
        torch.manual_seed(config.seed)
        self.scales = scales_of(data, discount=config.discount, horizon=config.horizon)
        samples = prepare(data, self.scales)
        states, actions = data.state_size, self.scales.chunk_size
        self.values = Values(states, actions, config.values)
        self.policies = build_policies(config.policy, states, actions)
        dynamics = Dynamics(states, actions, config.dynamics)
        judge = None if true_returns is None else true_returns(self.scales)
        self.fit = ValueFit(self.values, samples, config.seed)
        self.cloning = Cloning(self.policies, samples, config.cloning, config.seed)
        self.model = DynamicsFit(dynamics, samples, config.seed)
        # Its old policies are the cloned ones, so it is made when those are there.
        self.offline: OfflinePpo | None = None
        self._make_offline = lambda: OfflinePpo(
            self.policies,
            self.values,
            dynamics,
            samples,
            self.scales,
            config.offline,
            seed=config.seed,
            termination=termination,
            true_returns=judge,
        )

    def run(
        self, *, stop: Stop = lambda: False, say: Callable[[str], None] = print
    ) -> Agent | None:
        """All stages to their end, or to `stop`; None if it was stopped."""
        config = self.config
        with MetricsLog(self.folder / "metrics.jsonl") as log:
            for stage in (self.fit, self.cloning, self.model):
                if not self._stage(stage, log, stop, say):
                    return None
            torch.manual_seed(config.seed)
            self._save_clone()
            self.offline = self._make_offline()
            if not self._stage(self.offline, log, stop, say):
                return None
            chosen = self.offline.select()
            best = self.offline.best
            assert best is not None
            log.write({"stage": "selection", "member": chosen, "scores": best.tolist()})
            agent = Agent(
                policy=self.offline.old.member(chosen), value=self.values.value, scales=self.scales
            )
            agent.save(self.folder)
            say(f"member {chosen} of {self.policies.members}, AM-Q {float(best[chosen]):.3f}")
            return agent

    def _save_clone(self) -> None:
        """The first cloned member beside the agent, to compare with."""
        policy, value = self.policies.member(0), self.values.value
        if not (self.folder / "cloned.json").exists():
            Agent(policy=policy, value=value, scales=self.scales).save(self.folder, "cloned")

    def _stage(self, stage: Stage, log: MetricsLog, stop: Stop, say: Callable[[str], None]) -> bool:
        return run_stage(
            stage,
            self.folder,
            log,
            stop=stop,
            say=say,
            log_every=self.config.log_every,
            save_every_s=self.config.save_every_s,
        )


class OnlineRun:
    """PPO from an agent, in a folder of its own; goes on where it was."""

    def __init__(
        self,
        agent: Agent,
        env: VectorEnvironment,
        config: OnlineConfig,
        folder: Path,
        seed: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        require_same(folder / "config.json", asdict(config) | {"seed": seed})
        self.folder, self.scales = folder, agent.scales
        self.ppo = OnlinePpo(agent.policy, agent.value, agent.scales, env, config, seed)

    @property
    def agent(self) -> Agent:
        return Agent(policy=self.ppo.policy, value=self.ppo.value, scales=self.scales)

    def run(
        self,
        *,
        stop: Stop = lambda: False,
        say: Callable[[str], None] = print,
        on_update: Callable[[OnlinePpo], Metrics] | None = None,
        save_every_s: float = 60.0,
    ) -> Agent | None:
        """To its end, or to `stop`; None if it was stopped."""
        with MetricsLog(self.folder / "metrics.jsonl") as log:
            if not run_stage(
                self.ppo,
                self.folder,
                log,
                stop=stop,
                say=say,
                log_every=1,
                save_every_s=save_every_s,
                more=(lambda _: on_update(self.ppo)) if on_update else None,
            ):
                return None
        self.agent.save(self.folder)
        return self.agent


def run_stage(
    stage: Stage,
    folder: Path,
    log: MetricsLog,
    *,
    stop: Stop,
    say: Callable[[str], None],
    log_every: int,
    save_every_s: float,
    more: Callable[[Stage], Metrics] | None = None,
) -> bool:
    """Runs a stage from its checkpoint, if there is one, to its end. False if it was stopped.

    Args:
        more: further figures after every update.
    """
    try:
        stage.load_state_dict(load_state(folder, stage.name))
    except FileNotFoundError:
        pass
    else:
        say(f"{stage.name}: goes on after {stage.updates} updates")
    started = saved = time.monotonic()
    metrics: Metrics = {}
    while not stage.done:
        if stop():
            save_state(folder, stage.name, stage.state_dict())
            say(f"{stage.name}: stopped after {stage.updates} updates; the same command goes on")
            return False
        metrics = stage.update()
        if more is not None:
            metrics |= more(stage)
        looked = any(key.startswith("gate/") or "held_out" in key for key in metrics)
        if looked or stage.updates % log_every == 0 or stage.done:
            log.write({"stage": stage.name, "update": stage.updates} | metrics)
        if time.monotonic() - saved > save_every_s:
            save_state(folder, stage.name, stage.state_dict())
            saved = time.monotonic()
    save_state(folder, stage.name, stage.state_dict())
    if metrics:
        shown = [f"{k} {v:.4g}" for k, v in metrics.items() if "/" in k][:6]
        say(
            f"{stage.name}: {stage.updates} updates in {time.monotonic() - started:.0f} s, "
            + ", ".join(shown)
        )
    return True


def read_looks(folder: Path) -> list[dict[str, Any]]:
    """Every look of the offline gate of a run; [] if it has not come so far."""
    try:
        return list(load_state(folder, "offline")["looks"])
    except FileNotFoundError:
        return []


def fingerprint(data: Transitions) -> list[float]:
    """Tells data sets apart: size and sums."""
    sums = [float(np.sum(v, dtype=np.float64)) for v in (data.observations, data.actions)]
    return [float(len(data)), *sums, float(np.sum(data.rewards, dtype=np.float64))]


def require_same(path: Path, asked: dict[str, Any]) -> None:
    """Writes the settings of a new run; compares those of one that goes on.

    Raises:
        OtherRun: they differ.
    """
    wanted = json.loads(json.dumps(asked))
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    found = _flat(json.loads(path.read_text()))
    new = _flat(wanted)
    differ = [
        f"{key} {found.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(found.keys() | new.keys())
        if found.get(key) != new.get(key)
    ]
    if differ:
        raise OtherRun(
            f"{path.parent} holds a run with other settings ({'; '.join(differ[:4])}); name "
            "another folder, or give the same options"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
