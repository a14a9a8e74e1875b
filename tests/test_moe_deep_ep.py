"""DeepEP's V1 interface between two processes: hooks, two dispatches under way, scales, routes, biases, masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_bed import expert
from processes import Children, State

from railwire import TransferEngine
from railwire.integrations import deep_ep
from railwire.moe.kernels.quantise import dequantise, quantise
from railwire.moe.rendezvous import file_store

RANKS, EXPERTS, LOCAL, TOP_K, HIDDEN, MOST = 2, 6, 3, 2, 512, 8


def start(state: State, rank: int, store: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=file_store(store, RANKS), rank=rank, world_size=RANKS)
    state.rank = rank
    state.engine = TransferEngine(nics=["tcp://127.0.0.1"])
    state.buffer = deep_ep.Buffer(
        dist.group.WORLD, enable_shrink=True, engine=state.engine, max_tokens=32, timeout=20.0
    )
    state.generator = torch.Generator().manual_seed(rank)


def tokens(state: State, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn((number, HIDDEN), generator=state.generator).to(torch.bfloat16)
    ids = torch.rand((number, EXPERTS), generator=state.generator).argsort(1)[:, :TOP_K].contiguous()
    return x, ids, torch.rand((number, TOP_K), generator=state.generator)


def run(state: State, rows: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(rows.shape, dtype=torch.bfloat16)
    for number, n in enumerate(count.tolist()):
        y[number, :n] = expert(state.rank * LOCAL + number, rows[number, :n])
    return y


def summed(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(x.shape)
    for token in range(len(x)):
        for j in range(TOP_K):
            total[token] += expert(int(ids[token, j]), x[token]).float() * weights[token, j]
    return total.to(torch.bfloat16)


def two_under_way(state: State) -> None:
    """Micro-batches: both dispatched before either is combined; hooks run later."""
    stats = torch.zeros(LOCAL, dtype=torch.int32)
    for _ in range(3):
        loads = [tokens(state, n) for n in (5, 0)]
        sent = [
            state.buffer.low_latency_dispatch(
                x, ids, MOST, EXPERTS, use_fp8=False, return_recv_hook=True, cumulative_local_expert_recv_stats=stats
            )
            for x, ids, _ in loads
        ]
        outs = []
        for (recv, count, handle, event, hook), (_, ids, weights) in zip(sent, loads, strict=True):
            hook()
            event.current_stream_wait()
            assert handle.layout_range.shape == (LOCAL, RANKS)
            assert (handle.layout_range & 0xFFFFFFFF).sum(1).tolist() == count.tolist()
            y = state.buffer.get_next_low_latency_combine_buffer(handle)
            y.copy_(run(state, recv, count))
            outs.append(
                state.buffer.low_latency_combine(y, ids, weights, handle, zero_copy=True, return_recv_hook=True)
            )
        for (out, _, hook), (x, ids, weights) in zip(outs, loads, strict=True):
            hook()
            assert torch.equal(out, summed(x, ids, weights))
    assert int(stats.sum()) > 0


def scales(state: State) -> None:
    for rounded, packed in ((False, False), (True, False), (True, True)):
        x, ids, weights = tokens(state, 6)
        (values, s), count, handle, _, hook = state.buffer.low_latency_dispatch(
            x, ids, MOST, EXPERTS, use_fp8=True, round_scale=rounded, use_ue8m0=packed
        )
        assert hook is None and values.dtype == torch.float8_e4m3fn
        assert s.shape[1] == RANKS * MOST and s.stride(1) == 1  # column by column
        if packed:
            assert s.dtype == torch.int32 and s.shape[2] == HIDDEN // 512
            shifts = torch.arange(0, 32, 8)
            exponents = (s.unsqueeze(3) >> shifts) & 0xFF
            s = torch.exp2(exponents.flatten(2).float() - 127)
        flat = dequantise(values.reshape(-1, HIDDEN), s.reshape(-1, HIDDEN // 128)).to(torch.bfloat16)
        y = run(state, flat.view(values.shape), count)
        out, _, _ = state.buffer.low_latency_combine(y, ids, weights, handle)
        if not rounded:
            assert torch.equal(out, summed(dequantise(*quantise(x)).to(torch.bfloat16), ids, weights))
        else:
            assert torch.allclose(out.float(), summed(x, ids, weights).float(), rtol=0.1, atol=0.3)
    with pytest.raises(ValueError, match="round_scale"):
        state.buffer.low_latency_dispatch(*tokens(state, 1)[:2], MOST, EXPERTS, use_ue8m0=True)


def normal(state: State) -> None:
    x, ids, weights = tokens(state, 20)
    ids[3] = -1
    per_rank, rdma, per_expert, in_rank, _ = state.buffer.get_dispatch_layout(ids, EXPERTS)
    assert rdma is None and per_expert.tolist() == torch.bincount(ids[ids >= 0], minlength=EXPERTS).tolist()
    owners = torch.where(ids >= 0, ids // LOCAL, -1)
    want = torch.stack([(owners == rank).any(1) for rank in range(RANKS)], 1)
    assert torch.equal(in_rank, want) and per_rank.tolist() == want.sum(0).tolist()
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    recv, row_ids, row_weights, counts, handle, _ = state.buffer.dispatch(
        x, topk_idx=ids, topk_weights=weights, expert_alignment=4, **layout
    )
    rows = torch.bincount(row_ids[row_ids >= 0], minlength=LOCAL)
    assert counts == [-(-n // 4) * 4 for n in rows.tolist()]
    bias = (torch.ones(x.shape, dtype=torch.bfloat16), torch.full(x.shape, 0.5, dtype=torch.bfloat16))
    out, back, _ = state.buffer.combine(recv, handle, topk_weights=row_weights, bias=bias)
    copies = want.sum(1, keepdim=True)
    assert torch.equal(out, (x.float() * copies + 1.0 + 0.5).to(torch.bfloat16))
    assert torch.equal(back, weights * copies)
    again, *none, _ = state.buffer.dispatch(x * 2, handle=handle)
    assert torch.equal(again, recv * 2) and none == [None] * 4
    state.buffer.combine(again, handle)


def masks(state: State) -> list[int]:
    """Only rank 0 goes on."""
    x, ids, weights = tokens(state, 4)
    recv, count, handle, _, _ = state.buffer.low_latency_dispatch(x, ids, MOST, EXPERTS, use_fp8=False)
    out, _, _ = state.buffer.low_latency_combine(run(state, recv, count), ids, weights, handle)
    gone = ids // LOCAL == 1
    assert torch.equal(out, summed(x, torch.where(gone, 0, ids), torch.where(gone, 0.0, weights)))
    status = torch.zeros(RANKS, dtype=torch.int32)
    state.buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def finish(state: State) -> None:
    state.buffer.destroy()
    state.engine.close()


def test_everything_that_engines_call(children: Children, tmp_path: Path) -> None:
    ranks = [children.spawn(f"rank{rank}") for rank in range(RANKS)]
    for rank, child in enumerate(ranks):
        child.begin(start, rank, str(tmp_path / "store"))
    for child in ranks:
        child.answer(60)
    for function in (two_under_way, scales, normal):
        for child in ranks:
            child.begin(function)
        for child in ranks:
            child.answer(60)
    ranks[1].kill()
    assert ranks[0].call(masks, timeout=60) == [0, 1]
    ranks[0].call(finish, timeout=60)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="mpi4py"):
        deep_ep.Buffer(None)
    with pytest.raises(ValueError, match="even"):
        deep_ep.Buffer.set_num_sms(3)
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 64, 256) < 120e6
