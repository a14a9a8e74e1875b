"""Cutting off ranks that the group goes on without: before memory that they could write is used for anything else."""

from __future__ import annotations

from railwire.errors import RailwireError
from railwire.moe.wires import Wires
from railwire.transfer import Fence


class Fencing:
    """The fences of one rank that are under way, and those that cannot be had."""

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        self._fences: dict[int, Fence] = {}
        self.impossible: dict[int, RailwireError] = {}

    def __bool__(self) -> bool:
        return bool(self._fences)

    def begin(self, rank: int, generation: int, timeout: float) -> bool:
        """Tells the rank, and closes its connection. True: it can no longer write; else :meth:`ended` will say so."""
        fence = self._wires.cut_off(rank, generation, timeout)
        if fence is None:
            return True
        self._fences[rank] = fence
        return False

    def ended(self) -> list[int]:
        """Ranks that can no longer write, since the last call."""
        fenced = []
        for rank, fence in list(self._fences.items()):
            if fence.done():
                del self._fences[rank]
                error = fence.exception()
                if error is None:
                    fenced.append(rank)
                else:
                    self.impossible[rank] = error
        return fenced

    def pause(self) -> None:
        """Waits for one of them, for a millisecond at most."""
        try:
            next(iter(self._fences.values())).wait(0.001)
        except (TimeoutError, RailwireError):
            pass
