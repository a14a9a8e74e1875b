"""Checksums of what an update writes: computed by the writer from its sources and by the receiver from its memory.

The sum of a receiver is the sum over pages of ``mix(place) * (2 * crc32(bytes) + 1)`` mod 2**64, ``place`` being region
and offset at the destination: the parts of several writers add up, and a page at a wrong place changes it. It finds
accidents, not forgeries.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1


def pages_sum(
    memory: npt.NDArray[np.uint8], offsets: npt.NDArray[Any], runs: int, run_bytes: int, run_stride: int, region: int,
    places: npt.NDArray[Any],
) -> int:  # fmt: skip
    """Sum of pages that begin at ``offsets`` of ``memory`` and go to ``places`` of a destination's ``region``."""
    view, total = memory.data, 0
    for offset, place in zip(offsets.tolist(), places.tolist(), strict=True):
        crc = 0
        for run in range(runs):
            begin = offset + run * run_stride
            crc = zlib.crc32(view[begin : begin + run_bytes], crc)
        total += _mix((region << 48) + place) * (2 * crc + 1)
    return total & _MASK


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
