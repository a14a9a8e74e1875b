"""Pages with 4 to 32 multiprocessors, both directions at once, reads, and the time of 64 bytes."""

from __future__ import annotations

import statistics
import time

from two_gpus.pair import GIB, KIB, MIB, Far, Near, push, row


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
