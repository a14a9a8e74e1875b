"""The proof that a plan moves every byte of a destination exactly once, from where that very byte lies, and nothing
else.

It knows nothing of how plans are made: it takes the addresses of the finished steps apart, piece by contiguous
piece, and looks each piece up in a table of all (token, head, component) of a unit that is computed from the layouts
alone. Blocks and units repeat with the strides of the storages, which the steps must have too; that every storage
lies inside its region and shares no byte with another is what :class:`RankLayout` guarantees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from railwire.kvcache.geometry.layout import Component, LayoutError, RankLayout, Storage
from railwire.kvcache.geometry.pages import Addressing, Step

Ints = npt.NDArray[np.int64]

_REGION_SHIFT = 48  # of addresses in the table; layouts have at most 2**14 regions of 2**48 bytes


class ProofError(LayoutError):
    """A plan that does not cover its destination: a defect of the planner, never of the input."""


class _Table(NamedTuple):
    """All elements (one head of one token of one component) of a unit, by ascending destination address."""

    component: Ints
    token: Ints
    head: Ints
    address: Ints
    length: Ints
    page: Ints  # stride of the blocks
    unit: Ints  # stride of the units of a block


class _Pieces(NamedTuple):
    """Stretches of the steps that are contiguous on both sides."""

    step: Ints
    src: Ints
    dst: Ints
    length: Ints


def elements(layout: RankLayout, layer: int, unit_tokens: int) -> int:
    """How many entries the table of a layer has: what the proof costs."""
    return sum(held.heads for held in layout.shapes[layer].held) * unit_tokens


def prove_layer(
    layer: int,
    unit_tokens: int,
    destination: RankLayout,
    sources: Sequence[RankLayout],
    steps: Sequence[tuple[int, Step]],
) -> None:
    """Proves the steps (source rank, step) of one layer.

    Raises:
        ProofError: says what is wrong with which step.
    """
    components = [destination.components[index] for index in destination.by_name]
    table = _table(destination.storages(layer), components, unit_tokens)
    if not steps:
        if table.address.size:
            raise ProofError(f"layer {layer}: no step writes it")
        return
    for _, step in steps:
        if step.layer != layer:
            raise ProofError(f"layer {layer}: a step of layer {step.layer}")
        for side in (step.src, step.dst):
            if step.unit_bytes < 1 or side.runs[0] < 1 or step.unit_bytes % side.runs[0]:
                raise ProofError(f"layer {layer}: {step.unit_bytes} bytes cannot be {side.runs[0]} runs")
    limit = int(table.address.size)
    pieces = _pieces([step for _, step in steps], limit, layer)

    # Each piece begins with an element and ends with one, and is as long as its elements together.
    first = np.searchsorted(table.address, pieces.dst)
    end = np.searchsorted(table.address, pieces.dst + pieces.length)
    known = first < limit
    known[known] &= table.address[first[known]] == pieces.dst[known]
    _demand(known & (end > first), pieces, layer, "writes where no element begins")
    counts = end - first
    total = int(counts.sum())
    if total != limit:
        raise ProofError(f"layer {layer}: {total} elements are written, the destination has {limit}")
    summed = np.concatenate(([0], np.cumsum(table.length)))
    _demand(summed[end] - summed[first] == pieces.length, pieces, layer, "writes bytes of no element, or half a one")
    piece = np.repeat(np.arange(len(counts)), counts)
    element = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts) + first[piece]
    times = np.bincount(element, minlength=limit)
    if not (times == 1).all():
        wrong = int(np.argmax(times != 1))
        raise ProofError(f"layer {layer}: {_name(table, components, wrong)} is written {int(times[wrong])} times")

    # Each comes from its own place at the source.
    ranks = np.array([rank for rank, _ in steps])
    rank_of = ranks[pieces.step[piece]]
    came_from = pieces.src[piece] + (table.address[element] - pieces.dst[piece])
    step_of = pieces.step[piece]
    steps_src = _strides([step.src for _, step in steps])
    steps_dst = _strides([step.dst for _, step in steps])
    for rank in np.unique(ranks).tolist():
        if not 0 <= rank < len(sources) or layer not in sources[rank].shapes:
            raise ProofError(f"layer {layer}: source rank {rank} does not hold it")
        mine = rank_of == rank
        e = element[mine]
        address, page, unit = _lies(table, e, sources[rank].storages(layer), unit_tokens)
        wrong = address != came_from[mine]
        if wrong.any():
            raise ProofError(
                f"layer {layer}: {_name(table, components, int(e[np.argmax(wrong)]))} is taken from a wrong place of "
                f"source rank {rank}"
            )
        repeats = unit_tokens != sources[rank].block_tokens
        _same_strides(layer, steps_src[step_of[mine]], page, unit, repeats, f"source rank {rank}")
    repeats = unit_tokens != destination.block_tokens
    _same_strides(layer, steps_dst[step_of], table.page[element], table.unit[element], repeats, "the destination")


def _table(storages: Sequence[Storage], components: Sequence[Component], unit_tokens: int) -> _Table:
    columns: list[list[Ints]] = [[] for _ in range(7)]
    for index, (storage, component) in enumerate(zip(storages, components, strict=True)):
        n = unit_tokens * storage.heads
        token = np.repeat(np.arange(unit_tokens), storage.heads)
        head = np.tile(np.arange(storage.heads), unit_tokens)
        address = (storage.region << _REGION_SHIFT) + storage.offset
        values = (
            np.full(n, index),
            token,
            head + storage.first_head if n else head,
            address + token * storage.token_stride + head * storage.head_stride if n else head,
            np.full(n, component.head_bytes),
            np.full(n, storage.page_stride if n else 0),
            np.full(n, storage.token_stride * unit_tokens if n else 0),
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    whole = [np.concatenate(column) for column in columns]
    order = np.argsort(whole[3], kind="stable")
    return _Table(*(column[order] for column in whole))


def _lies(table: _Table, element: Ints, storages: Sequence[Storage], unit_tokens: int) -> tuple[Ints, Ints, Ints]:
    """Address (-1: not held), page stride and unit stride of elements in the storages of a source rank."""
    component = table.component[element]
    # What is not held has any numbers at all in it.
    held = [storage if storage.heads else Storage(0, 0, 1, 0, 0, 0, 0) for storage in storages]

    def of(values: list[int]) -> Ints:
        return np.array(values, dtype=np.int64)[component]

    head = table.head[element] - of([s.first_head for s in held])
    address = (
        of([(s.region << _REGION_SHIFT) + s.offset for s in held])
        + table.token[element] * of([s.token_stride for s in held])
        + head * of([s.head_stride if s.heads > 1 else 0 for s in held])
    )
    address[(head < 0) | (head >= of([s.heads for s in held]))] = -1
    return address, of([s.page_stride for s in held]), of([s.token_stride for s in held]) * unit_tokens


def _pieces(steps: Sequence[Step], limit: int, layer: int) -> _Pieces:
    columns: list[list[Ints]] = [[] for _ in range(4)]
    count = 0
    for index, step in enumerate(steps):
        src, dst = step.src, step.dst
        if src.runs[0] == dst.runs[0] == 1:
            at = np.zeros(1, dtype=np.int64)
        else:
            if src.runs[0] + dst.runs[0] > 2 * limit:
                raise ProofError(f"layer {layer}: a step of more runs than the destination has elements")
            at = np.union1d(
                np.arange(src.runs[0]) * (step.unit_bytes // src.runs[0]),
                np.arange(dst.runs[0]) * (step.unit_bytes // dst.runs[0]),
            )
        columns[0].append(np.full(len(at), index))
        columns[1].append(_run_address(step.src_region, src, step.unit_bytes, at))
        columns[2].append(_run_address(step.dst_region, dst, step.unit_bytes, at))
        columns[3].append(np.diff(at, append=step.unit_bytes))
        count += len(at)
        if count > limit:
            raise ProofError(f"layer {layer}: the steps have more pieces than the destination has elements")
    return _Pieces(*(np.concatenate(column) for column in columns))


def _run_address(region: int, side: Addressing, unit_bytes: int, at: Ints) -> Ints:
    run = unit_bytes // side.runs[0]
    return (region << _REGION_SHIFT) + side.offset + at // run * side.runs[1] + at % run


def _strides(sides: Sequence[Addressing]) -> Ints:
    """Per step: bytes from block to block, and from unit to unit of a block."""
    return np.array([(s.unit_stride * s.block_step, s.unit_stride * s.sub_step) for s in sides], dtype=np.int64)


def _same_strides(layer: int, steps: Ints, page: Ints, unit: Ints, repeats: bool, where: str) -> None:
    if not (steps[:, 0] == page).all() or (repeats and not (steps[:, 1] == unit).all()):
        raise ProofError(f"layer {layer}: a step strides otherwise than {where} from block to block, or unit to unit")


def _demand(fine: npt.NDArray[np.bool_], pieces: _Pieces, layer: int, what: str) -> None:
    if not fine.all():
        wrong = int(np.argmin(fine))
        raise ProofError(
            f"layer {layer}: step {int(pieces.step[wrong])} {what}: {int(pieces.length[wrong])} bytes at byte "
            f"{int(pieces.dst[wrong]) % (1 << _REGION_SHIFT)} of region {int(pieces.dst[wrong]) >> _REGION_SHIFT}"
        )


def _name(table: _Table, components: Sequence[Component], element: int) -> str:
    return (
        f"component {components[int(table.component[element])].name!r}, head {int(table.head[element])} of token "
        f"{int(table.token[element])} of a unit"
    )
