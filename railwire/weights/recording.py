"""What a receiver wants, found by running its own weight loader on tensors that hold nothing.

A loader takes tensors of the checkpoint apart and copies the parts into live parameters: it fuses q, k and v, puts an
expert where it belongs, takes its tensor-parallel share. Here it gets tensors of device "meta", whose offset and
strides tell at each copy which elements of the checkpoint's tensor are meant. No model needs rules of its own.
Imports torch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from railwire.weights.errors import RecordingError
from railwire.weights.memory import Storages, dtype_name
from railwire.weights.tables import Held, RankTable, contiguous

Shapes = Mapping[str, tuple[Sequence[int], torch.dtype]]
Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], object]


@dataclass
class Destination:
    """A receiver's table, and the live tensors behind it.

    Attributes:
        parameters: by their live names.
        unwritten: live parameters of which the checkpoint fills only a part, or nothing (padding, buffers).
    """

    table: RankTable
    storages: Storages
    parameters: dict[str, torch.Tensor]
    unwritten: tuple[str, ...]


def record(
    rank: str,
    load_weights: Loader,
    checkpoint: Shapes,
    live: Mapping[str, torch.Tensor],
    *,
    allow_unwritten: Sequence[str] = (),
) -> Destination:
    """Runs ``load_weights`` on recording tensors.

    Args:
        load_weights: the engine's own; it is called once with all names.
        checkpoint: name -> (whole shape, dtype), as the trainers have them.
        live: the parameters that the loader fills, by name.
        allow_unwritten: live names that the checkpoint may leave unwritten, or fill only partly.

    Raises:
        RecordingError: names each tensor whose loader computes instead of copying, or fills memory of no live
            parameter, and each live parameter that is not filled.
    """
    recorder = _Recorder(live)
    tensors = []
    for name, (shape, dtype) in checkpoint.items():
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        recorder.add(name, tensor)
        tensors.append((name, tensor))
    with recorder, torch.no_grad():
        try:
            load_weights(iter(tensors))
        except RecordingError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise RecordingError(
                f"receiver {rank}: the loader did something to {recorder.last or 'a tensor'} that is no copy of a part "
                f"of it: {str(error).splitlines()[0]}"
            ) from error
    return recorder.finish(rank, allow_unwritten)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every copy that the loader makes."""

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = dict(live)
        self._names: dict[int, str] = {}
        self._whole: dict[str, torch.Tensor] = {}
        self._storages = Storages()
        self._held: list[Held] = []
        self._problems: list[str] = []
        self._parameter_of: dict[int, list[tuple[int, int, str]]] = {}
        self._filled: dict[str, int] = {}
        self.last = ""
        for name, tensor in self._live.items():
            storage = tensor.untyped_storage().data_ptr()
            begin = tensor.data_ptr()
            span = tensor.element_size() + sum(
                (n - 1) * s * tensor.element_size() for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n
            )
            self._parameter_of.setdefault(storage, []).append((begin, begin + span, name))
        for parameters in self._parameter_of.values():
            parameters.sort()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._whole[name] = tensor
        self._names[tensor.untyped_storage()._cdata] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in args:
            if isinstance(argument, torch.Tensor) and (name := self._name(argument)):
                self.last = name
        if func is torch.ops.aten.copy_.default:
            into, tensor = args[0], args[1]
            if tensor.device.type == "meta":
                self._copied(into, tensor)
                return into
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default) and self._name(args[0]):
            # A copy of a part is that part, for whatever reason the loader made it; the dtype is the parameter's own.
            return args[0]
        return func(*args, **(kwargs or {}))

    def _name(self, tensor: torch.Tensor) -> str | None:
        return self._names.get(tensor.untyped_storage()._cdata) if tensor.device.type == "meta" else None

    def _copied(self, into: torch.Tensor, tensor: torch.Tensor) -> None:
        name = self._name(tensor)
        if name is None:
            self._problems.append(f"after {self.last}: a tensor that was computed is copied into a parameter")
            return
        begin = into.data_ptr()
        owner = self._owner(into.untyped_storage().data_ptr(), begin)
        if owner is None:
            self._problems.append(f"{name}: is copied into memory of no live parameter")
            return
        tensor = tensor.expand(into.shape) if tensor.shape != into.shape else tensor
        box = _box(self._whole[name], tensor, into)
        if box is None:
            self._problems.append(
                f"{name}: the part {tuple(tensor.shape)} (strides {tuple(tensor.stride())}) that goes into {owner} is "
                "no box of it"
            )
            return
        lo, size, strides = box
        if not into.numel():
            return
        place = self._storages.place(into)
        shape = tuple(self._whole[name].shape)
        self._filled[owner] = self._filled.get(owner, 0) + into.numel()
        self._held.append(
            Held(name, shape, dtype_name(into.dtype), lo, size, place.region, place.offset, strides, 0, owner)
        )

    def _owner(self, storage: int, address: int) -> str | None:
        """The live parameter at an address; the last one to begin there or before."""
        parameters = self._parameter_of.get(storage, [])
        index = bisect.bisect_right(parameters, address, key=lambda one: one[0]) - 1
        while index >= 0:
            begin, end, name = parameters[index]
            if begin <= address < end:
                return name
            if index and parameters[index - 1][0] != begin and end <= address:
                # An earlier one may reach over this one (a fused tensor with views of it); most do not.
                return next((n for a, b, n in parameters[:index] if a <= address < b), None)
            index -= 1
        return None

    def finish(self, rank: str, allow_unwritten: Sequence[str]) -> Destination:
        recorded = {held.name for held in self._held}
        problems = list(self._problems)
        unwritten = tuple(n for n, t in self._live.items() if self._filled.get(n, 0) < t.numel())
        for name in unwritten:
            if name not in allow_unwritten and not self._shares_memory(name):
                problems.append(f"{name}: the checkpoint fills {self._filled.get(name, 0)} of its elements only")
        if problems:
            raise RecordingError([f"receiver {rank}: {problem}" for problem in problems])
        names = {name: (tuple(t.shape), dtype_name(t.dtype)) for name, t in self._whole.items() if name in recorded}
        table = RankTable(rank, tuple(self._held), self._storages.sizes, {}, names)
        table.check()
        return Destination(table, self._storages, self._live, unwritten)

    def _shares_memory(self, name: str) -> bool:
        """Tied: another live name with the same memory has been filled."""
        tensor = self._live[name]
        return any(
            other != name and t.data_ptr() == tensor.data_ptr() and self._filled.get(other, 0) >= t.numel()
            for other, t in self._live.items()
        )


def _box(
    whole: torch.Tensor, view: torch.Tensor, into: torch.Tensor
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """(lo, size, byte strides of ``into``) by dimension of ``whole``, of a view of it that is copied to ``into``."""
    dims = whole.ndim
    steps = contiguous(whole.shape, 1)
    at, lo = view.storage_offset(), []
    for step in steps:
        lo.append(at // step if step else 0)
        at -= lo[-1] * step
    size, strides = [1] * dims, [0] * dims
    # Dimensions of the view from the outermost: each is one of the whole's, or a piece of one that was split.
    parts = sorted(
        ((s, n, d) for n, s, d in zip(view.shape, view.stride(), into.stride(), strict=True) if n > 1), reverse=True
    )
    for stride, extent, there in _join([[s, n, d] for s, n, d in parts], steps):
        if stride not in steps:
            return None
        dim = next((d for d in range(dims) if steps[d] == stride and whole.shape[d] > 1), -1)
        if dim < 0 or size[dim] != 1 or lo[dim] + extent > whole.shape[dim]:
            return None
        size[dim], strides[dim] = extent, there * into.element_size()
    if math.prod(size) != view.numel():
        return None
    return tuple(lo), tuple(size), tuple(strides)


def _join(parts: list[list[int]], steps: Sequence[int]) -> list[list[int]]:
    """Joins a dimension that a view has split, where the memory on both sides goes on across the split."""
    joined: list[list[int]] = []
    for stride, extent, there in reversed(parts):
        last = joined[-1] if joined else None
        goes_on = last is not None and stride == last[0] * last[1] and there == last[2] * last[1]
        if last is not None and goes_on and stride not in steps:
            last[1] *= extent
        else:
            joined.append([stride, extent, there])
    return joined
