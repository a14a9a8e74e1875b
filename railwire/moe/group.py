"""The native interface: one rank of an expert-parallel group, over a transfer engine."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from railwire import TransferEngine
from railwire.errors import ConfigurationError, RailwireError
from railwire.moe import protocol as p
from railwire.moe.checks import check_dispatch, check_results
from railwire.moe.config import MoeConfig
from railwire.moe.errors import MaskedOutError, MoeError, PhaseError, RankLostError
from railwire.moe.geometry import GRANT_MAGIC, Array, Geometry, HeaderError
from railwire.moe.kernels import Routing, make_backend
from railwire.moe.protocol import Machine, Phase, Wait
from railwire.moe.rendezvous import Exchange
from railwire.moe.rows import OutputRows
from railwire.moe.wires import Wires, host_bytes
from railwire.transfer import Expectation, Fence

Tensor = torch.Tensor
_SLICE = 0.0002  # seconds that one wait may keep us from looking at the others
_MOST_EXCUSES = 20  # each is worth half a time-out


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


class ExpertGroup:
    """One rank of an expert-parallel group. Every rank makes one, and calls :meth:`dispatch` and :meth:`combine` in
    turn, as often as all others do.

    Args:
        engine: of this rank; several groups (micro-batches) may share one.
        config: equal on all ranks.
        rank: of this process, 0 to ``config.ranks - 1``.
        exchange: joins the ranks at the start, see :mod:`railwire.moe.rendezvous`.
        kernels: ``torch`` or ``triton``; None: triton on GPUs, torch on CPUs.
        device: of the tokens.
        timeout: seconds that this rank waits for a rank that gives no sign. Longer than the experts' slowest turn.
        shrink: True: go on without ranks that are missing; False: raise :class:`RankLostError`.

    Raises:
        ConfigurationError: the ranks disagree, both values are named.
        ConnectError: a rank cannot be reached.
    """

    def __init__(
        self,
        engine: TransferEngine,
        config: MoeConfig,
        rank: int,
        exchange: Exchange,
        *,
        kernels: str | None = None,
        device: str = "cpu",
        timeout: float = 10.0,
        shrink: bool = False,
    ) -> None:
        if not 0 <= rank < config.ranks:
            raise ConfigurationError(f"rank is 0 to {config.ranks - 1}, not {rank}")
        if not 0.001 <= timeout <= 3600:
            raise ConfigurationError(f"timeout is between 0.001 and 3600 seconds, not {timeout}")
        self.config = config
        self.rank = rank
        self.geometry = Geometry(config)
        self.timeout = timeout
        self.shrink = shrink
        self.reasons: dict[int, str] = {}
        """Why each masked rank is."""
        self._backend = make_backend(kernels or ("torch" if device == "cpu" else "triton"), self.geometry, device)
        self._device = torch.device(device)
        self._wires = Wires(engine, self.geometry, rank, self._allocate)
        self._machine = Machine(self.geometry, rank)
        self._pending: dict[tuple[Wait, int], tuple[Expectation, float, int]] = {}
        self._excuses: dict[tuple[Wait, int], int] = {}
        self._fences: dict[int, Fence] = {}
        self._unfenceable: dict[int, RailwireError] = {}
        self._busy = threading.Lock()
        self._routing: Routing | None = None
        self._weights: Tensor | None = None
        self._result: Dispatched | None = None
        self._into: tuple[Tensor, Tensor | None] | None = None
        self._closed = False
        self.stats: dict[str, Any] = {
            "dispatches": 0,
            "sent_bytes": 0,
            "sent_to": [0] * config.ranks,
            "received_rows": 0,
            "second_rounds": 0,
            "wait_seconds": [0.0] * config.ranks,
        }
        try:
            generation, absent = self._wires.meet(exchange, 0, max(10.0, 2 * engine.liveness))
            if absent and not shrink:
                raise ConfigurationError(f"ranks {sorted(absent)} are not there")
            self._machine.reform(generation, absent)
            self.reasons = dict.fromkeys(absent, "absent from the start")
        except BaseException:
            self._wires.close()
            raise

    # ---- what callers use --------------------------------------------------------------------------------------------
    def dispatch(
        self, x: Tensor | tuple[Tensor, Tensor], topk_ids: Tensor, topk_weights: Tensor | None = None
    ) -> Dispatched:
        """Sends each token to the ranks of its experts, and returns what the others have sent here.

        Args:
            x: ``[tokens, hidden]`` in the configured dtype, or, with fp8, also ``(float8_e4m3fn, float32 scales
                [tokens, ceil(hidden / 128)])``. 0 to ``max_tokens`` tokens.
            topk_ids: ``[tokens, top_k]`` int32 or int64, -1 for none; an expert named twice gets the token twice.
            topk_weights: ``[tokens, top_k]`` float32; combine multiplies by them (``standard``: they travel along).

        Raises:
            TypeError, ValueError, IndexError: bad input; nothing has moved, and the call may be repeated.
            PhaseError: combine() of the dispatch before has not been called.
            RankLostError: a rank is missing. MaskedOutError: the others go on without this one.
        """
        self.dispatch_send(x, topk_ids, topk_weights)
        return self.dispatch_receive()

    def dispatch_send(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        into: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """The first half of :meth:`dispatch`: returns when everything is on its way.

        ``into``: ``batched``: where the rows (and scales) go, as :meth:`empty_outputs` gives them.
        """
        with self._alone():
            self._machine._check(Phase.IDLE, "dispatch")
            values, scales = check_dispatch(self.config, self._device, x, topk_ids, topk_weights)
            if into is not None and self.config.layout != "batched":
                raise ValueError("only the batched layout has outputs whose size is known before")
            routing = self._backend.route(topk_ids)
            if self.config.layout == "batched" and int(routing.counts.max(initial=0)) > self.config.max_tokens:
                raise ValueError("batched: a rank sends one expert more rows than max_tokens (experts named twice)")
            self._wait_for_fences()
            self._settle(self._wires.dispatching)
            machine, g = self._machine, self.geometry
            self._backend.pack(values, scales, topk_ids, topk_weights, routing, self._wires.dispatch_send)
            sent = routing.sent.tolist()
            self._routing, self._weights, self._result = routing, topk_weights, None
            self._into = into
            actions = machine.dispatch(sent, routing.counts[self.rank])
            headers = g.encode_headers(
                machine.generation, routing.sent, routing.segments, machine.next_slot_rows, machine.masked,
                routing.counts,
            )  # fmt: skip
            words = torch.from_numpy(headers.view(np.uint8))
            for rank in machine.peers:
                at = g.sent_segment(rank, int(routing.segments[rank]))
                self._wires.dispatch_send[at : at + g.header] = words[rank]
            self.stats["dispatches"] += 1
            self._kernels_done()
            self._run(actions)

    def dispatch_receive(self) -> Dispatched:
        """The second half: returns what has come."""
        with self._alone():
            if self._machine.phase is not Phase.EXPERTS:
                self._machine._check(Phase.DISPATCH, "dispatch_receive")
                self._work(Phase.DISPATCH)
            if self._result is None:
                raise PhaseError("dispatch_receive() without dispatch_send()")
            return self._result

    def combine(self, y: Tensor, topk_weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Sends the experts' results back where their tokens came from, and returns the sum for each of our tokens.

        ``out[t]`` is the sum over j of ``topk_weights[t, j] * y(t, j)``, in float32, in the order of j, rounded once at
        the end; pairs of -1 and of masked ranks are left out. ``standard``: the plain sum over ranks.

        Args:
            y: as ``Dispatched.x``, in the configured dtype.
            topk_weights: ``[tokens, top_k]`` float32; None: those of the dispatch (none there either: all 1).
            out: where the result goes, ``[tokens, hidden]``.

        Raises:
            As :meth:`dispatch`.
        """
        self.combine_send(y)
        return self.combine_receive(topk_weights, out)

    def combine_send(self, y: Tensor, row_weights: Tensor | None = None) -> None:
        """The first half of :meth:`combine`. ``row_weights``: ``standard``: weights to send back, ``[rows, top_k]``."""
        with self._alone():
            self._machine._check(Phase.EXPERTS, "combine")
            assert self._result is not None
            flat = check_results(self.config, self._device, y, self._result.rows.rows)
            self._wait_until_written(self._wires.combining)
            actions = self._machine.combine()
            own = self._machine.rank
            self._send_results(flat, row_weights, [a for a in actions if isinstance(a, p.SendCombined)])
            rows = self._result.rows.of(own)
            self._backend_gather_own(flat, row_weights, rows)
            self._watch()

    def combine_receive(self, topk_weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The second half."""
        with self._alone():
            routing = self._routing
            if routing is None or self._machine.phase not in (Phase.COMBINE, Phase.IDLE):
                self._machine._check(Phase.COMBINE, "combine_receive")
                raise PhaseError("combine_receive() without combine_send()")
            self._work(Phase.COMBINE)
            weights = self._weights if topk_weights is None else topk_weights
            if self.config.layout == "standard":
                weights = None
            slots = self._returned_slots(routing)
            if out is None:
                shape = (slots.shape[0], self.config.hidden)
                out = torch.empty(shape, dtype=getattr(torch, self.config.dtype), device=self._device)
            self._backend.reduce(self._wires.combine_recv, slots, weights, out)
            return out

    def returned_weights(self) -> Tensor:
        """``standard``: after :meth:`combine_receive`, the sums of the weights that came back, ``[tokens, top_k]``."""
        routing = self._routing
        if routing is None or self.config.layout != "standard":
            raise PhaseError("only the standard layout sends weights back, and combine() comes first")
        slots = self._returned_slots(routing)
        out = torch.empty((slots.shape[0], self.config.top_k), dtype=torch.float32, device=self._device)
        self._backend.reduce_weights(self._wires.combine_recv, slots, out)
        return out

    def empty_outputs(self) -> tuple[Tensor, Tensor | None]:
        """``batched``: (rows ``[local experts * ranks * max_tokens, hidden]``, scales or None) for
        :meth:`dispatch_send`."""
        c = self.config
        if c.layout != "batched":
            raise ValueError("only the batched layout has outputs whose size is known before")
        x, scales, _, _ = self._backend.outputs(c.local_experts * c.ranks * c.max_tokens)
        return x, scales

    @property
    def last(self) -> Dispatched:
        """What the last dispatch brought."""
        if self._result is None:
            raise PhaseError("nothing has been dispatched yet")
        return self._result

    @property
    def masked(self) -> frozenset[int]:
        """Ranks that the group goes on without."""
        return self._machine.masked

    @property
    def generation(self) -> int:
        """Dispatches begun."""
        return self._machine.generation

    @property
    def registered_bytes(self) -> int:
        """Registered memory of this group on this rank."""
        return sum(int(buffer.numel()) for buffer in self._wires.buffers)

    def mask(self, rank: int, reason: str = "by hand") -> None:
        """Goes on without a rank; the others learn it from the next dispatch. Between combine and dispatch."""
        with self._alone():
            if not 0 <= rank < self.config.ranks or rank == self.rank:
                raise ValueError(f"rank {rank} cannot be masked here")
            self._run(self._machine.missing(rank, reason))

    def reform(self, exchange: Exchange) -> None:
        """Takes ranks back. All live ranks and those that come back call it, with nothing under way: the live ones
        between combine and dispatch, a restarted one by :meth:`join`. Afterwards all are in one generation.

        Raises:
            PhaseError: in the middle of a generation.
        """
        with self._alone():
            if self._machine.phase not in (Phase.IDLE, Phase.OUT):
                raise PhaseError(f"reform() in phase {self._machine.phase.value!r}")
            self._wait_for_fences()
            self._drop_pending()
            for sent in (self._wires.dispatching, self._wires.combining):
                self._settle(sent)
            generation, absent = self._wires.meet(exchange, self._machine.generation, max(10.0, self.timeout))
            self._machine.reform(generation, absent)
            self.reasons = {rank: self.reasons.get(rank, "absent") for rank in absent}

    @classmethod
    def join(
        cls, engine: TransferEngine, config: MoeConfig, rank: int, exchange: Exchange, **options: Any
    ) -> ExpertGroup:
        """Makes the group of a restarted rank, while the others call :meth:`reform`."""
        return cls(engine, config, rank, exchange, **options)

    def close(self) -> None:
        """Ends the group; returns when all that this rank has sent has landed, and no other can write here any more.
        Idempotent."""
        if self._closed:
            return
        self._closed = True
        for sent in (self._wires.dispatching, self._wires.combining):
            self._settle(sent)  # a slower rank may still wait for it, and the engine may be closed next
        self._machine.masked_out()
        self._drop_pending()
        self._wires.close()

    def __enter__(self) -> ExpertGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- carrying out ------------------------------------------------------------------------------------------------
    def _run(self, actions: list[p.Action]) -> None:
        queue = list(actions)
        machine, g, wires = self._machine, self.geometry, self._wires
        routing = self._routing
        for action in queue:
            if machine.phase is Phase.OUT:
                return
            match action:
                case p.SendSlot(rank, rows, slot_rows):
                    assert routing is not None
                    start = g.sent_segment(rank, int(routing.segments[rank]))
                    nbytes = g.header + rows * g.row
                    at = g.slot(self.rank, rank, slot_rows)
                    self._write(rank, wires.send_rows, rank, start, at, nbytes, Wait.HEADER, machine.generation)
                    self._count(rank, nbytes)
                case p.SendOverflow(rank, first, rows, offset, slot_rows):
                    assert routing is not None
                    start = g.sent_segment(rank, int(routing.segments[rank])) + g.header + first * g.row
                    at, nbytes = g.overflow(slot_rows, offset), rows * g.row
                    self._write(rank, wires.send_rows, rank, start, at, nbytes, Wait.OVERFLOW, machine.generation)
                    self._count(rank, nbytes)
                case p.SendGrant(rank, offset, rows):
                    self._kernels_done()  # the rows that lay there have been taken
                    self._write(rank, wires.send_grant, rank, machine.generation, offset, rows)
                    self.stats["second_rounds"] += 1
                case p.Plan(counts):
                    self._make_outputs(counts)
                case p.TakeSlot(rank, rows):
                    self._take_slot(rank, rows)
                case p.TakeOverflow(rank, first, rows, offset):
                    at = g.overflow(machine.slot_rows, offset)
                    self._take(rank, first, rows, wires.dispatch_recv, at)
                case p.Blank(rank, first, rows):
                    if self._result is not None and machine.phase is not Phase.COMBINE:
                        self._backend.blank(self._result.rows.of(rank, first, rows), self._outputs())
                case p.Fence(rank, reason):
                    self._fence(rank, reason)
        self._watch()

    def _write(self, rank: int, write: Any, *args: Any) -> None:
        """A write that fails at the call means that the rank is lost: its expectation will say so."""
        try:
            write(*args)
        except RailwireError as error:
            if rank not in self._machine.masked:
                self._miss(rank, str(error))

    def _count(self, rank: int, nbytes: int) -> None:
        self.stats["sent_bytes"] += nbytes
        self.stats["sent_to"][rank] += nbytes

    def _make_outputs(self, counts: Array) -> None:
        c = self.config
        rows = OutputRows(c, counts)
        x, scales, ids, weights = (*self._into, None, None) if self._into else self._backend.outputs(rows.rows)
        machine = self._machine
        self._result = Dispatched(
            x, scales, rows.expert_rows, counts, ids, weights, rows, machine.masked, machine.generation
        )
        self.stats["received_rows"] += int(rows.expert_rows.sum())

    def _outputs(self) -> tuple[Any, Any, Any, Any]:
        result = self._result
        assert result is not None
        return result.x, result.scales, result.topk_ids, result.topk_weights

    def _take_slot(self, rank: int, rows: int) -> None:
        g, wires = self.geometry, self._wires
        if rank == self.rank:
            assert self._routing is not None
            at = g.sent_segment(rank, int(self._routing.segments[rank])) + g.header
            self._take(rank, 0, rows, wires.dispatch_send, at)
        else:
            at = g.slot(rank, self.rank, self._machine.slot_rows) + g.header
            self._take(rank, 0, rows, wires.dispatch_recv, at)

    def _take(self, rank: int, first: int, rows: int, source: Tensor, at: int) -> None:
        assert self._result is not None
        self._backend.unpack(source, at, self._result.rows.of(rank, first, rows), self._outputs())

    def _finish_dispatch(self) -> None:
        """Shapes what callers see."""
        result, c = self._result, self.config
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

    def _send_results(self, y: Tensor, weights: Tensor | None, actions: list[p.SendCombined]) -> None:
        """Packs as many sources as the region holds, sends them, and goes on when they have landed."""
        assert self._result is not None
        first = 0
        for action in actions:
            if action.rank in self._machine.masked:
                continue
            if first + action.rows > self.geometry.combine_send_rows:
                self._wait_until_written(self._wires.combining)
                first = 0
            if action.rows:
                self._backend.gather(y, weights, self._result.rows.of(action.rank), self._wires.combine_send, first)
            self._kernels_done()
            self._write(
                action.rank, self._wires.send_results,
                action.rank, first, action.segment, action.rows, self._machine.generation,
            )  # fmt: skip
            self._count(action.rank, action.rows * self.geometry.combine_row)
            first += action.rows

    def _kernels_done(self) -> None:
        """Until the GPU has written what is about to be sent, and read what is about to be overwritten."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _backend_gather_own(self, y: Tensor, weights: Tensor | None, rows: Array) -> None:
        """Our own rows go straight to where the others' results land."""
        assert self._routing is not None
        first = int(self._routing.segments[self.rank])
        self._backend.gather(y, weights, rows, self._wires.combine_recv, first)

    def _returned_slots(self, routing: Routing) -> Tensor:
        """The slots of all pairs, -1 where nothing came back."""
        machine = self._machine
        gone = [r for r in range(self.config.ranks) if r not in machine.returned and r != self.rank]
        gone = [r for r in gone if routing.sent[r]]
        if not gone:
            return routing.slots  # type: ignore[no-any-return]
        slots = routing.slots.clone()
        for rank in gone:
            first = int(routing.segments[rank])
            slots[(slots >= first) & (slots < first + int(routing.sent[rank]))] = -1
        return slots  # type: ignore[no-any-return]

    # ---- waiting -----------------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        """One expectation for everything that the machine awaits, and none for what it no longer does."""
        awaiting = self._machine.awaiting
        for key in [key for key in self._pending if key not in awaiting]:
            self._pending.pop(key)[0].cancel()
        now = time.monotonic()
        for key in awaiting - self._pending.keys():
            wait, rank = key
            expectation = self._wires.expect(wait, rank, self._machine.generation)
            self._pending[key] = (expectation, now + self.timeout, self._wires.beats(rank))

    def _work(self, phase: Phase) -> None:
        """Until the phase has ended."""
        began = time.monotonic()
        beat_at = began + self.timeout / 2
        machine = self._machine
        self._excuses.clear()
        while machine.phase is phase:
            for key in sorted(self._pending, key=lambda key: (key[0].value, key[1])):
                entry = self._pending.get(key)
                if entry is not None and entry[0].done():
                    self._came(key, entry[0], began)
            if machine.phase is not phase:
                break
            now = time.monotonic()
            if now > beat_at:
                beat_at = now + self.timeout / 4
                self._wires.beat(machine.peers)
            self._look_at_fences()
            self._look_at_clocks(now)
            if self._pending and machine.phase is phase:
                self._wait_a_little(min(entry[1] for entry in self._pending.values()) - now)
            elif machine.phase is phase:
                self._wait_for_a_fence()
        if machine.phase is Phase.OUT:
            self._drop_pending()
            raise MaskedOutError(f"the others go on without rank {self.rank}, which was late: reform() takes it back")
        if phase is Phase.DISPATCH:
            self._finish_dispatch()

    def _wait_a_little(self, left: float) -> None:
        keys = list(self._pending)
        alone = len({wait for wait, _ in keys}) == 1 and keys[0][0] in (Wait.HEADER, Wait.COMBINED)
        limit = min(max(left, 0.0001), self.timeout / 4)
        if not alone or self._fences:
            limit = min(limit, _SLICE)
        try:
            self._pending[keys[0]][0].wait(limit)
        except (TimeoutError, RailwireError):
            pass  # looked at by the caller

    def _came(self, key: tuple[Wait, int], expectation: Expectation, began: float) -> None:
        """An expectation has ended."""
        wait, rank = key
        self._pending.pop(key, None)
        machine = self._machine
        error = expectation.exception()
        if error is not None:
            self._miss(rank, str(error))
            return
        self.stats["wait_seconds"][rank] += time.monotonic() - began
        if wait is Wait.HEADER:
            g = self.geometry
            at = g.slot(rank, self.rank, machine.slot_rows)
            try:
                words = host_bytes(self._wires.dispatch_recv[at : at + g.header]).view(np.uint32)
                header = g.decode_header(words, self.rank)
            except HeaderError as bad:
                self._run(machine.missing(rank, f"what it sent is wrong: {bad}"))
                return
            self._run(machine.header(rank, header))
        elif wait is Wait.GRANT:
            magic, generation, offset, rows = self._wires.read_grant(rank)
            if magic != GRANT_MAGIC:
                self._miss(rank, "it lends nothing")
                return
            self._run(machine.grant(rank, generation, offset, rows))
        elif wait is Wait.OVERFLOW:
            self._run(machine.overflow(rank))
        else:
            self._run(machine.combined(rank))

    def _look_at_clocks(self, now: float) -> None:
        """A rank that is waited for too long is missing, unless it has said since then that it waits itself."""
        for (wait, rank), (expectation, end, beats) in list(self._pending.items()):
            if now < end or (wait, rank) not in self._pending or expectation.done():
                continue
            seen = self._wires.beats(rank)
            excuses = self._excuses.get((wait, rank), 0)
            if seen != beats and excuses < _MOST_EXCUSES:
                self._excuses[wait, rank] = excuses + 1
                self._pending[wait, rank] = (expectation, now + self.timeout / 2, seen)
                continue
            what = {Wait.HEADER: "its tokens", Wait.COMBINED: "its results"}.get(wait, "its second round")
            self._miss(rank, f"{what} did not come within {self.timeout * 1e3:.0f} ms")

    def _miss(self, rank: int, reason: str) -> None:
        """A rank gives no sign. Perhaps because it goes on without us: then it has said so."""
        if self._wires.is_masked_by(rank):
            self._machine.masked_out()
            return
        self._run(self._machine.missing(rank, reason))

    # ---- fences ------------------------------------------------------------------------------------------------------
    def _fence(self, rank: int, reason: str) -> None:
        self.reasons[rank] = reason
        name = self._wires.peer_name(rank)
        if not self.shrink:
            self._machine.masked_out()
            self._drop_pending()
            raise RankLostError(
                f"rank {rank} ({name}) is missing in generation {self._machine.generation}: {reason}; "
                "make a new group, or use shrink=True to go on without such ranks",
                rank=rank,
                generation=self._machine.generation,
            )
        fence = self._wires.cut_off(rank, self._machine.generation, min(max(self.timeout, 0.05), 1.0))
        if fence is None:
            self._machine.fenced(rank)
        else:
            self._fences[rank] = fence

    def _look_at_fences(self) -> None:
        for rank, fence in list(self._fences.items()):
            if fence.done():
                del self._fences[rank]
                error = fence.exception()
                if error is not None:
                    self._unfenceable[rank] = error
                    continue
                self._run(self._machine.fenced(rank))

    def _wait_for_a_fence(self) -> None:
        """Nothing is awaited and yet the phase goes on: all overflow rows are lent to ranks that are being cut off."""
        if not self._fences:
            self._machine.masked_out()
            raise MoeError(f"overflow rows stay lent to ranks that cannot be cut off: {self._unfenceable}")
        try:
            next(iter(self._fences.values())).wait(0.001)
        except (TimeoutError, RailwireError):
            pass

    def _wait_for_fences(self) -> None:
        end = time.monotonic() + 10.0
        beat_at = time.monotonic()
        while self._fences and time.monotonic() < end:
            if time.monotonic() > beat_at:  # the others may be further, and wait for us
                beat_at += self.timeout / 4
                self._wires.beat(self._machine.peers)
            self._wait_for_a_fence()
            self._look_at_fences()
        if self._machine.unfenced:
            ranks = sorted(self._machine.unfenced)
            raise MoeError(
                f"ranks {ranks} are masked and may still write here ({self._unfenceable}): end their processes"
            )

    # ---- our own writes ----------------------------------------------------------------------------------------------
    def _wait_until_written(self, sent: dict[int, list[Any]]) -> None:
        """Until nothing is read from the region any more; a write that failed means that its rank is missing."""
        for rank in list(sent):
            for transfer in sent.pop(rank):
                try:
                    transfer.wait()
                except RailwireError as error:
                    if rank not in self._machine.masked:
                        self._miss(rank, str(error))
        if self._machine.phase is Phase.OUT:
            raise MaskedOutError(f"the others go on without rank {self.rank}")

    def _settle(self, sent: dict[int, list[Any]]) -> None:
        """As above, for writes whose effect has been seen already or no longer matters."""
        for rank in list(sent):
            for transfer in sent.pop(rank):
                try:
                    transfer.wait()
                except RailwireError:
                    pass

    def _drop_pending(self) -> None:
        for expectation, _, _ in self._pending.values():
            expectation.cancel()
        self._pending.clear()

    def _allocate(self, nbytes: int) -> Tensor:
        if self._device.type == "cpu":
            return torch.zeros(nbytes, dtype=torch.uint8)
        return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)

    def _alone(self) -> _Alone:
        return _Alone(self)


class _Alone:
    """One thread at a time."""

    def __init__(self, group: ExpertGroup) -> None:
        self._group = group

    def __enter__(self) -> None:
        if self._group._closed:
            raise MoeError("the group is closed")
        if not self._group._busy.acquire(blocking=False):
            raise PhaseError("another thread is inside this group")

    def __exit__(self, *exc: object) -> None:
        self._group._busy.release()
