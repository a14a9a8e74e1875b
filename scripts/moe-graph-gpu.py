#!/usr/bin/env python3
"""On a CUDA machine: an expert-parallel group of two processes, on two GPUs or on one, whose layers are captured in a
CUDA graph and replayed. Every replay has other tokens and routes, and is compared with the reference bit for bit; a
rank that stops must not hang the other one's stream. Then times, with NCCL's all_to_all_single on the same routes
beside them where there are two GPUs. Exit status 0: all equal."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from railwire import TransferEngine
from railwire.moe import MoeConfig, RankLostError, StoreExchange
from railwire.moe.graph import GraphGroup
from railwire.moe.kernels.quantise import dequantise, quantise

RANKS = 2
HIDDEN = 7168
TOP_K = 8
TOKENS = (1, 8, 64, 128, 512, 1024, 4096)


class Rank:
    """One process."""

    def __init__(self, rank: int, store: str, seed: int) -> None:
        self.rank = rank
        self.device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(self.device)
        self.store = dist.FileStore(store, RANKS)
        self.engine = TransferEngine(f"cuda:{self.device.index}", nics=["shm"], progress="spin", name=f"rank{rank}")
        self.seed = seed
        self.number = 0

    def group(self, config: MoeConfig, timeout: float = 20.0) -> GraphGroup:
        self.number += 1
        exchange = StoreExchange(self.store, self.rank, RANKS, prefix=f"group{self.number}")
        return GraphGroup(self.engine, config, self.rank, exchange, device=str(self.device), timeout=timeout)

    def barrier(self) -> None:
        self.number += 1
        self.store.set(f"barrier{self.number}/{self.rank}", b"1")
        keys = [f"barrier{self.number}/{rank}" for rank in range(RANKS)]
        self.store.wait(keys, datetime.timedelta(seconds=120))

    def load(self, config: MoeConfig, turn: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device=self.device).manual_seed(self.seed + 1000 * turn + self.rank)
        x = torch.randn(tokens, config.hidden, device=self.device, generator=generator).to(torch.bfloat16)
        order = torch.rand(tokens, config.experts, device=self.device, generator=generator).argsort(dim=1)
        ids = order[:, : config.top_k].to(torch.int32).contiguous()
        if turn % 3 == 1:
            ids[torch.rand(ids.shape, device=self.device, generator=generator) < 0.3] = -1
        if turn % 7 == 5:
            ids[:] = -1  # nothing from this rank
        weights = torch.rand(ids.shape, device=self.device, generator=generator)
        return x, ids, weights

    def experts(self, config: MoeConfig, got: Any) -> torch.Tensor:
        """Row times a number of its expert, rounded to bfloat16; only kernels, so it may be captured."""
        ends = torch.cumsum(got.expert_rows, 0)
        rows = torch.arange(got.x.shape[0], device=self.device)
        number = torch.searchsorted(ends, rows, right=True) + self.rank * config.local_experts
        x = got.x if got.scales is None else dequantise(got.x, got.scales).to(torch.bfloat16)
        return (x.float() * (1.0 + number % 7).float()[:, None]).to(torch.bfloat16)


def expected(config: MoeConfig, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What combine must return."""
    if config.fp8:
        x = dequantise(*quantise(x)).to(torch.bfloat16)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for j in range(config.top_k):
        y = (x.float() * (1.0 + ids[:, j] % 7).float()[:, None]).to(torch.bfloat16).float()
        part = y * weights[:, j : j + 1]
        total = torch.where(ids[:, j : j + 1] >= 0, total + part, total)
    return total.to(torch.bfloat16)


def captured(group: GraphGroup, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what ``run`` launches, and what it returned. It has run twice before, with time for compiling."""
    timeout, group.timeout = group.timeout, 60.0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    group.timeout = timeout
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def check_replays(me: Rank, config: MoeConfig, tokens: int, turns: int) -> list[int]:
    """Turns whose results differ from the reference."""
    wrong = []
    with me.group(config) as group:
        x, ids, weights = me.load(config, 0, tokens)

        def layer() -> torch.Tensor:
            return group.combine(me.experts(config, group.dispatch(x, ids)), weights)

        graph, out = captured(group, layer)
        for turn in range(turns):
            for mine, other in zip((x, ids, weights), me.load(config, turn, tokens), strict=True):
                mine.copy_(other)
            graph.replay()
            group.check()
            if not torch.equal(out.view(torch.int16), expected(config, x, ids, weights).view(torch.int16)):
                wrong.append(turn)
        if group.generation != turns + 2:
            wrong.append(-1)
        me.barrier()
        del graph
    return wrong


def check_stop(me: Rank) -> str:
    """Rank 1 stops after a replay; rank 0 goes on. Returns what is wrong."""
    config = MoeConfig(ranks=RANKS, experts=32, hidden=HIDDEN, max_tokens=16, top_k=TOP_K)
    problem = ""
    with me.group(config, timeout=0.5) as group:
        x, ids, weights = me.load(config, 0, 16)
        y = torch.zeros((group.sizes.output_rows, HIDDEN), dtype=torch.bfloat16, device=me.device)

        def layer() -> torch.Tensor:
            group.dispatch(x, ids)
            return group.combine(y, weights)

        graph, _ = captured(group, layer)
        graph.replay()
        group.check()
        me.barrier()
        if me.rank == 0:
            began = time.monotonic()
            for _ in range(50):
                graph.replay()
            torch.cuda.synchronize()
            took = time.monotonic() - began
            try:
                group.check()
                problem = "nothing was noticed"
            except RankLostError as error:
                if error.rank != 1 or not 0.4 < took < 2.0:
                    problem = f"{error} after {took:.2f} s"
                print(f"      50 replays ended after {took * 1e3:.0f} ms: {error}", flush=True)
        me.barrier()
        del graph
    return problem


def microseconds(me: Rank, run: Callable[[], Any], repeats: int = 30) -> float:
    """The median of a call, both ranks at once, without what Python takes to launch."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times[5:])[(repeats - 5) // 2]


def measure(me: Rank, tokens: int, experts: int, fp8: bool, nccl: bool) -> tuple[float, float, float]:
    """Microseconds of (a whole layer without its experts, its dispatch, NCCL's layer or nan)."""
    config = MoeConfig(ranks=RANKS, experts=experts, hidden=HIDDEN, max_tokens=tokens, top_k=TOP_K, fp8=fp8)
    x, ids, weights = me.load(config, 0, tokens)
    theirs = float("nan")
    with me.group(config) as group:
        y = torch.zeros((group.sizes.output_rows, HIDDEN), dtype=torch.bfloat16, device=me.device)

        def layer() -> None:
            group.dispatch(x, ids)
            group.combine(y, weights)

        graph, _ = captured(group, layer)
        me.barrier()
        whole = microseconds(me, graph.replay)
        group.check()
        halves: list[float] = []
        for _ in range(20):  # launched from Python, in halves, for the share of each
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            group.dispatch(x, ids)
            marks[1].record()
            group.combine(y, weights)
            marks[2].record()
            torch.cuda.synchronize()
            halves.append(marks[0].elapsed_time(marks[1]) / marks[0].elapsed_time(marks[2]))
        group.check()
        me.barrier()
        del graph
    if nccl:
        me.barrier()
        theirs = microseconds(me, nccl_layer(config, x, ids, weights))
    return whole, whole * sorted(halves)[10], theirs


def nccl_layer(
    config: MoeConfig, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """The same with torch: pairs sorted by expert, counts exchanged, rows exchanged, back, summed up."""
    tokens = x.shape[0]

    def layer() -> torch.Tensor:
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        sent = torch.bincount(flat // config.local_experts, minlength=RANKS)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        to, come = sent.tolist(), received.tolist()
        rows = x[order // config.top_k]
        if config.fp8:
            values, scales = quantise(rows)
            rows = torch.cat([values.view(torch.uint8), scales.view(torch.uint8)], dim=1)
        here = torch.empty((sum(come), rows.shape[1]), dtype=rows.dtype, device=x.device)
        dist.all_to_all_single(here, rows, come, to)
        results = torch.zeros((sum(come), config.hidden), dtype=torch.bfloat16, device=x.device)
        back = torch.empty((flat.numel(), config.hidden), dtype=torch.bfloat16, device=x.device)
        dist.all_to_all_single(back, results, to, come)
        unsorted = torch.empty_like(back)
        unsorted[order] = back
        return (unsorted.view(tokens, config.top_k, -1).float() * weights[:, :, None]).sum(dim=1).to(torch.bfloat16)

    return layer


def work(rank: int, store: str, seed: int, turns: int, quick: bool) -> int:
    """What one process does; rank 0 speaks."""
    me = Rank(rank, store, seed)
    two = torch.cuda.device_count() >= RANKS
    failed = 0

    def note(name: str, problem: object) -> None:
        nonlocal failed
        failed += bool(problem)
        if problem or rank == 0:
            print(f"{'FAIL' if problem else 'ok  '} rank {rank}: {name} {problem or ''}", flush=True)

    for experts, tokens, fp8 in ((256, 128, False), (256, 128, True), (32, 64, False), (7, 1, True)):
        config = MoeConfig(
            ranks=RANKS, experts=experts, hidden=HIDDEN, max_tokens=tokens, top_k=min(TOP_K, experts), fp8=fp8
        )
        kind = "fp8" if fp8 else "bfloat16"
        note(f"{turns} replays, T = {tokens}, E = {experts}, {kind}", check_replays(me, config, tokens, turns))
    note("a rank that stops", check_stop(me))
    nccl = two and not quick
    if nccl:
        dist.init_process_group("nccl", store=dist.PrefixStore("nccl", me.store), rank=rank, world_size=RANKS)
    if rank == 0:
        where = "two GPUs" if two else "one GPU"
        print(f"\n{where}: us, median\n{'T':>6}{'E':>5}{'':>10}{'layer':>10}{'dispatch':>10}{'NCCL':>10}", flush=True)
    for fp8 in (False, True):
        for experts, all_tokens in ((256, TOKENS[:4] if quick else TOKENS), (32, (128,))):
            for tokens in all_tokens:
                whole, dispatch, theirs = measure(me, tokens, experts, fp8, nccl)
                if rank == 0:
                    kind = "fp8" if fp8 else "bf16"
                    line = f"{tokens:>6}{experts:>5}{kind:>10}{whole:>10.1f}{dispatch:>10.1f}{theirs:>10.1f}"
                    print(line, flush=True)
    if nccl:
        dist.destroy_process_group()
    me.barrier()
    me.engine.close()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100000)
    parser.add_argument("--turns", type=int, default=30, help="replays of each configuration that are compared")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, and no NCCL")
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank >= 0:
        return work(arguments.rank, arguments.store, arguments.seed, arguments.turns, arguments.quick)
    print(f"{torch.cuda.get_device_name()} torch {torch.__version__} seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--store", f"{folder}/store", "--seed", str(arguments.seed)]
        command += ["--turns", str(arguments.turns), *(["--quick"] if arguments.quick else [])]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(RANKS)]
        try:
            status = [rank.wait(540) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    print("FAILED" if any(status) else "all equal")
    return any(status)


if __name__ == "__main__":
    sys.exit(main())
