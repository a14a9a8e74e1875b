"""The memory in which versions land: which bytes a checkpoint fills, whether a plan fills them, whether they are still
what was published. Imports torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from railwire.weights.checksum import pages_sum
from railwire.weights.errors import PlanError
from railwire.weights.plan import Plan
from railwire.weights.recording import Destination
from railwire.weights.tables import ITEMSIZE

if TYPE_CHECKING:
    from railwire.engine import TransferEngine

Extents = list[list[tuple[int, int]]]
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VALUES = 4096  # elements of a tensor that are looked at
_WINDOW = 64  # bytes that are looked at in one place
_WINDOWS = 256  # places in each extent


class Landing:
    """Made once for a checkpoint. Not thread-safe.

    Args:
        destination: what is wanted, and where it lies.
        now: gives the engine's tensors as they are now; None: they are those of ``destination``.
        in_place: writes land in the weights that are served; else in a copy.
        given: others may be given from here: a sample is kept of what was published.
        watched: nobody may change the tensors' values between two updates: a sample of each is kept.

    Attributes:
        buffers: by region, where writes land.
    """

    def __init__(
        self,
        engine: TransferEngine,
        destination: Destination,
        now: Callable[[], Mapping[str, torch.Tensor]] | None = None,
        *,
        in_place: bool,
        given: bool = False,
        watched: bool = False,
    ) -> None:
        self.destination = destination
        self._in_place, self._given, self._watched = in_place, given, watched
        self._now = now
        self._layouts = {name: _layout(tensor) for name, tensor in destination.parameters.items()}
        self._live = destination.storages.buffers
        self.buffers = self._live if in_place else [torch.zeros_like(buffer) for buffer in self._live]
        self.regions = [engine.register(buffer) for buffer in self.buffers]
        self.descriptors = tuple(bytes(region.descriptor) for region in self.regions)
        self.extents = extents(destination)
        self._whole = False  # what is served lies here, and nothing else
        self._sample = -1  # of what is served, as it has landed
        self._values: dict[str, int] = {}  # by tensor, of what is served, as on_publish has left it

    def check_live(self) -> None:
        """Raises PlanError, naming each tensor that no longer lies where it was described, or whose values are not
        those of the version that is served."""
        now = self.destination.parameters if self._now is None else self._now()
        problems = []
        for name, layout in self._layouts.items():
            if name not in now:
                problems.append(f"{name}: is gone since the plan was made")
            elif _layout(now[name]) != layout:
                problems.append(f"{name}: has been replaced, moved or packed since the plan was made")
            elif name in self._values and values(now[name]) != self._values[name]:
                problems.append(
                    f"{name}: its values have changed since they were published: shuffled, scaled? What an engine does "
                    "to weights after loading, on_publish is to do after each update"
                )
        if problems:
            raise PlanError(problems)

    def checksum(self, part: Plan) -> int:
        """Of everything that a plan writes here."""
        total = 0
        memories = [buffer.cpu().numpy() for buffer in self.buffers]
        for row in part.batches.tolist():
            region, run_bytes, runs, stride, first, count = row[4], row[5], row[6], row[8], row[9], row[10]
            places = part.dst_offsets[first : first + count]
            total += pages_sum(memories[region], places, runs, run_bytes, stride, region, places)
        return total % (1 << 64)

    def open(self) -> None:
        """Writes may land from now on."""
        self._whole = False
        if self._in_place:
            self._values = {}  # until it is published

    def publish(self) -> None:
        """What has landed is whole: makes it what is served."""
        if not self._in_place:
            self._copy(self.buffers, self._live)
        self._whole = True
        if self._given:
            self._sample = sample(self.buffers, self.extents)

    def watch(self) -> None:
        """What is served is as it will be until the next update."""
        if self._watched:
            now = self.destination.parameters if self._now is None else self._now()
            filled = {held.parameter for held in self.destination.table.held}
            self._values = {name: values(now[name]) for name in filled if name in now}

    def holds_published(self) -> bool:
        """Whether what was published last lies here, so that it can be given on. A copy that a failed update has
        spoilt is made again from the weights that are served, unless those look different by now."""
        if self._whole and not self._in_place:
            return True
        if sample(self._live, self.extents) != self._sample:
            return False
        if not self._whole:
            if self._in_place:
                return False
            self._copy(self._live, self.buffers)
            self._whole = True
        return True

    def _copy(self, src: Sequence[torch.Tensor], dst: Sequence[torch.Tensor]) -> None:
        for source, target, pieces in zip(src, dst, self.extents, strict=True):
            for begin, end in pieces:
                target[begin:end].copy_(source[begin:end])


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def extents(destination: Destination) -> Extents:
    """By region, the bytes that the checkpoint fills, as few intervals as there are."""
    found: Extents = [[] for _ in destination.storages.buffers]
    for held in destination.table.held:
        runs = [(held.offset, ITEMSIZE[held.dtype])]
        for extent, stride in sorted(zip(held.size, held.strides, strict=True), key=lambda pair: pair[1]):
            if extent == 1:
                continue
            if len(runs) == 1 and stride == runs[0][1]:
                runs = [(runs[0][0], stride * extent)]
            else:
                runs = [(begin + i * stride, length) for i in range(extent) for begin, length in runs]
        found[held.region] += [(begin, begin + length) for begin, length in runs]
    merged = []
    for intervals in found:
        kept: list[tuple[int, int]] = []
        for begin, end in sorted(set(intervals)):
            if kept and begin <= kept[-1][1]:
                kept[-1] = (kept[-1][0], max(end, kept[-1][1]))
            else:
                kept.append((begin, end))
        merged.append(kept)
    return merged


def check_part(part: Plan, number: int, wanted: Extents) -> None:
    """Raises PlanError unless the pages fill exactly the wanted bytes of this receiver, each once."""
    got: Extents = [[] for _ in wanted]
    for row in part.batches.tolist():
        _, rank, _, _, region, run_bytes, runs, _, stride, first, count = row
        if rank != number or not 0 <= region < len(wanted):
            raise PlanError("the plan's part is another receiver's")
        begin = part.dst_offsets[first : first + count, None] + np.arange(runs) * stride
        got[region] += [(b, b + run_bytes) for b in begin.reshape(-1).tolist()]
    for region, intervals in enumerate(got):
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(intervals):
            if merged and begin < merged[-1][1]:
                raise PlanError(f"the plan writes bytes {begin}.. of region {region} twice")
            if merged and begin == merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        if merged != wanted[region]:
            raise PlanError(f"the plan does not fill region {region} as it is wanted")


def sample(buffers: Sequence[torch.Tensor], wanted: Extents) -> int:
    """A number that depends on bytes all over the extents: all of small ones, 256 windows of 64 bytes of the others. It
    finds weights that were shuffled, scaled or replaced, at the price of reading 16 KiB of each; not one changed value.
    """
    crc = 0
    for buffer, intervals in zip(buffers, wanted, strict=True):
        for begin, end in intervals:
            piece = buffer[begin:end]
            if len(piece) > _WINDOW * _WINDOWS:
                at = torch.linspace(0, len(piece) - _WINDOW, _WINDOWS, dtype=torch.float64, device=piece.device).long()
                piece = piece[at.unsqueeze(1) + torch.arange(_WINDOW, device=piece.device)].flatten()
            crc = zlib.crc32(piece.cpu().numpy().data, crc)
    return crc


def values(tensor: torch.Tensor) -> int:
    """A number that depends on 4096 elements, evenly spread (on all, of smaller tensors), and on their order."""
    bits = tensor.detach().view(_SAME_SIZE[tensor.element_size()])
    if not bits.numel():
        return 0
    last = bits.numel() - 1
    at = torch.linspace(0, last, min(bits.numel(), _VALUES), dtype=torch.float64, device=bits.device).long()
    chosen = bits[torch.unravel_index(at, bits.shape)] if bits.ndim else bits
    return zlib.crc32(chosen.reshape(-1).contiguous().cpu().numpy().tobytes())


def decode_checkpoint(data: bytes) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes, as the lead announces them. Raises PlanError for anything else."""
    try:
        names = msgspec.msgpack.decode(data, type=dict[str, tuple[tuple[int, ...], str]])
        return {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in names.items()}
    except (msgspec.DecodeError, msgspec.ValidationError, AttributeError) as error:
        raise PlanError(f"not a checkpoint's description: {error}") from error
