"""Compares the Triton kernels with the torch ones, on whatever device: in the interpreter here, on a GPU there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from railwire.moe import Geometry, MoeConfig
from railwire.moe.kernels.torch_backend import TorchBackend
from railwire.moe.rows import OutputRows


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))


def compare(config: MoeConfig, rng: np.random.Generator, device: str, tokens: int | None = None) -> list[str]:
    """Every kernel on one random routing; what differs from the reference."""
    from railwire.moe.kernels.triton_backend import TritonBackend

    g = Geometry(config)
    plain, fast = TorchBackend(g, device), TritonBackend(g, device)
    tokens = int(rng.integers(1, config.max_tokens + 1)) if tokens is None else tokens
    order = rng.random((tokens, config.experts)).argsort(axis=1)[:, : config.top_k]
    ids_ = np.full((tokens, config.top_k), -1, np.int64)
    ids_[:, : order.shape[1]] = order
    ids_[rng.random(ids_.shape) < 0.1] = -1
    if rng.random() < 0.3:
        ids_[rng.random(ids_.shape) < 0.7] = int(rng.integers(config.experts))
    ids = torch.from_numpy(ids_).to(device)
    dtype = getattr(torch, config.dtype)
    x = (torch.from_numpy(rng.standard_normal((tokens, config.hidden), np.float32)) * 3).to(dtype).to(device)
    weights = torch.from_numpy(rng.random(ids_.shape, np.float32)).to(device)
    wrong: list[str] = []

    def check(name: str, a: Any, b: Any) -> None:
        if a is not None and not equal(a, b):
            wrong.append(name)

    # route and pack
    want, got = plain.route(ids), fast.route(ids)
    check("route: slots", want.slots, got.slots.to(torch.int64))
    if not (np.array_equal(want.counts, got.counts) and np.array_equal(want.segments, got.segments)):
        wrong.append("route: counts")
    sends = [torch.zeros(g.dispatch_send_region, dtype=torch.uint8, device=device) for _ in range(2)]
    plain.pack(x, None, ids, weights, want, sends[0])
    fast.pack(x, None, ids, weights, got, sends[1])
    check("pack", *sends)
    # headers
    generation = int(rng.integers(1, 1 << 40))
    masked = frozenset({int(rng.integers(config.ranks))})
    words = g.encode_headers(generation, want.sent, want.segments, 5, masked, want.counts)
    for rank in range(config.ranks):
        at = g.sent_segment(rank, int(want.segments[rank]))
        sends[0][at : at + g.header] = torch.from_numpy(words[rank].view(np.uint8).copy()).to(device)
    control = np.zeros(3 + g.mask_words, np.uint32)
    control[:3] = generation & 0xFFFFFFFF, generation >> 32, 5
    for rank in masked:
        control[3 + rank // 32] |= np.uint32(1 << rank % 32)
    _, counts, starts = fast.route_device(fast.bins_of(ids))
    fast.headers_device(counts, starts, torch.from_numpy(control.view(np.int32)).to(device), sends[1])
    check("headers", *sends)
    # plan and unpack: this rank's neighbours have sent it some of the segments above
    # No source sends an expert more than max_tokens: the batched layout has no room for more.
    received = rng.integers(0, min(4, config.max_tokens + 1), (config.ranks, g.bins))
    slot_rows = int(received.sum(axis=1).max()) + 1
    rows = OutputRows(config, received.astype(np.int64))
    status = torch.zeros(1, dtype=torch.int32, device=device)
    planned, expert_rows = fast.plan_device(torch.from_numpy(received.astype(np.int32)).to(device), slot_rows, status)
    index = np.full((config.ranks, slot_rows), -1, np.int64)
    for rank in range(config.ranks):
        mine = rows.of(rank)
        index[rank, : mine.size] = mine
    if not np.array_equal(index, planned.cpu().numpy()) or expert_rows.tolist() != rows.expert_rows.tolist():
        wrong.append("plan")
    status[0] = 1
    nothing, _ = fast.plan_device(torch.from_numpy(received.astype(np.int32)).to(device), slot_rows, status)
    if int((nothing != -1).sum()):
        wrong.append("plan after a time-out")
    size = config.ranks * (g.header + slot_rows * g.row)
    slots = torch.from_numpy(rng.integers(0, 255, size, np.uint8)).to(device)
    outs = [plain.outputs(rows.rows), fast.outputs(rows.rows)]
    for out in outs:
        for tensor in out:
            if tensor is not None:
                tensor.view(torch.uint8).zero_()
    for rank in range(config.ranks):
        plain.unpack(slots, rank * (g.header + slot_rows * g.row) + g.header, rows.of(rank), outs[0])
    if config.layout == "standard":
        for rank in range(config.ranks):
            fast.unpack(slots, rank * (g.header + slot_rows * g.row) + g.header, rows.of(rank), outs[1])
    else:
        fast.unpack_device(slots, planned, slot_rows, g.header, outs[1])
    for name, a, b in zip(("x", "scales", "ids", "weights"), *outs, strict=True):
        check(f"unpack: {name}", a, b)
    # combine
    y = torch.from_numpy(rng.standard_normal((max(rows.rows, 1), config.hidden), np.float32)).to(dtype).to(device)
    mine = rows.of(config.ranks - 1)
    sends = [torch.zeros((mine.size + 3) * g.combine_row, dtype=torch.uint8, device=device) for _ in range(2)]
    row_weights = torch.rand((y.shape[0], config.top_k), device=device) if config.layout == "standard" else None
    plain.gather(y, row_weights, mine, sends[0], 2)
    fast.gather(y, row_weights, mine, sends[1], 2)
    check("gather", *sends)
    total = int(want.sent.sum())
    results = torch.from_numpy(rng.standard_normal((max(total, 1), g.combine_row // dtype.itemsize), np.float32))
    back = results.to(dtype).to(device).view(torch.uint8).reshape(-1)
    for w in (weights, None):
        sums = [torch.zeros((tokens, config.hidden), dtype=dtype, device=device) for _ in range(2)]
        plain.reduce(back, want.slots, w, sums[0])
        fast.reduce(back, got.slots, w, sums[1])
        check("reduce", *sums)
    return wrong
