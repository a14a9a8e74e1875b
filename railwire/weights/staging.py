"""One registered buffer of fixed size for what is converted on the way, and the watermark that bounds it.

Slots are taken and given back in the same order (the writes of an earlier unit end before those of a later one are
waited for), so the buffer is a ring. Gathered tensors lie elsewhere, but count: ``used`` never exceeds ``capacity``.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

ALIGN = 256


class Slot(NamedTuple):
    offset: int
    nbytes: int
    counted: int  # with what lies elsewhere, and what the ring's end wasted


class Ring:
    """Places in ``capacity`` bytes. Not thread-safe.

    Attributes:
        used: bytes that are counted now. high: the most there have been.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.high = 0
        self._slots: deque[Slot] = deque()
        self._head = 0

    def take(self, nbytes: int, elsewhere: int = 0) -> Slot | None:
        """A slot, or None as long as there is no room.

        Raises:
            ValueError: there never will be.
        """
        size = -(-nbytes // ALIGN) * ALIGN
        if size + elsewhere > self.capacity:
            raise ValueError(f"{size + elsewhere} bytes at a time do not fit into {self.capacity}")
        if self.used + size + elsewhere > self.capacity:
            return None
        tail = self._slots[0].offset if self._slots else 0
        if not self._slots:
            self._head = 0
        if self._slots and self._head <= tail:  # wrapped: free is [head, tail)
            if self._head + size > tail:
                return None
            offset = self._head
        elif self._head + size <= self.capacity:
            offset = self._head
        elif size <= tail:
            offset = 0
        else:
            return None
        slot = Slot(offset, size, size + elsewhere)
        self._head = offset + size
        self._slots.append(slot)
        self.used += slot.counted
        self.high = max(self.high, self.used)
        return slot

    def release_elsewhere(self, slot: Slot) -> Slot:
        """The gathered tensor is gone; the slot is still needed. Returns what takes the slot's place."""
        index = self._slots.index(slot)
        self._slots[index] = smaller = Slot(slot.offset, slot.nbytes, slot.nbytes)
        self.used -= slot.counted - slot.nbytes
        return smaller

    def give_back(self, slot: Slot) -> None:
        """Slots end in the order in which they were taken."""
        assert self._slots[0] is slot, "slots are given back in order"
        self._slots.popleft()
        self.used -= slot.counted
