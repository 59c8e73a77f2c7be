"""The trajectory store: every control tick of a robot on zarr + icechunk, and batches for learners.

`StoreWriter` records, `Store` and `FleetView` read, `ChunkSampler` feeds a learner. Importing this
needs neither torch nor ROS. docs/store.md is the guide.
"""

from trajectory_store.contract import Contract, ContractError, ContractMismatch, load_contract
from trajectory_store.draws import Filter, Part
from trajectory_store.errors import (
    BadTick,
    DamagedChunk,
    EpisodeState,
    FeatureMissing,
    NewerFormat,
    NotAStore,
    NothingToSample,
    SchemaMismatch,
    SpoolFull,
    StoreBusy,
    StoreError,
    StoreTaken,
    StoreUnavailable,
)
from trajectory_store.reader import FleetView, Store
from trajectory_store.sampler import NO_TAKEOVER, ChunkBatch, ChunkSampler, Provenance
from trajectory_store.schema import FORMAT, Episode, Outcome, Source, Tick
from trajectory_store.writer import Health, StoreWriter

__all__ = [
    "FORMAT",
    "NO_TAKEOVER",
    "BadTick",
    "ChunkBatch",
    "ChunkSampler",
    "Contract",
    "ContractError",
    "ContractMismatch",
    "DamagedChunk",
    "Episode",
    "EpisodeState",
    "FeatureMissing",
    "Filter",
    "FleetView",
    "Health",
    "NewerFormat",
    "NotAStore",
    "NothingToSample",
    "Outcome",
    "Part",
    "Provenance",
    "SchemaMismatch",
    "Source",
    "SpoolFull",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreTaken",
    "StoreUnavailable",
    "StoreWriter",
    "Tick",
    "load_contract",
]
