"""GPU memory as the NICs want it: a dma-buf file descriptor, obtained from the CUDA driver (no CUDA at build time)."""

from __future__ import annotations

import ctypes
import os

from railwire.errors import ConfigurationError

_DMA_BUF_FD = 1  # CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD


def export_dmabuf(address: int, nbytes: int) -> tuple[int, int]:
    """A dma-buf of the pages around ``[address, address + nbytes)``, and where the range begins in it.

    Returns (-1, 0) where the driver cannot export one; registration then depends on a peer-memory kernel module.

    Raises:
        ConfigurationError: there is no CUDA driver.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigurationError(f"GPU memory needs the CUDA driver: {error}") from error
    if not hasattr(driver, "cuMemGetHandleForAddressRange"):
        return -1, 0
    page = os.sysconf("SC_PAGE_SIZE")
    begin = address // page * page
    length = -(-(address + nbytes - begin) // page) * page
    fd = ctypes.c_int(-1)
    status = driver.cuMemGetHandleForAddressRange(
        ctypes.byref(fd), ctypes.c_uint64(begin), ctypes.c_size_t(length), ctypes.c_int(_DMA_BUF_FD), ctypes.c_uint64(0)
    )
    return (fd.value, address - begin) if status == 0 else (-1, 0)


def close_dmabuf(fd: int) -> None:
    """The NICs hold references of their own once they have registered it."""
    os.close(fd)
