"""vLLM's own DeepEP prepare/finalize classes, unchanged, over `railwire.integrations.deep_ep`, on CPU tensors."""

from __future__ import annotations

import multiprocessing
import traceback
from pathlib import Path
from typing import Any

import torch

RANKS, EXPERTS, TOP_K, HIDDEN, MAX_TOKENS = 2, 8, 3, 2048, 16
LOCAL = EXPERTS // RANKS


def expert(number: int, x: torch.Tensor) -> torch.Tensor:
    return x * (1.0 + number % 7) + 0.25 * (number % 3)


def tokens(generator: torch.Generator, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    number = int(torch.randint(0, most + 1, (1,), generator=generator))
    x = torch.randn((number, HIDDEN), generator=generator).to(torch.bfloat16)
    ids = torch.rand((number, EXPERTS), generator=generator).argsort(1)[:, :TOP_K].contiguous()
    return x, ids, torch.rand((number, TOP_K), generator=generator)


def low_latency(buffer: Any, rank: int, fp8: bool, generator: torch.Generator) -> bool:
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll import DeepEPLLPrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

    from railwire.moe.kernels.quantise import dequantise, quantise

    both = DeepEPLLPrepareAndFinalize(buffer, MAX_TOKENS, RANKS, use_fp8_dispatch=fp8)
    x, ids, weights = tokens(generator, MAX_TOKENS)
    rows, _, meta, _, _ = both.prepare(x, weights, ids, EXPERTS, None, False, FUSED_MOE_UNQUANTIZED_CONFIG)
    y = torch.zeros(rows.shape, dtype=torch.bfloat16)
    for number, count in enumerate(meta.expert_num_tokens.tolist()):
        y[number, :count] = expert(rank * LOCAL + number, rows[number, :count].to(torch.bfloat16))
    out = torch.zeros(x.shape, dtype=torch.bfloat16)
    both.finalize(out, y, weights, ids, False, TopKWeightAndReduceDelegate())
    source = dequantise(*quantise(x)).to(torch.bfloat16) if fp8 else x
    want = torch.zeros(x.shape)
    for token in range(len(x)):
        for j in range(TOP_K):
            want[token] += expert(int(ids[token, j]), source[token]).float() * weights[token, j]
    return torch.equal(out, want.to(torch.bfloat16))


def high_throughput(buffer: Any, rank: int, generator: torch.Generator) -> bool:
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ht import DeepEPHTPrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    both = DeepEPHTPrepareAndFinalize(buffer, RANKS, 1, rank * LOCAL)
    x, ids, weights = tokens(generator, 40)
    rows, _, meta, row_ids, row_weights = both.prepare(
        x, weights, ids, EXPERTS, None, False, FUSED_MOE_UNQUANTIZED_CONFIG
    )
    here = (row_ids >= rank * LOCAL) & (row_ids < (rank + 1) * LOCAL)
    y = torch.zeros(rows.shape)
    for row, j in torch.nonzero(here).tolist():
        y[row] += expert(int(row_ids[row, j]), rows[row]).float() * row_weights[row, j]
    counted = meta.expert_num_tokens_cpu.sum() == here.sum()
    out = torch.zeros(x.shape, dtype=torch.bfloat16)
    both.finalize(out, y.to(torch.bfloat16), row_weights, row_ids, False, TopKWeightAndReduceNoOP())
    want = torch.zeros(x.shape)
    for token in range(len(x)):
        owners = list(dict.fromkeys((ids[token] // LOCAL).tolist()))  # in the order of top-k
        for owner in owners:
            part = torch.zeros(HIDDEN)
            for j in range(TOP_K):
                if int(ids[token, j]) // LOCAL == owner:
                    part += expert(int(ids[token, j]), x[token]).float() * weights[token, j]
            want[token] += part.to(torch.bfloat16).float()
    return bool(counted) and torch.equal(out, want.to(torch.bfloat16))


def one_rank(rank: int, store: str, queue: Any) -> None:
    try:
        torch.set_num_threads(1)
        import torch.distributed as dist

        from railwire import TransferEngine
        from railwire.integrations import deep_ep

        deep_ep.install()
        dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
        engine = TransferEngine(nics=["tcp://127.0.0.1"])
        buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True, engine=engine, max_tokens=64)
        generator = torch.Generator().manual_seed(5 + rank)
        good = {f"low latency, fp8={fp8}": all([low_latency(buffer, rank, fp8, generator) for _ in range(4)])
                for fp8 in (False, True)}  # fmt: skip
        good["high throughput"] = all([high_throughput(buffer, rank, generator) for _ in range(4)])
        dist.barrier()
        buffer.destroy()
        engine.close()
        queue.put((rank, good))
    except BaseException:
        queue.put((rank, traceback.format_exc()))


def test_vllms_classes_run_unchanged(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=one_rank, args=(rank, str(tmp_path / "store"), queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        said = dict(queue.get(timeout=200) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    good = {"low latency, fp8=False": True, "low latency, fp8=True": True, "high throughput": True}
    assert said == {0: good, 1: good}
