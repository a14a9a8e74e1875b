"""One rank of an expert-parallel group as a pure machine: no clock, no thread, no memory.

Calls and events go in, actions come out. A shell (``group.py``) carries them out; tests walk them in every order.

A dispatch. Every rank writes, to every other live rank, a header and as many rows as the slot there holds, one write
with an immediate, whether it has rows or not. When a receiver has all headers it knows what did not fit. It owns its
overflow rows and lends them: a *grant* (offset, rows) goes to a source, the source writes so many rows there, the
receiver takes them out and lends the room again. A source has at most one grant of a receiver at a time.

A combine. Every rank writes to every other live rank the rows that it got from it, to the slots they came from.

Why no barrier is needed: a rank begins dispatch n + 1 when it has combine n of all live ranks. A peer sends combine n
after it has read all of dispatch n, so its slots are free; and it wrote our combine region in n only after our
dispatch n, which followed our reading of combine n - 1. A rank that is masked breaks this argument, so its connection
is fenced before the next dispatch begins (``Fence``), and overflow rows lent to it stay lent until then.

A rank is *missing* when it is late, lost or lies. Its rows stop counting where nothing has been planned with them yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from railwire.moe.actions import (
    Action,
    Blank,
    Fence,
    Phase,
    Plan,
    SendCombined,
    SendGrant,
    SendOverflow,
    SendSlot,
    TakeOverflow,
    TakeSlot,
    Wait,
)  # fmt: skip
from railwire.moe.errors import MaskedOutError, PhaseError
from railwire.moe.geometry import Array, Geometry, Header
from railwire.moe.lending import Loan, Room
from railwire.moe.membership import agree
from railwire.moe.tuning import SlotTuner


@dataclass(slots=True)
class _Source:
    """What one source still has to send us in this generation."""

    header: Header
    taken: int = 0
    loan: Loan | None = None


class Machine:
    """The protocol of one rank.

    Attributes:
        generation: dispatches begun so far; the same on all live ranks.
        masked: ranks that this one goes on without.
        awaiting: what must come before the phase ends: pairs of what and from whom.
        unfenced: masked ranks that may still write here.
        returned: ranks whose results have landed, in this combine or the last one.
        slot_rows: rows of a slot here, in this generation.
        next_slot_rows: the same in the next one; the headers of this generation say it.
    """

    def __init__(self, geometry: Geometry, rank: int) -> None:
        self.geometry = geometry
        self.rank = rank
        self.phase = Phase.IDLE
        self.generation = 0
        self.masked: frozenset[int] = frozenset()
        self.awaiting: set[tuple[Wait, int]] = set()
        self.unfenced: set[int] = set()
        self.slot_rows = geometry.first_slot_rows
        self.next_slot_rows = self.slot_rows
        self._tuner = SlotTuner(self.slot_rows, geometry.max_slot_rows())
        self._slot_rows_at = [self.slot_rows] * geometry.config.ranks  # at the others, in this generation
        self._next_slot_rows_at = list(self._slot_rows_at)
        self.returned: set[int] = set()
        self._sent: Sequence[int] = ()
        self._sent_so_far: dict[int, int] = {}
        self._own_counts: Array = np.zeros(0, np.int64)
        self._headers: dict[int, Header] = {}
        self._sources: dict[int, _Source] = {}
        self._room = Room()
        self._queue: deque[int] = deque()
        self.overflowed = 0
        """Sources that needed a second round, over all generations."""

    @property
    def live(self) -> list[int]:
        """Ranks that are not masked, this one included."""
        return [rank for rank in range(self.geometry.config.ranks) if rank not in self.masked]

    @property
    def peers(self) -> list[int]:
        """The other live ranks."""
        return [rank for rank in self.live if rank != self.rank]

    # ---- calls -------------------------------------------------------------------------------------------------------
    def dispatch(self, sent: Sequence[int], own_counts: Array) -> list[Action]:
        """Begins a generation.

        Args:
            sent: rows for each rank.
            own_counts: rows for each of our own bins.

        Raises:
            PhaseError, MaskedOutError: nothing has changed.
        """
        self._check(Phase.IDLE, "dispatch")
        if self.unfenced:
            raise PhaseError(f"ranks {sorted(self.unfenced)} may still write here")
        self.phase = Phase.DISPATCH
        self.generation += 1
        self.slot_rows, self.next_slot_rows = self.next_slot_rows, self._tuner.rows
        self._slot_rows_at = list(self._next_slot_rows_at)
        self._sent = sent
        self._own_counts = own_counts
        self._headers.clear()
        self._sources.clear()
        self._queue.clear()
        self._sent_so_far.clear()
        self._room = Room([Loan(0, self.geometry.overflow_capacity(self.slot_rows))])
        actions: list[Action] = []
        for rank in self.peers:
            rows = min(sent[rank], self._slot_rows_at[rank])
            actions.append(SendSlot(rank, rows, self._slot_rows_at[rank]))
            self.awaiting.add((Wait.HEADER, rank))
            if rows < sent[rank]:
                self._sent_so_far[rank] = rows
                self.awaiting.add((Wait.GRANT, rank))
        return actions + self._plan_if_complete()

    def combine(self) -> list[Action]:
        """Begins to send the results back. Raises PhaseError, MaskedOutError."""
        self._check(Phase.EXPERTS, "combine")
        self.phase = Phase.COMBINE
        self.returned.clear()
        actions: list[Action] = []
        for rank in self.peers:
            header = self._sources[rank].header
            actions.append(SendCombined(rank, header.rows, header.segment))
            self.awaiting.add((Wait.COMBINED, rank))
        self._end_if_quiet()
        return actions

    # ---- events ------------------------------------------------------------------------------------------------------
    def header(self, rank: int, header: Header) -> list[Action]:
        """The slot of ``rank`` has landed."""
        if not self._came(Wait.HEADER, rank):
            return []
        if header.generation != self.generation:
            return self._liar(rank, f"it is in generation {header.generation}, not {self.generation}")
        self._headers[rank] = header
        return self._plan_if_complete()

    def grant(self, rank: int, generation: int, offset: int, rows: int) -> list[Action]:
        """``rank`` lends us overflow rows."""
        if not self._came(Wait.GRANT, rank):
            return []
        first = self._sent_so_far[rank]
        slot_rows = self._slot_rows_at[rank]
        left = self._sent[rank] - first
        capacity = self.geometry.overflow_capacity(slot_rows)
        if generation != self.generation or not 0 < rows <= left or offset < 0 or offset + rows > capacity:
            why = f"it lends rows {offset} to {offset + rows} of {capacity} in generation {generation} for {left} rows"
            return self._liar(rank, why)
        self._sent_so_far[rank] = first + rows
        if rows < left:
            self.awaiting.add((Wait.GRANT, rank))
        actions: list[Action] = [SendOverflow(rank, first, rows, offset, slot_rows)]
        self._end_if_quiet()
        return actions

    def overflow(self, rank: int) -> list[Action]:
        """``rank`` has filled what it was lent."""
        if not self._came(Wait.OVERFLOW, rank):
            return []
        source = self._sources[rank]
        loan = source.loan
        assert loan is not None
        actions: list[Action] = [TakeOverflow(rank, source.taken, loan.rows, loan.offset)]
        source.taken += loan.rows
        source.loan = None
        self._room.give_back(loan)  # the shell takes the rows out before it sends the grants that follow
        if source.taken < source.header.rows:
            self._queue.append(rank)
        actions += self._lend()
        self._end_if_quiet()
        return actions

    def combined(self, rank: int) -> list[Action]:
        """The results of ``rank`` have landed."""
        if self._came(Wait.COMBINED, rank):
            self.returned.add(rank)
            self._end_if_quiet()
        return []

    def missing(self, rank: int, reason: str) -> list[Action]:
        """``rank`` is late, lost or lies: go on without it."""
        if rank in self.masked or rank == self.rank or self.phase is Phase.OUT:
            return []
        actions = self._mask({rank: reason})
        return actions + self._plan_if_complete()

    def fenced(self, rank: int) -> list[Action]:
        """``rank`` can no longer write here."""
        if rank not in self.unfenced:
            return []
        self.unfenced.discard(rank)
        source = self._sources.get(rank)
        if self.phase is not Phase.DISPATCH or source is None or source.loan is None:
            return []
        self._room.give_back(source.loan)
        source.loan = None
        actions = self._lend()
        self._end_if_quiet()
        return actions

    def masked_out(self) -> None:
        """The others go on without this rank."""
        self.phase = Phase.OUT
        self.awaiting.clear()

    def reform(self, generation: int, masked: frozenset[int]) -> None:
        """Begins anew after all live ranks have agreed on both, with nothing under way anywhere."""
        self.phase = Phase.IDLE
        self.generation = generation
        self.masked = masked
        self.awaiting.clear()
        self.unfenced.clear()
        self.slot_rows = self.next_slot_rows = self.geometry.first_slot_rows
        self._tuner = SlotTuner(self.slot_rows, self.geometry.max_slot_rows())
        self._next_slot_rows_at = [self.slot_rows] * self.geometry.config.ranks

    # ---- inside ------------------------------------------------------------------------------------------------------
    def _check(self, phase: Phase, call: str) -> None:
        if self.phase is Phase.OUT:
            raise MaskedOutError(f"rank {self.rank} is out of the group since generation {self.generation}: reform()")
        if self.phase is not phase:
            raise PhaseError(f"{call}() in phase {self.phase.value!r}: dispatch and combine go in turn")

    def _came(self, wait: Wait, rank: int) -> bool:
        if (wait, rank) not in self.awaiting:
            return False
        self.awaiting.discard((wait, rank))
        return True

    def _liar(self, rank: int, what: str) -> list[Action]:
        return self.missing(rank, f"what it sent is wrong: {what}")

    def _plan_if_complete(self) -> list[Action]:
        """Once: when the headers of all live ranks are here."""
        if self.phase is not Phase.DISPATCH or self._sources:
            return []
        if any(wait is Wait.HEADER for wait, _ in self.awaiting):
            return []
        said = {rank: header.masked for rank, header in self._headers.items() if rank not in self.masked}
        said[self.rank] = self.masked
        agreed = agree((), said)
        if self.rank in agreed:
            self.masked_out()
            return []
        accused = {rank: "another rank goes on without it" for rank in sorted(agreed - self.masked)}
        actions = self._mask(accused)
        config, geometry = self.geometry.config, self.geometry
        counts = np.zeros((config.ranks, geometry.bins), np.int64)
        counts[self.rank] = self._own_counts
        for rank in self.peers:
            header = self._headers[rank]
            counts[rank] = header.counts
            self._next_slot_rows_at[rank] = header.next_slot_rows
        received = counts.sum(axis=1)
        if not config.slot_rows:
            self._tuner.observe(received[self.peers])
        actions.append(Plan(counts))
        for rank in self.live:
            rows = int(received[rank])
            if rank == self.rank:
                header = Header(self.generation, rows, 0, 1, frozenset(), self._own_counts)
                self._sources[rank] = _Source(header, rows)
                actions.append(TakeSlot(rank, rows))
                continue
            source = _Source(self._headers[rank], min(rows, self.slot_rows))
            self._sources[rank] = source
            if source.taken:
                actions.append(TakeSlot(rank, source.taken))
            if source.taken < rows:
                self.overflowed += 1
                self._queue.append(rank)
        actions += self._lend()
        self._end_if_quiet()
        return actions

    def _lend(self) -> list[Action]:
        actions: list[Action] = []
        while self._queue:
            rank = self._queue[0]
            if rank in self.masked:
                self._queue.popleft()
                continue
            source = self._sources[rank]
            loan = self._room.lend(source.header.rows - source.taken)
            if loan is None:
                break
            self._queue.popleft()
            source.loan = loan
            self.awaiting.add((Wait.OVERFLOW, rank))
            actions.append(SendGrant(rank, loan.offset, loan.rows))
        return actions

    def _mask(self, ranks: Mapping[int, str]) -> list[Action]:
        actions: list[Action] = []
        for rank, reason in ranks.items():
            self.masked |= {rank}
            self.unfenced.add(rank)
            self.awaiting = {(wait, peer) for wait, peer in self.awaiting if peer != rank}
            source = self._sources.get(rank)
            if source is not None and source.taken < source.header.rows:
                actions.append(Blank(rank, source.taken, source.header.rows - source.taken))
            actions.append(Fence(rank, reason))  # what it was lent stays lent
        self._end_if_quiet()
        return actions

    def _end_if_quiet(self) -> None:
        if self.awaiting:
            return
        if self.phase is Phase.DISPATCH and self._sources and not self._queue:
            self.phase = Phase.EXPERTS
        elif self.phase is Phase.COMBINE:
            self.phase = Phase.IDLE
