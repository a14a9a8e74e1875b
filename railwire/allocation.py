"""Memory that ``engine.allocate`` makes: on huge pages, or in a file without a name that peers on this host can map."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

HUGE_PAGE = 2 << 20
_F_ADD_SEALS = 1033  # fcntl has no names for these before Python 3.13
_SEAL_SHRINK_GROW = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW


class SharedBuffer:
    """Zeroed, prefaulted memory of a memfd: ``array`` (uint8), and ``fd``, which is closed with :meth:`close_fd`.

    Nobody can shrink it, so whoever maps it can always touch it. A child of fork() shares it with its parent.
    """

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("railwire", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, nbytes)
            area = mmap.mmap(self.fd, nbytes)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEAL_SHRINK_GROW)
        except BaseException:
            self.close_fd()
            raise
        self.array = _prefault(area, nbytes)

    def close_fd(self) -> None:
        """The memory stays."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def allocate_huge(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed, prefaulted memory that begins on a huge page and uses huge pages where the kernel grants them."""
    area = mmap.mmap(-1, max(nbytes, 1) + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    skip = -int(np.frombuffer(area, dtype=np.uint8).ctypes.data) % HUGE_PAGE
    return _prefault(area, nbytes, skip)


def _prefault(area: mmap.mmap, nbytes: int, skip: int = 0) -> npt.NDArray[np.uint8]:
    """Faults every page in now, not during the first transfer."""
    with contextlib.suppress(AttributeError, OSError):  # without huge pages ordinary ones do as well, more slowly
        area.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(area, dtype=np.uint8)[skip : skip + nbytes]
    memory[:: mmap.PAGESIZE] = 0
    return memory
