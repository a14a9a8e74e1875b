"""The plan by which receivers give a receiver what they hold: bytes as they are, no conversion. Numpy only.

A receiver's table says which boxes lie where; here it is read as a source. Each box that is wanted becomes a tensor of
its own, of which the holders have parts: so holders that are sharded alike need not hold whole tensors, and others
serve as well, if their parts fit together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec

from railwire.weights.errors import PlanError
from railwire.weights.plan import Plan, compute
from railwire.weights.tables import ITEMSIZE, Held, RankTable

Box = tuple[tuple[int, ...], tuple[int, ...]]
_BYTES = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def peer_plan(holders: Sequence[RankTable], wanted: RankTable) -> Plan:
    """Sources are numbered as ``holders``; the one destination is ``wanted``.

    Raises:
        PlanError: they do not hold everything, parameter by parameter.
    """
    held = _by_tensor(holders)
    parts: list[list[Held]] = [[] for _ in holders]
    boxes: list[Held] = []
    known: dict[tuple[object, ...], str] = {}
    problems: dict[str, None] = {}
    filled: set[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = set()
    for want in wanted.held:
        place = (want.region, want.offset, want.size, want.strides)
        if place in filled:
            continue  # tied: it comes with the other name
        filled.add(place)
        key = (want.name, want.dtype, want.lo, want.size)
        if key not in known:
            known[key] = name = f"{want.name} {want.dtype} {want.lo}+{want.size}"
            found = _cut(held[want.name, want.shape, want.dtype], want)
            if found is None:
                problems[f"{want.name}: receiver {wanted.rank} wants a part of it that no receiver asked holds"] = None
            for number, part in found or ():
                parts[number].append(msgspec.structs.replace(part, name=name, dtype=_bytes(want.dtype)))
        boxes.append(
            msgspec.structs.replace(
                want, name=known[key], shape=want.size, lo=(0,) * len(want.size), dtype=_bytes(want.dtype)
            )
        )
    if problems:
        raise PlanError(list(problems))
    sources = [
        RankTable(f"{number} {table.rank}", tuple(mine), table.regions, {}, {h.name: (h.shape, h.dtype) for h in mine})
        for number, (table, mine) in enumerate(zip(holders, parts, strict=True))
    ]
    return compute(sources, [RankTable(wanted.rank, tuple(boxes), wanted.regions)])


def holds_all(holder: RankTable, wanted: RankTable) -> bool:
    """Whether this one alone has everything, in boxes that need no fitting together."""
    held = _by_tensor([holder])
    return all(
        any(_inside(want, one) == (want.lo, want.size) for _, one in held[want.name, want.shape, want.dtype])
        for want in wanted.held
    )


Tensors = dict[tuple[str, tuple[int, ...], str], list[tuple[int, Held]]]


def _by_tensor(holders: Sequence[RankTable]) -> Tensors:
    found: Tensors = defaultdict(list)
    for number, table in enumerate(holders):
        for one in table.held:
            found[one.name, one.shape, one.dtype].append((number, one))
    return found


def _cut(candidates: Sequence[tuple[int, Held]], want: Held) -> list[tuple[int, Held]] | None:
    """The candidates' parts of a box, as parts of a tensor of the box's shape; None if they do not fill it.

    Parts that several hold alike are all given: the plan chooses among them. Of parts that overlap, the larger counts.
    """
    groups: dict[Box, list[tuple[int, Held]]] = defaultdict(list)
    for number, one in candidates:
        box = _inside(want, one)
        if box is not None:
            groups[box].append((number, one))
    kept: list[Box] = []
    left = _volume(want.size)
    for box in sorted(groups, key=lambda box: (-_volume(box[1]), box)):
        if left and not any(_overlap(box, other) for other in kept):
            kept.append(box)
            left -= _volume(box[1])
    return None if left else list(_parts(groups, kept, want))


def _parts(groups: dict[Box, list[tuple[int, Held]]], kept: Sequence[Box], want: Held) -> Iterator[tuple[int, Held]]:
    for lo, size in kept:
        for number, one in groups[lo, size]:
            inner = sum((a - b) * stride for a, b, stride in zip(lo, one.lo, one.strides, strict=True))
            begin = tuple(a - b for a, b in zip(lo, want.lo, strict=True))
            yield (
                number,
                msgspec.structs.replace(one, shape=want.size, lo=begin, size=size, offset=one.offset + inner, mesh=0),
            )


def _inside(want: Held, one: Held) -> Box | None:
    """The part of the box ``want`` that lies in the box ``one``."""
    lo, size = [], []
    for a, n, b, m in zip(want.lo, want.size, one.lo, one.size, strict=True):
        lo.append(max(a, b))
        size.append(min(a + n, b + m) - lo[-1])
        if size[-1] <= 0:
            return None
    return tuple(lo), tuple(size)


def _overlap(a: Box, b: Box) -> bool:
    return all(max(x, y) < min(x + n, y + m) for x, n, y, m in zip(a[0], a[1], b[0], b[1], strict=True))


def _volume(size: Sequence[int]) -> int:
    total = 1
    for n in size:
        total *= n
    return total


def _bytes(dtype: str) -> str:
    """An integer dtype of the same size, which nobody converts."""
    return _BYTES[ITEMSIZE[dtype]]
