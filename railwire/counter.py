"""Immediate counters: how a receiver learns that everything has landed."""

from __future__ import annotations

from collections.abc import Sequence

from railwire import _native
from railwire.owner import Owner
from railwire.peer import Peer
from railwire.transfer import Expectation

UNITS_PER_ARRIVAL = 16
MAX_IMM = (1 << 22) - 1
DEFAULT_TIMEOUT = 60.0


def check_imm(imm: int | None) -> int:
    """What the native core takes: -1 for none. Raises TypeError, ValueError for what is no immediate."""
    if imm is None:
        return -1
    if isinstance(imm, bool) or not isinstance(imm, int):
        raise TypeError(f"an immediate is an int, not {type(imm).__name__}")
    if not 0 <= imm <= MAX_IMM:
        raise ValueError(f"an immediate is 0..{MAX_IMM}, not {imm}")
    return imm


class Counter:
    """Counts arrivals of one immediate at this engine. Made by ``engine.counter(imm)``; all objects for one immediate
    are the same counter.

    One write is one arrival, one page is one arrival, one scatter target is one arrival: whatever the striping, the
    merging and the order. Arrivals before :meth:`expect` count. Each expectation consumes its count, in the order in
    which the expectations were made.
    """

    def __init__(self, engine: Owner, imm: int) -> None:
        self._engine = engine
        self.imm = imm

    def expect(self, count: int, peers: Sequence[Peer] | None = None, timeout: float = DEFAULT_TIMEOUT) -> Expectation:
        """An awaitable that ends when ``count`` arrivals have come.

        Args:
            count: arrivals, at least 0.
            peers: who will write. If one of them is lost, or reports a failed write, the expectation fails at once.
                None: anyone may be meant, so losing any peer fails it.
            timeout: seconds from now.

        Raises:
            ValueError, ClosedError: at the call.
            WriterLost, WriterFailed, ExpectationTimeout: when awaited.
        """
        if count < 0:
            raise ValueError(f"cannot expect {count} arrivals")
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        self._engine._check_open()
        ids = []
        for peer in peers or ():
            self._engine._check_ours(peer)
            ids.append(peer.id)
        if peers is not None and not ids:
            raise ValueError("peers must name at least one peer, or be None")
        return Expectation(
            self._engine, _native.expect(self._engine._native, self.imm, count * UNITS_PER_ARRIVAL, ids, timeout)
        )

    @property
    def value(self) -> float:
        """Arrivals not yet consumed; a fraction while a striped write is half there."""
        self._engine._check_process()
        return self._engine._native.counter_units(self.imm) / UNITS_PER_ARRIVAL

    def reset(self) -> None:
        """Forgets arrivals and failures. Right only when nothing more can arrive: after a fence, or for a new use of
        an immediate whose writers have all ended."""
        self._engine._check_process()
        self._engine._native.reset_counter(self.imm)

    def __repr__(self) -> str:
        return f"<Counter {self.imm}: {self.value:g} arrivals>"
