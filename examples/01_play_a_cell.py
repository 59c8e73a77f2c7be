"""A simulated cell is a gymnasium environment, shaped by its contract; the expert solves it."""

import gymnasium

import sim
from sim.expert import make_expert
from trajectory_store import load_contract

contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
cell = gymnasium.make("vla_post/MetaWorld-v0", contract=contract, task="drawer-open")
expert = make_expert(contract, "drawer-open")

observation, info = cell.reset(seed=7)
print({key: value.shape for key, value in observation.items()})
terminated = truncated = False
steps = 0
while not (terminated or truncated):
    # The expert looks at the whole scene; a policy would look at `observation`.
    action = expert.act(info["scene"])
    observation, reward, terminated, truncated, info = cell.step(action)
    steps += 1
print(f"drawer open: {terminated} after {steps} steps of {1000 / contract.control_hz:.1f} ms")
cell.close()
