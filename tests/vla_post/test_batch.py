"""`Batch`: the store's arrays as tensors, on the CPU and through pinned memory on a GPU."""

from zlib import crc32

import numpy as np
import pytest
import torch

from trajectory_store import ChunkBatch, Provenance
from vla_post.batch import Batch, to_device

STATE, WRIST, DEPTH = "observation.state", "observation.images.wrist", "observation.images.depth"


def chunk(b: int = 3, h: int = 4) -> ChunkBatch:
    rng = np.random.default_rng(0)
    whole = np.arange(b)
    observation = {
        STATE: rng.normal(size=(b, 5)).astype(np.float32),
        WRIST: rng.integers(0, 256, (b, 2, 6, 8, 3), dtype=np.uint8),
        DEPTH: rng.integers(0, 65536, (b, 6, 8, 1), dtype=np.uint16),
    }
    return ChunkBatch(
        observation=observation,
        action=rng.normal(size=(b, h, 2)).astype(np.float32),
        valid=np.ones((b, h), bool),
        reward=rng.normal(size=(b, h)).astype(np.float32),
        source=np.zeros((b, h), np.uint8),
        next_observation={},
        n=np.full(b, h),
        terminated=np.zeros(b, bool),
        left=whole + h,
        outcome=np.ones(b, np.int8),
        task=np.zeros(b, np.int64),
        instruction=["pick"] * b,
        part=np.zeros(b, np.int64),
        provenance=Provenance(("s",), ["u", "v", "w"], whole, whole, whole, whole),
    )


def check(batch: Batch, of: ChunkBatch, device: str) -> None:
    assert batch.action.device.type == device
    np.testing.assert_array_equal(batch.action.cpu(), of.action)
    assert batch.episode is not None
    assert batch.episode.tolist() == [crc32(uuid) for uuid in (b"u", b"v", b"w")]
    np.testing.assert_array_equal(batch.observation[STATE].cpu(), of.observation[STATE])
    images = batch.observation[WRIST].cpu()
    assert images.shape == (3, 2, 3, 6, 8)  # (B, T, C, height, width) with a history
    np.testing.assert_allclose(
        images.movedim(2, -1).numpy() * 255, of.observation[WRIST], atol=1e-4
    )
    # Depth stays 16 bit, in its unit.
    np.testing.assert_array_equal(batch.observation[DEPTH].cpu().numpy(), of.observation[DEPTH])


def test_a_batch_holds_what_the_chunk_holds():
    check(Batch.from_numpy(chunk()), chunk(), "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_reaches_the_gpu_unchanged():
    check(Batch.from_numpy(chunk(), "cuda"), chunk(), "cuda")
    assert to_device(np.zeros(3), "cuda").is_cuda
