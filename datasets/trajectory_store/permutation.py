"""A random order of 0..size-1 without a table: any position can be asked for, memory stays
constant.

A four-round Feistel network over the next power of four permutes a slightly larger range; values
outside are sent through again until they fall inside (cycle walking), which keeps it a
permutation.
"""

from collections.abc import Sequence

import numpy as np


def permute(position: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Element at each position of the order that `key` names.

    Args:
        position: int64, each in [0, size).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    rounds = np.random.SeedSequence([k & (2**32 - 1) for k in key]).generate_state(4, np.uint64)

    def once(value: np.ndarray) -> np.ndarray:
        left, right = value >> shift, value & mask
        for secret in rounds:
            left, right = right, (left ^ _mix(right ^ secret)) & mask
        return (left << shift) | right

    out = once(position.astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = once(out[outside])
    return out.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """Finaliser of MurmurHash3: every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))
