#!/usr/bin/env python3
"""On a CUDA machine: prefill in this process on one GPU, decode in another process on another GPU (or the same one),
with random weights of an 8B Llama shape. Prints the time to the first token beside a single process, how much of the
transfer hides behind the prefill, and whether the logits are the same bits. Needs railwire, torch and numpy.

    python scripts/kv-gpu.py [--device cuda:0] [--peer cuda:1] [--tokens 512,2000,8000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from railwire import TransferEngine
from railwire.cuda import StreamWord
from railwire.kvcache import InstanceLayout, LayerWatcher, Receiver, Sender, paged_instance

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCAB = 32, 4096, 32, 8, 128, 14336, 128256
BLOCK = 16  # tokens


class Model:
    """Random weights; every process makes the same ones. Positions are not encoded."""

    def __init__(self, device: str, blocks: int) -> None:
        self.device = device
        generator = torch.Generator(device).manual_seed(7)

        def weight(*shape: int) -> torch.Tensor:
            made = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return made.normal_(0, shape[-1] ** -0.5, generator=generator)

        self.layers = [
            (weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), weight(HIDDEN, HEADS * DIM), weight(2 * FFN, HIDDEN),
             weight(HIDDEN, FFN)) for _ in range(LAYERS)
        ]  # fmt: skip
        self.embedding, self.head = weight(VOCAB, HIDDEN), weight(VOCAB, HIDDEN)
        # Pages [block, token, head, dim], K and V of each layer.
        self.cache = [
            torch.zeros((blocks, BLOCK, KV_HEADS, DIM), dtype=torch.bfloat16, device=device) for _ in range(2 * LAYERS)
        ]

    def forward(self, ids: torch.Tensor, first: int, blocks: torch.Tensor, after_layer: Any = None) -> torch.Tensor:
        """Logits of the last of `ids`, whose first has the position `first`; what is before it lies in the cache."""
        count = len(ids)
        at = torch.arange(first, first + count, device=self.device)
        page, place = blocks[at // BLOCK], at % BLOCK
        h = self.embedding[ids]
        for i, (qkv, out, up, down) in enumerate(self.layers):
            x = F.rms_norm(h, (HIDDEN,))
            q, k, v = (x @ qkv.T).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
            k, v = k.view(count, KV_HEADS, DIM), v.view(count, KV_HEADS, DIM)
            self.cache[2 * i][page, place] = k
            self.cache[2 * i + 1][page, place] = v
            if after_layer is not None:
                after_layer(i)
            if first:
                k, v = (self.cache[2 * i + j][blocks].view(-1, KV_HEADS, DIM)[: first + count] for j in (0, 1))
            q, k, v = (t.view(len(t), -1, DIM).transpose(0, 1)[None] for t in (q, k, v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=not first, enable_gqa=True)
            h = h + a[0].transpose(0, 1).reshape(count, -1) @ out.T
            gate, value = (F.rms_norm(h, (HIDDEN,)) @ up.T).chunk(2, dim=-1)
            h = h + (F.silu(gate) * value) @ down.T
        return F.rms_norm(h[-1:], (HIDDEN,)) @ self.head.T


def layout(blocks: int) -> InstanceLayout:
    return paged_instance(
        model="random-8b", stages=[range(LAYERS)], num_blocks=blocks, block_tokens=BLOCK, kv_heads=KV_HEADS,
        head_bytes=2 * DIM, order="NHD",
    )  # fmt: skip


def block_table(tokens: int, blocks: int, seed: int) -> Any:
    return np.random.default_rng(seed).permutation(blocks)[: -(-(tokens + 1) // BLOCK)]


def tokens_of(count: int, device: str) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(count).integers(0, VOCAB, count)).to(device)


def decode(device: str, blocks: int) -> None:
    """The other process: one line a request comes in, one goes out."""
    torch.cuda.set_device(device)
    model = Model(device, blocks)
    engine = TransferEngine(device, nics=["shm"])
    receiver = Receiver(engine, layout(blocks), 0, [engine.register(tensor) for tensor in model.cache])
    torch.cuda.synchronize()
    print("ready", flush=True)
    link = receiver.connect([bytes.fromhex(sys.stdin.readline())])
    print("connected", flush=True)
    for line in sys.stdin:
        request, count = json.loads(line)
        ids = tokens_of(count, device)
        table = block_table(count, blocks, 2)
        on_gpu = torch.from_numpy(table).to(device)
        torch.cuda.synchronize()
        ticket = receiver.prepare(link, request, table[: -(-(count - 1) // BLOCK)], count - 1)
        print(json.dumps("prepared"), flush=True)
        ticket.wait(60)
        here = time.monotonic_ns()
        logits = model.forward(ids[-1:], count - 1, on_gpu)
        token = int(logits.argmax())
        end = time.monotonic_ns()
        digest = int(logits.view(torch.int16).long().sum())
        print(json.dumps([here, end, token, digest]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--peer", default="cuda:1" if torch.cuda.device_count() > 1 else "cuda:0")
    parser.add_argument("--tokens", default="512,2000,8000")
    parser.add_argument("--decode", type=int)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.decode:
        decode(args.device, args.decode)
        return 0
    counts = [int(text) for text in args.tokens.split(",")]
    blocks = max(counts) // BLOCK + 64
    device = args.device
    torch.cuda.set_device(device)
    command = [sys.executable, __file__, "--device", args.peer, "--decode", str(blocks)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    model = Model(device, blocks)
    engine = TransferEngine(device, nics=["shm"])
    sender = Sender(engine, layout(blocks), 0, [engine.register(tensor) for tensor in model.cache])
    watcher = LayerWatcher(sender)
    word = StreamWord(watcher.watcher.address)
    stream = torch.cuda.Stream()
    assert other.stdout.readline() == "ready\n"
    print(sender.descriptor.hex(), file=other.stdin, flush=True)
    assert other.stdout.readline() == "connected\n"
    layers_done = 0
    rows = []
    same = True
    for count in counts:
        ids, table = tokens_of(count, device), block_table(count, blocks, 1)
        on_gpu = torch.from_numpy(table).to(device)

        def single(ids: Any = ids, on_gpu: Any = on_gpu, count: int = count) -> tuple[float, float, int]:
            """Milliseconds of the whole prompt at once, of all but its last token, and what the last one gives."""
            torch.cuda.synchronize()
            begin = time.monotonic_ns()
            int(model.forward(ids, 0, on_gpu).argmax())
            whole = time.monotonic_ns()
            model.forward(ids[:-1], 0, on_gpu)
            torch.cuda.synchronize()
            most = time.monotonic_ns()
            last = model.forward(ids[-1:], count - 1, on_gpu)
            return (whole - begin) / 1e6, (most - whole) / 1e6, int(last.view(torch.int16).long().sum())

        alone = [single() for _ in range(5)][1:]
        split, late = [], []
        for turn in range(5):
            request = f"{count}-{turn}"
            print(json.dumps([request, count]), file=other.stdin, flush=True)
            other.stdout.readline()
            torch.cuda.synchronize()
            begin = time.monotonic_ns()
            push = sender.open(request, count - 1)
            push.append_blocks(table[: -(-(count - 1) // BLOCK)])
            watcher.begin_step([(push, count - 1)])

            def after_layer(i: int) -> None:
                nonlocal layers_done
                layers_done += 1
                word.write(layers_done, stream.cuda_stream)

            with torch.cuda.stream(stream):
                model.forward(ids[:-1], 0, on_gpu, after_layer)
            stream.synchronize()
            computed = time.monotonic_ns()
            here, end, _, digest = json.loads(other.stdout.readline())
            push.done.wait(10)
            same &= digest == alone[0][2]
            split.append((end - begin) / 1e6)
            late.append((here - computed) / 1e6)
        whole, most = (statistics.median(one[i] for one in alone) for i in (0, 1))
        ttft, rest = statistics.median(split[1:]), max(0.0, statistics.median(late[1:]))
        nbytes = 2 * LAYERS * (count - 1) * KV_HEADS * DIM * 2
        bare = nbytes / 300e9 * 1e3
        rows.append(
            f"{count} tokens, {nbytes / 1e6:.0f} MB: first token after {ttft:.1f} ms, single process {whole:.1f} ms "
            f"({(ttft / whole - 1) * 100:+.1f} %); prefill {most:.1f} ms, the last pages {rest:.2f} ms after it "
            f"(at 300 GB/s all of them would take {bare:.2f} ms)"
        )
    other.kill()
    print(f"\n{torch.cuda.get_device_name(device)}, {device} to {args.peer}, torch {torch.__version__}")
    for text in rows:
        print(" ", text)
    print(f"  logits of the first token {'are the same bits' if same else 'DIFFER'}", flush=True)
    watcher.close()
    sender.close()
    engine.close()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
