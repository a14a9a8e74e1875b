"""Immediates for tickets: a slot and its generation.

The immediate of a ticket is ``BASE | slot << 8 | generation``. A slot is used again only when nothing of its last
ticket can arrive any more; the generation makes an arrival that breaks this rule count for nobody instead of for
somebody else. ``engine.new_imm()`` starts below and the upper quarter of the 22-bit space belongs to tickets.
"""

from __future__ import annotations

import threading
from collections import deque

from railwire.errors import RailwireError

BASE = 3 << 20
GENERATIONS = 256
MAX_SLOTS = 1 << 12


class SlotsExhausted(RailwireError):
    """Too many tickets are open at once."""


class ImmSlots:
    """Hands out immediates, the longest unused slot first.

    Args:
        count: tickets that may be open at once, 1 to 4096.
    """

    def __init__(self, count: int) -> None:
        if not 1 <= count <= MAX_SLOTS:
            raise ValueError(f"a receiver has 1 to {MAX_SLOTS} ticket slots, not {count}")
        self.count = count
        self._lock = threading.Lock()
        self._free = deque(range(count))
        self._generation = [0] * count
        self._taken: set[int] = set()

    def take(self) -> int:
        """An immediate. Raises SlotsExhausted."""
        with self._lock:
            if not self._free:
                raise SlotsExhausted(
                    f"all {self.count} ticket slots are in use: await or cancel tickets, or raise max_tickets"
                )
            slot = self._free.popleft()
            imm = BASE | slot << 8 | self._generation[slot]
            self._taken.add(imm)
            return imm

    def give_back(self, imm: int) -> None:
        """The ticket is quiet. Raises ValueError for an immediate that is not out."""
        with self._lock:
            if imm not in self._taken:
                raise ValueError(f"immediate {imm} is not in use")
            self._taken.remove(imm)
            slot = (imm - BASE) >> 8
            self._generation[slot] = (self._generation[slot] + 1) % GENERATIONS
            self._free.append(slot)

    @property
    def free(self) -> int:
        with self._lock:
            return len(self._free)
