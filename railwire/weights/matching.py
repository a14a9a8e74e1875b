"""Which tensor of the trainers fills which of the receivers, and what has to happen to it on the way.

Equal dtypes: bytes are written from where they lie (*direct*). Other floating dtypes: the sender converts into a
staging buffer (*cast*). fp8 with block scales: the sender quantises (*fp8*); where a shard boundary cuts blocks, the
ranks of the mesh gather the tensor first, and each quantises its own whole blocks (*fp8-gather*).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from railwire.weights.errors import PlanError
from railwire.weights.tables import (
    FP8,
    FP8_BLOCK,
    ITEMSIZE,
    SCALE_SUFFIX,
    Held,
    RankTable,
    Row,
    Views,
    contiguous,
    views,
)

_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_SCALE_DTYPE = "float32"
_ALIGN = 256  # of the scales behind the weights of a unit

Variant = tuple[str, str]  # name and dtype; the dtype of scales is "scale"
Box = tuple[tuple[int, ...], tuple[int, ...]]


class Unit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a source rank converts as one piece into a staging buffer.

    Attributes:
        kind: "cast", "fp8" or "fp8-gather".
        lo, size: the box that is converted; of a gather it may be empty (the rank then only takes part in it).
        nbytes: of the buffer: the box in ``dtype``, C-contiguous, and behind it, from ``scale_offset``, the scales.
        peak: bytes of temporary memory while it is made: the buffer, and a gathered tensor.
    """

    rank: int
    name: str
    kind: str
    dtype: str
    lo: tuple[int, ...]
    size: tuple[int, ...]
    nbytes: int
    scale_offset: int
    peak: int
    mesh: int


class Matched(NamedTuple):
    """All boxes of both sides by one numbering of variants."""

    variants: tuple[Variant, ...]
    sources: Views
    destinations: Views
    units: tuple[Unit, ...]


def match(sources: Sequence[RankTable], destinations: Sequence[RankTable], *, allow_extra: bool = False) -> Matched:
    """Raises PlanError with one sentence per parameter that is missing, extra, or of another shape or type."""
    return _Matcher(sources, destinations, allow_extra).run()


class _Matcher:
    def __init__(self, sources: Sequence[RankTable], destinations: Sequence[RankTable], allow_extra: bool) -> None:
        self._sources, self._destinations, self._allow_extra = sources, destinations, allow_extra
        self._problems: dict[str, None] = {}
        self._names: dict[str, tuple[tuple[int, ...], str]] = {}
        self._tied: dict[str, str] = {}
        self._takes_part: dict[str, list[int]] = defaultdict(list)  # ranks by name, whether or not they hold anything
        self._held: dict[str, dict[int, list[tuple[int, Held]]]] = defaultdict(lambda: defaultdict(list))
        self._variants: dict[Variant, int] = {}
        self._wanted: set[str] = set()
        self._rows: list[Row] = []
        self._units: list[Unit] = []

    def run(self) -> Matched:
        self._read_sources()
        wanted = self._destination_rows()
        if not self._allow_extra:
            for name in self._names:
                if name not in self._wanted:
                    self._problem(f"{name}: the trainers have it, no receiver wants it")
        self._raise()
        for number, (name, dtype) in enumerate(list(self._variants)):
            if dtype != "scale":
                self._source_rows(number, name, dtype)
        self._raise()
        return Matched(tuple(self._variants), views(self._rows), views(wanted), tuple(self._units))

    def _problem(self, text: str) -> None:
        self._problems[text] = None

    def _raise(self) -> None:
        if self._problems:
            raise PlanError(list(self._problems))

    def _read_sources(self) -> None:
        for index, table in enumerate(self._sources):
            self._tied |= table.tied
            for name, (shape, dtype) in table.names.items():
                known = self._names.setdefault(name, (tuple(shape), dtype))
                if known != (tuple(shape), dtype):
                    self._problem(f"{name}: {dtype} {shape} on trainer {table.rank}, {known[1]} {known[0]} on others")
                self._takes_part[name].append(index)
            for held in table.held:
                if self._names.get(held.name) != (held.shape, held.dtype):
                    self._problem(f"{held.name}: trainer {table.rank} holds a part of what it does not list")
                    continue
                self._held[held.name][held.mesh].append((index, held))
        self._raise()

    # ---- destinations ------------------------------------------------------------------------------------------------
    def _destination_rows(self) -> list[Row]:
        rows: list[Row] = []
        for index, table in enumerate(self._destinations):
            filled: dict[tuple[int, int], tuple[Variant, Box, str]] = {}
            scaled = {held.name for held in table.held if held.name.endswith(SCALE_SUFFIX)}
            for held in table.held:
                variant = self._variant(table.rank, held, scaled)
                if variant is None:
                    continue
                box = (held.lo, held.size)
                before = filled.setdefault((held.region, held.offset), (variant, box, held.name))
                if before[2] != held.name:
                    if before[:2] != (variant, box):
                        self._problem(
                            f"{held.name}: receiver {table.rank} fills the same memory with {before[2]}, which is not "
                            "tied to it"
                        )
                    continue  # tied: it comes with the other name
                number = self._variants.setdefault(variant, len(self._variants))
                rows.append(
                    (number, index, held.lo, held.size, held.region, held.offset, held.strides, 0, -1,
                     ITEMSIZE[held.dtype])
                )  # fmt: skip
        return rows

    def _variant(self, rank: str, held: Held, scaled: set[str]) -> Variant | None:
        name = self._tied.get(held.name, held.name)
        if name not in self._names and held.name.endswith(SCALE_SUFFIX):
            base = held.name.removesuffix(SCALE_SUFFIX)
            base = self._tied.get(base, base)
            if base in self._names:
                return self._scale_variant(rank, held, base)
        if name not in self._names:
            self._problem(f"{held.name}: receiver {rank} wants it, no trainer has it")
            return None
        self._wanted.add(name)
        shape, dtype = self._names[name]
        if held.shape != shape:
            self._problem(f"{held.name}: shape {held.shape} on receiver {rank}, {shape} on the trainers")
            return None
        if held.dtype == dtype:
            return name, dtype
        if held.dtype == FP8 and dtype in _FLOATS:
            if held.name + SCALE_SUFFIX not in scaled:
                self._problem(
                    f"{held.name}: {FP8} on receiver {rank} without a {held.name}{SCALE_SUFFIX} to go with it"
                )
            elif cut := _cuts_block(held.shape, held.lo, held.size):
                self._problem(
                    f"{held.name}: receiver {rank}'s part begins or ends at {cut} and so cuts a block of {FP8_BLOCK} "
                    "that shares one scale"
                )
            else:
                return name, FP8
            return None
        if held.dtype in _FLOATS and dtype in _FLOATS:
            return name, held.dtype
        self._problem(f"{held.name}: {held.dtype} on receiver {rank} cannot be made of the trainers' {dtype}")
        return None

    def _scale_variant(self, rank: str, held: Held, base: str) -> Variant | None:
        shape, _ = self._names[base]
        if held.shape != scale_shape(shape) or held.dtype != _SCALE_DTYPE:
            self._problem(
                f"{held.name}: {held.dtype} {held.shape} on receiver {rank}; scales of {base} are {_SCALE_DTYPE} "
                f"{scale_shape(shape)}"
            )
            return None
        return base, "scale"

    # ---- sources -----------------------------------------------------------------------------------------------------
    def _source_rows(self, number: int, name: str, dtype: str) -> None:
        shape, own = self._names[name]
        meshes = self._held.get(name, {})
        complete = [mesh for mesh, held in sorted(meshes.items()) if _volume(held) == _product(shape)]
        if not complete:
            self._problem(f"{name}: the trainers that take part hold only a part of it")
            return
        mesh = complete[0]
        held = meshes[mesh]
        if dtype == own:
            for rank, one in held:
                self._rows.append(
                    (number, rank, one.lo, one.size, one.region, one.offset, one.strides, mesh, -1, ITEMSIZE[dtype])
                )
        elif dtype != FP8:
            for rank, one in held:
                self._unit(number, None, Unit(rank, name, "cast", dtype, one.lo, one.size, 0, 0, 0, mesh))
        else:
            scales = self._variants.setdefault((name, "scale"), len(self._variants))
            if not any(_cuts_block(shape, one.lo, one.size) for _, one in held):
                for rank, one in held:
                    self._unit(number, scales, Unit(rank, name, "fp8", dtype, one.lo, one.size, 0, 0, 0, mesh))
                return
            holders = {rank for rank, _ in held}
            ranks = [r for r in self._takes_part[name] if r in holders or self._only_mesh(r, name, mesh)]
            gathered = _product(shape) * ITEMSIZE[own]
            for rank, (lo, size) in zip(ranks, _block_slices(shape, len(ranks), len(self._units)), strict=True):
                unit = Unit(rank, name, "fp8-gather", dtype, lo, size, 0, 0, gathered, mesh)
                self._unit(number, scales, unit)

    def _only_mesh(self, rank: int, name: str, mesh: int) -> bool:
        """A rank that takes part in a tensor's mesh with an empty shard."""
        return not any(rank == r for held in self._held[name].values() for r, _ in held)

    def _unit(self, number: int, scales: int | None, unit: Unit) -> None:
        nbytes = _product(unit.size) * ITEMSIZE[unit.dtype]
        scale_offset = 0
        if scales is not None:
            scale_offset = -(-nbytes // _ALIGN) * _ALIGN
            nbytes = scale_offset + _product(scale_shape(unit.size)) * ITEMSIZE[_SCALE_DTYPE]
        index = len(self._units)
        self._units.append(
            msgspec.structs.replace(unit, nbytes=nbytes, scale_offset=scale_offset, peak=unit.peak + nbytes)
        )
        if not _product(unit.size):
            return
        strides = contiguous(unit.size, ITEMSIZE[unit.dtype])
        self._rows.append(
            (number, unit.rank, unit.lo, unit.size, -1, 0, strides, unit.mesh, index, ITEMSIZE[unit.dtype])
        )
        if scales is not None:
            lo = tuple(x // FP8_BLOCK if d >= len(unit.lo) - 2 else x for d, x in enumerate(unit.lo))
            size = scale_shape(unit.size)
            self._rows.append((scales, unit.rank, lo, size, -1, scale_offset, contiguous(size, 4), unit.mesh, index, 4))


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scales of a tensor: one for each 128x128 block of its last two dimensions."""
    return tuple(-(-n // FP8_BLOCK) if d >= len(shape) - 2 else n for d, n in enumerate(shape))


def _cuts_block(shape: Sequence[int], lo: Sequence[int], size: Sequence[int]) -> int:
    """An index at which a box cuts a block, or 0."""
    for dim in range(max(0, len(shape) - 2), len(shape)):
        if lo[dim] % FP8_BLOCK:
            return lo[dim]
        end = lo[dim] + size[dim]
        if end % FP8_BLOCK and end != shape[dim]:
            return end
    return 0


def _block_slices(shape: Sequence[int], count: int, turn: int) -> list[Box]:
    """Cuts a tensor into ``count`` slices of whole blocks, some of them empty; ``turn`` says who gets the first."""
    step = FP8_BLOCK if len(shape) <= 2 else 1  # of experts that lie in one tensor, any one is whole
    blocks = -(-shape[0] // step)
    slices = []
    for index in range(count):
        place = (index + turn) % count
        begin = min(shape[0], blocks * place // count * step)
        end = min(shape[0], blocks * (place + 1) // count * step)
        lo, size = [0] * len(shape), list(shape)
        lo[0], size[0] = begin, end - begin
        slices.append((tuple(lo), tuple(size)))
    return slices


def _volume(held: Sequence[tuple[int, Held]]) -> int:
    return sum(_product(size) for _, size in {(one.lo, one.size) for _, one in held})


def _product(values: Sequence[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result
