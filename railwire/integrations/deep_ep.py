"""DeepEP's V1 interface (``deep_ep.Buffer``) over :class:`railwire.moe.ExpertGroup`, for engines that call it: vLLM's
and SGLang's DeepEP classes. :func:`install` makes ``import deep_ep`` find this module.

What is different: everything has happened when a call (or its hook) returns, so events carry nothing; ``handle`` is
opaque, because no token number travels; memory is registered at the first call of each shape, on all ranks together; a
combine belongs between two dispatches of one shape (two micro-batches may be under way). Not there: ``comm=`` (mpi4py),
logfmt, nvfp4, ``get_local_buffer_tensor``, ``get_comm_stream``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from railwire.engine import TransferEngine
from railwire.moe import Dispatched, ExpertGroup, Geometry, GroupExchange, MoeConfig
from railwire.moe.config import SCALE_BLOCK
from railwire.moe.kernels.quantise import FP8_MAX, FP8_MIN_AMAX

Tensor = torch.Tensor
Hook = Callable[[], None]


class EventOverlap:
    """Nothing to wait for: the call has done its work when it returns."""

    event = None
    extra_tensors = None

    def __init__(self, event: Any = None, extra_tensors: Any = None) -> None:
        pass

    def current_stream_wait(self) -> None:
        """Returns at once."""

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


EventHandle = EventOverlap


@dataclass(frozen=True)
class Config:
    """Tuning of DeepEP's kernels; nothing here depends on it."""

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: memory follows from the shapes."""
        return 0

    get_rdma_buffer_size_hint = get_nvl_buffer_size_hint


@dataclass
class Handle:
    """Of one dispatch, for its combine."""

    group: ExpertGroup
    topk_idx: Tensor
    expert_alignment: int = 1
    buffer: Tensor | None = None

    @property
    def layout_range(self) -> Tensor:
        """int64 ``[local experts, ranks]``: rows of each source, and (upper 32 bits) the first of them in its
        expert."""
        counts = torch.from_numpy(self.group.last.counts)
        begins = torch.cumsum(counts, 0) - counts
        return (counts | begins << 32).T.contiguous()


class Buffer:
    """See the module and DeepEP's documentation (V1).

    Args:
        group: torch ProcessGroup of the expert-parallel ranks.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, num_qps_per_rank, allow_nvlink_for_low_latency_mode,
        allow_mnnvl, use_fabric, explicitly_destroy: accepted; memory follows from the shapes.
        enable_shrink: go on without ranks that are missing.
        engine: None: one of its own on all NICs.
        max_tokens: most tokens of a rank in one ``dispatch()``.
        timeout: seconds until a rank that gives no sign is missing.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, low_latency_mode: bool = False,
        num_qps_per_rank: int = 24, allow_nvlink_for_low_latency_mode: bool = True, allow_mnnvl: bool = False,
        explicitly_destroy: bool = False, enable_shrink: bool = False, comm: Any = None, *,
        use_fabric: bool = False, engine: TransferEngine | None = None, max_tokens: int = 4096, timeout: float = 60.0,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        if group is None or comm is not None:
            raise NotImplementedError("Buffer takes a torch ProcessGroup, not an mpi4py communicator")
        self.group = group
        self.rank = torch.distributed.get_rank(group)
        self.group_size = torch.distributed.get_world_size(group)
        self.low_latency_mode = low_latency_mode
        self._engine = engine or TransferEngine()
        self._own_engine = engine is None
        self._options = {"timeout": timeout, "shrink": enable_shrink, "device": device}
        self._max_tokens = max_tokens
        self._groups: dict[Any, list[ExpertGroup]] = {}
        self._turn: dict[Any, int] = {}

    # ---- class-wide --------------------------------------------------------------------------------------------------
    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Raises ValueError unless it is even. Nothing depends on it."""
        if new_num_sms % 2:
            raise ValueError(f"the number of SMs must be even, not {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap()

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    get_combine_config = get_dispatch_config

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Registered memory for top-8 and bfloat16, in bytes."""
        config = MoeConfig(
            ranks=num_ranks, experts=num_experts, hidden=hidden, max_tokens=num_max_dispatch_tokens_per_rank, top_k=8
        )
        return Geometry(config).registered_bytes

    # ---- low latency -------------------------------------------------------------------------------------------------
    def low_latency_dispatch(
        self, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None, dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True, round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False, use_nvfp4: bool = False,
    ) -> tuple[Any, Tensor, Handle, EventOverlap, Hook | None]:  # fmt: skip
        """``(recv, recv_count, handle, event, hook)``; the rows are valid when ``hook()`` has returned."""
        if use_nvfp4:
            raise NotImplementedError("nvfp4 is not supported: use_fp8 or bfloat16")
        if async_finish and return_recv_hook:
            raise ValueError("async_finish and return_recv_hook exclude each other")
        if use_ue8m0 and not round_scale:
            raise ValueError("use_ue8m0 needs round_scale")
        key = ("ll", num_max_dispatch_tokens_per_rank, x.shape[1], num_experts, topk_idx.shape[1], use_fp8)
        group = self._next_group(
            key, MoeConfig(
                ranks=self.group_size, experts=num_experts, hidden=x.shape[1], top_k=topk_idx.shape[1],
                max_tokens=num_max_dispatch_tokens_per_rank, fp8=use_fp8, layout="batched",
            ), copies=2,
        )  # fmt: skip
        c = group.config
        slots = c.ranks * c.max_tokens
        tokens: Any = _quantise(x, round_scale) if use_fp8 else x
        out, scales = group.empty_outputs()
        recv_count = torch.zeros(c.local_experts, dtype=torch.int32, device=x.device)
        recv: Any = out.view(c.local_experts, slots, c.hidden)
        columns = None
        if scales is not None:
            shape = (c.local_experts, scales.shape[1] // (4 if use_ue8m0 else 1), slots)
            columns = torch.zeros(shape, dtype=torch.int32 if use_ue8m0 else torch.float32, device=x.device)
            recv = (recv, columns.transpose(1, 2))
        handle = Handle(group, topk_idx)
        waited = list(group.stats["wait_seconds"])
        group.dispatch_send(tokens, topk_idx, into=(out, scales))

        def receive() -> None:
            got = group.dispatch_receive()
            recv_count.copy_(torch.from_numpy(got.expert_rows))
            if columns is not None:
                assert scales is not None
                rows = scales.view(c.local_experts, slots, -1)
                columns.copy_((_pack_exponents(rows) if use_ue8m0 else rows).transpose(1, 2))
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(recv_count)
            if dispatch_wait_recv_cost_stats is not None:
                spent = [now - before for now, before in zip(group.stats["wait_seconds"], waited, strict=True)]
                stats = dispatch_wait_recv_cost_stats
                stats.add_((torch.tensor(spent) * 1e6).to(stats.dtype))

        return recv, recv_count, handle, EventOverlap(), _now_or_hook(receive, return_recv_hook)

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Handle, use_logfmt: bool = False,
        zero_copy: bool = False, async_finish: bool = False, return_recv_hook: bool = False, out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:  # fmt: skip
        """``(combined_x, event, hook)``: the weighted sum in float32, in top-k order; rows of masked ranks are left
        out."""
        if use_logfmt:
            raise NotImplementedError("logfmt is not supported")
        group = handle.group
        if out is None:
            out = torch.empty((topk_idx.shape[0], group.config.hidden), dtype=torch.bfloat16, device=x.device)
        result = out
        group.combine_send(handle.buffer if zero_copy and handle.buffer is not None else x)

        def receive() -> None:
            group.combine_receive(topk_weights, result)

        return result, EventOverlap(), _now_or_hook(receive, return_recv_hook)

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """Where ``zero_copy`` expects the results, ``[local experts, ranks * max tokens, hidden]``."""
        c = handle.group.config
        if handle.buffer is None:
            shape = (c.local_experts, c.ranks * c.max_tokens, c.hidden)
            handle.buffer = torch.zeros(shape, dtype=torch.bfloat16, device=handle.topk_idx.device)
        return handle.buffer

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to clean: no flag is ever reset."""

    # ---- masks -------------------------------------------------------------------------------------------------------
    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Masks a rank. ``mask=False`` raises: a rank comes back by :meth:`low_latency_clean_mask_buffer`."""
        if not mask:
            raise NotImplementedError("one rank cannot be taken back by itself: low_latency_clean_mask_buffer()")
        for group in self._all("ll"):
            group.mask(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """``mask_status[r] = 1`` for ranks that the groups go on without, int32 ``[ranks]``."""
        mask_status.zero_()
        for group in self._all("ll"):
            for rank in group.masked:
                mask_status[rank] = 1

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes all ranks back; all of them call it."""
        for group in self._all("ll"):
            if group.masked:
                group.reform(GroupExchange(self.group))

    # ---- normal ------------------------------------------------------------------------------------------------------
    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:  # fmt: skip
        """``(num_tokens_per_rank, None, num_tokens_per_expert, is_token_in_rank, event)``."""
        local = -(-num_experts // self.group_size)
        valid = topk_idx >= 0
        per_expert = torch.bincount(topk_idx[valid].flatten(), minlength=num_experts).to(torch.int32)
        in_rank = torch.zeros((topk_idx.shape[0], self.group_size + 1), dtype=torch.bool, device=topk_idx.device)
        in_rank.scatter_(1, torch.where(valid, topk_idx // local, self.group_size).to(torch.int64), True)
        in_rank = in_rank[:, : self.group_size].contiguous()
        return in_rank.sum(0).to(torch.int32), None, per_expert, in_rank, EventOverlap()

    def dispatch(
        self, x: Any, handle: Handle | None = None, num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None, is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None,
        expert_alignment: int = 1, num_worst_tokens: int = 0, config: Config | None = None, previous_event: Any = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:  # fmt: skip
        """``(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert, handle, event)``; with ``handle``
        the routes of that dispatch are used again, and only ``recv_x`` is returned."""
        if num_worst_tokens:
            raise NotImplementedError("num_worst_tokens is not supported")
        tokens = x[0] if isinstance(x, tuple) else x
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("with handle, topk_idx and topk_weights must be None")
            group, cached = handle.group, True
            got = group.dispatch(x, handle.topk_idx)
        else:
            if topk_idx is None or num_tokens_per_expert is None:
                raise ValueError("dispatch() needs topk_idx and num_tokens_per_expert, or a handle")
            cached = False
            experts = num_tokens_per_expert.shape[0]
            key = ("ht", tokens.shape[1], experts, topk_idx.shape[1], isinstance(x, tuple))
            group = self._next_group(
                key, MoeConfig(
                    ranks=self.group_size, experts=experts, hidden=tokens.shape[1], top_k=topk_idx.shape[1],
                    max_tokens=self._max_tokens, fp8=isinstance(x, tuple), layout="standard",
                ), copies=2,
            )  # fmt: skip
            if isinstance(x, tuple):
                x = (x[0], x[1].contiguous())
            got = group.dispatch(x, topk_idx, topk_weights)
            handle = Handle(group, topk_idx, expert_alignment)
        recv = got.x if got.scales is None else (got.x, got.scales)
        if cached:
            return recv, None, None, None, None, EventOverlap()
        assert got.topk_ids is not None
        ids = got.topk_ids.to(torch.int64)
        here = torch.bincount(ids[ids >= 0], minlength=group.config.local_experts).tolist()
        aligned = [-(-rows // expert_alignment) * expert_alignment for rows in here]
        return recv, ids, got.topk_weights, aligned, handle, EventOverlap()

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, bias: Any = None,
        config: Config | None = None, previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:  # fmt: skip
        """``(combined_x, combined_topk_weights, event)``: the sum over ranks in float32, ``bias`` (a tensor or two)
        added."""
        group = handle.group
        group.combine_send(x, topk_weights)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        shape = (handle.topk_idx.shape[0], group.config.hidden)
        out = torch.empty(shape, dtype=torch.float32 if biases else torch.bfloat16, device=x.device)
        group.combine_receive(None, out)
        for tensor in biases:
            out += tensor.to(torch.float32)
        weights = group.returned_weights() if topk_weights is not None else None
        return out.to(torch.bfloat16), weights, EventOverlap()

    # ---- the rest ----------------------------------------------------------------------------------------------------
    def destroy(self) -> None:
        """Closes all groups, and the engine if it is our own."""
        for group in self._all():
            group.close()
        self._groups.clear()
        if self._own_engine:
            self._engine.close()

    def _all(self, kind: str | None = None) -> list[ExpertGroup]:
        return [group for key, groups in self._groups.items() if kind in (None, key[0]) for group in groups]

    def _next_group(self, key: Any, config: MoeConfig, copies: int) -> ExpertGroup:
        """The group of this shape whose turn it is; made when it is used first, by all ranks together."""
        if key not in self._groups:
            self._groups[key] = []
            self._turn[key] = 0
        groups = self._groups[key]
        turn = self._turn[key] % copies
        self._turn[key] += 1
        if turn == len(groups):
            exchange = GroupExchange(self.group)
            groups.append(ExpertGroup(self._engine, config, self.rank, exchange, **self._options))  # type: ignore[arg-type]
        return groups[turn]


def install() -> None:
    """Makes ``import deep_ep`` find this module. Raises ImportError if another deep_ep is imported already."""
    here = sys.modules[__name__]
    if sys.modules.get("deep_ep", here) is not here:
        raise ImportError("another deep_ep has been imported already")
    sys.modules["deep_ep"] = here


def _now_or_hook(receive: Hook, hook: bool) -> Hook | None:
    if hook:
        return receive
    receive()
    return None


def _quantise(x: Tensor, round_scale: bool) -> tuple[Tensor, Tensor]:
    """As DeepEP's dispatch: scale = max / 448, rounded up to a power of two with ``round_scale``."""
    from railwire.moe.kernels.quantise import quantise

    if not round_scale:
        return quantise(x)
    tokens, hidden = x.shape
    if hidden % SCALE_BLOCK:
        raise ValueError(f"round_scale needs a multiple of {SCALE_BLOCK} channels, not {hidden}")
    wide = x.to(torch.float32).view(tokens, -1, SCALE_BLOCK)
    scales = torch.exp2(torch.ceil(torch.log2(wide.abs().amax(2).clamp_min(FP8_MIN_AMAX) / FP8_MAX)))
    values = (wide / scales.unsqueeze(2)).clamp(-FP8_MAX, FP8_MAX)
    return values.view(tokens, hidden).to(torch.float8_e4m3fn), scales


def _pack_exponents(scales: Tensor) -> Tensor:
    """Powers of two as ue8m0 bytes, four in an int32."""
    exponents = (scales.contiguous().view(torch.int32) >> 23) & 0xFF
    four = exponents.view(*scales.shape[:-1], -1, 4)
    return four[..., 0] | four[..., 1] << 8 | four[..., 2] << 16 | four[..., 3] << 24


__all__ = ["Buffer", "Config", "Dispatched", "EventHandle", "EventOverlap", "Handle", "install"]
