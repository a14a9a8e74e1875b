"""The memory of an engine: registered one by one, many at once, or made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from railwire import _native, cuda, memory, topology
from railwire.allocation import SharedBuffer, allocate_huge
from railwire.engine_core import EngineCore
from railwire.errors import ConfigurationError
from railwire.memory import MemoryRegion
from railwire.regions import Regions


class Registration(EngineCore):
    """The part of ``TransferEngine`` that registers memory."""

    def register(self, buffer: Any, *, readable_only: bool = False) -> MemoryRegion:
        """Registers memory with all NICs and keeps its owner alive.

        Args:
            buffer: numpy array, torch tensor (CPU or CUDA), anything with the buffer protocol or DLPack, or
                ``(address, nbytes)``. Contiguous, not empty, and writable unless ``readable_only``.
            readable_only: a source: we may write from it, and peers may read it; a write of a peer to it is a
                ``ValueError`` at its call, and refused by our NICs if it is made nevertheless. For mapped checkpoints
                and other read-only memory.

        Raises:
            TypeError, ValueError: not such a buffer; also host memory that is not mapped, cannot be written though it
                should be, or lies beyond the end of the file that is mapped there.
            ConfigurationError: a NIC refuses it (a memlock limit, or GPU memory on a NIC that cannot reach it).
        """
        self._check_open()
        try:
            return memory.register(self, buffer, readable_only)
        except _native.NativeError as error:
            raise ConfigurationError(str(error)) from error

    def register_many(self, buffers: Sequence[Any], *, readable_only: bool = False) -> Regions:
        """Registers many buffers in one call: microseconds each. ``regions[i]`` is the region of ``buffers[i]``, and
        ``regions.descriptor`` describes all of them in one table of some 15 bytes a region.

        All or none is registered. Arguments and errors are those of :meth:`register`.
        """
        self._check_open()
        try:
            return Regions(self, buffers, readable_only)
        except _native.NativeError as error:
            raise ConfigurationError(str(error)) from error

    def allocate(self, nbytes: int, device: str = "cpu") -> MemoryRegion:
        """New memory, registered.

        Args:
            nbytes: its size.
            device: ``"cpu"``: page-aligned, zeroed, prefaulted. With an shm NIC it is a memfd that peers on this host
                map, which is the fastest way there; a child of fork() shares it. Otherwise it is on huge pages.
                ``region.array`` is the memory. ``"cuda:N"``: memory of that GPU that peers on
                this host can always map; what is in it is undefined. ``torch.as_tensor(region, device="cuda")`` is the
                memory.

        Raises:
            ConfigurationError: there is no such GPU, or not so much memory.
        """
        ordinal = topology.parse_device(device)
        if ordinal is None:
            if nbytes < 1:
                raise ValueError("nbytes must be positive")
            if not any(nic.kind == "shm" for nic in self.nics):
                return self.register(allocate_huge(nbytes))
            shared = SharedBuffer(nbytes)
            try:
                return self.register(shared)
            finally:
                shared.close_fd()
        return self.register(cuda.GpuMemory(nbytes, ordinal))
