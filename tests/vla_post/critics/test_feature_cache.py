"""The encoder runs once per frame, whatever is asked for, and damaged files are computed again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sim
from trajectory_store import ChunkSampler, Outcome, Source, Store, StoreWriter
from trajectory_store.contract import Contract, load_contract
from vla_post.batch import Batch, Observation
from vla_post.critics.encoders import CACHED_FEATURES, CACHED_PROPRIOCEPTION
from vla_post.critics.feature_cache import FeatureCache
from vla_post.critics.networks import CriticInput, InputSize

IMAGE = "observation.images.corner"


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract(sim.CONTRACTS / "metaworld_pixels.yaml")


@pytest.fixture(scope="module")
def store(tmp_path_factory: Any, contract: Contract) -> Store:
    """Two episodes of 12 ticks with a new picture every third; its grey tells its number."""
    path = tmp_path_factory.mktemp("features") / "store"
    (image,) = contract.images
    shape, task = contract.images[image].shape, next(iter(contract.tasks))
    with StoreWriter.create_or_open(path, contract) as writer:
        for episode in range(2):
            frames = [
                np.full(shape, 10 * (4 * episode + k // 3), np.uint8) if k % 3 == 0 else None
                for k in range(12)
            ]
            vectors = {
                key: np.arange(12.0)[:, None] + np.zeros((12, f.shape[0]), np.float32)
                for key, f in contract.vectors.items()
            }
            writer.write_episode(
                task,
                vectors | {image: frames},
                np.zeros((12, contract.action.size)),
                outcome=Outcome.SUCCESS,
                source=Source.POLICY,
            )
    return Store(path)


class Grey:
    """Mean brightness of the picture as the one feature; counts the pictures that it saw."""

    size = InputSize(tokens=1, features=1, proprioception=1)
    kind = "policy"

    def __init__(self, name: str = "grey") -> None:
        self.seen, self.name = 0, name

    def __call__(self, observation: Observation, instruction: Sequence[str]) -> CriticInput:
        (image,) = (v for v in observation.values() if v.ndim == 4)
        self.seen += len(image)
        features = image.mean(dim=(1, 2, 3))[:, None, None] * 255
        return CriticInput(features=features, proprioception=self.proprioception(observation))

    def proprioception(self, observation: Observation) -> torch.Tensor:
        return observation["observation.state"][:, :1]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass

    @property
    def hash(self) -> str:
        return self.name


def test_a_frame_is_encoded_once_and_every_tick_gets_its_own(tmp_path: Path, store: Store):
    encoder = Grey()
    cache = FeatureCache(encoder, tmp_path)
    for number, episode in enumerate(store.episodes):
        seen = cache.episode(store, episode)
        expected = 10.0 * (4 * number + np.arange(12) // 3)
        np.testing.assert_allclose(seen.features[:, 0, 0], expected, atol=2.0)  # JPEG
        np.testing.assert_array_equal(seen.proprioception[:, 0], np.arange(12))
    assert encoder.seen == cache.counts.encoded == 8
    for episode in store.episodes:
        cache.episode(store, episode)
    again = FeatureCache(encoder, tmp_path)  # another process, or a resumed run
    again.episode(store, store.episodes[0])
    assert encoder.seen == 8
    assert again.counts.encoded == 0


def test_batches_carry_features_of_their_own_ticks(tmp_path: Path, store: Store):
    cache = FeatureCache(Grey(), tmp_path)
    state = ["observation.state"]
    sampler = ChunkSampler(store, horizon=4, backup=2, batch_size=40, seed=1, keys=state)
    chunk = cache.add_to(next(sampler), [store])
    tick = chunk.provenance.tick
    np.testing.assert_array_equal(chunk.observation[CACHED_PROPRIOCEPTION][:, 0], tick)
    after = chunk.next_observation["observation.state"][:, :1]
    np.testing.assert_array_equal(chunk.next_observation[CACHED_PROPRIOCEPTION], after)
    batch = Batch.from_numpy(chunk)
    assert batch.observation[CACHED_FEATURES].shape == (40, 1, 1)


def test_another_encoder_has_its_own_files_and_a_damaged_one_is_replaced(
    tmp_path: Path, store: Store
):
    episode = store.episodes[0]
    first = FeatureCache(Grey(), tmp_path).episode(store, episode)
    FeatureCache(Grey("other"), tmp_path).episode(store, episode)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        whole = bytearray(file.read_bytes())
        whole[-1] ^= 0xFF
        file.write_bytes(bytes(whole))
    encoder = Grey()
    cache = FeatureCache(encoder, tmp_path)
    again = cache.episode(store, episode)
    assert cache.counts.discarded == 1
    assert encoder.seen == 4
    assert torch.equal(again.features, first.features)


def test_memory_is_bounded(tmp_path: Path, store: Store):
    cache = FeatureCache(Grey(), tmp_path, memory_bytes=80)
    for episode in store.episodes * 2:
        cache.episode(store, episode)
    assert cache.held_bytes <= 80
    assert cache.counts.encoded == 8
