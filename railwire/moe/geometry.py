"""Where everything lies: rows, headers, slots, regions, and the bytes that a dispatch and a combine put on the wire.

Only a source's row of the count matrix travels (in the header of each slot). All else follows from it. Source ``g``
sorts its (token, expert) pairs by expert, in token order within an expert: pair ``P`` in that order is *slot* P.
Experts are dealt out in rank order, so the pairs for rank ``r`` are one contiguous segment. ``r`` returns it to where
it came from: combine puts the result of pair P at row P of the source's combine region. The index algebra is that of
pplx-garden (perplexityai/pplx-garden, p2p-all-to-all); headers in the slots, grants and tuned slots are ours.

The dispatch region of a rank::

    grants: one record from each rank | slot of rank 0: header, rows | slot of rank 1 | ... | shared overflow rows
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from railwire.moe.config import ITEM_BYTES, SCALE_BLOCK, MoeConfig

MAGIC = 0x314D5752
GRANT_BYTES = 32
GRANT_MAGIC = 0x314D5747
MASKED_MAGIC = 0x314D574D  # in place of a grant: "we go on without you"
_FIXED_WORDS = 8  # magic, generation (2), rows, segment, next slot rows, 2 reserved

Array = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]


def round_up(value: int, multiple: int) -> int:
    """The next multiple that is not smaller."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Header:
    """What rides at the head of a slot.

    Attributes:
        generation: of the dispatch, from 1.
        rows: rows of the source for this rank; those that do not fit the slot follow when granted.
        segment: the slot P of the first of them at the source.
        next_slot_rows: rows of a slot at the *sender*, from the next generation on.
        masked: ranks that the sender goes on without.
        counts: rows for each expert of the receiver.
    """

    generation: int
    rows: int
    segment: int
    next_slot_rows: int
    masked: frozenset[int]
    counts: Array


class HeaderError(ValueError):
    """A header that no honest source sends."""


@dataclass(frozen=True)
class Geometry:
    """Sizes and offsets of one group, the same on all ranks. All sizes are bytes unless they say rows."""

    config: MoeConfig

    # ---- rows --------------------------------------------------------------------------------------------------------
    @cached_property
    def token_bytes(self) -> int:
        """Of the payload of one dispatched token."""
        return self.config.hidden * (1 if self.config.fp8 else ITEM_BYTES[self.config.dtype])

    @cached_property
    def scales(self) -> int:
        """Scales of one token; 0 without fp8."""
        return -(-self.config.hidden // SCALE_BLOCK) if self.config.fp8 else 0

    @cached_property
    def scale_offset(self) -> int:
        """Where the scales begin in a row."""
        return round_up(self.token_bytes, 16)

    @cached_property
    def topk_offset(self) -> int:
        """Where the top-k (int32 ids, float32 weights) begin in a row; ``standard`` only."""
        return self.scale_offset + round_up(4 * self.scales, 16)

    @cached_property
    def row(self) -> int:
        """One dispatched row."""
        return self.topk_offset + (round_up(8 * self.config.top_k, 16) if self.config.layout == "standard" else 0)

    @cached_property
    def combine_token_bytes(self) -> int:
        return self.config.hidden * ITEM_BYTES[self.config.dtype]

    @cached_property
    def combine_topk_offset(self) -> int:
        """Where the weights (float32) begin in a returned row; ``standard`` only."""
        return round_up(self.combine_token_bytes, 16)

    @cached_property
    def combine_row(self) -> int:
        """One returned row."""
        extra = round_up(4 * self.config.top_k, 16) if self.config.layout == "standard" else 0
        return self.combine_topk_offset + extra

    # ---- destinations ------------------------------------------------------------------------------------------------
    @cached_property
    def bins(self) -> int:
        """Counts that one rank's header holds: one per local expert; ``standard``: one per rank."""
        return 1 if self.config.layout == "standard" else self.config.local_experts

    @cached_property
    def mask_words(self) -> int:
        return -(-self.config.ranks // 32)

    @cached_property
    def header(self) -> int:
        """One header."""
        return round_up(4 * (_FIXED_WORDS + self.mask_words + self.bins), 16)

    # ---- regions -----------------------------------------------------------------------------------------------------
    @cached_property
    def first_slot_rows(self) -> int:
        """Rows of a slot in the first generation: the mean of uniform routing and five standard deviations."""
        c = self.config
        if c.slot_rows:
            return min(c.slot_rows, c.max_rows)
        mean = c.max_rows / c.ranks
        return max(1, min(c.max_rows, math.ceil(mean + 5 * math.sqrt(mean))))

    @cached_property
    def min_overflow_rows(self) -> int:
        """What the tuning leaves for the overflow, whatever it does to the slots."""
        return min(self.config.overflow_rows or self.config.max_rows, self.config.max_tokens)

    @cached_property
    def receive_rows(self) -> int:
        """Rows of the dispatch region: slots and overflow together; the tuning moves the border between them."""
        c = self.config
        return (c.ranks - 1) * self.first_slot_rows + (c.overflow_rows or c.max_rows)

    def max_slot_rows(self) -> int:
        """The most rows that a slot may have."""
        others = self.config.ranks - 1
        if not others:
            return self.config.max_rows
        return max(1, min(self.config.max_rows, (self.receive_rows - self.min_overflow_rows) // others))

    @cached_property
    def slots_at(self) -> int:
        """Where the slots begin in the dispatch region."""
        return round_up(self.config.ranks * GRANT_BYTES, 64)

    @cached_property
    def dispatch_region(self) -> int:
        return self.slots_at + (self.config.ranks - 1) * self.header + self.receive_rows * self.row

    @cached_property
    def dispatch_send_region(self) -> int:
        return self.config.ranks * (self.header + GRANT_BYTES) + self.config.max_rows * self.row

    @cached_property
    def combine_region(self) -> int:
        return max(self.config.max_rows, 1) * self.combine_row

    @cached_property
    def combine_send_rows(self) -> int:
        """Rows that may be on their way back at a time: those of one source at least."""
        return self.config.max_rows + self.config.max_rows // 4

    @cached_property
    def combine_send_region(self) -> int:
        return self.combine_send_rows * self.combine_row

    @property
    def registered_bytes(self) -> int:
        """All registered memory of a rank."""
        return self.dispatch_region + self.dispatch_send_region + self.combine_region + self.combine_send_region

    def slot(self, source: int, receiver: int, slot_rows: int) -> int:
        """Where the slot of ``source`` begins in the dispatch region of ``receiver``. Nobody has a slot with itself."""
        index = source - (source > receiver)
        return self.slots_at + index * (self.header + slot_rows * self.row)

    def overflow(self, slot_rows: int, row: int) -> int:
        """Where an overflow row lies in a dispatch region."""
        return self.slots_at + (self.config.ranks - 1) * (self.header + slot_rows * self.row) + row * self.row

    def overflow_capacity(self, slot_rows: int) -> int:
        """Overflow rows that a region with such slots has."""
        return self.receive_rows - (self.config.ranks - 1) * slot_rows

    def grant(self, granter: int) -> int:
        """Where the record of ``granter`` lies in everybody's dispatch region."""
        return granter * GRANT_BYTES

    def sent_segment(self, rank: int, segment: int) -> int:
        """Where header and rows for ``rank`` begin in the send region; ``segment``: its first slot P."""
        return rank * self.header + segment * self.row

    def own_grant(self, rank: int) -> int:
        """Where the record that goes to ``rank`` is written in the send region."""
        return self.config.ranks * self.header + self.config.max_rows * self.row + rank * GRANT_BYTES

    # ---- headers -----------------------------------------------------------------------------------------------------
    def encode_headers(
        self, generation: int, sent: Array, segments: Array, next_slot_rows: int, masked: frozenset[int], counts: Array
    ) -> Words:
        """One header per rank, ``[ranks, header bytes / 4]``. ``counts``: ``[ranks, bins]``."""
        words = np.zeros((self.config.ranks, self.header // 4), np.uint32)
        words[:, 0] = MAGIC
        words[:, 1] = generation & 0xFFFFFFFF
        words[:, 2] = generation >> 32
        words[:, 3] = sent
        words[:, 4] = segments
        words[:, 5] = next_slot_rows
        for rank in masked:
            words[:, _FIXED_WORDS + rank // 32] |= np.uint32(1 << rank % 32)
        first = _FIXED_WORDS + self.mask_words
        words[:, first : first + self.bins] = counts
        return words

    def decode_header(self, words: Words, receiver: int) -> Header:
        """Raises HeaderError for what no honest source sends."""
        if words[0] != MAGIC:
            raise HeaderError(f"not a header: it begins with {int(words[0]):#x}")
        first = _FIXED_WORDS + self.mask_words
        counts = words[first : first + self.bins].astype(np.int64)
        rows, segment, slot = int(words[3]), int(words[4]), int(words[5])
        if counts.sum() != rows or rows + segment > self.config.max_rows:
            raise HeaderError(f"{rows} rows from slot {segment}, counted as {int(counts.sum())}")
        here = len(self.config.experts_of(receiver)) if self.config.layout != "standard" else 1
        if counts[here:].any():
            raise HeaderError("tokens for experts that do not exist")
        if not 1 <= slot <= self.max_slot_rows():
            raise HeaderError(f"slots of {slot} rows")
        bits = words[_FIXED_WORDS:first]
        masked = frozenset(
            32 * i + bit for i, word in enumerate(bits.tolist()) if word for bit in range(32) if word >> bit & 1
        )
        if any(rank >= self.config.ranks for rank in masked):
            raise HeaderError("it masks ranks that do not exist")
        return Header(int(words[1]) | int(words[2]) << 32, rows, segment, slot, masked, counts)

    # ---- the wire ----------------------------------------------------------------------------------------------------
    def dispatch_wire_bytes(self, rows: int, slot_rows: int) -> tuple[int, int]:
        """(bytes of the slot's write, bytes of all overflow writes) from one source to one receiver, grants apart."""
        now = min(rows, slot_rows)
        return self.header + now * self.row, (rows - now) * self.row

    def combine_wire_bytes(self, rows: int) -> int:
        """Bytes that come back."""
        return rows * self.combine_row


def encode_grant(magic: int, generation: int, offset: int, rows: int) -> npt.NDArray[np.uint8]:
    """One grant record."""
    words = np.zeros(GRANT_BYTES // 8, np.uint64)
    words[:] = (magic, generation, offset, rows)
    return words.view(np.uint8)


def decode_grant(record: npt.NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """(magic, generation, offset, rows)."""
    magic, generation, offset, rows = record.view(np.uint64).tolist()
    return magic, generation, offset, rows
