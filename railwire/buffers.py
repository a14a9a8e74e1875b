"""Where a buffer lies, whatever it is: numpy, torch, CuPy, the buffer protocol, DLPack, or a bare address."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from railwire import _native

_DLPACK_CUDA = 2  # kDLCUDA


def _on_gpu(buffer: Any) -> bool:
    return hasattr(buffer, "__dlpack_device__") and buffer.__dlpack_device__()[0] == _DLPACK_CUDA


class Buffer:
    """Where a buffer lies: address, length, device. Understands everything that ``register()`` takes."""

    def __init__(self, buffer: Any, readable_only: bool = False) -> None:
        self.owner: object = buffer
        self.readable_only = readable_only
        self.device = -1
        self.array: npt.NDArray[np.uint8] | None = None
        if isinstance(buffer, tuple):
            if len(buffer) != 2 or not all(isinstance(value, int) and value >= 0 for value in buffer):
                raise TypeError("raw memory is given as (address, nbytes)")
            self.address, self.nbytes = buffer
            self.device = _native.gpu_of(self.address)
        elif hasattr(buffer, "data_ptr") and hasattr(buffer, "untyped_storage"):
            self._take_tensor(buffer)
        elif hasattr(buffer, "__cuda_array_interface__"):
            self._take_cuda_array(buffer.__cuda_array_interface__)
        elif _on_gpu(buffer):
            import torch  # whoever has a GPU array without the CUDA array interface has torch or can have it

            self._take_tensor(torch.utils.dlpack.from_dlpack(buffer))
        else:
            self._take_array(buffer)

    def _take_tensor(self, tensor: Any) -> None:
        if not tensor.is_contiguous():
            raise ValueError("the tensor is not contiguous: register its storage, or tensor.contiguous()")
        self.address = int(tensor.data_ptr())
        self.nbytes = int(tensor.numel() * tensor.element_size())
        if tensor.device.type == "cuda":
            self.device = int(tensor.device.index or 0)
        elif tensor.device.type != "cpu":
            raise ValueError(f"memory of device {tensor.device} cannot be registered")
        elif self.nbytes:
            import torch  # numpy has no bfloat16: the bytes are what counts

            self.array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
            if self.readable_only:  # torch does not know of memory that cannot be written; numpy does
                self.array.flags.writeable = False

    def _take_cuda_array(self, interface: dict[str, Any]) -> None:
        shape, item = interface["shape"], np.dtype(interface["typestr"]).itemsize
        strides = interface.get("strides")
        if strides is not None:
            expected = item
            for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
                if extent > 1 and stride != expected:
                    raise ValueError("the array is not C-contiguous: register its base, or a contiguous copy")
                expected *= extent
        self.address, read_only = interface["data"]
        self.nbytes = math.prod(shape) * item
        if read_only and not self.readable_only:
            raise ValueError("the buffer is read-only: with readable_only=True it can be registered as a source")
        self.device = _native.gpu_of(self.address)
        if self.nbytes and self.device < 0:
            raise ValueError(f"0x{self.address:x} is no GPU's memory, though the array says so")

    def _take_array(self, buffer: Any) -> None:
        if isinstance(buffer, np.ndarray):
            array = buffer
        else:
            try:
                array = np.frombuffer(memoryview(buffer).cast("B"), dtype=np.uint8)
            except TypeError:
                if not hasattr(buffer, "__dlpack__"):
                    raise TypeError(
                        f"cannot register a {type(buffer).__name__}: give a numpy array, a torch tensor, anything with "
                        "the buffer protocol or DLPack, or (address, nbytes)"
                    ) from None
                array = np.from_dlpack(buffer)
        if not array.flags.c_contiguous:
            raise ValueError("the array is not C-contiguous: register its base, or np.ascontiguousarray()")
        if not array.flags.writeable and not self.readable_only:
            raise ValueError("the buffer is read-only: with readable_only=True it can be registered as a source")
        self.array = array.reshape(-1).view(np.uint8)
        if self.readable_only:
            self.array.flags.writeable = False
        self.address = int(array.ctypes.data)
        self.nbytes = int(array.nbytes)
