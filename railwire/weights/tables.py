"""What a rank tells the planner: which box of which tensor lies where in its memory.

A :class:`RankTable` is the wire form, made once on each rank. :class:`Views` holds the boxes of all ranks of one side
as numpy columns, which is what the planner computes with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from railwire.weights.errors import PlanError
from railwire.weights.placements import MAX_DIMS

Ints = npt.NDArray[np.int64]

ITEMSIZE: Mapping[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
FP8 = "float8_e4m3fn"
FP8_BLOCK = 128
SCALE_SUFFIX = "_scale_inv"

MAX_TABLE_BYTES = 64 << 20
_MAX_EXTENT = 1 << 48


class Held(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A box of a tensor in a rank's memory.

    Attributes:
        name: in the checkpoint's name space.
        shape: of the whole tensor, at most four dimensions.
        dtype: of this memory, a torch name such as "bfloat16".
        lo, size: the box, in elements of the whole tensor.
        region: index into the rank's regions.
        offset: bytes from the region's begin to the box's first element.
        strides: bytes, by dimension.
        mesh: sources only: index of the device mesh; a tensor's boxes of one mesh make up the whole tensor.
        parameter: for people: the live parameter of which this is a part.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    lo: tuple[int, ...]
    size: tuple[int, ...]
    region: int
    offset: int
    strides: tuple[int, ...]
    mesh: int = 0
    parameter: str = ""


class RankTable(msgspec.Struct, frozen=True, array_like=True):
    """Everything one rank holds.

    Attributes:
        regions: bytes of each registered region.
        tied: name -> the name under which the very same memory is listed.
        names: all tensors of the model that this side knows, with shape and dtype, also those of which this rank holds
            nothing. Sources only.
    """

    rank: str
    held: tuple[Held, ...]
    regions: tuple[int, ...]
    tied: dict[str, str] = {}
    names: dict[str, tuple[tuple[int, ...], str]] = {}

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> RankTable:
        """Raises PlanError for anything that is no table of boxes inside their regions."""
        if len(data) > MAX_TABLE_BYTES:
            raise PlanError(f"a table of {len(data)} bytes; the most is {MAX_TABLE_BYTES}")
        try:
            table = msgspec.msgpack.decode(data, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise PlanError(f"not a rank's table: {error}") from error
        table.check()
        return table

    def check(self) -> None:
        """Raises PlanError, naming the parameter, unless every box lies in its tensor and in its region."""
        problems = []
        for held in self.held:
            try:
                _check(held, self.regions)
            except PlanError as error:
                problems.append(f"rank {self.rank}: {held.name}: {error}")
        for name, to in self.tied.items():
            if to in self.tied:
                problems.append(f"rank {self.rank}: {name} is tied to {to}, which is tied itself")
        if problems:
            raise PlanError(problems)


def _check(held: Held, regions: Sequence[int]) -> None:
    dims = len(held.shape)
    if not (dims == len(held.lo) == len(held.size) == len(held.strides)):
        raise PlanError("shape, box and strides have different numbers of dimensions")
    if dims > MAX_DIMS:
        raise PlanError(f"{dims} dimensions; the most is {MAX_DIMS}")
    if held.dtype not in ITEMSIZE:
        raise PlanError(f"dtype {held.dtype} is not known")
    if not 0 <= held.region < len(regions) or held.offset < 0:
        raise PlanError(f"there is no region {held.region}, or offset {held.offset} is negative")
    end = held.offset + ITEMSIZE[held.dtype]
    for extent, lo, size, stride in zip(held.shape, held.lo, held.size, held.strides, strict=True):
        if lo < 0 or size < 1 or not lo + size <= extent <= _MAX_EXTENT or not 0 <= stride <= _MAX_EXTENT:
            raise PlanError(f"box {held.lo} + {held.size} does not lie in shape {held.shape}, strides {held.strides}")
        end += (size - 1) * stride
    if end > regions[held.region]:
        raise PlanError(f"ends at byte {end} of a region of {regions[held.region]} bytes")


@dataclass(frozen=True)
class Views:
    """Boxes as columns. All arrays have one row per box; those with dimensions have ``MAX_DIMS`` columns, filled with
    extent 1 at the end.

    Attributes:
        tensor: index of the variant (name, dtype) that the caller numbers.
        unit: -1, or number of the staged unit whose buffer the box is.
    """

    tensor: Ints
    rank: Ints
    lo: Ints
    size: Ints
    region: Ints
    offset: Ints
    strides: Ints
    mesh: Ints
    unit: Ints
    itemsize: Ints

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    def take(self, index: npt.NDArray[Any]) -> Views:
        return Views(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def nbytes(self) -> Ints:
        result: Ints = self.size.prod(axis=1) * self.itemsize
        return result


Row = tuple[int, int, tuple[int, ...], tuple[int, ...], int, int, tuple[int, ...], int, int, int]


def views(rows: Iterable[Row]) -> Views:
    """From rows (tensor, rank, lo, size, region, offset, strides, mesh, unit, itemsize)."""
    columns: list[Any] = list(zip(*rows, strict=True)) or [()] * 10

    def ints(values: Sequence[int]) -> Ints:
        return np.array(values, dtype=np.int64)

    def padded(values: Sequence[tuple[int, ...]], fill: int) -> Ints:
        tail = {dims: (fill,) * (MAX_DIMS - dims) for dims in range(MAX_DIMS + 1)}
        flat = np.array([value + tail[len(value)] for value in values], dtype=np.int64)
        return flat.reshape(len(values), MAX_DIMS)

    tensor, rank, lo, size, region, offset, strides, mesh, unit, itemsize = columns
    return Views(
        ints(tensor), ints(rank), padded(lo, 0), padded(size, 1), ints(region), ints(offset), padded(strides, 0),
        ints(mesh), ints(unit), ints(itemsize),
    )  # fmt: skip


def contiguous(size: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Byte strides of a C-contiguous box."""
    strides, step = [], itemsize
    for extent in reversed(size):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))
