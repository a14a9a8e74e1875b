"""Tensors in memory: one region per storage, and where in its region a tensor lies. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """Where a tensor lies: region number, byte offset, byte strides."""

    region: int
    offset: int
    strides: tuple[int, ...]


class Storages:
    """Numbers the storages of tensors as they are met: a storage is one region, however many tensors lie in it."""

    def __init__(self) -> None:
        self._number: dict[int, int] = {}
        self.buffers: list[torch.Tensor] = []
        """By region: the whole storage as bytes, to be registered."""

    def place(self, tensor: torch.Tensor) -> Place:
        """Raises ValueError for a tensor without memory."""
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        if base == 0 or storage.nbytes() == 0:
            raise ValueError("the tensor has no memory of its own")
        number = self._number.get(base)
        if number is None:
            number = self._number[base] = len(self.buffers)
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self.buffers.append(whole)
        size = tensor.element_size()
        return Place(number, int(tensor.storage_offset()) * size, tuple(int(s) * size for s in tensor.stride()))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(buffer.numel()) for buffer in self.buffers)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
