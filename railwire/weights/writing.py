"""A trainer rank's work in an update: convert what has to be converted, write everything, wait until it has landed.

Direct batches are submitted first: they need nothing of us. Then unit after unit is gathered, converted into the ring
and written, while earlier writes fly. Every rank goes through the units of a mesh in the same order, so gathers meet.
Imports torch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from railwire.errors import RailwireError, TransferError
from railwire.memory import MemoryRegion, Pages, RemoteRegion
from railwire.weights.checksum import pages_sum
from railwire.weights.errors import PlanError
from railwire.weights.matching import Unit, scale_shape
from railwire.weights.plan import Batch, Plan
from railwire.weights.quantize import quantize_into
from railwire.weights.source import Source
from railwire.weights.staging import Ring, Slot

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.transfer import Transfer


class Span(NamedTuple):
    """A piece of the timeline: ``stage`` is gather, convert, submit or wait; seconds of ``time.time()``."""

    stage: str
    name: str
    begin: float
    end: float


class Target(NamedTuple):
    """A receiver as a writer needs it."""

    name: str
    regions: Sequence[RemoteRegion]


class Bound(NamedTuple):
    """A batch with everything that the engine wants but the immediate and the place in the ring."""

    target: int
    region: int
    src: npt.NDArray[np.int64]
    src_stride: int
    src_begin: int
    dst: Pages
    page_bytes: int
    runs: tuple[int, int]
    remote: RemoteRegion
    dst_region: int


class Work(NamedTuple):
    """All of a rank's work for one cohort."""

    plan: Plan
    targets: Sequence[Target]
    direct: Sequence[Bound]
    units: Sequence[tuple[Unit, Sequence[Bound]]]


class Outcome(NamedTuple):
    """``failed``: receivers that did not get everything, and why; ``unquiet``: of these, where something may still
    land. ``nbytes``: by receiver."""

    failed: dict[str, str]
    unquiet: tuple[str, ...]
    nbytes: dict[str, int]
    spans: list[Span]
    checksums: Mapping[str, int] = MappingProxyType({})


class Stopped(Exception):
    """The lead has stopped the update."""


class Writer:
    """One trainer rank.

    Args:
        source: its tensors.
        staging_bytes: the watermark: converted and gathered tensors together never take more.
        regions: of the source's storages, where they are registered already.
    """

    def __init__(
        self,
        engine: TransferEngine,
        source: Source,
        staging_bytes: int,
        *,
        checksum: bool = False,
        regions: Sequence[MemoryRegion] | None = None,
    ) -> None:
        self._checksum = checksum
        self._engine = engine
        self._source = source
        self._regions = list(regions) if regions else [engine.register(buffer) for buffer in source.storages.buffers]
        self._addresses = {name: local.data_ptr() for name, local in source.locals.items()}
        self._staging_bytes = staging_bytes
        self._ring = Ring(staging_bytes)
        self._buffer: torch.Tensor | None = None
        self._buffer_region: MemoryRegion | None = None

    @property
    def high_water(self) -> int:
        """The most bytes that were converted or gathered at a time."""
        return self._ring.high

    def bind(self, plan: Plan, number: int, targets: Sequence[Target]) -> Work:
        """Prepares this rank's part of a plan: what is the same at every step is done here.

        Raises:
            PlanError: a unit does not fit into the staging buffer.
        """
        batches = plan.batches_of(number)
        by_unit: dict[int, list[Bound]] = {}
        for batch in batches:
            by_unit.setdefault(batch.unit, []).append(self._bind(plan, batch, targets))
        units = []
        shape_of = {name: shape for name, (shape, _) in self._source.table.names.items()}
        for index, unit in plan.units_of(number).items():
            if unit.peak > self._staging_bytes:
                raise PlanError(
                    f"{unit.name}: takes {unit.peak} bytes to convert; staging_bytes is {self._staging_bytes}"
                )
            parameter = self._source.parameters[unit.name]
            if (
                unit.kind == "fp8-gather"
                and not hasattr(parameter, "full_tensor")
                and parameter.shape != shape_of[unit.name]
            ):
                raise PlanError(
                    f"{unit.name}: its shards cut fp8 blocks, and it is no DTensor that could be gathered: cut it at "
                    "multiples of 128"
                )
            units.append((unit, tuple(by_unit.get(index, ()))))
        if units and self._buffer is None:
            device = next(iter(self._source.locals.values())).device
            self._buffer = torch.empty(self._staging_bytes, dtype=torch.uint8, device=device)
            self._buffer_region = self._engine.register(self._buffer)
        return Work(plan, targets, tuple(by_unit.get(-1, ())), tuple(units))

    def _bind(self, plan: Plan, batch: Batch, targets: Sequence[Target]) -> Bound:
        rows = slice(batch.first, batch.first + batch.count)
        src, src_stride, src_begin = _indices(plan.src_offsets[rows])
        dst, dst_stride, dst_begin = _indices(plan.dst_offsets[rows])
        return Bound(
            batch.dst_rank,
            batch.src_region,
            src,
            src_stride,
            src_begin,
            Pages(dst, dst_stride, dst_begin, (batch.runs, batch.dst_stride)),
            batch.run_bytes * batch.runs,
            (batch.runs, batch.src_stride),
            targets[batch.dst_rank].regions[batch.dst_region],
            batch.dst_region,
        )

    def run(
        self,
        works: Sequence[Work],
        imms: Mapping[str, int],
        *,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], object] | None = None,
    ) -> Outcome:
        """Writes everything to the receivers in ``imms``; returns when nothing is under way any more.

        Args:
            imms: immediate by receiver.
            stopped: asked between units; True cancels what is under way.
            progress: is called with bytes submitted and bytes in all.
        """
        return _Run(self, works, imms, stopped, progress).run()


@dataclass
class _Flight:
    """Writes that are under way, and the slot that they read."""

    slot: Slot | None = None
    transfers: list[tuple[str, Transfer]] = field(default_factory=list)


class _Run:
    """One update. A unit's slot is given back when its writes have ended."""

    def __init__(
        self, writer: Writer, works: Sequence[Work], imms: Mapping[str, int], stopped: Callable[[], bool],
        progress: Callable[[int, int], object] | None,
    ) -> None:  # fmt: skip
        self._writer = writer
        self._works = works
        self._imms = imms
        self._stopped = stopped
        self._progress = progress
        self._failed: dict[str, str] = {}
        self._unquiet: set[str] = set()
        self._nbytes: dict[str, int] = dict.fromkeys(imms, 0)
        self._spans: list[Span] = []
        self._sums: dict[str, int] = {}
        self._flying: deque[_Flight] = deque()
        self._submitted = 0
        self._total = sum(
            batch.page_bytes * len(batch.dst)
            for work in works
            for batches in (work.direct, *(batches for _, batches in work.units))
            for batch in batches
            if work.targets[batch.target].name in imms
        )

    def run(self) -> Outcome:
        try:
            self._check_addresses()
            for work in self._works:
                begin = time.time()
                flight = _Flight()
                self._flying.append(flight)
                self._submit(flight, work, work.direct, 0)
                self._span("submit", "direct", begin)
            for work in self._works:
                for unit, batches in work.units:
                    self._unit(work, unit, batches)
        except Stopped:
            self._failed.setdefault("", "stopped")
            self._cancel()
        except BaseException as error:
            # A gather that failed, memory that ran out: the others must know, and nothing may go on being written.
            self._failed[""] = f"{type(error).__name__}: {error}"
            self._cancel()
            if not isinstance(error, Exception):
                self._drain()
                raise
        begin = time.time()
        self._drain()
        self._span("wait", "all", begin)
        return Outcome(self._failed, tuple(sorted(self._unquiet)), self._nbytes, self._spans, self._sums)

    def _check_addresses(self) -> None:
        source = self._writer._source
        for name, local in source.locals.items():
            parameter = source.parameters[name]
            now = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if local.numel() and now.data_ptr() != self._writer._addresses[name]:
                raise PlanError(f"{name}: the parameter has moved in memory since the plan was made")

    def _unit(self, work: Work, unit: Unit, batches: Sequence[Bound]) -> None:
        flight = self._take(unit)
        assert flight.slot is not None
        gathered = unit.peak - unit.nbytes
        parameter = self._writer._source.parameters[unit.name]
        begin = time.time()
        with torch.no_grad():
            if gathered:
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
                self._span("gather", unit.name, begin)
                part = whole[tuple(slice(a, a + n) for a, n in zip(unit.lo, unit.size, strict=True))]
            else:
                part = _local_box(self._writer._source, unit)
            begin = time.time()
            self._convert(unit, part, flight.slot)
            self._span("convert", unit.name, begin)
            if gathered:
                del whole, part
                flight.slot = self._writer._ring.release_elsewhere(flight.slot)
        begin = time.time()
        self._submit(flight, work, batches, flight.slot.offset)
        self._span("submit", unit.name, begin)

    def _convert(self, unit: Unit, part: torch.Tensor, slot: Slot) -> None:
        if not part.numel():
            return
        assert self._writer._buffer is not None
        buffer = self._writer._buffer[slot.offset : slot.offset + unit.nbytes]
        dtype = getattr(torch, unit.dtype)
        weights = part.numel() * dtype.itemsize
        out = buffer[:weights].view(dtype).view(unit.size)
        if unit.kind == "cast":
            out.copy_(part)
        else:
            scales = buffer[unit.scale_offset :].view(torch.float32).view(scale_shape(unit.size))
            quantize_into(part, out, scales)

    def _take(self, unit: Unit) -> _Flight:
        """A slot in the ring; waits for earlier writes while there is none."""
        begin = time.time()
        while (slot := self._writer._ring.take(unit.nbytes, unit.peak - unit.nbytes)) is None:
            self._wait_oldest()
        flight = _Flight(slot)
        self._flying.append(flight)
        if self._stopped():
            raise Stopped
        self._span("wait", unit.name, begin)
        return flight

    def _submit(self, flight: _Flight, work: Work, batches: Sequence[Bound], base: int) -> None:
        writer, imms, failed = self._writer, self._imms, self._failed
        for batch in batches:
            name = work.targets[batch.target].name
            imm = imms.get(name)
            if imm is None or name in failed:
                continue
            region = writer._regions[batch.region] if batch.region >= 0 else writer._buffer_region
            assert region is not None
            try:
                src = Pages(batch.src, batch.src_stride, base + batch.src_begin, batch.runs)
                transfer = writer._engine.write_pages(region, src, batch.remote, batch.dst, batch.page_bytes, imm)
            except RailwireError as error:
                failed[name] = str(error)
                continue
            if writer._checksum:
                self._add_sum(name, batch, base)
            nbytes = batch.page_bytes * len(batch.dst)
            self._nbytes[name] += nbytes
            self._submitted += nbytes
            flight.transfers.append((name, transfer))
        if self._progress is not None:
            self._progress(self._submitted, self._total)

    def _add_sum(self, name: str, batch: Bound, base: int) -> None:
        buffers, staged = self._writer._source.storages.buffers, self._writer._buffer
        memory = buffers[batch.region] if batch.region >= 0 else staged
        assert memory is not None
        offsets = batch.src.astype(np.int64) * batch.src_stride + base + batch.src_begin
        places = batch.dst.indices.astype(np.int64) * batch.dst.stride + batch.dst.offset
        runs, stride = batch.runs
        run_bytes = batch.page_bytes // runs
        total = pages_sum(memory.cpu().numpy(), offsets, runs, run_bytes, stride, batch.dst_region, places)
        self._sums[name] = (self._sums.get(name, 0) + total) % (1 << 64)

    def _wait_oldest(self) -> None:
        flight = self._flying[0]
        for name, transfer in flight.transfers:
            while not transfer.done():
                if self._stopped():
                    self._cancel()
                try:
                    transfer.wait(0.2)
                except TimeoutError:
                    continue
                except TransferError:
                    break
            error = transfer.exception()
            if error is not None:
                self._failed.setdefault(name, str(error))
                if isinstance(error, TransferError) and error.may_still_land:
                    self._unquiet.add(name)
        self._flying.popleft()
        if flight.slot is not None:
            self._writer._ring.give_back(flight.slot)

    def _drain(self) -> None:
        while self._flying:
            self._wait_oldest()

    def _cancel(self) -> None:
        for flight in self._flying:
            for _, transfer in flight.transfers:
                transfer.cancel()

    def _span(self, stage: str, name: str, begin: float) -> None:
        end = time.time()
        if end - begin > 2e-4:
            self._spans.append(Span(stage, name, begin, end))


def _local_box(source: Source, unit: Unit) -> torch.Tensor:
    """The part of a local tensor that a unit converts."""
    held = source.held.get((unit.name, unit.lo))
    if held is None or held.size != unit.size:
        raise PlanError(f"{unit.name}: this rank does not hold the part that the plan says it does")
    local = source.locals[unit.name]
    size = local.element_size()
    strides = [stride // size for stride in held.strides]
    return torch.as_strided(local, held.size, strides, held.offset // size)


def _indices(offsets: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int, int]:
    """Offsets as (indices, stride, begin): as small indices as there are."""
    begin = int(offsets.min())
    stride = int(np.gcd.reduce(offsets - begin)) or 1
    return np.ascontiguousarray((offsets - begin) // stride), stride, begin
