"""Speed of Uni-O4's online PPO beside stable-baselines3's, and of an ensemble beside one member.

python benchmarks/bench_uni_o4.py [--quick] [--env Hopper-v5] [--width 256] [--threads 1]

Both PPOs in one process, turn by turn, on the same environments, with networks of equal width and
depth, the same batch, minibatch and epochs. Figures are CPU time, which a busy machine disturbs
little, and the medians of the turns. stable-baselines3 is not asked to normalise observations; ours
always does.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from vla_post.critics.networks import InputSize, ValueNet
from vla_post.learners.uni_o4.amq import GateConfig
from vla_post.learners.uni_o4.cloning import Cloning, CloningConfig
from vla_post.learners.uni_o4.data import Transitions
from vla_post.learners.uni_o4.dynamics import Dynamics, DynamicsConfig
from vla_post.learners.uni_o4.offline import OfflineConfig, OfflinePpo
from vla_post.learners.uni_o4.online import OnlineConfig, OnlinePpo
from vla_post.learners.uni_o4.policies import PolicyConfig, build_policies
from vla_post.learners.uni_o4.samples import Samples, Scales, prepare, scales_of
from vla_post.learners.uni_o4.values import ValueConfig, Values

ENVS, BATCH, MINIBATCH, EPOCHS, LAYERS = 8, 2048, 128, 10, 2
MINIBATCHES = EPOCHS * BATCH // MINIBATCH
MOST_OVER_SB3 = 1.0
"""Our CPU time over stable-baselines3's, per environment step with its share of the updates."""
MOST_OVER_ONE = 2.0
"""An update of four members over one of a single member."""


class Halves(BaseCallback):
    """Tells stable-baselines3's collecting and improving apart."""

    def __init__(self) -> None:
        super().__init__()
        self.collected = 0.0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.collected = time.process_time()


def ours(env_id: str, width: int) -> Callable[[], tuple[float, float]]:
    """CPU seconds (collecting, improving) of one batch."""
    env = SyncVectorEnv(
        [lambda: gymnasium.make(env_id)] * ENVS, autoreset_mode=AutoresetMode.SAME_STEP
    )
    size, actions = env.single_observation_space.shape, env.single_action_space.shape
    assert size is not None
    assert actions is not None
    policy = build_policies(
        PolicyConfig(members=1, width=width, layers=LAYERS), size[0], actions[0]
    )
    inputs = InputSize(tokens=0, features=0, proprioception=size[0])
    scales = Scales(
        state_mean=(0.0,) * size[0],
        state_std=(1.0,) * size[0],
        action_low=(-1.0,) * actions[0],
        action_high=(1.0,) * actions[0],
        reward=1.0,
        discount=0.99,
        horizon=1,
    )
    config = OnlineConfig(
        batch_steps=BATCH,
        minibatch_size=MINIBATCH,
        epochs=EPOCHS,
        learning_rate=3e-4,
        value_learning_rate=3e-4,
        clip=0.2,
        target_kl=0.0,
        steps=10**9,
    )
    value = ValueNet(inputs, None, width=width, layers=LAYERS)
    learner = OnlinePpo(policy, value, scales, env, config)
    generator = torch.Generator().manual_seed(0)

    def turn() -> tuple[float, float]:
        begun = time.process_time()
        rollout = learner.collect(generator)
        collected = time.process_time()
        metrics = learner.improve(rollout, generator)
        assert metrics["online/minibatches"] == MINIBATCHES
        return collected - begun, time.process_time() - collected

    return turn


def theirs(env_id: str, width: int) -> Callable[[], tuple[float, float]]:
    """The same of stable-baselines3."""
    model = PPO(
        "MlpPolicy",
        DummyVecEnv([lambda: gymnasium.make(env_id)] * ENVS),
        n_steps=BATCH // ENVS,
        batch_size=MINIBATCH,
        n_epochs=EPOCHS,
        policy_kwargs={"net_arch": [width] * LAYERS},
        seed=0,
        device="cpu",
    )
    model.learn(0)

    def turn() -> tuple[float, float]:
        halves = Halves()
        begun = time.process_time()
        model.learn(BATCH, callback=halves, reset_num_timesteps=False)
        return halves.collected - begun, time.process_time() - halves.collected

    return turn


def compare_ppo(env_id: str, width: int, turns: int) -> dict[str, float]:
    """Steps and updates per CPU second of both, and their ratios of CPU time."""
    sides = {"ours": ours(env_id, width), "sb3": theirs(env_id, width)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for name, turn in sides.items():
        turn()
        del name
    for _ in range(turns):
        for name, turn in sides.items():
            times[name].append(turn())
    found: dict[str, float] = {}
    for name, rows in times.items():
        found[f"{name} environment steps/s, collecting"] = BATCH / statistics.median(
            r[0] for r in rows
        )
        found[f"{name} updates/s of {MINIBATCH}"] = MINIBATCHES / statistics.median(
            r[1] for r in rows
        )
        found[f"{name} environment steps/s, all"] = BATCH / statistics.median(map(sum, rows))
    for number, what in ((0, "collecting"), (1, "improving")):
        found[f"ours / sb3, {what}"] = statistics.median(
            a[number] / b[number] for a, b in zip(times["ours"], times["sb3"], strict=True)
        )
    found["ours / sb3, per environment step"] = statistics.median(
        sum(a) / sum(b) for a, b in zip(times["ours"], times["sb3"], strict=True)
    )
    return found


def made_up(rows: int = 20_000) -> tuple[Samples, Scales]:
    """Transitions of Hopper's sizes; speed does not ask what they say."""
    random = np.random.default_rng(0)
    states = random.normal(size=(rows, 11)).astype(np.float32)
    ends = np.arange(rows) % 200 == 199
    data = Transitions(
        observations=states,
        actions=random.uniform(-1, 1, (rows, 3)).astype(np.float32),
        rewards=random.normal(size=rows).astype(np.float32),
        terminals=ends,
        timeouts=np.zeros(rows, np.bool_),
        next_observations=np.roll(states, -1, axis=0),
    )
    scales = scales_of(data, discount=0.99)
    return prepare(data, scales), scales


def compare_members(width: int, updates: int) -> dict[str, float]:
    """CPU time of an update of four members over one of a single member, turn by turn."""
    samples, scales = made_up()
    cloning: dict[int, Callable[[], Any]] = {}
    offline: dict[int, Callable[[], Any]] = {}
    for members in (1, 4):
        config = PolicyConfig(members=members, width=width, layers=LAYERS)
        cloning[members] = Cloning(build_policies(config, 11, 3), samples, CloningConfig()).update
        offline[members] = OfflinePpo(
            build_policies(config, 11, 3),
            Values(11, 3, ValueConfig()),
            Dynamics(11, 3, DynamicsConfig()),
            samples,
            scales,
            # The gate's look is not part of a step.
            OfflineConfig(updates=10**6, gate=GateConfig(every=10**9, horizon=2)),
        ).update
    found: dict[str, float] = {}
    for name, calls in (("cloning", cloning), ("offline PPO", offline)):
        times: dict[int, list[float]] = {1: [], 4: []}
        for number in range(updates + 3):
            for members, call in calls.items():
                begun = time.process_time()
                call()
                if number >= 3:
                    times[members].append(time.process_time() - begun)
        for members, rows in times.items():
            found[f"{name} ms, {members} members"] = 1e3 * statistics.median(rows)
        found[f"{name}, four members / one"] = statistics.median(times[4]) / statistics.median(
            times[1]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few turns")
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--width", type=int, default=256, help="of both hidden layers")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = compare_ppo(arguments.env, arguments.width, 3 if arguments.quick else 15)
    found |= compare_members(arguments.width, 20 if arguments.quick else 200)
    print(
        json.dumps(
            {k: round(v, 3) for k, v in found.items()}
            | {"load": round(os.getloadavg()[0], 1), "python": platform.python_version()},
            indent=1,
        )
    )
    limits = {
        "ours / sb3, per environment step": MOST_OVER_SB3,
        "cloning, four members / one": MOST_OVER_ONE,
        "offline PPO, four members / one": MOST_OVER_ONE,
    }
    for name, most in limits.items():
        verdict = "kept" if found[name] <= most else "MISSED"
        print(f"{name}: {found[name]:.2f}, wanted at most {most:g}: {verdict}")


if __name__ == "__main__":
    main()
