"""Which source rank sends which heads: checks that two layouts describe the same model, and picks among replicas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from railwire.kvcache.geometry.layout import Component, Held, LayoutError, RankLayout


class Share(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Global heads [first_head, first_head + heads) of a component; ``component`` counts by ascending name."""

    component: int
    first_head: int
    heads: int


class Source(NamedTuple):
    """What a source rank holds of a layer."""

    rank: int
    held: tuple[Held, ...]


class Budget:
    """Work that may still be done: layouts come from the network and must not buy hours with a message."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def spend(self, amount: int) -> None:
        """Raises LayoutError once it is used up."""
        self._left -= amount
        if self._left < 0:
            raise LayoutError("these layouts are too large or too irregular to be planned")


def check_mappable(source: RankLayout, destination: RankLayout) -> None:
    """Raises LayoutError, naming what differs, unless both describe the same model and the same components."""
    if source.model != destination.model:
        raise LayoutError(f"other model: the source has {source.model!r}, the destination {destination.model!r}")
    ours = {component.name: component for component in source.components}
    theirs = {component.name: component for component in destination.components}
    for name in sorted(ours.keys() ^ theirs.keys()):
        where, other = ("source", "destination") if name in ours else ("destination", "source")
        raise LayoutError(f"component {name!r} of the {where} is missing at the {other}")
    for name, component in sorted(ours.items()):
        for field in ("dtype", "heads", "head_bytes"):
            one, other = getattr(component, field), getattr(theirs[name], field)
            if one != other:
                raise LayoutError(
                    f"component {name!r} differs in {field}: {one!r} at the source, {other!r} at the destination"
                )


class _Interval(NamedTuple):
    component: int
    first: int
    end: int
    candidates: tuple[int, ...]


def choose(
    layer: int,
    components: Sequence[Component],
    wanted: Sequence[Held],
    sources: Sequence[Source],
    index: int,
    budget: Budget,
) -> dict[int, list[Share]]:
    """Shares by source rank. Each wanted head has one source; the ``index``-th replica, counted round, but a rank that
    sends something of this layer anyway is preferred, so that no further connection is needed.

    Raises:
        LayoutError: heads, or the whole layer, that no source rank holds.
    """
    if not sources:
        if any(held.heads for held in wanted):
            raise LayoutError(f"layer {layer} is held by no source rank")
        return {}
    intervals: list[_Interval] = []
    for number, held in enumerate(wanted):
        first, end = held.first_head, held.first_head + held.heads
        if not held.heads:
            continue
        offers = [
            (source.rank, offer.first_head, offer.first_head + offer.heads)
            for source in sources
            if (offer := source.held[number]).heads
            and offer.first_head < end
            and first < offer.first_head + offer.heads
        ]
        edges = sorted({first, end, *(max(a, first) for _, a, _ in offers), *(min(b, end) for _, _, b in offers)})
        budget.spend(len(offers) * len(edges))
        for low, high in pairwise(edges):
            candidates = tuple(rank for rank, a, b in offers if a <= low and high <= b)
            if not candidates:
                raise LayoutError(
                    f"heads {low}..{high - 1} of component {components[number].name!r} of layer {layer} are held by no "
                    "source rank"
                )
            intervals.append(_Interval(number, low, high, candidates))
    picked: dict[tuple[int, int], int] = {}
    senders: set[int] = set()
    for one in sorted(intervals, key=lambda interval: (len(interval.candidates), interval)):
        ranks = [rank for rank in one.candidates if rank in senders] or list(one.candidates)
        picked[one.component, one.first] = ranks[index % len(ranks)]
        senders.add(ranks[index % len(ranks)])
    shares: dict[int, list[Share]] = {}
    for one in intervals:
        mine = shares.setdefault(picked[one.component, one.first], [])
        if mine and mine[-1].component == one.component and mine[-1].first_head + mine[-1].heads == one.first:
            mine[-1] = Share(one.component, mine[-1].first_head, mine[-1].heads + one.end - one.first)
        else:
            mine.append(Share(one.component, one.first, one.end - one.first))
    return shares
