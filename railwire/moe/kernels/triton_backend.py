"""The Triton kernels as a backend: a launch per step, sizes from the geometry. Works on CUDA tensors, and on CPU
tensors in Triton's interpreter (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton

from railwire.moe.geometry import MAGIC, Array, Geometry
from railwire.moe.kernels import triton_kernels as k
from railwire.moe.kernels.backend import Routing
from railwire.moe.kernels.torch_backend import TorchBackend

Tensor = torch.Tensor
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
ROUTE_BLOCK = 64
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_FIXED_WORDS = 8
INTERPRETED = bool(triton.knobs.runtime.interpret)


def word_of(nbytes: int) -> int:
    """The widest word, 4, 2 or 1 bytes, that divides a token."""
    return 4 if nbytes % 4 == 0 else 2 if nbytes % 2 == 0 else 1


def block_of(words: int, word: int) -> int:
    """Words that one program copies: 16 bytes for each of 128 threads, twice."""
    return int(min(4096 // word, triton.next_power_of_2(words)))


class TritonBackend(TorchBackend):
    """See :class:`railwire.moe.kernels.KernelBackend`. What is not worth a kernel (``standard``'s top-k, blanks of
    missing ranks) is torch's."""

    def __init__(self, geometry: Geometry, device: str = "cuda") -> None:
        super().__init__(geometry, device)
        g, c = geometry, geometry.config
        self.token_word = word_of(g.token_bytes)
        self.result_word = word_of(g.combine_token_bytes)
        self.number = c.ranks * g.bins
        self.per_rank = g.bins

    # ---- route -------------------------------------------------------------------------------------------------------
    def bins_of(self, topk_ids: Tensor) -> Tensor:
        """The bin of each pair, int32, -1 for none."""
        c = self.geometry.config
        if c.layout != "standard":
            return topk_ids.to(torch.int32).contiguous()
        bins = torch.where(topk_ids >= 0, topk_ids // c.local_experts, -1).to(torch.int32)
        for j in range(1, bins.shape[1]):
            double = (bins[:, :j] == bins[:, j : j + 1]).any(dim=1)
            bins[:, j] = torch.where(double, -1, bins[:, j])
        return bins.contiguous()

    def route_device(self, bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(slots int32, counts, starts), all on the device; may be captured in a graph."""
        pairs = bins.numel()
        blocks = max(1, triton.cdiv(pairs, ROUTE_BLOCK))
        histogram = torch.zeros((blocks, self.number), dtype=torch.int32, device=self.device)
        counts = torch.empty(self.number, dtype=torch.int32, device=self.device)
        starts = torch.empty(self.number, dtype=torch.int32, device=self.device)
        ranks = torch.empty(max(pairs, 1), dtype=torch.int32, device=self.device)
        slots = torch.empty(bins.shape, dtype=torch.int32, device=self.device)
        if pairs:
            k.rank_kernel[(blocks,)](bins, ranks, histogram, pairs, self.number, BLOCK=ROUTE_BLOCK)
        wide = max(2, triton.next_power_of_2(self.number))
        k.scan_kernel[(1,)](histogram, counts, starts, blocks, self.number, BINS=wide)
        if pairs:
            k.slot_kernel[(blocks,)](bins, ranks, histogram, slots, pairs, self.number, BLOCK=ROUTE_BLOCK)
        return slots, counts, starts

    def route(self, topk_ids: Tensor) -> Routing:
        bins = self.bins_of(topk_ids)
        slots, counts, _ = self.route_device(bins)
        per_rank = counts.cpu().numpy().astype(np.int64).reshape(self.geometry.config.ranks, -1)
        sent = per_rank.sum(axis=1)
        routing = Routing(slots, per_rank, sent, np.cumsum(sent) - sent, bins)
        return routing

    # ---- dispatch ----------------------------------------------------------------------------------------------------
    def pack(
        self, x: Tensor, scales: Tensor | None, ids: Tensor, weights: Tensor | None, routing: Routing, send: Tensor
    ) -> None:
        bins = routing.tokens
        self.pack_device(x, scales, bins, routing.slots, send)
        if self.geometry.config.layout == "standard" and bins.numel():
            self._pack_topk(ids, weights, bins, routing.slots, send)

    def pack_device(self, x: Tensor, scales: Tensor | None, bins: Tensor, slots: Tensor, send: Tensor) -> None:
        """May be captured in a graph."""
        g, c = self.geometry, self.geometry.config
        tokens = x.shape[0]
        if not tokens:
            return
        if c.fp8 and scales is None:
            groups = min(16, max(2, triton.next_power_of_2(g.scales)))
            k.pack_fp8_kernel[(tokens, triton.cdiv(g.scales, groups))](
                x.contiguous(), bins, slots, send, send.view(torch.float32),
                TOP_K=c.top_k, PER_RANK=self.per_rank, HIDDEN=c.hidden, ROW=g.row, HEADER=g.header,
                SCALE_AT=g.scale_offset, SCALES=g.scales, GROUPS=groups, enable_fp_fusion=False,
            )  # fmt: skip
            return
        word = self.token_word
        self._pack_words(x.contiguous().view(torch.uint8), bins, slots, send, g.token_bytes, word, 0)
        if scales is not None:
            self._pack_words(scales.contiguous().view(torch.uint8), bins, slots, send, 4 * g.scales, 4, g.scale_offset)

    def _pack_words(
        self, data: Tensor, bins: Tensor, slots: Tensor, send: Tensor, nbytes: int, word: int, at: int
    ) -> None:
        g, c = self.geometry, self.geometry.config
        words = nbytes // word
        block = block_of(words, word)
        k.pack_kernel[(data.shape[0], triton.cdiv(words, block))](
            data.view(_WORDS[word]), bins, slots, send[at:].view(_WORDS[word]),
            TOP_K=c.top_k, PER_RANK=self.per_rank, WORDS=words, ROW=g.row // word, HEADER=g.header // word, BLOCK=block,
        )  # fmt: skip

    def _pack_topk(self, ids: Tensor, weights: Tensor | None, bins: Tensor, slots: Tensor, send: Tensor) -> None:
        g = self.geometry
        self._pack_words(self._topk_bytes(ids, weights), bins, slots, send, 8 * g.config.top_k, 4, g.topk_offset)

    def headers_device(self, counts: Tensor, starts: Tensor, control: Tensor, send: Tensor) -> None:
        """Writes all headers; ``control``: int32 words, generation (2), next slot rows, mask. May be captured."""
        g = self.geometry
        words = g.header // 4
        k.header_kernel[(g.config.ranks,)](
            counts, starts, control, send.view(torch.int32), WORDS=words, ROW=g.row // 4, BINS=g.bins,
            FIRST=_FIXED_WORDS + g.mask_words, BLOCK=triton.next_power_of_2(words), FIXED=_FIXED_WORDS, MAGIC=MAGIC,
        )  # fmt: skip

    def plan_device(self, counts: Tensor, slot_rows: int, status: Tensor) -> tuple[Tensor, Tensor]:
        """(rows ``[ranks, slot_rows]`` int32, expert rows ``[bins]`` int32) from counts ``[ranks, bins]`` int32."""
        g, c = self.geometry, self.geometry.config
        rows = torch.empty((c.ranks, slot_rows), dtype=torch.int32, device=self.device)
        expert_rows = torch.empty(g.bins, dtype=torch.int32, device=self.device)
        self.plan_into(counts, slot_rows, status, rows, expert_rows)
        return rows, expert_rows

    def plan_into(self, counts: Tensor, slot_rows: int, status: Tensor, rows: Tensor, expert_rows: Tensor) -> None:
        """The same, into memory that is there."""
        g, c = self.geometry, self.geometry.config
        align = c.expert_alignment if c.layout == "grouped" else 1
        stride = c.ranks * c.max_tokens if c.layout == "batched" else 0
        k.plan_kernel[(c.ranks,)](
            counts, rows, expert_rows, status, c.ranks, slot_rows, align, stride, BINS=g.bins,
            WIDE=max(2, triton.next_power_of_2(g.bins)), BLOCK=64,
        )  # fmt: skip

    def unpack_device(self, source: Tensor, rows: Tensor, slot_rows: int, header: int, outputs: Outputs) -> None:
        """Rows of all slots, ``rows[source, i]``, -1 for none. ``header``: bytes before the rows of each slot."""
        g = self.geometry
        word = self.token_word
        words = g.token_bytes // word
        block = block_of(words, word)
        x, scales = outputs[0], outputs[1]
        none = scales is None
        k.unpack_kernel[(rows.numel(), triton.cdiv(words, block))](
            source.view(_WORDS[word]), source.view(torch.float32), rows, x.view(torch.uint8).view(_WORDS[word]),
            source.view(torch.float32) if none else scales, slot_rows, WORDS=words, ROW=g.row // word,
            HEADER=header // word, SCALE_AT=g.scale_offset, SCALES=g.scales, WORD=word,
            WIDE=triton.next_power_of_2(max(g.scales, 2)), BLOCK=block,
        )  # fmt: skip

    def unpack(self, source: Tensor, first: int, rows: Array, outputs: Outputs) -> None:
        g = self.geometry
        if not rows.size:
            return
        here = source[first : first + rows.size * g.row]
        index = torch.from_numpy(rows).to(self.device).to(torch.int32)
        self.unpack_device(here, index, rows.size, 0, outputs)
        if outputs[2] is not None:
            received = here.view(rows.size, g.row)
            half = g.topk_offset + 4 * g.config.top_k
            _, _, ids, weights = outputs
            assert ids is not None and weights is not None
            ids.view(torch.uint8)[index.long()] = received[:, g.topk_offset : half]
            weights.view(torch.uint8)[index.long()] = received[:, half : half + 4 * g.config.top_k]

    # ---- combine -----------------------------------------------------------------------------------------------------
    def gather_device(self, y: Tensor, rows: Tensor, send: Tensor, first: int) -> None:
        """Result rows ``rows[i]`` (-1: none) to rows ``first + i`` of the send region."""
        g = self.geometry
        word = self.result_word
        words = g.combine_token_bytes // word
        block = block_of(words, word)
        k.gather_kernel[(rows.numel(), triton.cdiv(words, block))](
            y.view(torch.uint8).view(_WORDS[word]), rows, send.view(_WORDS[word]), first,
            WORDS=words, ROW=g.combine_row // word, BLOCK=block,
        )  # fmt: skip

    def gather(self, y: Tensor, weights: Tensor | None, rows: Array, send: Tensor, first: int) -> None:
        if not rows.size:
            return
        g = self.geometry
        index = torch.from_numpy(rows).to(self.device).to(torch.int32)
        self.gather_device(y.contiguous(), index, send, first)
        if g.config.layout == "standard":
            begin = first * g.combine_row
            segment = send[begin : begin + rows.size * g.combine_row].view(rows.size, g.combine_row)
            tail = segment[:, g.combine_topk_offset : g.combine_topk_offset + 4 * g.config.top_k]
            if weights is None:
                tail.zero_()
            else:
                tail.copy_(weights[index.long()].view(torch.uint8))

    def reduce(self, received: Tensor, slots: Tensor, weights: Tensor | None, out: Tensor) -> None:
        """May be captured in a graph."""
        g, c = self.geometry, self.geometry.config
        tokens = slots.shape[0]
        if not tokens:
            return
        block = min(1024, triton.next_power_of_2(c.hidden))
        values = received.view(self.dtype)
        bfloat16 = c.dtype == "bfloat16"
        k.reduce_kernel[(tokens, triton.cdiv(c.hidden, block))](
            values, slots, slots if weights is None else weights, out.view(torch.int16) if bfloat16 else out,
            TOP_K=c.top_k, WEIGHTED=weights is not None, HIDDEN=c.hidden, ROW=g.combine_row // values.element_size(),
            BFLOAT16=bfloat16, BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip

    def reduce_weights(self, received: Tensor, slots: Tensor, out: Tensor) -> None:
        super().reduce_weights(received, slots.long(), out)


def raise_flag(address: int, value: int) -> None:
    """Raises a 64-bit word in pinned or device memory, after everything before it on the current stream."""
    k.flag_kernel[(1,)](address, value, ASM=not INTERPRETED, num_warps=1)


def wait_for(address: int, value: int, status: Tensor, clock: Tensor, limit: int) -> None:
    """The current stream goes on when the word has reached ``value``, or after ``limit`` nanoseconds: ``status[0] =
    1``. ``clock``: int64 scratch."""
    k.wait_kernel[(1,)](address, value, status, clock, limit, ASM=not INTERPRETED, num_warps=1)


__all__: list[Any] = ["TritonBackend", "block_of", "raise_flag", "wait_for", "word_of"]
