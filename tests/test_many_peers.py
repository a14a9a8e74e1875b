"""What peers cost, on shm and on tcp: nothing once they are gone, little while they are silent. One does not hold up
another."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable

import far_side
import numpy as np
import pytest
from processes import Child, Children

from railwire import RemoteRegion, TransferEngine

Open = Callable[..., TransferEngine]


def maps(name: str) -> int:
    """How many mappings of memfds with that name this process has."""
    with open("/proc/self/maps") as lines:
        return sum(f"/memfd:{name} " in line for line in lines)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def own_bytes() -> int:
    with open("/proc/self/smaps_rollup") as lines:
        fields = {line.split(":")[0]: line.split()[1] for line in lines if line.count(":") == 1}
    return int(fields["Rss"]) * 1024


def test_a_thousand_connects_and_closes_leave_nothing_behind(open_engine: Open, child: Child, nic: str) -> None:
    engine = open_engine(nic)
    address = child.call(far_side.open_engine, [nic])

    def now() -> tuple[int, ...]:
        kept = ("railwire-link", "railwire-messages", "railwire-regions")
        return len(os.listdir("/proc/self/fd")), *(maps(name) for name in kept)

    def once() -> None:
        engine.connect(address).close()

    for _ in range(20):
        once()
    gc.collect()
    before, bytes_before = now(), own_bytes()
    for _ in range(1000):
        once()
    gc.collect()
    assert within(10, lambda: all(a <= b + 1 for a, b in zip(now(), before, strict=True))), (before, now())
    assert own_bytes() - bytes_before < 4 << 20  # 4 KiB a time, of heaps that grow


def open_many(state: far_side.State, nic: str, count: int, address: bytes) -> float:
    """So many engines here, all of which connect to `address`; returns how long that took, in seconds."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    engines = [TransferEngine(nics=[nic], name=f"peer{i}", liveness=30) for i in range(count)]
    begin = time.monotonic()
    for engine in engines:
        engine.connect(address)
    state.extra = engines
    return time.monotonic() - begin


@pytest.mark.slow
def test_256_peers_cost_under_a_mebibyte_each(open_engine: Open, child: Child, nic: str) -> None:
    """And an engine that is connected to them and idle uses next to no CPU."""
    engine = open_engine(nic, liveness=30)
    before = own_bytes()
    seconds = child.call(open_many, nic, 256, bytes(engine.address), timeout=120)
    assert within(10, lambda: len(engine.peers) == 256)
    each = (own_bytes() - before) / 256
    time.sleep(1)
    used, begin = time.process_time(), time.monotonic()
    time.sleep(5)
    share = (time.process_time() - used) / (time.monotonic() - begin)
    print(f"{nic}: {seconds:.1f} s to connect 256, {each / 1024:.0f} KiB each, {100 * share:.2f} % of a core when idle")
    assert each < 1 << 20
    assert seconds < 10
    assert share < 0.01


def test_a_long_write_does_not_hold_up_another_peers_short_ones(
    open_engine: Open, children: Children, nic: str
) -> None:
    """A short write takes at most a small part of what the long one takes that is under way."""
    engine = open_engine(nic, liveness=10.0)
    source = engine.register(np.ones(256 << 20, np.uint8))
    remotes = []
    for name, nbytes in ("long", len(source.array)), ("short", 64):
        child = children.spawn(name)
        engine.connect(child.call(far_side.open_engine, [nic], liveness=10.0))
        remotes.append(RemoteRegion.from_bytes(child.call(far_side.offer, nbytes)))
    begin = time.monotonic()
    long = [engine.write(source, remotes[0]) for _ in range(6)]
    short: list[float] = []
    while not long[-1].done():
        at = time.monotonic()
        engine.write(source[:64], remotes[1]).wait(30)
        short.append(time.monotonic() - at)
    for one in long:
        one.wait(30)
    whole = time.monotonic() - begin
    assert len(short) > 10, f"{len(short)} short writes in {whole:.1f} s"
    assert float(np.median(short)) < whole / 20, f"{np.median(short):.4f} s of {whole:.1f} s"
