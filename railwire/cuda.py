"""What Railwire asks of the CUDA driver, which is opened when it is first wanted (no CUDA at build time): dma-bufs of
GPU memory, for NICs; and words of host memory that a stream writes to, for watchers."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy.typing as npt

from railwire import _native
from railwire.errors import ConfigurationError

_HOST_REGISTER_DEVICEMAP = 2  # CU_MEMHOSTREGISTER_DEVICEMAP
_ALREADY_REGISTERED = 712  # CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED


def _driver() -> ctypes.CDLL:
    """Raises ConfigurationError: there is no CUDA driver."""
    try:
        return ctypes.CDLL(os.environ.get("RAILWIRE_LIBCUDA") or "libcuda.so.1")
    except OSError as error:
        raise ConfigurationError(f"GPU memory needs the CUDA driver: {error}") from error


def export_dmabuf(address: int, nbytes: int, ordinal: int) -> tuple[int, int]:
    """A dma-buf of the pages around ``[address, address + nbytes)``, and where the range begins in it.

    Returns (-1, 0) where the driver cannot export one; registration with an RDMA NIC then depends on a peer-memory
    kernel module.

    Raises:
        ConfigurationError: there is no CUDA driver, or no such GPU.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    begin = address // page * page
    length = -(-(address + nbytes - begin) // page) * page
    try:
        fd, _ = _native.gpu_dmabuf(ordinal, begin, length)
    except _native.CudaError as error:
        raise ConfigurationError(f"GPU memory: {error}") from error
    return (fd, address - begin) if fd >= 0 else (-1, 0)


def close_dmabuf(fd: int) -> None:
    """The NICs hold references of their own once they have registered it."""
    os.close(fd)


class GpuMemory:
    """Memory of a GPU that other processes can always map, whatever the framework's allocator does. Freed when the last
    reference goes. A CUDA array: ``torch.as_tensor(memory, device="cuda")`` is a view of it.

    Args:
        nbytes: rounded up to the GPU's granularity (2 MiB) in the allocation, not in the view.
        ordinal: of the GPU.

    Raises:
        ConfigurationError: the driver refuses; its words are in the message.
    """

    def __init__(self, nbytes: int, ordinal: int) -> None:
        if nbytes < 1:
            raise ValueError("nbytes must be positive")
        try:
            self._native = _native.GpuMemory(nbytes, ordinal)
        except _native.CudaError as error:
            raise ConfigurationError(f"cuda:{ordinal}: {error}") from error
        self.nbytes = nbytes
        self.ordinal = ordinal

    @property
    def address(self) -> int:
        return self._native.address

    def fill(self, data: npt.NDArray[Any]) -> None:
        """Copies a host array to the beginning, and waits. ``ValueError``: it is longer, or not contiguous."""
        self._check(data)
        _native.gpu_copy(self.ordinal, self.address, data.ctypes.data, data.nbytes)

    def read_into(self, data: npt.NDArray[Any]) -> None:
        """Copies the beginning to a host array, and waits. Raises as :meth:`fill` does."""
        self._check(data)
        _native.gpu_copy(self.ordinal, data.ctypes.data, self.address, data.nbytes)

    def _check(self, data: npt.NDArray[Any]) -> None:
        if data.nbytes > self.nbytes or not data.flags.c_contiguous:
            raise ValueError(f"a contiguous array of at most {self.nbytes} bytes is wanted")

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self._native.address, False),
            "version": 3,
            "strides": None,
        }


def stream_handle(stream: Any, device: str) -> tuple[int, int]:
    """(ordinal of its GPU, ``CUstream`` handle) of a torch or CuPy stream, of anything with ``__cuda_stream__``, or of
    a handle as an int, which then belongs to ``device``.

    Raises:
        TypeError: it is no stream.
        ValueError: a bare handle, and ``device`` is no GPU.
    """
    own = getattr(stream, "device", None)
    ordinal = getattr(own, "index", None) if own is not None else getattr(stream, "device_id", None)
    if hasattr(stream, "cuda_stream"):
        handle = int(stream.cuda_stream)
    elif hasattr(stream, "__cuda_stream__"):
        handle = int(stream.__cuda_stream__()[1])
    elif hasattr(stream, "ptr"):
        handle = int(stream.ptr)
    elif isinstance(stream, int) and not isinstance(stream, bool):
        handle = stream
    else:
        raise TypeError(f"a CUDA stream is wanted, not {type(stream).__name__}")
    if ordinal is None:
        if not device.startswith("cuda:"):
            raise ValueError(f"which GPU does this stream belong to? The engine's device is {device}")
        ordinal = int(device[5:])
    return int(ordinal), handle


def mark(after: Any, device: str) -> _native.StreamWord | None:
    """What ``after=`` of a transfer means: a word that is raised when the stream, or event, has come so far.

    Raises:
        TypeError: neither a stream nor an event.
        ValueError: an event that nobody has recorded.
        ConfigurationError: the driver refuses; its words are in the message.
    """
    if after is None:
        return None
    is_event = hasattr(after, "cuda_event") or type(after).__name__ == "Event"
    try:
        if not is_event:
            return _native.mark_stream(*stream_handle(after, device))
        handle = int(after.cuda_event if hasattr(after, "cuda_event") else after.ptr)
        if handle == 0:
            raise ValueError("the event has not been recorded")
        of = getattr(after, "device", None)
        ordinal = of.index if of is not None else int(device.partition(":")[2] or 0)
        return _native.mark_event(ordinal, handle)
    except _native.CudaError as error:
        raise ConfigurationError(str(error)) from error


def let_stream_wait(operation: _native.Operation, stream: Any, device: str) -> None:
    """Implements ``future.on(stream)``."""
    ordinal, handle = stream_handle(stream, device)
    try:
        _native.let_stream_wait(operation, ordinal, handle)
    except _native.CudaError as error:
        raise ConfigurationError(f"cuda:{ordinal}: {error}") from error


class MappedPages:
    """Pages of host memory that kernels of a GPU may read and write, until :meth:`close`.

    Args:
        address, nbytes: a range; the pages around it are registered with the current CUDA context.

    Raises:
        ConfigurationError: no CUDA driver, no current context, or memory that it does not take.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self._library = _driver()
        page = os.sysconf("SC_PAGE_SIZE")
        self._page = address // page * page
        length = -(-(address + nbytes - self._page) // page) * page
        status = self._library.cuMemHostRegister_v2(
            ctypes.c_void_p(self._page), ctypes.c_size_t(length), _HOST_REGISTER_DEVICEMAP
        )
        self._registered = status == 0
        if status not in (0, _ALREADY_REGISTERED):
            raise ConfigurationError(f"registering host memory: {self._name(status)}")
        device = ctypes.c_uint64(0)
        status = self._library.cuMemHostGetDevicePointer_v2(ctypes.byref(device), ctypes.c_void_p(address), 0)
        if status != 0:
            self.close()
            raise ConfigurationError(f"the device's address of host memory: {self._name(status)}")
        self._device = device
        _native.expect_gpu_words()

    @property
    def device_address(self) -> int:
        """What kernels call the address."""
        return self._device.value

    def close(self) -> None:
        """The memory may go after this. No kernel may still use it."""
        if self._registered:
            self._registered = False
            self._library.cuMemHostUnregister(ctypes.c_void_p(self._page))

    def _name(self, status: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode()} ({status})"


class StreamWord(MappedPages):
    """A 64-bit word of host memory, such as a watcher's, that CUDA streams write to in their own order.

    Args:
        address: of the word; its page is registered with the current CUDA context.

    Raises:
        ConfigurationError: no CUDA driver, no current context, or memory that it does not take.
    """

    def __init__(self, address: int) -> None:
        super().__init__(address, 8)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """The word as an array of one int64 on the device, for kernels: ``torch.as_tensor(word, device="cuda")``. A
        captured graph needs a kernel that increments it; :meth:`write` would write the same value at each replay."""
        return {"shape": (1,), "typestr": "<i8", "data": (self._device.value, False), "version": 3, "strides": None}

    def write(self, value: int, stream: int) -> None:
        """Enqueues the write behind everything that is on the stream (a ``CUstream`` handle). Does not wait.

        Raises:
            ConfigurationError: what the driver says.
        """
        status = self._library.cuStreamWriteValue64_v2(ctypes.c_void_p(stream), self._device, ctypes.c_uint64(value), 0)
        if status != 0:
            raise ConfigurationError(f"writing a word from a stream: {self._name(status)}")
