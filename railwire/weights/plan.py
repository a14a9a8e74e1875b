"""The static routing plan: which rank writes which bytes where, computed once, replayed at every step."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from railwire.weights import cover, cutting
from railwire.weights.errors import PlanError
from railwire.weights.matching import Unit, Variant, match
from railwire.weights.tables import Ints, RankTable

VERSION = 2
_MAGIC = b"RWPLAN"
_MAX_BYTES = 4 << 30  # of a plan that is read
_MIN_RUN = 32  # bytes; shorter runs by the million are a transposed weight
_MAX_SHORT_RUNS = 1 << 22


class Batch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Pages of one shape from one region (or staged unit) to one region: one ``engine.write_pages``.

    Attributes:
        unit: -1, or the staged unit; then ``src_region`` is -1 and offsets count from the unit's buffer.
        first, count: pages ``[first, first + count)`` of the rank's page columns.
        runs: of each page, on both sides, ``src_stride`` and ``dst_stride`` bytes apart.
    """

    src_rank: int
    dst_rank: int
    unit: int
    src_region: int
    dst_region: int
    run_bytes: int
    runs: int
    src_stride: int
    dst_stride: int
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.run_bytes * self.runs * self.count


class _Header(msgspec.Struct, array_like=True):
    version: int
    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    variants: tuple[Variant, ...]
    units: tuple[Unit, ...]


class _Saved(msgspec.Struct, array_like=True):
    """Arrays as little-endian int64."""

    header: bytes
    batches: bytes
    src: bytes
    dst: bytes
    digest: bytes


@dataclass(frozen=True)
class Plan:
    """All transfers of an update. Frozen; equal plans have equal hashes on every machine.

    Attributes:
        sources, destinations: names of the ranks, in the order of their numbers.
        units: what sources convert, in the order in which every rank goes through its own.
        batches: int64 [n, 11], the fields of :class:`Batch`.
        src_offsets, dst_offsets: int64, bytes, by page.
    """

    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    variants: tuple[Variant, ...]
    units: tuple[Unit, ...]
    batches: Ints
    src_offsets: Ints
    dst_offsets: Ints

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over everything in the plan."""
        digest = hashlib.sha256(self._header())
        for array in (self.batches, self.src_offsets, self.dst_offsets):
            digest.update(np.ascontiguousarray(array, dtype="<i8").data)
        return digest.digest()[:16]

    def batches_of(self, source: int) -> list[Batch]:
        """What one source rank writes, direct batches first, then by unit."""
        low, high = np.searchsorted(self.batches[:, 0], [source, source + 1])
        return [Batch(*row) for row in self.batches[low:high].tolist()]

    def units_of(self, source: int) -> dict[int, Unit]:
        """The units that one source rank makes, by number."""
        return {index: unit for index, unit in enumerate(self.units) if unit.rank == source}

    def arrivals(self) -> npt.NDArray[np.int64]:
        """[source, destination]: pages, which is arrivals at the destination's counter."""
        return self._matrix(self.batches[:, 10])

    def nbytes(self) -> npt.NDArray[np.int64]:
        """[source, destination]: bytes."""
        return self._matrix(self.batches[:, 5] * self.batches[:, 6] * self.batches[:, 10])

    def imbalance(self) -> tuple[float, float]:
        """Bytes of the most loaded rank over the mean: of sources, of destinations."""
        matrix = self.nbytes()
        sent, received = matrix.sum(axis=1), matrix.sum(axis=0)
        return float(sent.max() / max(sent.mean(), 1e-9)), float(received.max() / max(received.mean(), 1e-9))

    def only(self, source: int) -> Plan:
        """The part of one source rank: what is sent to it. Its ``digest`` is another one."""
        return self._part(self.batches[:, 0] == source, [i for i, unit in enumerate(self.units) if unit.rank == source])

    def into(self, destination: int) -> Plan:
        """The part of one destination rank, by which it can check what it is about to get."""
        part = self._part(self.batches[:, 1] == destination, [])
        part.batches[:, 2] = -1
        return part

    def _part(self, chosen: npt.NDArray[np.bool_], units: Sequence[int]) -> Plan:
        mine = self.batches[chosen]
        rows = np.repeat(mine[:, 9] - np.append(0, np.cumsum(mine[:, 10])[:-1]), mine[:, 10])
        rows += np.arange(len(rows))
        mine[:, 9] = np.cumsum(mine[:, 10]) - mine[:, 10]
        number = np.full(len(self.units) + 1, -1, dtype=np.int64)
        number[list(units)] = np.arange(len(units))
        mine[:, 2] = number[mine[:, 2]]
        return Plan(
            self.sources, self.destinations, self.variants, tuple(self.units[i] for i in units), mine,
            self.src_offsets[rows], self.dst_offsets[rows],
        )  # fmt: skip

    def _matrix(self, weights: Ints) -> npt.NDArray[np.int64]:
        shape = (len(self.sources), len(self.destinations))
        flat = np.bincount(
            self.batches[:, 0] * shape[1] + self.batches[:, 1],
            weights=weights.astype(np.float64), minlength=shape[0] * shape[1],
        )  # fmt: skip
        return flat.astype(np.int64).reshape(shape)

    def _header(self) -> bytes:
        return msgspec.msgpack.encode(_Header(VERSION, self.sources, self.destinations, self.variants, self.units))

    # ---- files -------------------------------------------------------------------------------------------------------
    def save(self, file: Path | BinaryIO) -> None:
        """Plain numbers, compressed: reading it runs nothing."""
        if isinstance(file, Path):
            file.write_bytes(self.encode())
        else:
            file.write(self.encode())

    def encode(self) -> bytes:
        """:meth:`save`, as bytes."""
        batches, src, dst = (
            np.ascontiguousarray(array, dtype="<i8").tobytes()
            for array in (self.batches, self.src_offsets, self.dst_offsets)
        )
        return _MAGIC + zlib.compress(msgspec.msgpack.encode(_Saved(self._header(), batches, src, dst, self.digest)))

    @classmethod
    def load(cls, file: Path | BinaryIO | bytes) -> Plan:
        """Raises PlanError for anything that is no plan, or has been changed since it was saved."""
        # Not numpy's own format: it reads headers with ast, and several threads in CPython 3.11's parser raise
        # SystemError (gh-106905).
        data = file if isinstance(file, bytes) else file.read_bytes() if isinstance(file, Path) else file.read()
        try:
            if not data.startswith(_MAGIC):
                raise ValueError("it begins otherwise")
            inflater = zlib.decompressobj()
            plain = inflater.decompress(data[len(_MAGIC) :], _MAX_BYTES)
            if not inflater.eof:
                raise ValueError(f"it is cut off, or has more than {_MAX_BYTES} bytes")
            saved = msgspec.msgpack.decode(plain, type=_Saved)
            header = msgspec.msgpack.decode(saved.header, type=_Header)
            columns = [np.frombuffer(c, "<i8").astype(np.int64) for c in (saved.batches, saved.src, saved.dst)]
            arrays = [columns[0].reshape(-1, len(Batch.__struct_fields__)), *columns[1:]]
        except (ValueError, zlib.error, msgspec.DecodeError, msgspec.ValidationError) as error:
            raise PlanError(f"not a saved plan: {error}") from error
        if header.version != VERSION:
            raise PlanError(f"a plan of version {header.version}; this is version {VERSION}")
        plan = cls(header.sources, header.destinations, header.variants, header.units, *arrays)
        if plan.digest != saved.digest:
            raise PlanError("the plan's digest does not fit its content: it was changed or damaged")
        return plan


def compute(
    sources: Sequence[RankTable], destinations: Sequence[RankTable], *, allow_extra: bool = False, prove: bool = True
) -> Plan:
    """Computes and proves the plan from what all ranks hold.

    Args:
        allow_extra: trainers may have tensors that no receiver wants.
        prove: check every page (:mod:`railwire.weights.cover`).

    Raises:
        PlanError: parameter by parameter, what does not fit.
    """
    if not sources or not destinations:
        raise PlanError("a plan needs at least one trainer and one receiver")
    for side, tables in (("trainers", sources), ("receivers", destinations)):
        if len({table.rank for table in tables}) != len(tables):
            raise PlanError(f"two {side} have the same name")
    matched = match(sources, destinations, allow_extra=allow_extra)
    group, pieces = cutting.intersect(matched.sources, matched.destinations)
    pieces = cutting.choose(matched.sources, group, pieces, matched.destinations, len(sources))
    pages = cutting.pages(matched.sources, matched.destinations, pieces)
    short = int(pages.runs[pages.run_bytes < _MIN_RUN].sum())
    if short > _MAX_SHORT_RUNS:
        tensor = int(matched.destinations.tensor[pages.dst[np.argmax(pages.runs * (pages.run_bytes < _MIN_RUN))]])
        raise PlanError(
            f"{matched.variants[tensor][0]}: would be written in {short} runs of less than {_MIN_RUN} bytes: is it "
            "stored transposed on one side?"
        )
    if prove:
        cover.prove(matched.sources, matched.destinations, pages)
    units = _used(matched.units, matched.sources.unit[pieces.src])
    number = np.full(len(matched.units) + 1, -1, dtype=np.int64)
    number[[index for index, _ in units]] = np.arange(len(units))
    columns = np.column_stack(
        (
            matched.sources.rank[pages.src],
            matched.destinations.rank[pages.dst],
            number[matched.sources.unit[pages.src]],
            matched.sources.region[pages.src],
            matched.destinations.region[pages.dst],
            pages.run_bytes, pages.runs, pages.src_stride, pages.dst_stride,
        )
    )  # fmt: skip
    # By source rank, then unit; a source begins with another destination than its neighbours: no two begin at one NIC.
    turn = (columns[:, 1] - columns[:, 0] * len(destinations) // len(sources)) % len(destinations)
    order = np.lexsort(
        (pages.src_offset, columns[:, 8], columns[:, 7], columns[:, 6], columns[:, 5], columns[:, 4], columns[:, 3],
         turn, columns[:, 2], columns[:, 0])
    )  # fmt: skip
    columns = columns[order]
    new = np.ones(len(columns), dtype=bool)
    new[1:] = (columns[1:] != columns[:-1]).any(axis=1)
    first = np.flatnonzero(new)
    count = np.diff(np.append(first, len(columns)))
    return Plan(
        tuple(table.rank for table in sources),
        tuple(table.rank for table in destinations),
        matched.variants,
        tuple(unit for _, unit in units),
        np.column_stack((columns[first], first, count)),
        pages.src_offset[order],
        pages.dst_offset[order],
    )


def _used(units: Sequence[Unit], chosen: Ints) -> list[tuple[int, Unit]]:
    """Units that something is sent of, and all of a gather, in which everybody must take part; by mesh and tensor."""
    needed = set(chosen.tolist())
    kept = [(i, unit) for i, unit in enumerate(units) if i in needed or unit.kind == "fp8-gather"]
    first_seen: dict[str, int] = {}
    for index, (_, unit) in enumerate(kept):
        first_seen.setdefault(unit.name, index)
    return sorted(kept, key=lambda pair: (pair[1].mesh, first_seen[pair[1].name], pair[1].rank))
