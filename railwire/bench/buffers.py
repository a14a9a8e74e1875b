"""The memory that every contender works on: one huge-page buffer a process, filled and checked from a seed.

Runs in the measured processes: standard library and numpy only.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from railwire.bench.work import Work

HUGE_PAGE_BYTES = 2 << 20

Bytes = npt.NDArray[np.uint8]


def allocate(nbytes: int) -> Bytes:
    """`nbytes` of zeroed anonymous memory, aligned to 2 MiB, on huge pages if the system gives them; all touched."""
    # private: shared anonymous memory gets no transparent huge pages
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, dtype=np.uint8)
    skip = -whole.ctypes.data % HUGE_PAGE_BYTES
    buffer = whole[skip : skip + nbytes]
    buffer[:] = 0
    return buffer


def huge_page_bytes(buffer: Bytes) -> int:
    """How much of the mapping that holds `buffer` lies on huge pages (from /proc/self/smaps); 0 if that is unknown."""
    address = buffer.ctypes.data
    inside = False
    with contextlib.suppress(OSError, ValueError), open("/proc/self/smaps", encoding="ascii") as smaps:
        for line in smaps:
            fields = line.split()
            if "-" in fields[0] and not fields[0].endswith(":"):
                low, high = (int(part, 16) for part in fields[0].split("-"))
                inside = low <= address < high
            elif inside and fields[0] == "AnonHugePages:":
                return int(fields[1]) * 1024
    return 0


def pattern(nbytes: int, seed: int) -> Bytes:
    """The bytes that a source buffer holds: pseudo-random, so that no two pages are alike."""
    words = np.random.default_rng([seed, 0x7A11]).integers(0, 1 << 64, size=-(-nbytes // 8), dtype=np.uint64)
    return words.view(np.uint8)[:nbytes]


def verify(work: Work, destination: Bytes) -> bool:
    """Whether `destination`, zero before the run, holds exactly the pages that `work` moves and nothing else.

    What it should hold is computed anew from the seed; nothing is taken from the process that wrote.
    """
    if work.op == "pingpong":
        echo = destination[work.echo_offset :][: work.page_bytes]
        return bool(np.array_equal(echo, pattern(work.page_bytes, work.seed)))
    size = work.slots * work.page_bytes
    expected = np.zeros((work.slots, work.page_bytes), dtype=np.uint8)
    source = pattern(work.buffer_bytes, work.seed)[:size].reshape(expected.shape)
    source_slots, destination_slots = work.order()
    used = min(work.rounds, work.groups)
    expected[destination_slots[:used].ravel()] = source[source_slots[:used].ravel()]
    landed = destination[: work.buffer_bytes]
    return bool(np.array_equal(landed[:size], expected.ravel()) and not landed[size:].any())


class TorchMemory:
    """GPU memory from torch's allocator, which is what users of other engines register."""

    def __init__(self, nbytes: int, number: int) -> None:
        import torch

        self._torch: Any = torch
        self._tensor: Any = torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{number}")
        self.number = number
        self.address = int(self._tensor.data_ptr())

    def fill(self, data: Bytes) -> None:
        self._tensor.copy_(self._torch.from_numpy(data))
        self._torch.cuda.synchronize()

    def read_into(self, data: Bytes) -> None:
        self._torch.from_numpy(data).copy_(self._tensor)


def device_memory(device: str, nbytes: int) -> TorchMemory | None:
    """The memory under test on a GPU; None: it is the host buffer."""
    if device == "cpu":
        return None
    return TorchMemory(nbytes, int(device.partition(":")[2]))
