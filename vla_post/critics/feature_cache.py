"""Features of a frozen encoder, computed once per frame and kept on disk.

A large encoder costs far more than the critic behind it. `FeatureCache` runs it once for every
distinct frame of an episode and keeps the result in a file named by what it depends on: the encoder
and the episode. A finished episode never changes, whatever snapshot shows it, so later snapshots
reuse what earlier ones computed. T ticks, M feature tokens of size F, P proprioception, B batch.
"""

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trajectory_store import ChunkBatch, Episode, Store
from vla_post.batch import Observation, observation_from_numpy
from vla_post.critics.encoders import CACHED_FEATURES, CACHED_PROPRIOCEPTION, Encoder
from vla_post.critics.networks import CriticInput

log = logging.getLogger(__name__)


@dataclass
class CacheCounts:
    """How often the encoder ran, and for how many ticks it did not."""

    encoded: int = 0
    """Distinct frames that went through the encoder."""
    ticks: int = 0
    """Ticks that were asked for."""
    discarded: int = 0
    """Files whose contents did not match their hash; computed again."""


class FeatureCache:
    """Features by episode, in memory up to `memory_bytes` and on disk without bound.

    Args:
        folder: of the files, such as the run's; each is written under a temporary name and renamed.
        batch_size: frames that go through the encoder together.
        device: of the encoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: Path,
        *,
        memory_bytes: int = 256 << 20,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.encoder, self.folder, self.batch_size = encoder, folder, batch_size
        self.device = device
        self._limit, self._used = memory_bytes, 0
        self._held: OrderedDict[str, CriticInput] = OrderedDict()
        self._hash = encoder.hash
        self.counts = CacheCounts()

    def episode(self, store: Store, episode: Episode) -> CriticInput:
        """Features of every tick of a finished episode, on the CPU."""
        name = hashlib.sha256(f"{self._hash} {episode.uuid} {len(episode)}".encode()).hexdigest()
        self.counts.ticks += len(episode)
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        path = self.folder / f"{name}.safetensors"
        found = self._read(path)
        if found is None:
            found = self._encode(store, episode)
            self._write(path, found, store, episode)
        self._hold(name, found)
        return found

    def add_to(self, batch: ChunkBatch, stores: Sequence[Store]) -> ChunkBatch:
        """The batch with features among its observations, now and at the backup.

        Args:
            stores: those that the batch was drawn from.
        """
        place = batch.provenance
        by_location = {store.location: store for store in stores}
        now = np.asarray(place.tick)
        after = now + np.minimum(batch.n, batch.left - 1)
        columns: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
        for number in np.unique(place.episode):  # every episode's features are read in one go
            items = np.flatnonzero(place.episode == number)
            store = by_location[place.stores[int(place.store[items[0]])]]
            seen = self.episode(store, store.episode(place.uuids[int(number)]))
            for column, ticks in zip(columns, (now, after), strict=True):
                index = torch.from_numpy(ticks[items])
                for key, known in (
                    (CACHED_FEATURES, seen.features),
                    (CACHED_PROPRIOCEPTION, seen.proprioception),
                ):
                    if key not in column:
                        column[key] = np.empty((len(batch), *known.shape[1:]), np.float32)
                    column[key][items] = known[index].numpy()
        return replace(
            batch,
            observation=batch.observation | columns[0],
            next_observation=batch.next_observation | columns[1],
        )

    @torch.no_grad()
    def _encode(self, store: Store, episode: Episode) -> CriticInput:
        """Runs the encoder once for each distinct combination of frames and vectors' ticks."""
        contract = store.contracts[episode.contract_sha256]
        ticks = np.arange(episode.first_row, episode.end_row)
        # Cameras are slower than control: ticks that share all frames share their features.
        frames = [store.read(f"{key}.frame", ticks)[:, 0] for key in contract.images]
        if frames:
            _, first, inverse = np.unique(
                np.stack(frames, axis=1), axis=0, return_index=True, return_inverse=True
            )
        else:
            first, inverse = np.arange(len(ticks)), np.arange(len(ticks))
        self.counts.encoded += len(first)
        parts: list[Tensor] = []
        for start in range(0, len(first), self.batch_size):
            rows = ticks[first[start : start + self.batch_size]]
            parts.append(self._run(store, contract, rows, episode.instruction).features.cpu())
        features = torch.cat(parts)[torch.from_numpy(inverse.reshape(-1))]
        state = self.encoder.proprioception(
            observation_from_numpy({k: store.read(k, ticks) for k in contract.vectors}, self.device)
        )
        return CriticInput(features=features.half(), proprioception=state.cpu())

    def _run(self, store: Store, contract: Any, rows: np.ndarray, instruction: str) -> CriticInput:
        seen: Observation = observation_from_numpy(
            {key: store.read(key, rows) for key in contract.observations}, self.device
        )
        return self.encoder(seen, [instruction] * len(rows))

    def _read(self, path: Path) -> CriticInput | None:
        """None where there is no file, or one that is not what was written."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                features = file.get_tensor("features")
                state = file.get_tensor("proprioception")
                promised = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError) as error:
            log.warning("%s: cannot be read (%s); its features are computed again", path, error)
            promised, features, state = None, torch.empty(0), torch.empty(0)
        if promised is None or promised != _digest(features, state):
            self.counts.discarded += 1
            return None
        return CriticInput(features=features, proprioception=state)

    def _write(self, path: Path, seen: CriticInput, store: Store, episode: Episode) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.new")
        save_file(
            {
                "features": seen.features.contiguous(),
                "proprioception": seen.proprioception.contiguous(),
            },
            fresh,
            metadata={
                "sha256": _digest(seen.features, seen.proprioception),
                "encoder": self._hash,
                "store": store.location,
                "snapshot": store.snapshot_id,
                "episode": episode.uuid,
            },
        )
        fresh.replace(path)

    def _hold(self, name: str, seen: CriticInput) -> None:
        self._held[name] = seen
        self._used += _bytes(seen)
        while self._used > self._limit and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._used -= _bytes(oldest)

    @property
    def held_bytes(self) -> int:
        """In memory now."""
        return self._used


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _bytes(seen: CriticInput) -> int:
    return sum(t.numel() * t.element_size() for t in (seen.features, seen.proprioception))
