"""Native memory as arrays of 64-bit words."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt


def words_at(address: int, count: int, owner: object) -> npt.NDArray[np.uint64]:
    """Native memory as an array that keeps its owner."""
    if count == 0:
        return np.zeros(0, np.uint64)
    memory = (ctypes.c_uint64 * count).from_address(address)
    memory._railwire_owner = owner  # type: ignore[attr-defined]
    words: npt.NDArray[np.uint64] = np.frombuffer(memoryview(memory), dtype=np.uint64)
    return words
