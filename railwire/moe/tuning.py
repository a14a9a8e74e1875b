"""How many rows a slot should have: enough that a source almost never needs a second round, and no more.

The rows that one source sends vary around their mean; a slot of mean plus some standard deviations fits nearly always.
Both are followed as exponentially weighted averages (Welford's update with a constant gain), so a change of load shows
within a few dozen generations. Growth is immediate, shrinking needs a margin, so that the size does not swing.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

GAIN = 1 / 32
DEVIATIONS = 4.5
SHRINK_MARGIN = 0.75  # a smaller slot must be at most this share of today's


class SlotTuner:
    """Follows the rows that sources send to one rank, and says how many a slot should have."""

    def __init__(self, rows: int, most: int) -> None:
        self.rows = rows
        self._most = most
        self._mean = 0.0
        self._variance = 0.0
        self._seen = 0

    def observe(self, rows: npt.NDArray[np.int64]) -> int:
        """What each other live rank sent in a generation. Returns the size for the next one."""
        if not rows.size:
            return self.rows
        mean = float(rows.mean())
        spread = float(((rows - self._mean) ** 2).mean()) if self._seen else float(rows.var())
        gain = max(GAIN, 1 / (self._seen + 1))
        self._mean += gain * (mean - self._mean)
        self._variance += gain * (spread - self._variance)
        self._seen += 1
        wanted = min(self._most, max(1, math.ceil(self._mean + DEVIATIONS * math.sqrt(max(self._variance, 0.0)))))
        if wanted > self.rows or wanted <= self.rows * SHRINK_MARGIN:
            self.rows = wanted
        return self.rows
