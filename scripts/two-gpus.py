#!/usr/bin/env python3
"""On a machine with two GPUs: pages over NVLink with 4 to 32 multiprocessors, both directions at once, reads, the time
of 64 bytes, a 16 GB state dict beside NCCL's broadcast, words that kernels write, the effect on a decode step; and on
tcp. Every byte is checked. Needs railwire, torch and numpy; prints a short table last. With one GPU (``--peer cuda:0``)
both processes share it. ``--only pages,words`` runs some of the parts.

    python scripts/two-gpus.py [--device cuda:0] [--peer cuda:1] [--only PART,...]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from railwire import EngineAddress, Pages, RemoteRegion, TransferEngine

ROWS: list[tuple[str, str]] = []
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def row(name: str, value: str) -> None:
    ROWS.append((name, value))
    print(f"      {name}: {value}", flush=True)


class Far:
    """The other process: memory on its GPU, an engine, and what it is asked to do (see `serve`)."""

    def __init__(self, device: str, nic: str, nbytes: int, sms: int = 8) -> None:
        command = [sys.executable, __file__, "--serve", device, "--nic", nic, "--bytes", str(nbytes), "--sms", str(sms)]
        self.nbytes = nbytes
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        address, descriptor = self.answer()
        self.address = EngineAddress.from_bytes(bytes.fromhex(address))
        self.remote = RemoteRegion.from_bytes(bytes.fromhex(descriptor))

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the other process has ended")
        return json.loads(line)

    def tell(self, *what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def ask(self, *what: object) -> Any:
        self.tell(*what)
        return self.answer()

    def close(self) -> None:
        self.tell("end")
        self._process.wait(30)


def serve(device: str, nic: str, nbytes: int, sms: int) -> None:
    engine = TransferEngine(device, nics=[nic], options={"copy_sms": str(sms)})
    memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    region = engine.register(memory)
    print(json.dumps([bytes(engine.address).hex(), bytes(region.descriptor).hex()]), flush=True)
    for line in sys.stdin:
        what, *args = json.loads(line)
        if what == "expect":
            engine.counter(args[0]).expect(args[1]).wait(60)
            print(json.dumps(time.monotonic_ns()), flush=True)
        elif what == "sum":  # of the bytes at random places, with their number as weight
            at = torch.arange(0, nbytes, 4099, device=device)
            print(json.dumps(int((memory[at].long() * (at % 8191)).sum())), flush=True)
        elif what == "zero":
            memory.zero_()
            torch.cuda.synchronize(device)
            print("0", flush=True)
        elif what == "echo":
            count, address, descriptor = args
            back = engine.connect(EngineAddress.from_bytes(bytes.fromhex(address)))
            remote = RemoteRegion.from_bytes(bytes.fromhex(descriptor))
            print("0", flush=True)
            for _ in range(count):
                engine.counter(3).expect(1).wait(20)
                engine.write(region[:64], remote[:64], imm=3)
            del back
        elif what == "push":  # pages back, for both directions at once
            address, descriptor, page, count, rounds = args
            engine.connect(EngineAddress.from_bytes(bytes.fromhex(address)))
            remote = RemoteRegion.from_bytes(bytes.fromhex(descriptor))
            print(json.dumps(push(engine, region, remote, page, count, rounds)), flush=True)
        else:
            break
    engine.close()


def push(engine: Any, region: Any, remote: Any, page: int, count: int, rounds: int) -> float:
    """GB/s of random pages: `rounds` lists of `count` within 1 GiB, two in flight."""
    slots = GIB // page
    rng = np.random.default_rng(1)
    count = min(count, slots)
    lists = [
        (Pages(rng.permutation(slots)[:count], page), Pages(rng.permutation(slots)[:count], page)) for _ in range(4)
    ]
    for a, b in lists:
        engine.write_pages(region, a, remote, b, page).wait(60)
    begin = time.monotonic()
    under_way: list[Any] = []
    for i in range(rounds):
        if len(under_way) == 2:
            under_way.pop(0).wait(60)
        a, b = lists[i % 4]
        under_way.append(engine.write_pages(region, a, remote, b, page))
    for one in under_way:
        one.wait(60)
    return rounds * count * page / (time.monotonic() - begin) / 1e9


class Near:
    """An engine of ours, with an engine of the other process."""

    memory: ClassVar[dict[int, torch.Tensor]] = {}  # made once for each size

    def __init__(self, device: str, far: Far, nic: str, sms: int = 8) -> None:
        self.far, self.device, self.nbytes = far, device, far.nbytes
        self.engine = TransferEngine(device, nics=[nic], options={"copy_sms": str(sms)})
        if self.nbytes not in self.memory:
            self.memory[self.nbytes] = torch.randint(0, 256, (self.nbytes,), dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
        self.mine = self.memory[self.nbytes]
        self.region = self.engine.register(self.mine)
        self.peer = self.engine.connect(far.address)

    def check(self) -> bool:
        """Writes all, and compares with what the other side has."""
        self.far.ask("zero")
        self.engine.write(self.region, self.far.remote).wait(60)
        at = torch.arange(0, self.nbytes, 4099, device=self.device)
        return int((self.mine[at].long() * (at % 8191)).sum()) == self.far.ask("sum")

    def offer(self) -> tuple[str, str]:
        return bytes(self.engine.address).hex(), bytes(self.region.descriptor).hex()

    def close(self) -> None:
        self.engine.close()


def pages(device: str, far: Far, nic: str = "shm") -> None:
    shm = nic == "shm"
    sizes = (4 * KIB, 32 * KIB, 128 * KIB, MIB, 16 * MIB) if shm else (4 * KIB, 32 * KIB, MIB)
    total = GIB if shm else 128 * MIB
    for sms in (4, 8, 16, 32) if shm else (8,):
        near = Near(device, far, nic, sms)
        found = []
        for size in sizes:
            count = max(1, min(8192, 64 * MIB // size))
            rounds = max(4, total // (count * size))
            found.append(
                statistics.median(push(near.engine, near.region, far.remote, size, count, rounds) for _ in range(3))
            )
        good = near.check()
        names = ", ".join(f"{size >> 10} KiB {gbs:.1f}" for size, gbs in zip(sizes, found, strict=True))
        row(f"{nic}, random pages, {sms} SM, GB/s", names + ("" if good else "  BYTES ARE WRONG"))
        if sms == 8 and shm:
            for size in (32 * KIB, MIB):
                count = 64 * MIB // size
                far.tell("push", *near.offer(), size, count, 60)
                mine = push(near.engine, near.region, far.remote, size, count, 60)
                row(f"both directions at once, {size >> 10} KiB, GB/s each", f"{mine:.0f} and {far.answer():.0f}")
            begin = time.monotonic()
            for _ in range(20):
                near.engine.read(far.remote[: 64 * MIB], near.region[: 64 * MIB]).wait(60)
            row("reads of 64 MiB, GB/s", f"{20 * 64 * MIB / (time.monotonic() - begin) / 1e9:.0f}")
        near.close()


def small(device: str, far: Far, nic: str = "shm") -> None:
    near = Near(device, far, nic)
    count = 2000
    far.ask("echo", count, *near.offer())
    laps = []
    counter = near.engine.counter(3)
    for _ in range(count):
        begin = time.monotonic_ns()
        near.engine.write(near.region[:64], far.remote[:64], imm=3)
        counter.expect(1).wait(20)
        laps.append((time.monotonic_ns() - begin) / 2e3)
    laps.sort()
    row(
        f"{nic}, 64 B, seen by the other side's counter, us (p50, p99)",
        f"{laps[count // 2]:.1f}, {laps[count * 99 // 100]:.1f}",
    )
    near.close()


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit(do_not_specialize=["question", "reply", "rounds"])
    def reply_kernel(question, reply, rounds):
        """Writes each number to the word `reply` as soon as the word `question` has it; both are addresses."""
        for turn in range(1, rounds + 1):
            looks = 0
            seen = tl.cast(0, tl.int64)
            while (seen < turn) & (looks < 20_000_000):
                seen = tl.inline_asm_elementwise(
                    "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [question.to(tl.int64)], dtype=tl.int64,
                    is_pure=False, pack=1,
                )  # fmt: skip
                looks += 1
            tl.inline_asm_elementwise(
                "st.release.sys.global.b64 [$1], $2; mov.u32 $0, 0;", "=r,l,l",
                [reply.to(tl.int64), turn.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


def words(device: str) -> None:
    """A word that a kernel writes, seen by a callback and by a thread that waits; a stream that goes on when something
    has arrived."""
    from railwire.cuda import StreamWord

    torch.cuda.set_device(device)
    engine, other = TransferEngine(device, nics=["shm"]), TransferEngine(device, nics=["shm"])
    question = torch.zeros(512, dtype=torch.int64).pin_memory()
    plain = torch.zeros(512, dtype=torch.int64).pin_memory()
    asked, told = question.numpy(), plain.numpy()
    count = 2000
    stream = torch.cuda.Stream()

    def round_trip(reply: int, wait: Callable[[], object]) -> float:
        """Microseconds, with `count` of them behind one another."""
        asked[0] = told[0] = 0
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            reply_kernel[(1,)](question.data_ptr(), reply, count, num_warps=1)
        time.sleep(0.05)
        begin = time.monotonic_ns()
        asked[0] = 1
        wait()
        took = (time.monotonic_ns() - begin) / 1e3 / count
        stream.synchronize()
        return took

    def by_loop() -> None:
        for turn in range(1, count + 1):
            while told[0] < turn:
                pass
            asked[0] = turn + 1

    def by_callback(mode: Any) -> str:
        ended = threading.Event()

        def moved(old: int, new: int) -> None:
            asked[0] = new + 1
            if new >= count:
                ended.set()

        with TransferEngine(device, nics=["shm"], progress=mode) as watching:
            watcher = watching.watch(moved)
            word = StreamWord(watcher.address)
            address: Any = word.__cuda_array_interface__["data"]
            took = round_trip(address[0], lambda: ended.wait(10))
            watcher.close()
            word.close()
        return f"{took:.1f}" if ended.is_set() else "WRONG: an increment was not told"

    round_trip(plain.data_ptr(), by_loop)  # the kernel is compiled
    bare = round_trip(plain.data_ptr(), by_loop)
    row(
        "from a word to a kernel that answers, and back, us: a Python loop; a callback, progress adaptive; spin",
        f"{bare:.1f}; {by_callback('adaptive')}; {by_callback('spin')}",
    )

    source, landing = (torch.zeros(64, dtype=torch.uint8, device=device) for _ in range(2))
    near, far = engine.register(source), other.register(landing)
    engine.connect(other.address)
    one = torch.ones(1, dtype=torch.int64, device=device)
    flags = torch.as_tensor(plain)
    arrivals, streams = [], []
    for _ in range(300):
        arrived = other.counter(9).expect(1)
        begin = time.monotonic_ns()
        engine.write(near, far.descriptor, imm=9)
        arrived.wait(10)
        arrivals.append((time.monotonic_ns() - begin) / 1e3)
    told[0] = late = 0
    for _ in range(300):
        arrived = other.counter(9).expect(1).on(stream)
        with torch.cuda.stream(stream):
            flags[:1].copy_(one, non_blocking=True)
        soon = time.monotonic_ns() + 100_000
        while time.monotonic_ns() < soon:  # until the stream waits
            pass
        begin = time.monotonic_ns()
        engine.write(near, far.descriptor, imm=9)
        while told[0] == 0 and time.monotonic_ns() < begin + 10**8:
            pass
        late += told[0] == 0
        streams.append((time.monotonic_ns() - begin) / 1e3)
        told[0] = 0
        stream.synchronize()
    row("64 B in one process, us (p50): until a thread has the count; until the stream behind .on() has written a word",
        f"{statistics.median(arrivals):.1f}; {statistics.median(streams):.1f}"
        + (f" WRONG: {late} of 300 did not go on within 0.1 s" if late else ""))  # fmt: skip
    engine.close()
    other.close()


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
    command = [sys.executable, __file__, "--nccl-rank"]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--peer", default="cuda:1" if torch.cuda.device_count() > 1 else "cuda:0")
    parser.add_argument("--only", default="pages,small,tcp,words,weights,nccl,decode")
    parser.add_argument("--gigabytes", type=float, default=16.0)
    parser.add_argument("--serve")
    parser.add_argument("--nic", default="shm")
    parser.add_argument("--bytes", type=int, default=GIB)
    parser.add_argument("--sms", type=int, default=8)
    parser.add_argument("--nccl-rank", type=int)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.nic, args.bytes, args.sms)
        return 0
    if args.nccl_rank is not None:
        nccl_rank(args.nccl_rank, args.device, args.gigabytes)
        return 0
    here, there = args.device, args.peer
    tcp = "tcp://127.0.0.1"
    wanted = args.only.split(",")
    nbytes = sum(2 * int(np.prod(shape)) for shape in llama_shapes(args.gigabytes)) if "weights" in wanted else GIB
    fars: dict[str, Far] = {}

    def far(nic: str) -> Far:
        if nic not in fars:
            fars[nic] = Far(there, nic, nbytes if nic == "shm" else GIB)
        return fars[nic]

    def over_tcp() -> None:
        pages(here, far(tcp), tcp)
        small(here, far(tcp), tcp)

    parts: dict[str, Callable[[], None]] = {
        "pages": lambda: pages(here, far("shm")),
        "small": lambda: small(here, far("shm")),
        "tcp": over_tcp,
        "words": lambda: words(here),
        "weights": lambda: weights(here, far("shm"), args.gigabytes),
        "nccl": lambda: nccl(here, there, args.gigabytes),
        "decode": lambda: decode(here, far("shm")),
    }
    failed = False
    for name in wanted:
        begin = time.monotonic()
        try:
            parts[name]()
        except Exception as error:  # the other parts still tell something
            failed = True
            row(name, f"FAILED: {type(error).__name__}: {error}")
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
    for one in fars.values():
        one.close()
    card = torch.cuda.get_device_name(here)
    print(f"\n{card}, {here} to {there}, torch {torch.__version__}")
    for name, value in ROWS:
        print(f"  {name}: {value}")
    wrong = any("WRONG" in value for _, value in ROWS)
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
