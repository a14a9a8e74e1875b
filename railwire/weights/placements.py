"""Which part of a tensor a rank holds, from its DTensor placements: pure arithmetic, no process group, no torch.

The semantics are those of ``torch.distributed.tensor``: placements are applied from the first mesh dimension to the
last; ``Shard(dim)`` cuts like ``torch.chunk`` (10 rows over 4 ranks are 3, 3, 3, 1; some shards may be empty);
``_StridedShard(dim, split_factor)``, which FSDP2 makes on top of tensor parallelism, cuts first into ``split_factor``
pieces, each of these among the ranks, and gives a rank its part of every piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from railwire.weights.errors import PlanError

MAX_DIMS = 4


class Placement(msgspec.Struct, frozen=True, array_like=True):
    """One mesh dimension's: ``dim`` None replicates; ``split`` above 1 is ``_StridedShard``'s split factor."""

    dim: int | None = None
    split: int = 1


REPLICATE = Placement()


def shard(dim: int, split: int = 1) -> Placement:
    """``Shard(dim)``, or ``_StridedShard(dim, split_factor=split)``."""
    return Placement(dim, split)


class Part(NamedTuple):
    """A box of the whole tensor that lies in a rank's local tensor.

    Attributes:
        lo, size: in elements of the whole tensor.
        local: where it begins in the local tensor, in elements, by dimension.
    """

    lo: tuple[int, ...]
    size: tuple[int, ...]
    local: tuple[int, ...]


Interval = tuple[int, int]


def local_parts(
    shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> tuple[tuple[int, ...], tuple[Part, ...]]:
    """Shape of the local tensor, and the boxes of the whole tensor in it (none if it is empty).

    Raises:
        PlanError: placements that do not fit the mesh or the tensor.
    """
    if not len(mesh) == len(coordinate) == len(placements):
        raise PlanError(f"{len(placements)} placements, coordinate {tuple(coordinate)} and mesh {tuple(mesh)} differ")
    per_dim: list[list[Interval]] = [[(0, extent)] for extent in shape]
    for extent, index, placement in zip(mesh, coordinate, placements, strict=True):
        if not 0 <= index < extent:
            raise PlanError(f"coordinate {tuple(coordinate)} lies outside mesh {tuple(mesh)}")
        if placement.dim is None:
            continue
        dim = placement.dim + len(shape) if placement.dim < 0 else placement.dim
        if not 0 <= dim < len(shape) or placement.split < 1:
            raise PlanError(f"{placement} does not fit a tensor of shape {tuple(shape)}")
        pieces = [
            _chunk(outer, extent, index)
            for outer in (_chunk(per_dim[dim], placement.split, i) for i in range(placement.split))
        ]
        per_dim[dim] = _merge([interval for piece in pieces for interval in piece])
    local_shape = tuple(sum(end - begin for begin, end in intervals) for intervals in per_dim)
    parts = []
    for combination in itertools.product(*(_with_offsets(intervals) for intervals in per_dim)):
        lo = tuple(begin for begin, _, _ in combination)
        size = tuple(end - begin for begin, end, _ in combination)
        parts.append(Part(lo, size, tuple(at for _, _, at in combination)))
    return local_shape, tuple(parts) if all(local_shape) else ()


def from_dtensor(placements: Sequence[Any], ndim: int) -> tuple[Placement, ...]:
    """Our form of a DTensor's ``placements``.

    Raises:
        PlanError: a partial sum, which is no weight.
    """
    ours = []
    for placement in placements:
        if placement.is_replicate():
            ours.append(REPLICATE)
        elif placement.is_partial():
            raise PlanError(f"placement {placement} is a partial sum: redistribute it before the update")
        else:
            dim = int(placement.dim)
            ours.append(Placement(dim + ndim if dim < 0 else dim, int(getattr(placement, "split_factor", 1))))
    return tuple(ours)


def _chunk(intervals: Sequence[Interval], count: int, index: int) -> list[Interval]:
    """The ``index``-th of ``count`` chunks of what the intervals enumerate."""
    total = sum(end - begin for begin, end in intervals)
    each = -(-total // count)
    first, last = min(total, index * each), min(total, (index + 1) * each)
    taken, at = [], 0
    for begin, end in intervals:
        a, b = max(first, at), min(last, at + end - begin)
        if a < b:
            taken.append((begin + a - at, begin + b - at))
        at += end - begin
    return taken


def _merge(intervals: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in intervals:
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


def _with_offsets(intervals: Sequence[Interval]) -> list[tuple[int, int, int]]:
    at, found = 0, []
    for begin, end in intervals:
        found.append((begin, end, at))
        at += end - begin
    return found
