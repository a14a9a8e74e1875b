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

from railwire.splitmix import GOLDEN, mix


def pages_sum(
    memory: npt.NDArray[np.uint8], offsets: npt.NDArray[Any], runs: int, run_bytes: int, run_stride: int, region: int,
    places: npt.NDArray[Any],
) -> int:  # fmt: skip
    """Sum of pages that begin at ``offsets`` of ``memory`` and go to ``places`` of a destination's ``region``."""
    view = memory.data
    factors = np.empty(len(offsets), np.uint64)
    for index, offset in enumerate(offsets.tolist()):
        crc = 0
        for run in range(runs):
            begin = offset + run * run_stride
            crc = zlib.crc32(view[begin : begin + run_bytes], crc)
        factors[index] = 2 * crc + 1
    keys = mix(places.astype(np.uint64) + np.uint64(((region << 48) + GOLDEN) & 0xFFFFFFFFFFFFFFFF))
    return int((keys * factors).sum(dtype=np.uint64))
