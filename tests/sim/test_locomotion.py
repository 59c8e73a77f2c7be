"""Behaviour agents: levels, resuming, what is recorded. Tiny budgets."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from sim.locomotion.agent import Agent, LevelNotReached, OtherAgent
from sim.locomotion.config import PpoConfig
from sim.locomotion.facts import ENVIRONMENTS, UnknownEnvironment, environment, normalised_score
from sim.locomotion.recorder import Recorder
from sim.locomotion.trajectory import Trajectory, join, load_trajectories, save_trajectories

TINY = PpoConfig(
    envs=2, rollout_steps=40, iterations=2, batch_size=20, epochs=2, evaluation_episodes=2
)
ANY = -100.0
"""A score that every policy has."""


def quiet(_: str) -> None:
    pass


def equal(first: list[Trajectory], second: list[Trajectory]) -> bool:
    a, b = join(first), join(second)
    return all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_facts_agree_with_gymnasium(name: str):
    facts = environment(name)
    env: Any = gymnasium.make(name)
    try:
        assert env.observation_space.shape == (len(facts.state_names),)
        assert env.action_space.shape == (len(facts.joints),)
        limits = facts.contract().action.limits.position
        assert np.allclose(limits, np.stack([env.action_space.low, env.action_space.high], 1))
        assert env.unwrapped.dt == pytest.approx(facts.dt_s)
        assert env.spec.max_episode_steps * facts.dt_s == pytest.approx(
            facts.contract().task("run").time_limit_s
        )
        # The names are those of the model, in its order: qpos without rootx, then qvel.
        model = env.unwrapped.model
        joints = [model.joint(i).name for i in range(model.njnt)]
        expected = [f"{j}_joint" for j in facts.joints]
        assert joints[:3] == ["rootx", "rootz", "rooty"]
        assert [j.removesuffix("_joint") for j in joints[3:]] == [
            j.removesuffix("_joint") for j in expected
        ]
        actuated = [model.joint(model.actuator(i).trnid[0]).name for i in range(model.nu)]
        assert actuated == joints[3:]
    finally:
        env.close()


def test_scores_are_0_at_random_and_100_at_the_expert():
    assert normalised_score("Hopper-v5", -20.272305) == pytest.approx(0.0)
    assert normalised_score("HalfCheetah-v5", 12135.0) == pytest.approx(100.0)
    # D4RL's paper: hopper-medium's behaviour, 44.1 on this scale, returned about 1415.
    assert normalised_score("Hopper-v5", 1415.0) == pytest.approx(44.1, abs=0.1)
    with pytest.raises(UnknownEnvironment, match=r"'Ant-v5'.*Hopper-v5, Walker2d-v5, HalfCheetah"):
        normalised_score("Ant-v5", 1.0)


class Counter(gymnasium.Env[np.ndarray, np.ndarray]):
    """Observation: steps since the reset. Ends at `length`, by itself or by the clock."""

    observation_space = gymnasium.spaces.Box(0, 100, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length: int, terminates: bool) -> None:
        self.length, self.terminates, self.count = length, terminates, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        over = self.count == self.length
        seen = np.array([self.count], np.float32)
        return seen, float(self.count), over and self.terminates, over and not self.terminates, {}


def test_the_recorder_keeps_ends_apart_and_sees_past_the_reset():
    recorder = Recorder(DummyVecEnv([lambda: Counter(3, True), lambda: Counter(2, False)]))
    recorder.reset()
    for k in range(5):
        recorder.step(np.array([[0.1 * k], [-0.1 * k]]))
    assert recorder.completed() == [1, 2]
    first, second = recorder.take()
    recorder.close()
    assert [(len(t), t.terminated, t.complete) for t in first] == [
        (3, True, True),
        (2, False, False),
    ]
    assert [(len(t), t.terminated, t.complete) for t in second] == [
        (2, False, True),
        (2, False, True),
        (1, False, False),
    ]
    np.testing.assert_array_equal(first[0].observation[:, 0], [0, 1, 2])
    np.testing.assert_array_equal(first[0].next_observation[:, 0], [1, 2, 3])
    np.testing.assert_array_equal(first[0].reward, [1, 2, 3])
    np.testing.assert_allclose(second[1].action[:, 0], [-0.2, -0.3], atol=1e-7)
    np.testing.assert_array_equal(second[2].next_observation[:, 0], [1])
    assert first[0].episode_return == 6.0


def test_trajectories_return_from_their_file(tmp_path: Path):
    recorder = Recorder(DummyVecEnv([lambda: Counter(3, True)]))
    recorder.reset()
    for _ in range(7):
        recorder.step(np.zeros((1, 1)))
    (taken,) = recorder.take()
    recorder.close()
    save_trajectories(tmp_path / "some.npz", taken)
    assert equal(load_trajectories(tmp_path / "some.npz"), taken)
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


def test_a_stopped_training_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path):
    steps = 2 * TINY.round_steps
    whole = Agent(tmp_path / "whole", "Hopper-v5", TINY, seed=3)
    with pytest.raises(LevelNotReached, match=r"'medium' is a score of 99.*--max-steps"):
        whole.reach("medium", 99.0, max_steps=steps, say=quiet)
    whole.close()

    parts = Agent(tmp_path / "parts", "Hopper-v5", TINY, seed=3)
    with pytest.raises(LevelNotReached):
        parts.reach("medium", 99.0, max_steps=TINY.round_steps, say=quiet)
    parts.close()
    # A kill in the second round may leave that round's data behind; it is written again.
    (tmp_path / "parts" / "rounds" / "00002.npz").write_bytes(b"half")
    parts = Agent(tmp_path / "parts", "Hopper-v5", TINY, seed=3)
    with pytest.raises(LevelNotReached):
        parts.reach("medium", 99.0, max_steps=steps, say=quiet)
    assert parts.rounds == whole.rounds
    assert len({r.mean_return for r in parts.rounds}) == 2  # it does learn something

    # A target that training has passed needs no more of it, and is the best round's policy.
    best = max(parts.rounds, key=lambda r: r.score)
    level = parts.reach("medium", best.score, max_steps=steps, say=quiet)
    assert level.reached == best
    replay = parts.replay()
    assert sum(map(len, replay)) == best.steps
    again = Agent(tmp_path / "whole", "Hopper-v5", TINY, seed=3)
    again.reach("medium", best.score, max_steps=steps, say=quiet)
    assert equal(again.replay(), replay)
    recorded = parts.roll_out(51, seed=5, say=quiet)
    assert sum(map(len, recorded)) == 52  # the same number in each environment
    assert equal(again.roll_out(51, seed=5, say=quiet), recorded)
    assert not equal(again.roll_out(51, seed=6, say=quiet), recorded)
    assert np.abs(join(recorded)["action"]).max() <= 1.0
    with pytest.raises(OtherAgent, match=r"target .* and 50 is asked"):
        parts.reach("medium", 50.0, max_steps=steps, say=quiet)
    parts.close()
    again.close()


def test_an_agent_of_another_configuration_is_refused(tmp_path: Path):
    Agent(tmp_path, "Hopper-v5", TINY, seed=0).close()
    with pytest.raises(OtherAgent, match=r"env 'Hopper-v5', asked 'Walker2d-v5'; seed 0, asked 1"):
        Agent(tmp_path, "Walker2d-v5", TINY, seed=1)
    with pytest.raises(UnknownEnvironment):
        Agent(tmp_path / "other", "Pong-v5", TINY)
    with pytest.raises(ValueError, match="batch_size is 5000"):
        PpoConfig(batch_size=5000)
