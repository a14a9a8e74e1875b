"""What this machine offers and what stands in the way: the facts behind `railwire doctor`. Prints nothing."""

from __future__ import annotations

from railwire.doctor.examine import examine
from railwire.doctor.report import Report

__all__ = ["Report", "examine"]
