"""What a sender or a receiver shares with its pushes or tickets: engine, memory, messages, clock and lock."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from railwire.kvcache.channel import Channel, channel_of
from railwire.kvcache.deadlines import Deadlines
from railwire.kvcache.geometry.layout import InstanceLayout, LayoutError, RankLayout

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.memory import MemoryRegion


@dataclass(frozen=True)
class Side:
    """One rank of an instance. ``lock`` guards everything that its sender or receiver, its pushes and tickets know."""

    engine: TransferEngine
    layout: RankLayout
    regions: tuple[MemoryRegion, ...]
    channel: Channel
    clock: Deadlines
    lock: threading.RLock


def side(
    engine: TransferEngine, instance: InstanceLayout, rank: int, regions: Sequence[MemoryRegion], name: str
) -> Side:
    """Raises LayoutError for a rank that the instance does not have, or regions that are not as its layout says."""
    if not 0 <= rank < len(instance.ranks):
        raise LayoutError(f"rank {rank} of an instance of {len(instance.ranks)} ranks")
    layout = instance.ranks[rank]
    if len(regions) != len(layout.region_bytes):
        raise LayoutError(f"the layout has {len(layout.region_bytes)} regions, {len(regions)} were given")
    for index, (region, nbytes) in enumerate(zip(regions, layout.region_bytes, strict=True)):
        if region.nbytes < nbytes:
            raise LayoutError(f"region {index} has {region.nbytes} bytes, its layout {nbytes}")
    return Side(engine, layout, tuple(regions), channel_of(engine), Deadlines(name), threading.RLock())
