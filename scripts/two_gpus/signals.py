"""Words that kernels write: seen by a callback, by a thread, and by a stream that goes on."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from two_gpus.pair import row

from railwire import TransferEngine
from railwire.cuda import StreamWord

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
