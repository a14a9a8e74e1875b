"""The proof that a plan writes every byte of every destination exactly once, each from where that very element lies.

It knows nothing of how plans are made. It takes the addresses of finished pages, finds by division which elements lie
there on either side, and compares; then it lays the written bytes of each destination region side by side.
"""

from __future__ import annotations

import numpy as np

from railwire.weights.cutting import Pages
from railwire.weights.errors import ProofError
from railwire.weights.placements import MAX_DIMS
from railwire.weights.tables import Ints, Views

_CHUNK = 1 << 20
_REGION_SHIFT = 48


def prove(sources: Views, destinations: Views, pages: Pages) -> None:
    """Raises ProofError, saying what is wrong with which tensor."""
    if (sources.tensor[pages.src] != destinations.tensor[pages.dst]).any():
        raise ProofError("a page goes from one tensor to another")
    for begin in range(0, len(pages.src), _CHUNK):
        _prove_places(sources, destinations, Pages(*(column[begin : begin + _CHUNK] for column in pages)))
    _prove_bytes(destinations, pages)


def _prove_places(sources: Views, destinations: Views, pages: Pages) -> None:
    itemsize = destinations.itemsize[pages.dst]
    if (sources.itemsize[pages.src] != itemsize).any() or (pages.run_bytes % itemsize).any():
        raise ProofError("a page cuts an element")
    several = pages.runs > 1
    _prove_runs(sources, destinations, pages, [np.zeros_like(pages.runs)])
    if several.any():
        pages = Pages(*(column[several] for column in pages))
        _prove_runs(sources, destinations, pages, [np.ones_like(pages.runs), pages.runs - 1])


def _prove_runs(sources: Views, destinations: Views, pages: Pages, which: list[Ints]) -> None:
    """The first element of such runs, one inside, and the last."""
    itemsize = destinations.itemsize[pages.dst]
    inside = (pages.run_bytes // itemsize * 7919 // 10007) * itemsize
    for run in which:
        for byte in (np.zeros_like(inside), inside, pages.run_bytes - itemsize):
            here = _element(sources, pages.src, pages.src_offset + run * pages.src_stride + byte)
            there = _element(destinations, pages.dst, pages.dst_offset + run * pages.dst_stride + byte)
            wrong = (here != there).any(axis=1)
            if wrong.any():
                index = int(np.argmax(wrong))
                raise ProofError(
                    f"tensor {int(destinations.tensor[pages.dst[index]])}: element {there[index].tolist()} of "
                    f"destination rank {int(destinations.rank[pages.dst[index]])} would get element "
                    f"{here[index].tolist()}"
                )


def _element(views: Views, index: Ints, address: Ints) -> Ints:
    """Which element of the whole tensor lies at an address of a view; -1 where none does."""
    strides, size = views.strides[index], views.size[index]
    left = address - views.offset[index]
    outside = left < 0
    place = np.zeros_like(size)
    order = np.argsort(np.where(size > 1, -strides, 1), axis=1, kind="stable")
    rows = np.arange(len(index))
    for turn in range(MAX_DIMS):
        dim = order[:, turn]
        step = np.where(size[rows, dim] > 1, strides[rows, dim], 0)
        at = np.where(step > 0, left // np.maximum(step, 1), 0)
        outside |= at >= size[rows, dim]
        place[rows, dim] = at
        left = left - at * step
    outside |= left != 0
    result: Ints = place + views.lo[index]
    result[outside] = -1 - np.arange(2, 2 + 2 * int(outside.sum()), 2)[:, None]  # equal to nothing else
    return result


def _prove_bytes(destinations: Views, pages: Pages) -> None:
    wanted = destinations.nbytes
    rank = destinations.rank[pages.dst]
    by_rank = np.argsort(rank, kind="stable")
    bounds = np.searchsorted(rank[by_rank], np.arange(int(destinations.rank.max(initial=-1)) + 2))
    for number in range(len(bounds) - 1):
        mine = by_rank[bounds[number] : bounds[number + 1]]
        views = np.flatnonzero(destinations.rank == number)
        total = int(pages.nbytes[mine].sum())
        if total != int(wanted[views].sum()):
            raise ProofError(f"destination rank {number}: {total} bytes are written, it has {int(wanted[views].sum())}")
        runs = pages.runs[mine]
        index = np.repeat(mine, runs)
        step = np.arange(len(index)) - np.repeat(np.cumsum(runs) - runs, runs)
        begin = (destinations.region[pages.dst[index]] << _REGION_SHIFT) + pages.dst_offset[index]
        begin += step * pages.dst_stride[index]
        order = np.argsort(begin)
        begin, length = begin[order], pages.run_bytes[index][order]
        twice = begin[1:] < begin[:-1] + length[:-1]
        if twice.any():
            tensor = int(destinations.tensor[pages.dst[index[order[int(np.argmax(twice)) + 1]]]])
            raise ProofError(f"destination rank {number}: bytes of tensor {tensor} are written twice")
