"""Cuts what one rank sends to another into as few strided steps as the engine can carry.

A box is what two storages have in common: tokens x heads x bytes with strides on either side. Dimensions that are
contiguous on both sides are fused, components that touch on both sides joined, and what is left is fitted into the one
level of runs that a page list has on each side; where it does not fit, the smallest dimension becomes several steps.
Pure geometry: offsets are relative to the layer, see :class:`railwire.kvcache.geometry.layout.Held`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from math import gcd
from typing import NamedTuple

from railwire.kvcache.geometry.layout import Held
from railwire.kvcache.geometry.pages import Runs


class Side(NamedTuple):
    """Where a box lies on one side: unit ``u`` of block ``b`` at ``offset + b * page_stride + u * unit_stride``, the
    latter 0 where a block is one unit."""

    region: int
    offset: int
    page_stride: int
    unit_stride: int


class Dim(NamedTuple):
    size: int
    src_stride: int
    dst_stride: int


class Box(NamedTuple):
    """Runs of ``run`` bytes that are contiguous on both sides, repeated along the dimensions."""

    src: Side
    dst: Side
    dims: tuple[Dim, ...]
    run: int


class Cut(NamedTuple):
    """One step: page-list runs on both sides; both enumerate the same bytes in the same order."""

    src: Side
    dst: Side
    src_runs: Runs
    dst_runs: Runs
    nbytes: int


def box(
    src: Held,
    dst: Held,
    first_head: int,
    heads: int,
    head_bytes: int,
    unit_tokens: int,
    src_block_tokens: int,
    dst_block_tokens: int,
) -> Box:
    """The heads [first_head, first_head + heads) of one component, for one unit of tokens."""
    sides = []
    for held, block_tokens in ((src, src_block_tokens), (dst, dst_block_tokens)):
        offset = held.offset + (first_head - held.first_head) * held.head_stride
        unit_stride = unit_tokens * held.token_stride if unit_tokens < block_tokens else 0
        sides.append(Side(held.region, offset, held.page_stride, unit_stride))
    dims = (
        Dim(unit_tokens, src.token_stride, dst.token_stride),
        Dim(heads, src.head_stride, dst.head_stride),
    )
    return Box(sides[0], sides[1], tuple(dim for dim in dims if dim.size > 1), head_bytes)


def cut(boxes: Iterable[Box]) -> list[Cut]:
    """Steps that move exactly the bytes of the boxes."""
    whole = [_fuse(one) for one in boxes]
    while True:
        joined = _join(whole)
        if len(joined) == len(whole):
            break
        whole = [_fuse(one) for one in joined]
    return [step for one in whole for step in _fit(one)]


def _fuse(one: Box) -> Box:
    """Swallows dimensions that only continue the run, on both sides."""
    dims, run = list(one.dims), one.run
    while True:
        for dim in dims:
            if dim.src_stride == dim.dst_stride == run:
                dims.remove(dim)
                run *= dim.size
                break
        else:
            return Box(one.src, one.dst, tuple(dims), run)


def _join(boxes: Sequence[Box]) -> list[Box]:
    """Joins boxes of which one continues the other's runs, on both sides."""
    joined: list[Box] = []
    for one in sorted(boxes, key=lambda b: (b.src.region, b.dst.region, b.dst.offset, b.src.offset)):
        if joined:
            last = joined[-1]
            if (
                one.dims == last.dims
                and one.src == last.src._replace(offset=last.src.offset + last.run)
                and one.dst == last.dst._replace(offset=last.dst.offset + last.run)
            ):
                joined[-1] = last._replace(run=last.run + one.run)
                continue
        joined.append(one)
    return joined


def _fit(one: Box) -> Iterator[Cut]:
    best: Cut | None = None
    fewest = 0
    nbytes = one.run
    for dim in one.dims:
        nbytes *= dim.size
    for order in permutations(one.dims):
        src = _runs(((dim.size, dim.src_stride) for dim in reversed(order)), one.run)
        dst = _runs(((dim.size, dim.dst_stride) for dim in reversed(order)), one.run)
        if src is not None and dst is not None and (best is None or max(src[0], dst[0]) < fewest):
            best = Cut(one.src, one.dst, src, dst, nbytes)
            fewest = max(src[0], dst[0])
    if best is not None:
        yield best
        return
    smallest = min(one.dims)
    rest = list(one.dims)
    rest.remove(smallest)
    for index in range(smallest.size):
        yield from _fit(
            Box(
                one.src._replace(offset=one.src.offset + index * smallest.src_stride),
                one.dst._replace(offset=one.dst.offset + index * smallest.dst_stride),
                tuple(rest),
                one.run,
            )
        )


def _runs(inside_out: Iterable[tuple[int, int]], run: int) -> Runs | None:
    """(count, stride) of what (count, stride) dimensions, innermost first, make of a run; None if one level is too
    few."""
    level: Runs | None = None
    for count, stride in inside_out:
        if level is None and stride == run:
            run *= count
        elif level is None:
            level = (count, stride)
        elif stride == level[0] * level[1]:
            level = (level[0] * count, level[1])
        else:
            return None
    return level or (1, 0)


def unit_steps(side: Side) -> tuple[int, int, int]:
    """(stride, block_step, sub_step) of a page list: unit ``u`` of block ``b`` has the index ``b * block_step + u *
    sub_step``, and ``stride`` is the greatest one that allows it."""
    stride = gcd(side.page_stride, side.unit_stride)
    return stride, side.page_stride // stride, side.unit_stride // stride
