"""Uni-O4's whole run on a toy: stages, resuming, the online phase, and what a user gets told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from vla_post.learners.uni_o4.amq import GateConfig
from vla_post.learners.uni_o4.cloning import CloningConfig
from vla_post.learners.uni_o4.data import BadTransitions, Transitions
from vla_post.learners.uni_o4.dynamics import DynamicsConfig
from vla_post.learners.uni_o4.offline import OfflineConfig
from vla_post.learners.uni_o4.online import OnlineConfig, OnlinePpo
from vla_post.learners.uni_o4.policies import PolicyConfig
from vla_post.learners.uni_o4.rollouts import true_returns
from vla_post.learners.uni_o4.samples import scales_of
from vla_post.learners.uni_o4.values import ValueConfig
from vla_post.recipes.uni_o4_env import vector_env
from vla_post.training.metrics import read_metrics
from vla_post.training.uni_o4 import (
    Agent,
    OfflineRun,
    OnlineRun,
    OtherRun,
    UniO4Config,
    fresh_agent,
)


class Push(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point on a line; its place counts against it, and the clock ends an episode at 10."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.place, self.tick = 0.0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.tick = float(self.np_random.uniform(-1, 1)), 0
        return np.array([self.place], np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.place += 0.5 * float(action[0])
        self.tick += 1
        reward = 1.0 - abs(self.place)
        return np.array([self.place], np.float32), reward, False, self.tick == 10, {}


def recorded(episodes: int = 60) -> Transitions:
    """A clumsy player: half of the right push, and much noise."""
    env, rng, rows = Push(), np.random.default_rng(0), []
    for episode in range(episodes):
        state, _ = env.reset(seed=episode)
        for tick in range(10):
            action = np.clip(-0.5 * state + rng.normal(size=1) * 0.6, -1, 1).astype(np.float32)
            following, reward, _, _, _ = env.step(action)
            rows.append((state, action, reward, following, tick == 9))
            state = following
    states, actions, rewards, after, last = (
        np.array(v, np.float32) for v in zip(*rows, strict=True)
    )
    return Transitions(
        observations=states,
        actions=actions,
        rewards=rewards,
        terminals=np.zeros(len(rows), np.bool_),
        timeouts=last.astype(np.bool_),
        next_observations=after,
    )


TINY = UniO4Config(
    discount=0.9,
    policy=PolicyConfig(members=2, width=24, layers=1),
    values=ValueConfig(updates=250, width=24, layers=1, batch_size=64, learning_rate=3e-3),
    cloning=CloningConfig(updates=150, batch_size=64, learning_rate=3e-3),
    dynamics=DynamicsConfig(
        members=2, elites=1, width=24, layers=1, batch_size=64, max_updates=200, check_every=50
    ),
    offline=OfflineConfig(
        updates=150, batch_size=64, learning_rate=2e-3,
        gate=GateConfig(every=25, horizon=5, starts=64),
    ),
    save_every_s=1e9,
)  # fmt: skip


def played(agent: Agent, episodes: int = 32) -> float:
    env = vector_env(Push, episodes)
    try:
        return float(true_returns(agent.policy, agent.scales, env, seed=7).mean())
    finally:
        env.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Agent]:
    folder = tmp_path_factory.mktemp("uni_o4") / "run"
    agent = OfflineRun(TINY, recorded(), folder).run(say=lambda _: None)
    assert agent is not None
    return folder, agent


def test_offline_beats_the_clone_and_the_run_tells_what_it_did(finished: tuple[Path, Agent]):
    folder, agent = finished
    assert played(agent) > played(Agent.load(folder, "cloned")) + 0.2
    rows = read_metrics(folder / "metrics.jsonl")
    assert {r["stage"] for r in rows} >= {"values", "cloning", "dynamics", "offline", "selection"}
    last = [r for r in rows if r["stage"] == "offline"][-1]
    for key in ("offline/clip_fraction", "offline/kl", "offline/disagreement", "gate/score"):
        assert np.isfinite(last[key]), key
    assert not list(folder.glob("*.pkl"))
    loaded = Agent.load(folder)
    state = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(loaded.act(state), agent.act(state))
    assert loaded.act(state).shape == (5, 1)


def test_a_run_that_was_cut_short_ends_where_an_uninterrupted_one_does(
    finished: tuple[Path, Agent], tmp_path: Path
):
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls % 120 == 0

    agent = None
    for _ in range(20):
        agent = OfflineRun(TINY, recorded(), tmp_path).run(stop=stop, say=lambda _: None)
        if agent is not None:
            break
    assert agent is not None
    state = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(agent.act(state), finished[1].act(state))
    with pytest.raises(OtherRun, match=r"discount 0\.9, now 0\.8"):
        OfflineRun(replace(TINY, discount=0.8), recorded(), tmp_path)


def test_data_without_ends_is_refused_before_anything_is_trained(tmp_path: Path):
    data = recorded(20)
    none = np.zeros(len(data), np.bool_)
    with pytest.raises(BadTransitions, match="neither `terminals` nor `timeouts`"):
        OfflineRun(TINY, replace(data, timeouts=none), tmp_path)


def test_going_online_starts_from_the_same_policy_and_keeps_the_units(
    finished: tuple[Path, Agent], tmp_path: Path
):
    folder, agent = finished
    before = played(agent)
    env = vector_env(Push, 4)
    config = OnlineConfig(steps=1600, batch_steps=400, epochs=4, learning_rate=1e-4)
    start = Agent.load(folder)
    online = OnlineRun(start, env, config, tmp_path / "online")
    assert played(online.agent) == before
    assert online.scales == agent.scales
    found = online.run(say=lambda _: None)
    env.close()
    assert found is not None
    assert played(found) > before - 0.3
    rows = read_metrics(tmp_path / "online" / "metrics.jsonl")
    assert [r["online/steps"] for r in rows] == [400, 800, 1200, 1600]
    assert all(np.isfinite(r["online/explained_variance"]) for r in rows)


def test_plain_ppo_learns_from_random_weights_and_resumes(tmp_path: Path):
    config = OnlineConfig(
        steps=6000, batch_steps=500, epochs=8, learning_rate=3e-3, value_learning_rate=3e-3,
        clip=0.2, target_kl=0.05, minibatch_size=100,
    )  # fmt: skip
    small = replace(TINY, policy=PolicyConfig(width=24, layers=1))
    agent = fresh_agent(scales_of(recorded(5), discount=0.9), small)
    before = played(agent)
    env = vector_env(Push, 10)
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls == 5

    assert OnlineRun(agent, env, config, tmp_path).run(stop=stop, say=lambda _: None) is None
    again = OnlineRun(fresh_agent(agent.scales, small), env, config, tmp_path)
    found = again.run(say=lambda _: None)
    env.close()
    assert found is not None
    assert again.ppo.steps == 6000
    assert played(found) > before + 1.0


def test_environments_that_reset_a_step_late_are_refused():
    agent = fresh_agent(scales_of(recorded(5), discount=0.9), TINY)
    env = SyncVectorEnv([Push])
    with pytest.raises(ValueError, match="SAME_STEP"):
        OnlinePpo(agent.policy, agent.value, agent.scales, env, OnlineConfig())
    env.close()


def test_the_commands_run_from_a_file_and_say_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from vla_post.cli.main import main

    data = recorded().save(tmp_path / "push.npz")
    sizes = [
        *("--policy.members", "1", "--policy.width", "8", "--policy.layers", "1"),
        *("--values.updates", "5", "--values.width", "8", "--values.batch-size", "64"),
        *("--cloning.updates", "5", "--cloning.batch-size", "64", "--dynamics.width", "16"),
        *("--dynamics.max-updates", "200", "--dynamics.layers", "1", "--dynamics.members", "1"),
        *("--dynamics.elites", "1", "--dynamics.batch-size", "64", "--offline.updates", "4"),
        *("--offline.batch-size", "64", "--offline.gate.every", "2", "--offline.gate.horizon", "2"),
    ]
    main(["uni-o4", "offline", "--data", str(data), "--out", str(tmp_path / "run"), *sizes])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run")
    main(["uni-o4", "gate", str(tmp_path / "run")])
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("step") for row in looks[:3]] == [0, 2, 4]
    with pytest.raises(SystemExit):
        main(["uni-o4", "offline", "--data", "nowhere.npz", "--out", str(tmp_path / "x"), *sizes])
    assert "nowhere.npz: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["uni-o4", "eval", str(tmp_path / "run"), "--env", "Pendulum-v1"])
    assert "observations (3,)" in capsys.readouterr().err


def test_a_generator_of_its_own_leaves_torchs_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    agent = fresh_agent(scales_of(recorded(5), discount=0.9), TINY)
    torch.manual_seed(3)
    agent.act(np.zeros((2, 1), np.float32))
    torch.testing.assert_close(torch.rand(1), expected)
