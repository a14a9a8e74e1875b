"""Whether the machine is quiet enough to measure on."""

from __future__ import annotations

import time
from pathlib import Path

_STAT = Path("/proc/stat")


def _ticks() -> tuple[int, int]:
    """(busy, all) of all cores since boot, in clock ticks."""
    fields = [int(field) for field in _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def busy_share(seconds: float = 0.5) -> float:
    """Share of all cores' time, 0..1, that anybody used during the next `seconds`; 0 where /proc/stat is missing."""
    try:
        busy, whole = _ticks()
        time.sleep(seconds)
        busy_after, whole_after = _ticks()
    except (OSError, ValueError, IndexError):
        return 0.0
    return (busy_after - busy) / max(1, whole_after - whole)
