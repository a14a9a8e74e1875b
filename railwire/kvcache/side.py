"""One rank of an instance: what a sender or a receiver shares with its pushes or tickets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from railwire.kvcache.channel import channel_of
from railwire.kvcache.deadlines import Deadlines
from railwire.kvcache.geometry.layout import InstanceLayout, LayoutError

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.memory import MemoryRegion


class Side:
    """Engine, memory, messages and clock of a rank. ``lock`` guards what it, its pushes and its tickets know.

    Raises:
        LayoutError: a rank that the instance does not have, or regions that are not what its layout says.
    """

    def __init__(
        self, engine: TransferEngine, instance: InstanceLayout, rank: int, regions: Sequence[MemoryRegion], thread: str
    ) -> None:
        if not 0 <= rank < len(instance.ranks):
            raise LayoutError(f"rank {rank} of an instance of {len(instance.ranks)} ranks")
        self.layout = instance.ranks[rank]
        if len(regions) != len(self.layout.region_bytes):
            raise LayoutError(f"the layout has {len(self.layout.region_bytes)} regions, {len(regions)} were given")
        for index, (region, nbytes) in enumerate(zip(regions, self.layout.region_bytes, strict=True)):
            if region.nbytes < nbytes:
                raise LayoutError(f"region {index} has {region.nbytes} bytes, its layout {nbytes}")
        self.engine = engine
        self.instance = instance
        self.rank = rank
        self.regions = tuple(regions)
        self.lock = threading.RLock()
        self.channel = channel_of(engine)
        self.clock = Deadlines(thread)
        self.closed = False
