"""Demonstrations into a trajectory store, and batches of action chunks out of it."""

import tempfile
from pathlib import Path

import sim
from sim.demonstrations import write_demonstrations
from trajectory_store import ChunkSampler, Part, Store, load_contract

contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
folder = Path(tempfile.mkdtemp()) / "demonstrations"
write_demonstrations(folder, contract, tasks=["reach", "drawer-open"], episodes_per_task=3)

store = Store(folder)
print(f"{len(store.episodes)} episodes, {store.rows} ticks, snapshot {store.snapshot_id}")
for episode in store.episodes:
    print(f"  {episode.task:<12} {episode.outcome} after {episode.duration_s:.2f} s")

sampler = ChunkSampler(
    [Part(data=store, balance_tasks=True)], horizon=contract.chunk_horizon, batch_size=64, seed=0
)
with sampler:
    batch = next(sampler)
print(f"action {batch.action.shape}, valid steps {batch.valid.mean():.0%}")
# A chunk never crosses the end of its episode: what would is masked, and n counts the rest.
assert (batch.valid.sum(axis=1) == batch.n).all()
