"""An expert-parallel group whose layers are kernels and native actions alone, so that a CUDA graph may capture them.

A kernel fills the table of a prepared scatter and raises its word; the engine's own thread posts it; words that follow
the counters of the arrivals let the other side's kernel go on. No Python runs between the layers of a replay.

What differs from :class:`~railwire.moe.group.ExpertGroup`: there is no second round, because a host would have to
lend rows in the middle of a graph. So a slot holds the most that a rank can send to another one, or ``slot_rows``, and
a layer that sends more fails. All slots, a rank's own included, are equally large::

    dispatch: pack -> send slot r -> [prepared scatter] -> slot g of r -> unpack
    combine:  gather -> send slot g -> [prepared scatter] -> rows S_r.. of g's combine region -> reduce

Why one set of regions is enough: a rank packs layer n + 1 after it has the results of layer n from all, and those were
sent after layer n had been unpacked; its own sends of layer n must have ended, and a kernel waits for that.

Failures: once anything is wrong, ``status`` (on the device) is not 0; nothing is posted, planned or waited for then,
whatever is replayed. :meth:`GraphGroup.check` says what it was, and the group has ended: the ranks that are left make
a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from railwire import cuda
from railwire.engine import TransferEngine
from railwire.errors import ConfigurationError
from railwire.memory import ScatterTarget
from railwire.moe.checks import check_dispatch, check_results
from railwire.moe.config import MoeConfig
from railwire.moe.errors import MoeError, RankLostError
from railwire.moe.geometry import MAGIC
from railwire.moe.graph_sizes import GraphSizes
from railwire.moe.kernels import graph_kernels as gk
from railwire.moe.kernels.triton_backend import _WORDS, INTERPRETED, TritonBackend, block_of
from railwire.moe.meeting import Remote, meet
from railwire.moe.rendezvous import Exchange
from railwire.prepared import IMMEDIATE, LENGTH, NO_IMMEDIATE, ArrivalWords, Prepared, Trigger

Tensor = torch.Tensor
_DEPTH = 2
_FIRST = 8  # words of a header before its mask and counts
_WHAT = {
    gk.LATE: "did not send in time, or is lost",
    gk.BAD_HEADER: "has sent what no honest rank sends",
}


@dataclass(frozen=True, slots=True)
class GraphDispatched:
    """What has come to the experts of this rank: all on the device, at the same addresses in every layer.

    Attributes:
        x: ``grouped``: ``[output rows, hidden]``, the rows of local expert 0 first, each expert's from a multiple of
            ``expert_alignment``; ``batched``: ``[local experts, ranks * max_tokens, hidden]``. Rows beyond those of an
            expert are whatever was there.
        scales: float32, with fp8: ``[..., ceil(hidden / 128)]``.
        expert_rows: int32 ``[local experts]``.
        counts: int32 ``[ranks, local experts]``: which source sent how many.
    """

    x: Tensor
    scales: Tensor | None
    expert_rows: Tensor
    counts: Tensor


class GraphGroup:
    """One rank of an expert-parallel group whose :meth:`dispatch` and :meth:`combine` only launch kernels, and may be
    captured in a CUDA graph.

    Every rank runs the same layers in the same order. The tensors that dispatch and combine return are overwritten
    by the next layer; take one group (``context``) for each layer that is in flight.

    Args:
        engine: of this rank. ``progress="spin"`` sees words soonest.
        config: equal on all ranks; layout ``grouped`` or ``batched``. ``slot_rows``: the most rows that a rank sends
            to another one; 0: as many as it can (``max_tokens * min(top_k, local experts)``).
        rank, exchange: as for :class:`~railwire.moe.group.ExpertGroup`; all ranks must be there.
        device: of the tokens. ``cpu`` runs the kernels in Triton's interpreter, for tests.
        timeout: seconds that a kernel waits for a rank. In the interpreter: looks, 20,000 for a second.

    Raises:
        ConfigurationError: the ranks disagree, or the configuration cannot be.
        ConnectError: a rank cannot be reached.
    """

    def __init__(
        self,
        engine: TransferEngine,
        config: MoeConfig,
        rank: int,
        exchange: Exchange,
        *,
        device: str = "cuda",
        timeout: float = 1.0,
    ) -> None:
        if not 0 <= rank < config.ranks:
            raise ConfigurationError(f"rank is 0 to {config.ranks - 1}, not {rank}")
        self.timeout = timeout
        self.sizes = GraphSizes.of(config)
        self.config, self.rank = config, rank
        self._device = torch.device(device)
        self._raw = self._device.type == "cpu"
        if self._raw != INTERPRETED:
            raise ConfigurationError("device='cpu' is for Triton's interpreter (TRITON_INTERPRET=1), and only it")
        self._engine = engine
        self._backend = TritonBackend(self.sizes.geometry, device)
        s, g = self.sizes, self.sizes.geometry
        self._send, self._recv, self._results, self._returned = (
            torch.zeros(size, dtype=torch.uint8, device=self._device)
            for size in (s.dispatch, s.dispatch, s.combine_send, g.combine_region)
        )
        self._make_state()
        self._regions = [engine.register(t) for t in (self._send, self._recv, self._results, self._returned)]
        self._first_imm = engine.new_imms(2 * config.ranks)
        self._pages: list[cuda.MappedPages] = []
        self._closers: list[Callable[[], None]] = []
        self._remotes: dict[int, Remote] = {}
        self._slots: Tensor | None = None
        self._ended = False
        try:
            self._remotes, _ = meet(
                engine, exchange, config, rank, [self._regions[1], self._regions[3]], self._first_imm, 0,
                max(10.0, 2 * engine.liveness), self._reset_counters,
            )  # fmt: skip
            missing = set(range(config.ranks)) - {rank} - self._remotes.keys()
            if missing:
                raise ConfigurationError(f"ranks {sorted(missing)} are not there")
            self._dispatching = self._prepare(0, s.slot, s.slot * rank)
            self._combining = self._prepare(1, g.combine_region, 0)
        except BaseException:
            self.close()
            raise

    # ---- making ------------------------------------------------------------------------------------------------------
    def _make_state(self) -> None:
        s, g, ranks, own = self.sizes, self.sizes.geometry, self.config.ranks, self.rank

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._state = ints(1, dtype=torch.int64)  # the generation
        self._status, self._late = ints(1), ints(1024)
        self._clock = ints(1, dtype=torch.int64)
        self._sent, self._came, self._segments, self._nowhere = (ints(ranks) for _ in range(4))
        self._counts = ints(ranks, g.bins)
        self._straight = ints(ranks)
        self._straight[own] = 1
        places = [rank * s.slot for rank in range(ranks)]
        places[own] = self._recv.data_ptr() + own * s.slot - self._send.data_ptr()
        result_places = [rank * s.result_slot for rank in range(ranks)]
        result_places[own] = self._returned.data_ptr() - self._results.data_ptr()
        places, result_places = ([at // 16 for at in all_] for all_ in (places, result_places))  # all are multiples
        self._places = torch.tensor(places, dtype=torch.int64, device=self._device)
        self._result_places = torch.tensor(result_places, dtype=torch.int64, device=self._device)
        x, scales, _, _ = self._backend.outputs(s.output_rows)
        self._outputs = (x, scales, None, None)
        self._rows = ints(ranks, s.slot_rows)
        self._expert_rows = ints(g.bins)

    def _reset_counters(self) -> None:
        for number in range(2 * self.config.ranks):
            self._engine.counter(self._first_imm + number).reset()

    def _prepare(self, phase: int, window: int, first: int) -> _Way:
        """The way of one phase: what posts our sends, and the words of what comes."""
        ranks, engine = self.config.ranks, self._engine
        others = [rank for rank in range(ranks) if rank != self.rank]
        peers = [self._remotes[rank].peer for rank in others]
        imms = torch.full((ranks,), -1, dtype=torch.int64)
        for rank in others:
            imms[rank] = self._remotes[rank].first_imm + phase * ranks + self.rank
        if not others:
            return _Way(None, None, None, imms.to(self._device), 0, 0, 0, 0)
        source = self._regions[2 * phase]
        targets = [ScatterTarget(0, self._remotes[rank].regions[phase][first : first + window]) for rank in others]
        prepared = engine.peer_group(peers).prepare_scatter(source, targets, depth=_DEPTH)
        prepared.table[:, :, LENGTH] = 0
        prepared.table[:, :, IMMEDIATE] = NO_IMMEDIATE
        # One word a rank, our own included: nobody writes that one.
        writers = [self._remotes[rank].peer if rank != self.rank else peers[0] for rank in range(ranks)]
        arrived = engine.arrival_words(self._first_imm + phase * ranks, writers)
        self._closers.append(arrived.close)
        trigger = prepared.on_word()
        self._closers.append(trigger.close)
        return _Way(
            prepared, trigger, arrived, imms.to(self._device),
            self._map(prepared.table.ctypes.data, prepared.table.nbytes),
            self._map(trigger.address, 8),
            self._map(trigger.progress.ctypes.data, 192) + 64,
            self._map(arrived.address, 8 * ranks),
        )  # fmt: skip

    def _map(self, address: int, nbytes: int) -> int:
        """What kernels call a word of the engine's."""
        if self._raw:
            return address
        with torch.cuda.device(self._device):
            pages = cuda.MappedPages(address, nbytes)
        self._pages.append(pages)
        return pages.device_address

    # ---- layers ------------------------------------------------------------------------------------------------------
    def dispatch(self, x: Tensor | tuple[Tensor, Tensor], topk_ids: Tensor) -> GraphDispatched:
        """Launches a dispatch on the current stream: sends each token to the ranks of its experts, and unpacks what the
        others have sent. Arguments as for :meth:`ExpertGroup.dispatch`; rows that are not to be sent have ids of -1.

        Raises:
            TypeError, ValueError: wrong shapes, dtypes or devices; nothing has been launched.
        """
        self.dispatch_send(x, topk_ids)
        return self.dispatch_receive()

    def dispatch_send(self, x: Tensor | tuple[Tensor, Tensor], topk_ids: Tensor) -> None:
        """The first half of :meth:`dispatch`, for overlap."""
        self._check_open()
        values, scales = check_dispatch(self.config, self._device, x, topk_ids, None, values=False)
        s, g, c, way = self.sizes, self.sizes.geometry, self.config, self._dispatching
        gk.begin_kernel[(1,)](self._state)
        self._wait(way.ended, 1, 1, gk.NOT_SENT, -1)
        bins = torch.empty(topk_ids.shape, dtype=torch.int32, device=self._device)
        pairs = bins.numel()
        if pairs:
            gk.bins_kernel[(triton.cdiv(pairs, 256),)](
                topk_ids.contiguous(), bins, self._status, pairs, EXPERTS=c.experts, BLOCK=256
            )
        slots, counts, starts = self._backend.route_device(bins)
        self._slots = slots
        self._pack(values, scales, bins, slots, starts)
        words = g.header // 4
        gk.slot_header_kernel[(c.ranks,)](
            counts, starts, self._state, self._places, self._memory(self._send, 4), self._sent, self._status,
            BINS=g.bins, FIRST=_FIRST + g.mask_words, WORDS=words, MOST=s.slot_rows, MOST_OF_EXPERT=s.most_of_expert,
            MAGIC=MAGIC, RAW=self._raw, BLOCK=triton.next_power_of_2(words),
        )  # fmt: skip
        self._post(way, self._sent, self._nowhere, s.slot, 0, g.header, g.row)

    def dispatch_receive(self) -> GraphDispatched:
        """The second half."""
        self._check_open()
        s, g, c = self.sizes, self.sizes.geometry, self.config
        self._wait(self._dispatching.arrived_at, 0, c.ranks, gk.LATE, self.rank)
        words = g.header // 4
        gk.read_headers_kernel[(c.ranks,)](
            self._memory(self._recv, 4), self._state, self._counts, self._came, self._segments, self._status,
            self._late, BINS=g.bins, HERE=len(c.experts_of(self.rank)), FIRST=_FIRST + g.mask_words,
            STRIDE=s.slot // 4, WORDS=words, MOST=s.slot_rows, MOST_OF_EXPERT=s.most_of_expert, MAX_ROWS=c.max_rows,
            MAGIC=MAGIC, RAW=self._raw, BLOCK=triton.next_power_of_2(words),
        )  # fmt: skip
        self._backend.plan_into(self._counts, s.slot_rows, self._status, self._rows, self._expert_rows)
        self._backend.unpack_device(self._recv, self._rows, s.slot_rows, g.header, self._outputs)
        x, scales = self._outputs[0], self._outputs[1]
        if c.layout == "batched":
            shape = (c.local_experts, c.ranks * c.max_tokens)
            x = x.view(*shape, c.hidden)
            scales = None if scales is None else scales.view(*shape, g.scales)
        return GraphDispatched(x, scales, self._expert_rows, self._counts)

    def combine(self, y: Tensor, topk_weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Launches a combine on the current stream: sends the experts' results back, and sums them up for each of our
        tokens, as :meth:`ExpertGroup.combine` does.

        Args:
            y: as ``GraphDispatched.x``, in the configured dtype.
            topk_weights: ``[tokens, top_k]`` float32; None: all 1.
            out: where the result goes, ``[tokens, hidden]``; None: new memory (in a graph, the graph's).

        Raises:
            TypeError, ValueError: as above. MoeError: there was no dispatch.
        """
        self.combine_send(y)
        return self.combine_receive(topk_weights, out)

    def combine_send(self, y: Tensor) -> None:
        """The first half of :meth:`combine`."""
        self._check_open()
        s, g, way = self.sizes, self.sizes.geometry, self._combining
        flat = check_results(self.config, self._device, y, s.output_rows).contiguous()
        self._wait(way.ended, 1, 1, gk.NOT_SENT, -1)
        word = self._backend.result_word
        words = g.combine_token_bytes // word
        block = block_of(words, word)
        gk.gather_slots_kernel[(self.config.ranks * s.slot_rows, triton.cdiv(words, block))](
            flat.view(torch.uint8).view(_WORDS[word]), self._rows, self._segments, self._result_places, self._straight,
            self._memory(self._results, word), SLOT_ROWS=s.slot_rows, WORDS=words, ROW=g.combine_row // word,
            WORD=word, RAW=self._raw, BLOCK=block,
        )  # fmt: skip
        self._post(way, self._came, self._segments, s.result_slot, g.combine_row, 0, g.combine_row)

    def combine_receive(self, topk_weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The second half."""
        self._check_open()
        if self._slots is None:
            raise MoeError("combine_receive() without dispatch()")
        self._wait(self._combining.arrived_at, 0, self.config.ranks, gk.LATE, self.rank)
        if out is None:
            shape = (self._slots.shape[0], self.config.hidden)
            out = torch.empty(shape, dtype=getattr(torch, self.config.dtype), device=self._device)
        self._backend.reduce(self._returned, self._slots, topk_weights, out)
        return out

    def _pack(self, x: Tensor, scales: Tensor | None, bins: Tensor, slots: Tensor, starts: Tensor) -> None:
        s, g, c = self.sizes, self.sizes.geometry, self.config
        tokens = x.shape[0]
        if not tokens:
            return
        if c.fp8 and scales is None:
            groups = min(16, max(2, triton.next_power_of_2(g.scales)))
            floats = self._send.data_ptr() if self._raw else self._send.view(torch.float32)
            gk.pack_slots_fp8_kernel[(tokens, triton.cdiv(g.scales, groups))](
                x.contiguous(), bins, slots, starts, self._places, self._memory(self._send, 1), floats,
                TOP_K=c.top_k, PER_RANK=g.bins, HIDDEN=c.hidden, ROW=g.row, HEADER=g.header, SCALE_AT=g.scale_offset,
                SCALES=g.scales, MOST=s.slot_rows, GROUPS=groups, RAW=self._raw, enable_fp_fusion=False,
            )  # fmt: skip
            return
        parts = [(x, g.token_bytes, self._backend.token_word, 0)]
        if scales is not None:
            parts.append((scales, 4 * g.scales, 4, g.scale_offset))
        for data, nbytes, word, at in parts:
            words = nbytes // word
            block = block_of(words, word)
            gk.pack_slots_kernel[(tokens, triton.cdiv(words, block))](
                data.contiguous().view(torch.uint8).view(_WORDS[word]), bins, slots, starts, self._places,
                self._memory(self._send, word), TOP_K=c.top_k, PER_RANK=g.bins, WORDS=words, ROW=g.row // word,
                HEADER=g.header // word, AT=at // word, MOST=s.slot_rows, WORD=word, RAW=self._raw, BLOCK=block,
            )  # fmt: skip

    def _post(self, way: _Way, rows: Tensor, firsts: Tensor, stride: int, first: int, header: int, row: int) -> None:
        if way.prepared is None:
            return
        gk.post_kernel[(1,)](
            rows, firsts, self._state, self._status, way.imms, way.table, way.word, OWN=self.rank,
            RANKS=self.config.ranks, DEPTH=_DEPTH, STRIDE=stride, FIRST_BYTES=first, HEADER=header, ROW=row,
            BLOCK=max(2, triton.next_power_of_2(self.config.ranks)), ASM=not self._raw, num_warps=1,
        )  # fmt: skip

    def _wait(self, words: int, behind_by: int, count: int, code: int, own: int) -> None:
        if words == 0:
            return
        limit = int(self._timeout * (2e4 if self._raw else 1e6))
        late = self._late if count > 1 else self._late[1023:]
        gk.wait_all_kernel[(1,)](
            words, self._state, behind_by, self._status, late, self._clock, limit, code, OWN=own, COUNT=count,
            BLOCK=max(2, triton.next_power_of_2(count)), ASM=not self._raw, num_warps=1,
        )  # fmt: skip

    def _memory(self, tensor: Tensor, word: int) -> Any:
        return tensor.data_ptr() if self._raw else tensor.view(_WORDS[word])

    # ---- what went wrong ---------------------------------------------------------------------------------------------
    @property
    def timeout(self) -> float:
        """Seconds that a kernel waits for a rank. What is launched (or captured) after a change has the new one: the
        first layer compiles kernels, which takes some ranks seconds longer than others."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        if not 0.001 <= seconds <= 2000:
            raise ConfigurationError(f"timeout is between 0.001 and 2000 seconds, not {seconds}")
        self._timeout = seconds

    @property
    def generation(self) -> int:
        """Dispatches begun. Waits for the device."""
        return int(self._state.item())

    @property
    def registered_bytes(self) -> int:
        """Registered memory of this group on this rank."""
        return self.sizes.registered

    def check(self) -> None:
        """Waits for the device, and raises what has gone wrong since the beginning. What layers have returned counts
        only if this returns.

        Raises:
            RankLostError: a rank is late, lost, or has sent what it must not.
            ValueError: too many rows for a slot, or an id that names no expert.
            MoeError: our own writes did not end in time.
        """
        status = int(self._status.item())
        if status == 0:
            return
        self._ended = True
        s = self.sizes
        if status & gk.TOO_MANY:
            raise ValueError(
                f"more rows for one rank than the {s.slot_rows} of a slot, or for one expert than {s.most_of_expert}: "
                "slot_rows of the configuration; the group has ended"
            )
        if status & gk.BAD_ID:
            raise ValueError(f"topk_ids beyond -1 to {self.config.experts - 1}; the group has ended")
        late = {rank: kind for rank, kind in enumerate(self._late[: self.config.ranks].tolist()) if kind}
        # Who has stopped because of somebody else is late, too: blame first those that the engine has lost.
        lost = [rank for rank in late if rank in self._remotes and self._remotes[rank].peer.state != "connected"]
        if late:
            rank = (lost or sorted(late))[0]
            name = self._remotes[rank].peer.name if rank in self._remotes else "this one"
            all_ = f" (behind as well: ranks {sorted(set(late) - {rank})})" if len(late) > 1 else ""
            raise RankLostError(
                f"rank {rank} ({name}) {_WHAT[late[rank]]} in generation {self.generation}, time-out "
                f"{self.timeout * 1e3:.0f} ms{all_}; make a new group without it",
                rank=rank,
                generation=self.generation,
            )
        raise MoeError(f"what was sent before did not end within {self.timeout * 1e3:.0f} ms; the group has ended")

    def _check_open(self) -> None:
        if self._ended:
            raise MoeError("the group has ended: make a new one")

    def close(self) -> None:
        """Ends the group. Idempotent. No graph that was captured from it may run any more."""
        self._ended = True
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for close in (*self._closers, *(pages.close for pages in self._pages)):
            close()
        self._closers, self._pages = [], []
        for region in self._regions:
            region.close()

    def __enter__(self) -> GraphGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Way:
    """Of one phase. Addresses are those that kernels use; 0: there is nobody else."""

    prepared: Prepared | None
    trigger: Trigger | None
    arrived: ArrivalWords | None
    imms: Tensor
    table: int
    word: int
    ended: int
    arrived_at: int
