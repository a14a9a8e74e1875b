"""The native interface: one rank of an expert-parallel group, over a transfer engine."""

from __future__ import annotations

import threading
from typing import Any

import torch

from railwire.engine import TransferEngine
from railwire.errors import ConfigurationError
from railwire.moe import actions as p
from railwire.moe.actions import Phase
from railwire.moe.carrying import Carrier, Dispatched
from railwire.moe.checks import check_dispatch, check_results
from railwire.moe.config import MoeConfig
from railwire.moe.driving import Driver
from railwire.moe.errors import MoeError, PhaseError
from railwire.moe.geometry import Geometry
from railwire.moe.kernels import make_backend
from railwire.moe.protocol import Machine
from railwire.moe.rendezvous import Exchange
from railwire.moe.wires import Wires

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
        self._device = torch.device(device)
        self._wires = Wires(engine, self.geometry, rank, self._allocate, self._stream)
        backend = make_backend(kernels or ("torch" if device == "cpu" else "triton"), self.geometry, device)
        self._carrier = Carrier(self.geometry, rank, backend, self._wires)
        self._machine = Machine(self.geometry, rank)
        self._driver = Driver(self._machine, self._carrier, self._wires, timeout, shrink)
        self._busy = threading.Lock()
        self._closed = False
        self.stats = self._carrier.stats
        """Counts: dispatches, sent_bytes, sent_to, received_rows, second_rounds, wait_seconds (by rank)."""
        try:
            generation, absent = self._wires.meet(exchange, 0, max(10.0, 2 * engine.liveness))
            if absent and not shrink:
                raise ConfigurationError(f"ranks {sorted(absent)} are not there")
            self._machine.reform(generation, absent)
            self._driver.reasons = dict.fromkeys(absent, "absent from the start")
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
            self._driver.wait_for_fences()
            self._driver.settle(self._wires.dispatching)
            self._carrier.pack(values, scales, topk_ids, topk_weights, routing, into)
            actions = self._machine.dispatch(routing.sent.tolist(), routing.counts[self.rank])
            self._carrier.put_headers(self._machine)
            self._driver.run(actions)

    def dispatch_receive(self) -> Dispatched:
        """The second half: returns what has come."""
        with self._alone():
            if self._machine.phase is not Phase.EXPERTS:
                self._machine._check(Phase.DISPATCH, "dispatch_receive")
                self._driver.work(Phase.DISPATCH)
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
            self._driver.wait_until_written()
            actions = [action for action in self._machine.combine() if isinstance(action, p.SendCombined)]
            self._carrier.send_results(flat, row_weights, actions, self._machine, self._driver.wait_until_written)
            self._carrier.keep_own_results(flat, row_weights)
            self._driver.watch()

    def combine_receive(self, topk_weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The second half."""
        with self._alone():
            if self._carrier.routing is None or self._machine.phase not in (Phase.COMBINE, Phase.IDLE):
                self._machine._check(Phase.COMBINE, "combine_receive")
                raise PhaseError("combine_receive() without combine_send()")
            self._driver.work(Phase.COMBINE)
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
    def reasons(self) -> dict[int, str]:
        """Why each masked rank is."""
        return self._driver.reasons

    @property
    def timeout(self) -> float:
        """Seconds that this rank waits for a rank that gives no sign; may be changed between calls."""
        return self._driver.waiting.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        if not 0.001 <= seconds <= 3600:
            raise ConfigurationError(f"timeout is between 0.001 and 3600 seconds, not {seconds}")
        self._driver.waiting.timeout = seconds

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
            self._driver.run(self._machine.missing(rank, reason))

    def reform(self, exchange: Exchange) -> None:
        """Takes ranks back. All live ranks and those that come back call it, with nothing under way: the live ones
        between combine and dispatch, a restarted one by :meth:`join`. Afterwards all are in one generation.

        Raises:
            PhaseError: in the middle of a generation.
        """
        with self._alone():
            if self._machine.phase not in (Phase.IDLE, Phase.OUT):
                raise PhaseError(f"reform() in phase {self._machine.phase.value!r}")
            self._driver.wait_for_fences()
            self._driver.waiting.drop()
            for sent in (self._wires.dispatching, self._wires.combining):
                self._driver.settle(sent)
            generation, absent = self._wires.meet(exchange, self._machine.generation, max(10.0, self.timeout))
            self._machine.reform(generation, absent)
            self._driver.reasons = {rank: self.reasons.get(rank, "absent") for rank in absent}

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
            self._driver.settle(sent)  # a slower rank may still wait for it, and the engine may be closed next
        self._machine.masked_out()
        self._driver.waiting.drop()
        self._wires.close()

    def __enter__(self) -> ExpertGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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
