"""When each layer of a push was ready, posted, and landed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class LayerTimes:
    """Monotonic seconds; 0 for what has not been."""

    ready: float = 0.0
    """The last time that the layer was said to be ready."""
    posted: float = 0.0
    landed: float = 0.0
    nbytes: int = 0


@dataclass
class Timeline:
    """When each layer was ready, when it was posted, when the last of it had landed."""

    opened: float = field(default_factory=time.monotonic)
    layers: dict[int, LayerTimes] = field(default_factory=dict)

    def ready(self, layer: int) -> None:
        self.layers.setdefault(layer, LayerTimes()).ready = time.monotonic()

    def posted(self, layer: int, nbytes: int) -> None:
        times = self.layers.setdefault(layer, LayerTimes())
        times.posted = time.monotonic()
        times.nbytes += nbytes

    def landed(self, layer: int, when: float) -> None:
        times = self.layers.setdefault(layer, LayerTimes())
        times.landed = max(times.landed, when)

    def hidden(self, until: float) -> float:
        """Share of the bytes, 0..1, of layers that had landed before ``until`` (such as the end of the prefill)."""
        total = sum(times.nbytes for times in self.layers.values())
        done = sum(times.nbytes for times in self.layers.values() if 0 < times.landed <= until)
        return done / total if total else 1.0
