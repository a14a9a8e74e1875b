"""How the steps of a plan name pages: what a planner makes, a proof checks, and ``engine.write_pages`` is given."""

from __future__ import annotations

import msgspec

Runs = tuple[int, int]
"""Count, and bytes from the begin of one to the begin of the next."""


class Addressing(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One side of a step: unit ``u`` of block ``b`` has the index ``b * block_step + u * sub_step`` and begins
    ``offset + index * unit_stride`` bytes after the begin of the region; it consists of ``runs`` = (count, stride)
    equal runs. Steps whose (block_step, sub_step) are equal have the same indices."""

    offset: int
    unit_stride: int
    runs: Runs
    block_step: int
    sub_step: int


class Step(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one source rank writes to one destination rank of one layer by page lists of one shape.

    Attributes:
        unit_bytes: of each unit, all runs together; both sides enumerate the same bytes in the order of their runs.
    """

    layer: int
    src_region: int
    dst_region: int
    src: Addressing
    dst: Addressing
    unit_bytes: int
