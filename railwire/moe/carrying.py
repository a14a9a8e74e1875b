"""The rows of one generation on their way: packed, sent, unpacked, sent back and summed up, as the machine says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from railwire.moe import actions as p
from railwire.moe.actions import Wait
from railwire.moe.errors import PhaseError
from railwire.moe.geometry import Array, Geometry
from railwire.moe.kernels import KernelBackend, Routing
from railwire.moe.protocol import Machine
from railwire.moe.rows import OutputRows
from railwire.moe.wires import Piece, Wires

Tensor = torch.Tensor


@dataclass(slots=True)
class Dispatched:
    """What has come to the experts of this rank.

    Attributes:
        x: tokens. ``grouped``: ``[rows, hidden]``; ``batched``: ``[local experts, ranks * max_tokens, hidden]``;
            ``standard``: ``[rows, hidden]``.
        scales: float32, with fp8: ``[..., ceil(hidden / 128)]``.
        expert_rows: rows of each local expert, int64 on the host (``standard``: one number, the rows).
        counts: ``[ranks, local experts]``: which source sent how many.
        topk_ids, topk_weights: ``standard``: of each row; ids are local, -1 for experts elsewhere.
        rows: which output row is which (:class:`OutputRows`).
        masked: ranks that nothing came from because the group goes on without them.
        generation: number of this dispatch.
    """

    x: Tensor
    scales: Tensor | None
    expert_rows: Array
    counts: Array
    topk_ids: Tensor | None
    topk_weights: Tensor | None
    rows: OutputRows
    masked: frozenset[int]
    generation: int


class Carrier:
    """Kernels, memory and wires of one rank.

    Attributes:
        routing, weights: of the dispatch under way, or the last one.
        result: what it has brought; None until all headers are here.
    """

    def __init__(self, geometry: Geometry, rank: int, backend: KernelBackend, wires: Wires) -> None:
        self.geometry = geometry
        self.config = geometry.config
        self.rank = rank
        self.backend = backend
        self.wires = wires
        self.routing: Routing | None = None
        self.weights: Tensor | None = None
        self.result: Dispatched | None = None
        self._into: tuple[Tensor, Tensor | None] | None = None
        self.stats: dict[str, Any] = {
            "dispatches": 0,
            "sent_bytes": 0,
            "sent_to": [0] * self.config.ranks,
            "received_rows": 0,
            "second_rounds": 0,
            "wait_seconds": [0.0] * self.config.ranks,
        }

    # ---- dispatch ----------------------------------------------------------------------------------------------------
    def pack(
        self, values: Tensor, scales: Tensor | None, ids: Tensor, weights: Tensor | None, routing: Routing,
        into: tuple[Tensor, Tensor | None] | None,
    ) -> None:  # fmt: skip
        """Writes all rows to the send region."""
        self.backend.pack(values, scales, ids, weights, routing, self.wires.dispatch_send)
        self.routing, self.weights, self.result, self._into = routing, weights, None, into
        self.stats["dispatches"] += 1

    def put_headers(self, machine: Machine) -> None:
        """Writes the headers before them."""
        g, routing = self.geometry, self.routing
        assert routing is not None
        headers = g.encode_headers(
            machine.generation, routing.sent, routing.segments, machine.next_slot_rows, machine.masked, routing.counts
        )
        words = torch.from_numpy(headers.view(np.uint8))
        for rank in machine.peers:
            at = g.sent_segment(rank, int(routing.segments[rank]))
            self.wires.dispatch_send[at : at + g.header] = words[rank]

    def send_slots(self, actions: Sequence[p.SendSlot], generation: int) -> None:
        """Posts all slots at once."""
        g, routing = self.geometry, self.routing
        assert routing is not None
        pieces = []
        for action in actions:
            start = g.sent_segment(action.rank, int(routing.segments[action.rank]))
            at = g.slot(self.rank, action.rank, action.slot_rows)
            pieces.append(Piece(action.rank, start, at, g.header + action.rows * g.row))
        self.wires.scatter_slots(pieces, generation)
        self._count(pieces)

    def send_overflow(self, action: p.SendOverflow, generation: int) -> None:
        """Sends rows to where they have been lent room."""
        g, routing, rank = self.geometry, self.routing, action.rank
        assert routing is not None
        start = g.sent_segment(rank, int(routing.segments[rank])) + g.header + action.first * g.row
        piece = Piece(rank, start, g.overflow(action.slot_rows, action.offset), action.rows * g.row)
        self.wires.send_rows(rank, piece.start, piece.at, piece.nbytes, Wait.OVERFLOW, generation)
        self._count([piece])

    def plan(self, counts: Array, machine: Machine) -> None:
        """All headers are here: makes the outputs."""
        rows = OutputRows(self.config, counts)
        x, scales, ids, weights = (*self._into, None, None) if self._into else self.backend.outputs(rows.rows)
        self.result = Dispatched(
            x, scales, rows.expert_rows, counts, ids, weights, rows, machine.masked, machine.generation
        )
        self.stats["received_rows"] += int(rows.expert_rows.sum())

    def take_slot(self, rank: int, rows: int, slot_rows: int) -> None:
        """Unpacks a slot; our own rows lie in the send region."""
        g = self.geometry
        if rank == self.rank:
            assert self.routing is not None
            at = g.sent_segment(rank, int(self.routing.segments[rank])) + g.header
            self._take(rank, 0, rows, self.wires.dispatch_send, at)
        else:
            self._take(rank, 0, rows, self.wires.dispatch_recv, g.slot(rank, self.rank, slot_rows) + g.header)

    def take_overflow(self, action: p.TakeOverflow, slot_rows: int) -> None:
        """Unpacks overflow rows."""
        at = self.geometry.overflow(slot_rows, action.offset)
        self._take(action.rank, action.first, action.rows, self.wires.dispatch_recv, at)

    def _take(self, rank: int, first: int, rows: int, source: Tensor, at: int) -> None:
        assert self.result is not None
        self.backend.unpack(source, at, self.result.rows.of(rank, first, rows), self._outputs())

    def blank(self, action: p.Blank) -> None:
        """Zeroes rows that will not come."""
        assert self.result is not None
        self.backend.blank(self.result.rows.of(action.rank, action.first, action.rows), self._outputs())

    def _outputs(self) -> tuple[Any, Any, Any, Any]:
        result = self.result
        assert result is not None
        return result.x, result.scales, result.topk_ids, result.topk_weights

    def finish_dispatch(self) -> None:
        """Shapes what callers see."""
        result, c = self.result, self.config
        assert result is not None
        if c.layout == "batched" and result.x.dim() == 2:
            shape = (c.local_experts, c.ranks * c.max_tokens)
            result.x = result.x.view(*shape, c.hidden)
            if result.scales is not None:
                result.scales = result.scales.view(*shape, result.scales.shape[1])
        if result.topk_ids is not None:
            local = result.topk_ids - self.rank * c.local_experts
            here = (local >= 0) & (local < len(c.experts_of(self.rank)))
            result.topk_ids = torch.where(here, local, -1)

    # ---- combine -----------------------------------------------------------------------------------------------------
    def send_results(
        self, y: Tensor, weights: Tensor | None, actions: Sequence[p.SendCombined], machine: Machine,
        written: Callable[[], None],
    ) -> None:  # fmt: skip
        """Packs as many sources as the region holds, posts them at once, and goes on when they have landed, which
        ``written`` waits for. A rank that is masked meanwhile gets nothing."""
        rest = list(actions)
        while rest := [action for action in rest if action.rank not in machine.masked]:
            first, number = 0, 0
            while number < len(rest) and first + rest[number].rows <= self.geometry.combine_send_rows:
                first += rest[number].rows
                number += 1
            self._send_some(y, weights, rest[:number], machine.generation)
            rest = rest[number:]
            if rest:
                written()

    def _send_some(self, y: Tensor, weights: Tensor | None, actions: Sequence[p.SendCombined], generation: int) -> None:
        assert self.result is not None
        row = self.geometry.combine_row
        rows = [self.result.rows.of(action.rank) for action in actions]
        self.backend.gather(y, weights, np.concatenate(rows), self.wires.combine_send, 0)
        pieces, first = [], 0
        for action in actions:
            pieces.append(Piece(action.rank, first * row, action.segment * row, action.rows * row))
            first += action.rows
        self.wires.scatter_results(pieces, generation)
        self._count(pieces)

    def keep_own_results(self, y: Tensor, weights: Tensor | None) -> None:
        """Our own rows go straight to where the others' results land."""
        assert self.routing is not None and self.result is not None
        first = int(self.routing.segments[self.rank])
        self.backend.gather(y, weights, self.result.rows.of(self.rank), self.wires.combine_recv, first)

    def reduce(self, returned: set[int], weights: Tensor | None, out: Tensor | None) -> Tensor:
        """The sums, see :meth:`ExpertGroup.combine`; ``returned``: ranks whose results are here."""
        slots = self._returned_slots(returned)
        if out is None:
            shape = (slots.shape[0], self.config.hidden)
            out = torch.empty(shape, dtype=getattr(torch, self.config.dtype), device=slots.device)
        self.backend.reduce(self.wires.combine_recv, slots, weights, out)
        return out

    def returned_weights(self, returned: set[int]) -> Tensor:
        """``standard``: the sums of the weights that came back."""
        if self.routing is None or self.config.layout != "standard":
            raise PhaseError("only the standard layout sends weights back, and combine() comes first")
        slots = self._returned_slots(returned)
        out = torch.empty((slots.shape[0], self.config.top_k), dtype=torch.float32, device=slots.device)
        self.backend.reduce_weights(self.wires.combine_recv, slots, out)
        return out

    def _returned_slots(self, returned: set[int]) -> Tensor:
        """The slots of all pairs, -1 where nothing came back."""
        routing = self.routing
        assert routing is not None
        gone = [r for r in range(self.config.ranks) if r not in returned and r != self.rank and routing.sent[r]]
        if not gone:
            return routing.slots  # type: ignore[no-any-return]
        slots = routing.slots.clone()
        for rank in gone:
            first = int(routing.segments[rank])
            slots[(slots >= first) & (slots < first + int(routing.sent[rank]))] = -1
        return slots  # type: ignore[no-any-return]

    def _count(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.stats["sent_bytes"] += piece.nbytes
            self.stats["sent_to"][piece.rank] += piece.nbytes
