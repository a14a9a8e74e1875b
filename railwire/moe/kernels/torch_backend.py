"""The kernels in plain torch: what all others are compared with, and what runs on CPUs."""

from __future__ import annotations

import numpy as np
import torch

from railwire.moe.geometry import Array, Geometry
from railwire.moe.kernels.backend import Routing
from railwire.moe.kernels.quantise import quantise

Tensor = torch.Tensor
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def in_words(nbytes: int) -> tuple[torch.dtype, int]:
    """(the widest integer that divides so many bytes, how many): torch copies rows of it ten times as fast as bytes."""
    word = next(word for word in _WORDS if nbytes % word == 0)
    return _WORDS[word], nbytes // word


class TorchBackend:
    """See :class:`railwire.moe.kernels.KernelBackend`."""

    def __init__(self, geometry: Geometry, device: str = "cpu") -> None:
        self.geometry = geometry
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, geometry.config.dtype)

    # ---- dispatch ----------------------------------------------------------------------------------------------------
    def route(self, topk_ids: Tensor) -> Routing:
        config = self.geometry.config
        ids = topk_ids.detach().cpu().numpy().astype(np.int64, copy=False)
        local = config.local_experts
        if config.layout == "standard":
            bins = np.where(ids >= 0, ids // local, -1)
            for j in range(1, bins.shape[1]):
                bins[(bins[:, :j] == bins[:, j : j + 1]).any(axis=1), j] = -1
            number = config.ranks
        else:
            bins = ids
            number = config.ranks * local
        flat = bins.reshape(-1)
        counts = np.bincount(flat[flat >= 0], minlength=number)
        order = np.argsort(flat, kind="stable")[flat.size - int(counts.sum()) :]
        slots = np.full(flat.size, -1, np.int64)
        slots[order] = np.arange(order.size)
        per_rank = counts.reshape(config.ranks, -1)
        sent = per_rank.sum(axis=1)
        return Routing(
            torch.from_numpy(slots.reshape(bins.shape)).to(self.device),
            per_rank,
            sent,
            np.cumsum(sent) - sent,
            torch.from_numpy(order // max(bins.shape[1], 1)).to(self.device),
        )

    def pack(
        self, x: Tensor, scales: Tensor | None, ids: Tensor, weights: Tensor | None, routing: Routing, send: Tensor
    ) -> None:
        g = self.geometry
        if not routing.tokens.numel():
            return
        if g.config.fp8 and scales is None:
            x, scales = quantise(x)
        dtype, words = in_words(g.token_bytes)
        payload = x.contiguous().view(torch.uint8).view(dtype)
        floats = None if scales is None else scales.contiguous()
        topk = None if g.config.layout != "standard" else self._topk_bytes(ids, weights)
        for rank in np.flatnonzero(routing.sent).tolist():
            first, rows = int(routing.segments[rank]), int(routing.sent[rank])
            begin = g.sent_segment(rank, first) + g.header
            segment = send[begin : begin + rows * g.row].view(rows, g.row)
            tokens = routing.tokens[first : first + rows]
            segment.view(dtype)[:, :words] = torch.index_select(payload, 0, tokens)
            if floats is not None:
                at = g.scale_offset // 4
                segment.view(torch.float32)[:, at : at + g.scales] = torch.index_select(floats, 0, tokens)
            if topk is not None:
                segment[:, g.topk_offset : g.topk_offset + topk.shape[1]] = topk[tokens]

    def outputs(self, rows: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        g, c = self.geometry, self.geometry.config
        dtype = torch.float8_e4m3fn if c.fp8 else self.dtype
        x = torch.empty((rows, c.hidden), dtype=dtype, device=self.device)
        scales = torch.empty((rows, g.scales), dtype=torch.float32, device=self.device) if c.fp8 else None
        if c.layout != "standard":
            return x, scales, None, None
        ids = torch.empty((rows, c.top_k), dtype=torch.int32, device=self.device)
        weights = torch.empty((rows, c.top_k), dtype=torch.float32, device=self.device)
        return x, scales, ids, weights

    def unpack(
        self,
        source: Tensor,
        first: int,
        rows: Array,
        outputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    ) -> None:
        g = self.geometry
        if not rows.size:
            return
        received = source[first : first + rows.size * g.row].view(rows.size, g.row)
        index = torch.from_numpy(rows).to(self.device)
        x, scales, ids, weights = outputs
        dtype, words = in_words(g.token_bytes)
        x.view(torch.uint8).view(dtype).index_copy_(0, index, received.view(dtype)[:, :words])
        if scales is not None:
            at = g.scale_offset // 4
            scales.index_copy_(0, index, received.view(torch.float32)[:, at : at + g.scales])
        if ids is not None and weights is not None:
            half = g.topk_offset + 4 * g.config.top_k
            ids.view(torch.uint8)[index] = received[:, g.topk_offset : half]
            weights.view(torch.uint8)[index] = received[:, half : half + 4 * g.config.top_k]

    def blank(self, rows: Array, outputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]) -> None:
        index = torch.from_numpy(rows).to(self.device)
        x, scales, ids, weights = outputs
        x.view(torch.uint8)[index] = 0
        if scales is not None:
            scales[index] = 0
        if ids is not None and weights is not None:
            ids[index] = -1
            weights[index] = 0

    # ---- combine -----------------------------------------------------------------------------------------------------
    def gather(self, y: Tensor, weights: Tensor | None, rows: Array, send: Tensor, first: int) -> None:
        g = self.geometry
        if not rows.size:
            return
        begin = first * g.combine_row
        segment = send[begin : begin + rows.size * g.combine_row].view(rows.size, g.combine_row)
        index = torch.from_numpy(rows).to(self.device)
        dtype, words = in_words(g.combine_token_bytes)
        rows_ = y.contiguous().view(torch.uint8).view(dtype)
        segment.view(dtype)[:, :words] = torch.index_select(rows_, 0, index)
        if g.config.layout == "standard":
            tail = segment[:, g.combine_topk_offset : g.combine_topk_offset + 4 * g.config.top_k]
            if weights is None:
                tail.zero_()
            else:
                tail.copy_(weights[index].view(torch.uint8))

    def reduce(self, received: Tensor, slots: Tensor, weights: Tensor | None, out: Tensor) -> None:
        g = self.geometry
        dtype, words = in_words(g.combine_token_bytes)
        rows = received.view(-1, g.combine_row).view(dtype)[:, :words]
        total = torch.zeros((slots.shape[0], g.config.hidden), dtype=torch.float32, device=self.device)
        for j in range(slots.shape[1]):
            here = torch.nonzero(slots[:, j] >= 0).flatten()
            if not here.numel():
                continue
            values = torch.index_select(rows, 0, slots[here, j]).view(self.dtype).to(torch.float32)
            if weights is not None:
                values *= weights[here, j].unsqueeze(1)
            if here.numel() == slots.shape[0]:
                total += values
            else:
                total[here] += values
        out.copy_(total)

    def reduce_weights(self, received: Tensor, slots: Tensor, out: Tensor) -> None:
        g, k = self.geometry, self.geometry.config.top_k
        tail = received.view(-1, g.combine_row)[:, g.combine_topk_offset : g.combine_topk_offset + 4 * k]
        out.zero_()
        for j in range(slots.shape[1]):
            here = torch.nonzero(slots[:, j] >= 0).flatten()
            out[here] += tail[slots[here, j]].contiguous().view(torch.float32)

    def _topk_bytes(self, ids: Tensor, weights: Tensor | None) -> Tensor:
        """int32 ids, then float32 weights, ``[tokens, 8 * top_k]``."""
        ids32 = ids.to(torch.int32).contiguous()
        floats = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device) if weights is None else weights
        return torch.cat([ids32.view(torch.uint8), floats.to(torch.float32).contiguous().view(torch.uint8)], dim=1)
