"""Whether strided storages share a byte. Decided exactly for regular nestings; everything else counts as an overlap.

A box is a run of bytes repeated along up to three dimensions. Its dimensions are *nested* if each stride is at least
the extent of what it repeats: then no byte of the box comes twice. Boxes that interleave (K|V in
the last axis, the layers of a cross-layer page) are compared modulo the stride of their outermost dimension, which
leaves one dimension less.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_MAX_FOLDS = 16  # a layout that somebody would use takes as many as it has different outermost strides: one to three


class OverlapError(ValueError):
    """Two boxes overlap: ``pair`` has the (layer, component) of each."""

    def __init__(self, one: Box, other: Box) -> None:
        super().__init__("boxes overlap")
        self.pair = ((one.layer, one.component), (other.layer, other.component))


class Box(NamedTuple):
    """Bytes [offset, offset + run) repeated along ``dims`` = (stride, count), outermost first; ``extent`` is the
    distance from the first byte to behind the last one."""

    offset: int
    extent: int
    dims: tuple[tuple[int, int], ...]
    run: int
    layer: int
    component: int


def nested(pairs: Iterable[tuple[int, int]], run: int) -> tuple[tuple[tuple[int, int], ...], int] | None:
    """Sorts (count, stride) pairs outermost first and drops those of count 1.

    Returns:
        ((stride, count), ...) and the extent in bytes; None if the dimensions are not nested.
    """
    dims = sorted(((stride, count) for count, stride in pairs if count > 1), reverse=True)
    extent = run
    for stride, count in reversed(dims):
        if stride < extent:
            return None
        extent += (count - 1) * stride
    return tuple(dims), extent


def check_disjoint(boxes: list[Box], folds: int = 0) -> None:
    """Raises OverlapError unless no two boxes share a byte (or if that cannot be told, or only with more work than any
    layout is worth: layouts come from the network)."""
    boxes = sorted(boxes)
    start, end = 0, -1
    for index, box in enumerate(boxes):
        if box.offset >= end:
            _check_cluster(boxes[start:index], folds)
            start = index
        end = max(end, box.offset + box.extent)
    _check_cluster(boxes[start:], folds)


def _check_cluster(boxes: list[Box], folds: int) -> None:
    """Boxes, by offset, whose extents overlap in a chain: disjoint if they are so modulo the largest stride."""
    if len(boxes) < 2:
        return
    period = max((box.dims[0][0] for box in boxes if box.dims), default=0)
    if not period or folds == _MAX_FOLDS:  # bare runs, or who knows
        raise OverlapError(boxes[0], boxes[1])
    folded = []
    for box in boxes:
        extent, dims = box.extent, box.dims
        if dims and dims[0][0] == period:
            extent, dims = extent - (dims[0][1] - 1) * period, dims[1:]
        offset = (box.offset - boxes[0].offset) % period
        if offset + extent > period:
            raise OverlapError(boxes[0], box if box is not boxes[0] else boxes[1])
        folded.append(box._replace(offset=offset, extent=extent, dims=dims))
    check_disjoint(folded, folds + 1)
