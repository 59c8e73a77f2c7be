"""A cell as a chunk environment, and going online in it from what its stores taught."""

from pathlib import Path

import numpy as np
import pytest

from sim.demonstrations import write_demonstrations
from trajectory_store import FleetView, load_contract
from vla_post.convert.d4rl import from_stores
from vla_post.learners.uni_o4.online import OnlineConfig
from vla_post.learners.uni_o4.policies import PolicyConfig
from vla_post.learners.uni_o4.samples import prepare, scales_of
from vla_post.recipes.uni_o4_env import ChunkCell, env_maker, vector_env
from vla_post.training.uni_o4 import OnlineRun, UniO4Config, fresh_agent

CONTRACT = Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml"


def test_a_chunk_runs_open_loop_and_sees_what_stores_hold(tmp_path: Path):
    contract = load_contract(CONTRACT)
    write_demonstrations(
        tmp_path / "store", contract, tasks=("reach",), episodes_per_task=1, seed=3
    )
    data = from_stores(FleetView(tmp_path / "store"), task="reach")
    cell = ChunkCell(contract, "reach", horizon=3, discount=0.5)
    observation, _ = cell.reset(seed=0)
    assert observation.shape == (data.state_size,)
    assert cell.action_space.shape == (3, 4)
    total, over, steps = 0.0, False, 0
    while not over:
        observation, reward, success, truncated, _ = cell.step(np.zeros((3, 4), np.float32))
        total, over, steps = total + reward, success or truncated, steps + 1
    limit = contract.tasks["reach"].time_limit_s * contract.control_hz
    assert steps == pytest.approx(np.ceil(limit / 3), abs=1)
    assert total == 0.0
    cell.close()

    # The units of the stores are those of the environment, chunk by chunk.
    scales = scales_of(data, discount=0.9, horizon=3)
    assert prepare(data, scales).action.shape[1] == 12
    agent = fresh_agent(scales, UniO4Config(policy=PolicyConfig(width=8, layers=1)))
    env = vector_env(env_maker("reach", contract=contract, scales=scales), 2)
    config = OnlineConfig(steps=20, batch_steps=20, epochs=1)
    online = OnlineRun(agent, env, config, tmp_path / "online")
    assert online.run(say=lambda _: None) is not None
    assert online.ppo.steps == 20
    env.close()
