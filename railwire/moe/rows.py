"""Which row of the output each received row becomes, from the count matrix alone."""

from __future__ import annotations

import numpy as np

from railwire.moe.config import MoeConfig
from railwire.moe.geometry import Array, round_up


class OutputRows:
    """The output of one dispatch at one rank.

    Within an expert the rows of source 0 come first, then those of source 1, and so on, each in the source's token
    order: the same in every run.

    Args:
        counts: ``[ranks, bins]`` rows of each source for each local expert (``standard``: for this rank).

    Attributes:
        counts: the same.
        expert_rows: rows of each local expert, ``[bins]``.
        rows: rows of the output, alignment and (``batched``) free rows included.
    """

    def __init__(self, config: MoeConfig, counts: Array) -> None:
        self.counts = counts
        self.expert_rows: Array = counts.sum(axis=0)
        if config.layout == "batched":
            stride = config.ranks * config.max_tokens
            bases = np.arange(counts.shape[1], dtype=np.int64) * stride
            self.rows = counts.shape[1] * stride
        else:
            align = config.expert_alignment if config.layout == "grouped" else 1
            padded = -(-self.expert_rows // align) * align
            ends = np.cumsum(padded)
            bases = ends - padded
            self.rows = round_up(int(ends[-1]), align)
        self.bases: Array = bases
        """The first row of each expert."""
        earlier = np.cumsum(counts, axis=0) - counts
        self._shift = bases + earlier - (np.cumsum(counts, axis=1) - counts)

    def run(self, source: int, expert: int) -> tuple[int, int]:
        """(first row, rows) of what one source has sent to one local expert."""
        begin = int(self._shift[source, expert] + self.counts[source, :expert].sum())
        return begin, int(self.counts[source, expert])

    def of(self, source: int, first: int = 0, rows: int | None = None) -> Array:
        """Output rows of rows ``first`` and following of a source's segment."""
        counts = self.counts[source]
        stop = int(counts.sum()) if rows is None else first + rows
        index = np.repeat(self._shift[source], counts)
        index += np.arange(index.size)
        return index[first:stop]
