#!/usr/bin/env python3
"""On a CUDA machine: checks every MoE kernel against the reference, bit for bit, and measures packing and unpacking
against the card's own copy rate; then scripts/moe-graph-gpu.py, two processes whose layers are captured. Needs torch,
triton, numpy and railwire; prints short tables. Exit status 0: all equal."""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from railwire.moe import Geometry, MoeConfig
from railwire.moe.kernels.check import compare
from railwire.moe.kernels.torch_backend import TorchBackend
from railwire.moe.kernels.triton_backend import TritonBackend, raise_flag, wait_for

FAILED: list[str] = []


def note(name: str, ok: bool, text: str = "") -> None:
    print(f"{'ok  ' if ok else 'FAIL'} {name} {text}", flush=True)
    if not ok:
        FAILED.append(name)


LAYOUTS = ("grouped", "batched", "standard")
KINDS = {"bfloat16": False, "float16": False, "float32": False, "fp8": True}


def check_kernels(rng: np.random.Generator, number: int, layout: str, kind: str) -> None:
    """Random sizes of one layout and dtype; the sizes of DeepSeek-V3 for what it uses."""
    fp8 = KINDS[kind]
    dtype = "bfloat16" if fp8 else kind
    configs: list[tuple[MoeConfig, int | None]] = []
    for _ in range(number):
        config = MoeConfig(
            ranks=int(rng.integers(1, 9)), experts=int(rng.integers(1, 40)), top_k=int(rng.integers(1, 9)),
            hidden=int(rng.choice([8, 128, 520, 2048] if fp8 else [8, 33, 128, 520, 2048])),
            max_tokens=int(rng.choice([1, 7, 130])), dtype=dtype, fp8=fp8, layout=layout,
            expert_alignment=int(rng.choice([1, 16])),
        )  # fmt: skip
        configs.append((config, None))
    if layout == "grouped" and dtype == "bfloat16":
        for tokens in (128, 4096):
            config = MoeConfig(ranks=64, experts=256, hidden=7168, max_tokens=tokens, top_k=8, fp8=fp8)
            configs.append((config, tokens))
    bad = 0
    for config, count in configs:
        print("     ", config, flush=True)
        wrong = compare(config, rng, "cuda", count)
        torch.cuda.synchronize()
        if wrong:
            bad += 1
            print("      DIFFERENT:", wrong, flush=True)
    note(f"kernels against the reference, {layout} {kind}, {len(configs)} configurations", not bad)


def check_graph(rng: np.random.Generator) -> None:
    """One captured graph, replayed with other tokens and routes."""
    config = MoeConfig(ranks=8, experts=64, hidden=2048, max_tokens=128, top_k=8, fp8=True)
    g = Geometry(config)
    plain, fast = TorchBackend(g, "cuda"), TritonBackend(g, "cuda")
    x = torch.randn(128, 2048, device="cuda").to(torch.bfloat16)
    ids = torch.zeros((128, 8), dtype=torch.int32, device="cuda")
    weights = torch.rand((128, 8), device="cuda")
    send = torch.zeros(g.dispatch_send_region, dtype=torch.uint8, device="cuda")
    back = torch.randn(g.combine_region // 2, device="cuda").to(torch.bfloat16).view(torch.uint8)
    out = torch.zeros((128, 2048), dtype=torch.bfloat16, device="cuda")
    control = torch.zeros(3 + g.mask_words, dtype=torch.int32, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        slots, counts, starts = fast.route_device(ids)
        fast.pack_device(x, None, ids, slots, send)
        fast.headers_device(counts, starts, control, send)
        fast.reduce(back, slots, weights, out)
        return slots, counts

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots, _ = step()
    bad = []
    for turn in range(20):
        ids.copy_(torch.from_numpy(rng.random((128, 64)).argsort(axis=1)[:, :8].astype(np.int32)))
        x.copy_(torch.randn_like(x))
        control[0] = turn + 1
        send.zero_()
        graph.replay()
        torch.cuda.synchronize()
        want = plain.route(ids)
        other = torch.zeros_like(send)
        plain.pack(x, None, ids, weights, want, other)
        words = g.encode_headers(turn + 1, want.sent, want.segments, 0, frozenset(), want.counts)
        for rank in range(8):
            at = g.sent_segment(rank, int(want.segments[rank]))
            other[at : at + g.header] = torch.from_numpy(words[rank].view(np.uint8).copy()).cuda()
        total = torch.zeros_like(out)
        plain.reduce(back, want.slots, weights, total)
        same = torch.equal(slots.long(), want.slots) and torch.equal(send, other) and torch.equal(out, total)
        if not same:
            bad.append(turn)
    note("one CUDA graph replayed with 20 other routings", not bad, str(bad or ""))


def check_words() -> None:
    """Words between GPU and CPU, and a wait that gives up."""
    word = torch.zeros(1, dtype=torch.int64).pin_memory()
    status = torch.zeros(1, dtype=torch.int32, device="cuda")
    clock = torch.zeros(1, dtype=torch.int64, device="cuda")
    raise_flag(word.data_ptr(), 1)
    torch.cuda.synchronize()
    seen = int(word[0])
    raise_flag(word.data_ptr(), (7 << 40) + 3)
    torch.cuda.synchronize()
    note("the CPU sees a word that a kernel has raised", (seen, int(word[0])) == (1, (7 << 40) + 3), f"{seen}")
    word[0] = 5
    wait_for(word.data_ptr(), 5, status, clock, 10_000_000)
    torch.cuda.synchronize()
    note("a wait for what is there", int(status[0]) == 0)

    def later() -> None:
        time.sleep(0.02)
        word[0] = 6

    thread = threading.Thread(target=later)
    begin = time.monotonic()
    thread.start()
    wait_for(word.data_ptr(), 6, status, clock, 2_000_000_000)
    torch.cuda.synchronize()
    took = time.monotonic() - begin
    thread.join()
    note("a wait for what comes 20 ms later", int(status[0]) == 0 and took > 0.015, f"{took * 1e3:.1f} ms")
    begin = time.monotonic()
    wait_for(word.data_ptr(), 99, status, clock, 5_000_000)
    torch.cuda.synchronize()
    took = time.monotonic() - begin
    ok = int(status[0]) == 1 and 0.004 < took < 0.5
    note("a wait that gives up after 5 ms", ok, f"{took * 1e3:.1f} ms")
    graph = torch.cuda.CUDAGraph()
    status.zero_()
    with torch.cuda.graph(graph):
        wait_for(word.data_ptr(), 7, status, clock, 1_000_000_000)
        raise_flag(word.data_ptr(), 8)
    word[0] = 7
    graph.replay()
    torch.cuda.synchronize()
    note("wait and flag in a CUDA graph", int(status[0]) == 0 and int(word[0]) == 8)


def microseconds(function: Callable[[], object], turns: int = 20, repeats: int = 7) -> tuple[float, float]:
    """(in a CUDA graph, launched from Python), medians."""
    function()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            function()

    def once(run: Callable[[], object], number: int) -> float:
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / number)
        return sorted(times)[len(times) // 2]

    def eager() -> None:
        for _ in range(turns):
            function()

    return once(graph.replay, turns), once(eager, turns)


def measure(rng: np.random.Generator) -> list[tuple[str, int, float, float, float, float]]:
    """(kernel, T, us in a graph, us from Python, GB/s, share of the copy rate)."""
    size = 1 << 30
    a, b = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_us, _ = microseconds(lambda a=a, b=b: b.copy_(a), turns=3)
    copy_rate = 2 * size / copy_us / 1e3
    del a, b
    rows: list[tuple[str, int, float, float, float, float]] = [("copy of 1 GiB", 0, copy_us, copy_us, copy_rate, 1.0)]

    def add(name: str, tokens: int, nbytes: float, function: Callable[[], object]) -> None:
        try:
            graph, eager = microseconds(function)
            rate = nbytes / graph / 1e3
            rows.append((name, tokens, graph, eager, rate, rate / copy_rate))
        except Exception as error:
            note(f"{name} T={tokens}", False, repr(error)[:300])

    hidden, k, ranks, experts = 7168, 8, 64, 256
    for tokens in (128, 4096):
        ids_ = rng.random((tokens, experts)).argsort(axis=1)[:, :k].astype(np.int32)
        ids = torch.from_numpy(ids_).cuda()
        x = torch.randn(tokens, hidden, device="cuda").to(torch.bfloat16)
        weights = torch.rand((tokens, k), device="cuda")
        pairs = tokens * k
        for fp8 in (False, True):
            config = MoeConfig(ranks=ranks, experts=experts, hidden=hidden, max_tokens=tokens, top_k=k, fp8=fp8)
            g = Geometry(config)
            fast = TritonBackend(g, "cuda")
            kind = "fp8" if fp8 else "bf16"
            send = torch.zeros(g.dispatch_send_region, dtype=torch.uint8, device="cuda")
            slots, counts, starts = fast.route_device(ids)
            if not fp8:
                add("route", tokens, 4 * pairs, lambda f=fast, i=ids: f.route_device(i))
            moved = tokens * hidden * 2 + pairs * (g.token_bytes + 4 * g.scales)
            add(
                f"pack {kind}", tokens, moved,
                lambda f=fast, x=x, i=ids, s=slots, b=send: f.pack_device(x, None, i, s, b),
            )  # fmt: skip
            if fp8:
                control = torch.zeros(3 + g.mask_words, dtype=torch.int32, device="cuda")
                add("headers", tokens, g.header * ranks,
                    lambda f=fast, c=counts, s=starts, o=control, b=send: f.headers_device(c, s, o, b))  # fmt: skip
            # What one rank gets: each source sends it some of its pairs.
            received_ = rng.multinomial(pairs, np.full(experts, 1 / experts), size=ranks)[:, : config.local_experts]
            received = torch.from_numpy(received_.astype(np.int32)).cuda()
            slot_rows = max(int(received_.sum(axis=1).max()), g.first_slot_rows)
            status = torch.zeros(1, dtype=torch.int32, device="cuda")
            rows_, _ = fast.plan_device(received, slot_rows, status)
            if fp8:
                add("plan", tokens, 4 * ranks * slot_rows,
                    lambda f=fast, r=received, n=slot_rows, s=status: f.plan_device(r, n, s))  # fmt: skip
            total = int(received_.sum())
            slots_ = torch.zeros(ranks * (g.header + slot_rows * g.row), dtype=torch.uint8, device="cuda")
            outs = fast.outputs(total)
            moved = 2 * total * (g.token_bytes + 4 * g.scales)
            add(f"unpack {kind}", tokens, moved,
                lambda f=fast, s=slots_, r=rows_, n=slot_rows, h=g.header, o=outs:
                    f.unpack_device(s, r, n, h, o))  # fmt: skip
            if not fp8:
                y = torch.randn(total, hidden, device="cuda").to(torch.bfloat16)
                index = torch.randperm(total, device="cuda").to(torch.int32)
                results = torch.zeros(total * g.combine_row, dtype=torch.uint8, device="cuda")
                add("combine pack", tokens, 2 * total * g.combine_row,
                    lambda f=fast, y=y, i=index, r=results: f.gather_device(y, i, r, 0))  # fmt: skip
                back = torch.zeros(g.combine_region, dtype=torch.uint8, device="cuda")
                out = torch.zeros_like(x)
                add("combine reduce", tokens, pairs * g.combine_row + tokens * hidden * 2,
                    lambda f=fast, b=back, s=slots, w=weights, o=out: f.reduce(b, s, w, o))  # fmt: skip
    return rows


def run_part(part: str, seed: int, number: int) -> None:
    """One part, in this process."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    if part == "words":
        check_words()
    elif part == "graph":
        check_graph(rng)
    elif part == "measure":
        rows = measure(rng)
        print(f"\n{'kernel':<16}{'T':>6}{'us, graph':>11}{'us, Python':>12}{'GB/s':>8}{'of copy':>9}")
        for name, tokens, graph, eager, rate, share in rows:
            print(f"{name:<16}{tokens or '':>6}{graph:>11.1f}{eager:>12.1f}{rate:>8.0f}{share:>9.2f}")
    else:
        check_kernels(rng, number, *part.split(":")[1:])


def main() -> int:
    """Every part in a process of its own: after a fault on the device a process can do no more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--number", type=int, default=4, help="random configurations of each layout and dtype")
    parser.add_argument("--part", default="", help="words, graph, kernels:LAYOUT:DTYPE or measure; default: all")
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part, arguments.seed, arguments.number)
        return bool(FAILED)
    import triton

    print(f"{torch.cuda.get_device_name()} torch {torch.__version__} triton {triton.__version__} seed {arguments.seed}")
    kernels = [f"kernels:{layout}:{kind}" for layout in LAYOUTS for kind in KINDS]
    failed = []
    for part in ["words", "graph", *kernels, "measure"]:
        command = [sys.executable, __file__, "--part", part, "--seed", str(arguments.seed)]
        done = subprocess.run(
            [*command, "--number", str(arguments.number)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            failed.append(part)
            print(f"FAIL {part}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}", flush=True)
        else:
            lines = done.stdout.splitlines()
            print("\n".join(line for line in lines if not line.startswith("      ")), flush=True)
    if subprocess.run([sys.executable, str(Path(__file__).with_name("moe-graph-gpu.py"))], check=False).returncode:
        failed.append("graphs of two processes")
    print("FAILED: " + ", ".join(failed) if failed else "all equal")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
