"""What a kernel backend does: the interface, and what it says of where tokens go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from railwire.moe.geometry import Array, Geometry


@dataclass(slots=True)
class Routing:
    """Where the tokens of one rank go.

    Attributes:
        slots: tensor ``[tokens, top_k]`` int64: slot P of each pair, -1 for none.
        counts: ``[ranks, bins]`` pairs for each bin.
        sent: ``[ranks]`` pairs for each rank.
        segments: ``[ranks]`` the first slot of each rank.
        tokens: tensor ``[pairs]`` int64: the token of each slot.
    """

    slots: Any
    counts: Array
    sent: Array
    segments: Array
    tokens: Any


class KernelBackend(Protocol):
    """Kernels of one group on one device. Buffers are uint8 tensors, registered with the engine."""

    geometry: Geometry

    def route(self, topk_ids: Any) -> Routing:
        """Sorts the pairs ``[tokens, top_k]`` by bin, in token order within a bin."""
        ...

    def pack(self, x: Any, scales: Any, ids: Any, weights: Any, routing: Routing, send: Any) -> None:
        """Writes the rows of all pairs to the send region; with fp8 and no ``scales`` it quantises."""
        ...

    def outputs(self, rows: int) -> tuple[Any, Any, Any, Any]:
        """(x, scales, ids, weights) for so many rows; None for what the layout does not have."""
        ...

    def unpack(self, source: Any, first: int, rows: Array, outputs: tuple[Any, Any, Any, Any]) -> None:
        """Copies rows that begin ``first`` bytes into ``source`` to these rows of the outputs."""
        ...

    def blank(self, rows: Array, outputs: tuple[Any, Any, Any, Any]) -> None:
        """Zeroes these rows of the outputs."""
        ...

    def gather(self, y: Any, weights: Any, rows: Array, send: Any, first: int) -> None:
        """Copies these rows of the experts' results to the combine send region, from its row ``first`` on."""
        ...

    def reduce(self, received: Any, slots: Any, weights: Any, out: Any) -> None:
        """``out[t] = sum over j of weights[t, j] * received[slots[t, j]]``, in float32, in the order of j; slots of -1
        are left out; no weights: a plain sum."""
        ...

    def reduce_weights(self, received: Any, slots: Any, out: Any) -> None:
        """As :meth:`reduce`, of the top-k weights at the end of each row (``standard``)."""
        ...
