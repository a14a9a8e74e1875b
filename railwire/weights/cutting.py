"""Which pieces go from where to where: intersection of boxes, choice among replicas, and runs of bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from railwire.weights.placements import MAX_DIMS
from railwire.weights.tables import Ints, Views

_CHUNK = 1 << 19  # pairs of boxes that are looked at together: bounds the memory


class Pieces(NamedTuple):
    """Boxes that one source view writes into one destination view.

    Attributes:
        src, dst: indices of views.
        lo, size: in elements of the whole tensor.
    """

    src: Ints
    dst: Ints
    lo: Ints
    size: Ints


class Pages(NamedTuple):
    """Pieces as what the engine writes: ``runs`` runs of ``run_bytes`` bytes, some stride apart on each side."""

    src: Ints
    dst: Ints
    src_offset: Ints
    dst_offset: Ints
    run_bytes: Ints
    runs: Ints
    src_stride: Ints
    dst_stride: Ints

    @property
    def nbytes(self) -> Ints:
        return self.run_bytes * self.runs


def intersect(sources: Views, destinations: Views) -> tuple[Ints, Pieces]:
    """All pieces, with ``src`` an index into groups of equal source boxes; and the group of each source view."""
    key = np.column_stack((sources.tensor, sources.mesh, sources.lo, sources.size))
    order = np.lexsort(key.T[::-1])
    new = np.ones(len(sources), dtype=bool)
    new[1:] = (key[order][1:] != key[order][:-1]).any(axis=1)
    group = np.empty(len(sources), dtype=np.int64)
    group[order] = np.cumsum(new) - 1
    first = order[new]  # a view of each group; sorted by tensor
    tensor, lo, hi = sources.tensor[first], sources.lo[first], sources.lo[first] + sources.size[first]
    begin = np.searchsorted(tensor, destinations.tensor, side="left")
    count = np.searchsorted(tensor, destinations.tensor, side="right") - begin
    found = [_pairs(rows, begin, count, lo, hi, destinations) for rows in _chunks(count)]
    empty = np.empty((0, MAX_DIMS), dtype=np.int64)
    none = np.empty(0, dtype=np.int64)
    found.append(Pieces(none, none, empty, empty))
    return group, Pieces(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _chunks(count: Ints) -> Iterator[npt.NDArray[np.int64]]:
    total = np.cumsum(count)
    at = 0
    while at < len(count):
        done = total[at - 1] if at else 0
        end = max(at + 1, int(np.searchsorted(total, done + _CHUNK, side="right")))
        yield np.arange(at, end)
        at = end


def _pairs(rows: Ints, begin: Ints, count: Ints, lo: Ints, hi: Ints, destinations: Views) -> Pieces:
    many = count[rows]
    dst = np.repeat(rows, many)
    src = np.arange(len(dst)) - np.repeat(np.cumsum(many) - many, many) + begin[dst]
    low = np.maximum(lo[src], destinations.lo[dst])
    size = np.minimum(hi[src], destinations.lo[dst] + destinations.size[dst]) - low
    keep = (size > 0).all(axis=1)
    return Pieces(src[keep], dst[keep], low[keep], size[keep])


def choose(sources: Views, group: Ints, pieces: Pieces, destinations: Views, ranks: int) -> Pieces:
    """Picks one source view for each piece, such that the ranks send about the same number of bytes.

    Groups with the same set of ranks are filled together, those with the least choice first: each rank of the set is
    filled up to a common level. Pieces of one destination rank are spread over the set, so that no pair of NICs gets
    much more than another.
    """
    nbytes = pieces.size.prod(axis=1) * destinations.itemsize[pieces.dst]
    by_group = np.lexsort((sources.rank, group))
    starts = np.searchsorted(group[by_group], np.arange(int(group.max(initial=-1)) + 2))
    members = [by_group[a:b] for a, b in itertools.pairwise(starts)]
    sets: dict[bytes, int] = {}
    set_of = np.empty(len(members), dtype=np.int64)
    set_ranks: list[Ints] = []
    for index, views in enumerate(members):
        ranks_of = sources.rank[views]
        number = sets.setdefault(ranks_of.tobytes(), len(sets))
        if number == len(set_ranks):
            set_ranks.append(ranks_of)
        set_of[index] = number
    member_start = starts[:-1]
    load = np.zeros(ranks, dtype=np.int64)
    chosen = np.empty(len(pieces.src), dtype=np.int64)
    piece_set = set_of[pieces.src]
    by_set = np.argsort(piece_set, kind="stable")
    bounds = np.searchsorted(piece_set[by_set], np.arange(len(set_ranks) + 1))
    for number in sorted(range(len(set_ranks)), key=lambda i: len(set_ranks[i])):
        mine = by_set[bounds[number] : bounds[number + 1]]
        candidates = set_ranks[number]
        if len(candidates) == 1:
            position = np.zeros(len(mine), dtype=np.int64)
        else:
            # Largest first; among equals, a tensor after the other, each beginning with another destination.
            turn = destinations.rank[pieces.dst[mine]] + np.unique(pieces.src[mine], return_inverse=True)[1]
            turn %= int(destinations.rank.max()) + 1
            order = np.lexsort((turn, pieces.src[mine], -nbytes[mine]))
            position = np.empty(len(mine), dtype=np.int64)
            position[order] = _fill(nbytes[mine][order], load[candidates])
        chosen[mine] = by_group[member_start[pieces.src[mine]] + position]
        load += np.bincount(candidates[position], weights=nbytes[mine], minlength=ranks).astype(np.int64)
    return pieces._replace(src=chosen)


def _fill(nbytes: Ints, load: Ints) -> Ints:
    """For items in descending order of size: which bin gets each, such that all bins end about equally full."""
    bins = len(load)
    level = load.astype(np.float64)
    position = np.empty(len(nbytes), dtype=np.int64)
    at = 0
    while at < len(nbytes):
        # Equal items are dealt out in one go: how many fit below a common level, the least loaded first.
        end = int(np.searchsorted(-nbytes, -nbytes[at], side="right"))
        size, count = float(nbytes[at]), end - at
        low, high = level.min(), level.max() + size * (count // bins + 1)
        for _ in range(60):
            middle = (low + high) / 2
            if np.floor(np.maximum(middle - level, 0) / size).sum() >= count:
                high = middle
            else:
                low = middle
        share = np.floor(np.maximum(high - level, 0) / size).astype(np.int64)
        surplus = int(share.sum()) - count
        if surplus > 0:
            for index in np.argsort(-(level + share * size), kind="stable"):
                taken = min(surplus, int(share[index]), 1)
                share[index] -= taken
                surplus -= taken
                if not surplus:
                    break
        while surplus > 0:
            index = int(np.argmax(share))
            share[index] -= 1
            surplus -= 1
        # Deal round, not in blocks: consecutive destinations get different sources.
        turns = np.concatenate([np.arange(n, dtype=np.float64) / max(n, 1) for n in share])
        owner = np.repeat(np.arange(bins), share)
        position[at:end] = owner[np.lexsort((owner, turns))]
        level += share * size
        at = end
    return position


def pages(sources: Views, destinations: Views, pieces: Pieces) -> Pages:
    """Pieces as pages: what is contiguous on both sides is one run; one more dimension becomes the runs of a page, and
    what is left becomes pages of their own."""
    src_stride, dst_stride = sources.strides[pieces.src], destinations.strides[pieces.dst]
    src = sources.offset[pieces.src] + ((pieces.lo - sources.lo[pieces.src]) * src_stride).sum(axis=1)
    dst = destinations.offset[pieces.dst] + ((pieces.lo - destinations.lo[pieces.dst]) * dst_stride).sum(axis=1)
    run = destinations.itemsize[pieces.dst].copy()
    left = pieces.size.copy()
    # The innermost dimension need not be the last one: a transposed tensor has it elsewhere. Each turn takes any
    # dimension that goes on where the run ends, on both sides.
    for _ in range(MAX_DIMS):
        for dim in range(MAX_DIMS):
            joins = (left[:, dim] > 1) & (src_stride[:, dim] == run) & (dst_stride[:, dim] == run)
            run = np.where(joins, run * left[:, dim], run)
            left[:, dim] = np.where(joins, 1, left[:, dim])
    rows = np.arange(len(run))
    most = left.argmax(axis=1)
    runs = left[rows, most]
    run_src = np.where(runs > 1, src_stride[rows, most], 0)
    run_dst = np.where(runs > 1, dst_stride[rows, most], 0)
    left[rows, most] = 1
    # Two dimensions at most are left.
    for dim in range(MAX_DIMS):
        many = left[:, dim]
        if (many == 1).all():
            continue
        index = np.repeat(np.arange(len(run)), many)
        step = np.arange(len(index)) - np.repeat(np.cumsum(many) - many, many)
        src, dst = src[index] + step * src_stride[index, dim], dst[index] + step * dst_stride[index, dim]
        run, runs, run_src, run_dst = run[index], runs[index], run_src[index], run_dst[index]
        rows, left = rows[index], left[index]
        src_stride, dst_stride = src_stride[index], dst_stride[index]
        left[:, dim] = 1
    return Pages(pieces.src[rows], pieces.dst[rows], src, dst, run, runs, run_src, run_dst)
