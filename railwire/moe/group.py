"""The native interface: one rank of an expert-parallel group, over a transfer engine."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from railwire.engine import TransferEngine
from railwire.errors import ConfigurationError, RailwireError
from railwire.moe import actions as p
from railwire.moe.actions import Phase, Wait
from railwire.moe.carrying import Carrier, Dispatched
from railwire.moe.checks import check_dispatch, check_results
from railwire.moe.config import MoeConfig
from railwire.moe.errors import MaskedOutError, MoeError, PhaseError, RankLostError
from railwire.moe.fencing import Fencing
from railwire.moe.geometry import GRANT_MAGIC, Geometry, HeaderError
from railwire.moe.kernels import make_backend
from railwire.moe.protocol import Machine
from railwire.moe.rendezvous import Exchange
from railwire.moe.waiting import Waiting
from railwire.moe.wires import Sent, Wires, host_bytes

Tensor = torch.Tensor


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
        self.shrink = shrink
        self.reasons: dict[int, str] = {}
        """Why each masked rank is."""
        self._device = torch.device(device)
        self._wires = Wires(engine, self.geometry, rank, self._allocate, self._stream)
        backend = make_backend(kernels or ("torch" if device == "cpu" else "triton"), self.geometry, device)
        self._carrier = Carrier(self.geometry, rank, backend, self._wires)
        self._machine = Machine(self.geometry, rank)
        self._waiting = Waiting(self._wires, timeout)
        self._fencing = Fencing(self._wires)
        self._busy = threading.Lock()
        self._closed = False
        self.stats = self._carrier.stats
        """Counts: dispatches, sent_bytes, sent_to, received_rows, second_rounds, wait_seconds (by rank)."""
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
            routing = self._carrier.backend.route(topk_ids)
            if self.config.layout == "batched" and int(routing.counts.max(initial=0)) > self.config.max_tokens:
                raise ValueError("batched: a rank sends one expert more rows than max_tokens (experts named twice)")
            self._wait_for_fences()
            self._settle(self._wires.dispatching)
            self._carrier.pack(values, scales, topk_ids, topk_weights, routing, into)
            actions = self._machine.dispatch(routing.sent.tolist(), routing.counts[self.rank])
            self._carrier.put_headers(self._machine)
            self._run(actions)

    def dispatch_receive(self) -> Dispatched:
        """The second half: returns what has come."""
        with self._alone():
            if self._machine.phase is not Phase.EXPERTS:
                self._machine._check(Phase.DISPATCH, "dispatch_receive")
                self._work(Phase.DISPATCH)
            if self._carrier.result is None:
                raise PhaseError("dispatch_receive() without dispatch_send()")
            return self._carrier.result

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
            assert self._carrier.result is not None
            flat = check_results(self.config, self._device, y, self._carrier.result.rows.rows)
            self._wait_until_written()
            actions = [action for action in self._machine.combine() if isinstance(action, p.SendCombined)]
            self._carrier.send_results(flat, row_weights, actions, self._machine, self._wait_until_written)
            self._carrier.keep_own_results(flat, row_weights)
            self._watch()

    def combine_receive(self, topk_weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The second half."""
        with self._alone():
            if self._carrier.routing is None or self._machine.phase not in (Phase.COMBINE, Phase.IDLE):
                self._machine._check(Phase.COMBINE, "combine_receive")
                raise PhaseError("combine_receive() without combine_send()")
            self._work(Phase.COMBINE)
            weights = self._carrier.weights if topk_weights is None else topk_weights
            if self.config.layout == "standard":
                weights = None
            return self._carrier.reduce(self._machine.returned, weights, out)

    def returned_weights(self) -> Tensor:
        """``standard``: after :meth:`combine_receive`, the sums of the weights that came back, ``[tokens, top_k]``."""
        return self._carrier.returned_weights(self._machine.returned)

    def empty_outputs(self) -> tuple[Tensor, Tensor | None]:
        """``batched``: (rows ``[local experts * ranks * max_tokens, hidden]``, scales or None) for
        :meth:`dispatch_send`."""
        c = self.config
        if c.layout != "batched":
            raise ValueError("only the batched layout has outputs whose size is known before")
        x, scales, _, _ = self._carrier.backend.outputs(c.local_experts * c.ranks * c.max_tokens)
        return x, scales

    @property
    def last(self) -> Dispatched:
        """What the last dispatch brought."""
        if self._carrier.result is None:
            raise PhaseError("nothing has been dispatched yet")
        return self._carrier.result

    @property
    def timeout(self) -> float:
        """Seconds that this rank waits for a rank that gives no sign; may be changed between calls."""
        return self._waiting.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        if not 0.001 <= seconds <= 3600:
            raise ConfigurationError(f"timeout is between 0.001 and 3600 seconds, not {seconds}")
        self._waiting.timeout = seconds

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
            self._waiting.drop()
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
        self._waiting.drop()
        self._wires.close()

    def __enter__(self) -> ExpertGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- carrying out ------------------------------------------------------------------------------------------------
    def _run(self, actions: list[p.Action]) -> None:
        machine, carrier, wires = self._machine, self._carrier, self._wires
        slots = [action for action in actions if isinstance(action, p.SendSlot)]
        if slots and machine.phase is not Phase.OUT:
            carrier.send_slots(slots, machine.generation)
        for action in actions:
            if machine.phase is Phase.OUT:
                return
            match action:
                case p.SendOverflow():
                    self._write(action.rank, carrier.send_overflow, action, machine.generation)
                case p.SendGrant(rank, offset, rows):  # behind what has taken the rows that lay there
                    self._write(rank, wires.send_grant, rank, machine.generation, offset, rows)
                    self.stats["second_rounds"] += 1
                case p.Plan(counts):
                    carrier.plan(counts, machine)
                case p.TakeSlot(rank, rows):
                    carrier.take_slot(rank, rows, machine.slot_rows)
                case p.TakeOverflow():
                    carrier.take_overflow(action, machine.slot_rows)
                case p.Blank():
                    if carrier.result is not None and machine.phase is not Phase.COMBINE:
                        carrier.blank(action)
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

    # ---- waiting -----------------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        self._waiting.watch(self._machine.awaiting, self._machine.generation)

    def _work(self, phase: Phase) -> None:
        """Until the phase has ended."""
        began = time.monotonic()
        beat_at = began + self.timeout / 2
        machine, waiting = self._machine, self._waiting
        waiting.begin()
        while machine.phase is phase:
            for wait, rank, error in waiting.ended():
                if error is not None:
                    self._miss(rank, str(error))
                else:
                    self.stats["wait_seconds"][rank] += time.monotonic() - began
                    self._came(wait, rank)
            if machine.phase is not phase:
                break
            now = time.monotonic()
            if now > beat_at:
                beat_at = now + self.timeout / 4
                self._wires.beat(machine.peers)
            self._look_at_fences()
            for rank, reason in waiting.overdue(now):
                self._miss(rank, reason)
            if waiting and machine.phase is phase:
                waiting.pause(now, bool(self._fencing))
            elif machine.phase is phase:
                self._wait_for_a_fence()
        if machine.phase is Phase.OUT:
            waiting.drop()
            raise MaskedOutError(f"the others go on without rank {self.rank}, which was late: reform() takes it back")
        if phase is Phase.DISPATCH:
            self._carrier.finish_dispatch()

    def _came(self, wait: Wait, rank: int) -> None:
        """What a rank owed us is here."""
        machine, g = self._machine, self.geometry
        if wait is Wait.HEADER:
            at = g.slot(rank, self.rank, machine.slot_rows)
            try:
                words = host_bytes(self._wires.dispatch_recv[at : at + g.header]).view("uint32")
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
            self._waiting.drop()
            raise RankLostError(
                f"rank {rank} ({name}) is missing in generation {self._machine.generation}: {reason}; "
                "make a new group, or use shrink=True to go on without such ranks",
                rank=rank,
                generation=self._machine.generation,
            )
        if self._fencing.begin(rank, self._machine.generation, min(max(self.timeout, 0.05), 1.0)):
            self._machine.fenced(rank)

    def _look_at_fences(self) -> None:
        for rank in self._fencing.ended():
            self._run(self._machine.fenced(rank))

    def _wait_for_a_fence(self) -> None:
        """Nothing is awaited and yet the phase goes on: all overflow rows are lent to ranks that are being cut off."""
        if not self._fencing:
            self._machine.masked_out()
            raise MoeError(f"overflow rows stay lent to ranks that cannot be cut off: {self._fencing.impossible}")
        self._fencing.pause()

    def _wait_for_fences(self) -> None:
        end = time.monotonic() + 10.0
        beat_at = time.monotonic()
        while self._fencing and time.monotonic() < end:
            if time.monotonic() > beat_at:  # the others may be further, and wait for us
                beat_at += self.timeout / 4
                self._wires.beat(self._machine.peers)
            self._wait_for_a_fence()
            self._look_at_fences()
        if self._machine.unfenced:
            ranks = sorted(self._machine.unfenced)
            raise MoeError(
                f"ranks {ranks} are masked and may still write here ({self._fencing.impossible}): end their processes"
            )

    # ---- our own writes ----------------------------------------------------------------------------------------------
    def _wait_until_written(self) -> None:
        """Until nothing is read from the combine send region any more; a write that failed means that its rank is
        missing."""
        sent = self._wires.combining
        while sent:
            one = sent.pop(0)
            try:
                one.transfer.wait()
            except RailwireError as error:
                for rank in self._wires.failed(one.ranks, error):
                    if rank not in self._machine.masked:
                        self._miss(rank, str(error))
        if self._machine.phase is Phase.OUT:
            raise MaskedOutError(f"the others go on without rank {self.rank}")

    def _settle(self, sent: list[Sent]) -> None:
        """As above, for writes whose effect has been seen already or no longer matters."""
        while sent:
            try:
                sent.pop().transfer.wait()
            except RailwireError:
                pass

    def _allocate(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)

    def _stream(self) -> Any:
        """What a write waits for: until the GPU has written what is to be sent, and read what is to be overwritten."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

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
