"""What the machine of one rank (:mod:`railwire.moe.protocol`) goes through, waits for, and asks to be done."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from railwire.moe.geometry import Array


class Phase(Enum):
    """Of one rank."""

    IDLE = "idle"
    DISPATCH = "dispatch"
    EXPERTS = "experts"  # dispatch has ended, combine has not begun
    COMBINE = "combine"
    OUT = "out"  # masked by the others, or closed


class Wait(Enum):
    """What an immediate from a peer says; with the generation it makes the counter."""

    HEADER = 0
    GRANT = 1
    OVERFLOW = 2
    COMBINED = 3


@dataclass(frozen=True, slots=True)
class SendSlot:
    """Write header and ``rows`` rows, the first of the segment, to our slot at ``rank`` (slots of ``slot_rows``)."""

    rank: int
    rows: int
    slot_rows: int


@dataclass(frozen=True, slots=True)
class SendGrant:
    """Lend ``rows`` overflow rows from ``offset`` on to ``rank``."""

    rank: int
    offset: int
    rows: int


@dataclass(frozen=True, slots=True)
class SendOverflow:
    """Write ``rows`` rows of the segment of ``rank``, from ``first`` on, to its overflow rows from ``offset`` on."""

    rank: int
    first: int
    rows: int
    offset: int
    slot_rows: int


@dataclass(frozen=True, slots=True)
class SendCombined:
    """Write the results of ``rows`` rows to ``rank``, to its combine rows from ``segment`` on."""

    rank: int
    rows: int
    segment: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All headers are here: ``counts[source, bin]`` rows come in this generation."""

    counts: Array


@dataclass(frozen=True, slots=True)
class TakeSlot:
    """Unpack the ``rows`` rows in the slot of ``rank``; of this rank itself: out of the send region."""

    rank: int
    rows: int


@dataclass(frozen=True, slots=True)
class TakeOverflow:
    """Unpack ``rows`` overflow rows from ``offset`` on: rows ``first`` and following of ``rank``."""

    rank: int
    first: int
    rows: int
    offset: int


@dataclass(frozen=True, slots=True)
class Blank:
    """Rows ``first`` and following of ``rank`` will not come: zero them."""

    rank: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Fence:
    """Tell ``rank`` that it is out, cut it off, and call ``fenced(rank)`` when it can no longer write here."""

    rank: int
    reason: str


Action = SendSlot | SendGrant | SendOverflow | SendCombined | Plan | TakeSlot | TakeOverflow | Blank | Fence
