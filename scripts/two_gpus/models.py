"""What a model asks for: a 16 GB state dict, beside NCCL's broadcast, and a decode step while pages leave its GPU."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from two_gpus.pair import GIB, KIB, SCRIPT, Far, Near, row

from railwire import Pages


def weights(device: str, far: Far, gigabytes: float) -> None:
    """A bf16 state dict of a Llama shape from one GPU to the other: one write a tensor, all at once."""
    shapes = llama_shapes(gigabytes)
    nbytes = sum(2 * int(np.prod(shape)) for shape in shapes)
    near = Near(device, far, "shm", 16)
    times = []
    for turn in range(5):
        begin = time.monotonic_ns()
        at, transfers = 0, []
        far.tell("expect", 100 + turn, len(shapes))
        for shape in shapes:
            n = 2 * int(np.prod(shape))
            transfers.append(near.engine.write(near.region[at : at + n], far.remote[at : at + n], imm=100 + turn))
            at += n
        for transfer in transfers:
            transfer.wait(60)
        times.append((far.answer() - begin) / 1e6)
    good = near.check()
    ms = statistics.median(times)
    row(f"{nbytes / 1e9:.1f} GB in {len(shapes)} tensors, ms until all are there",
        f"{ms:.1f} ({nbytes / ms / 1e6:.0f} GB/s)" + ("" if good else "  BYTES ARE WRONG"))  # fmt: skip
    near.close()


def llama_shapes(gigabytes: float) -> list[tuple[int, ...]]:
    layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336),
             (4096,), (4096,)]  # fmt: skip
    shapes: list[tuple[int, ...]] = [(128256, 4096)]
    while sum(2 * int(np.prod(shape)) for shape in shapes) < (gigabytes - 1.05) * 1e9:
        shapes += layer
    return [*shapes, (128256, 4096)]


def nccl(device: str, peer: str, gigabytes: float) -> None:
    """The same state dict by NCCL's broadcast: a tensor at a time, and packed in 1 GiB."""
    if device == peer:
        return
    command = [sys.executable, str(SCRIPT), "--nccl-rank"]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
    both = [
        subprocess.Popen([*command, str(rank), "--device", one, "--gigabytes", str(gigabytes)], env=environment,
                         stdout=subprocess.PIPE, text=True)
        for rank, one in enumerate((device, peer))
    ]  # fmt: skip
    try:
        text = both[0].communicate(timeout=60)[0]
        row("NCCL broadcast of the same, ms (per tensor; packed in 1 GiB)", text.strip().splitlines()[-1])
    finally:
        for one in both:
            one.kill()


def nccl_rank(rank: int, device: str, gigabytes: float) -> None:
    import torch.distributed as dist

    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=2)
    shapes = llama_shapes(gigabytes)
    tensors = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    packed = torch.zeros(GIB // 2, dtype=torch.bfloat16, device=device)
    total = sum(t.nbytes for t in tensors)

    def time_of(work: Callable[[], None]) -> float:
        found = []
        for _ in range(4):
            dist.barrier()
            torch.cuda.synchronize()
            begin = time.monotonic()
            work()
            torch.cuda.synchronize()
            found.append((time.monotonic() - begin) * 1e3)
        return statistics.median(found[1:])

    def by_tensor() -> None:
        for tensor in tensors:
            dist.broadcast(tensor, 0)

    def by_buffer() -> None:
        # As vLLM does it: packed on one side, unpacked on the other.
        flat = iter(tensors)
        left: list[Any] = []
        done = 0
        while done < total:
            used, chunk = 0, []
            while left or (nxt := next(flat, None)) is not None:
                tensor = left.pop() if left else nxt
                assert tensor is not None
                if used + tensor.numel() > packed.numel():
                    left.append(tensor)
                    break
                chunk.append((used, tensor))
                used += tensor.numel()
            if rank == 0:
                for at, tensor in chunk:
                    packed[at : at + tensor.numel()].copy_(tensor.view(-1))
            dist.broadcast(packed[:used], 0)
            if rank == 1:
                for at, tensor in chunk:
                    tensor.view(-1).copy_(packed[at : at + tensor.numel()])
            done += used * 2

    one, two = time_of(by_tensor), time_of(by_buffer)
    print(f"{one:.1f}; {two:.1f}", flush=True)
    dist.destroy_process_group()


def decode(device: str, far: Far) -> None:
    """What a decode step of an 8B shape (batch 64, its GEMVs as a CUDA graph) loses while pages are pushed."""
    near = Near(device, far, "shm")
    layers = [(torch.randn(6144, 4096, device=device, dtype=torch.bfloat16),
               torch.randn(4096, 4096, device=device, dtype=torch.bfloat16),
               torch.randn(28672, 4096, device=device, dtype=torch.bfloat16),
               torch.randn(4096, 14336, device=device, dtype=torch.bfloat16)) for _ in range(32)]  # fmt: skip
    x = torch.randn(64, 4096, device=device, dtype=torch.bfloat16)

    def step() -> None:
        h = x
        for qkv, o, up, down in layers:
            h = h + (h @ qkv.T)[:, :4096] @ o.T * 1e-3
            h = h + (h @ up.T)[:, :14336] @ down.T * 1e-3

    with torch.cuda.device(device):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        torch.cuda.synchronize()

        def time_of(count: int) -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(count):
                graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end) / count)

        alone = min(time_of(50) for _ in range(3))
        # What prefill of one prompt hands over while others decode: 5 GB/s, in page lists of 16 MiB.
        count = 512
        rng = np.random.default_rng(2)
        lists = [Pages(rng.permutation(GIB // (32 * KIB))[:count], 32 * KIB) for _ in range(8)]
        moved = [0]
        stop = threading.Event()

        def mover() -> None:
            i = 0
            while not stop.is_set():
                one = near.engine.write_pages(near.region, lists[i % 8], far.remote, lists[(i + 3) % 8], 32 * KIB)
                one.wait(30)
                moved[0] += count * 32 * KIB
                i += 1
                stop.wait(0.003)

        thread = threading.Thread(target=mover)
        thread.start()
        begin, before = time.monotonic(), moved[0]
        with_copies = statistics.median(time_of(50) for _ in range(3))
        rate = (moved[0] - before) / (time.monotonic() - begin) / 1e9
        stop.set()
        thread.join()
        torch.cuda.synchronize()
    row("decode step of an 8B shape, batch 64, ms alone and with pages leaving",
        f"{alone:.3f} and {with_copies:.3f} ({(with_copies / alone - 1) * 100:+.1f} %, {rate:.1f} GB/s)")  # fmt: skip
    near.close()
