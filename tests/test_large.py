"""Large and idle: 5 GiB in one write, 100,000 pages in one call, and engines that do nothing."""

from __future__ import annotations

import gc
import mmap
import os
import resource
import time
from collections.abc import Callable

import far_side
import numpy as np
import pytest
from processes import Child

from railwire import Pages, RemoteRegion, TransferEngine
from railwire.testing import SimulatedFabric

Open = Callable[..., TransferEngine]


def sparse(nbytes: int) -> np.ndarray:
    """Zeros that take no memory until they are written."""
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(area, dtype=np.uint8)


def offer_sparse(state: far_side.State, nbytes: int) -> bytes:
    region = state.engine.register(sparse(nbytes))
    state.regions.append(region)
    return bytes(region.descriptor)


def marks_of(state: far_side.State, places: list[int]) -> list[int]:
    array = state.regions[0].array
    return [int(array[place]) for place in places]


def everything_else_is_zero(state: far_side.State, places: list[int]) -> bool:
    array = state.regions[0].array
    array[places] = 0
    step = 1 << 28
    return not any(array[at : at + step].any() for at in range(0, len(array), step))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_five_gib_in_one_write(open_engine: Open, child: Child, nic: str) -> None:
    nbytes = (5 << 30) + 3
    engine = open_engine(nic, liveness=20.0)
    engine.connect(child.call(far_side.open_engine, [nic], liveness=20.0))
    remote = RemoteRegion.from_bytes(child.call(offer_sparse, nbytes))
    source = engine.register(sparse(nbytes))
    places = [0, 1, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, nbytes - 1]
    for number, place in enumerate(places):
        source.array[place] = number + 1
    engine.write(source, remote, imm=1).wait(200)
    child.call(far_side.expect, 1, 1)
    assert child.call(marks_of, places) == list(range(1, len(places) + 1))
    assert child.call(everything_else_is_zero, places, timeout=100)


def test_a_call_of_a_hundred_thousand_pages_returns_at_once() -> None:
    """1 ms is what `railwire bench engine` is to show on a quiet machine; here only the order of magnitude counts."""
    with SimulatedFabric(discard=True) as fabric:
        near, far = (TransferEngine(nics=[fabric.nic(name)], name=name) for name in "nf")
        near.connect(far.address)
        count = 100_000
        source, target = near.allocate(count * 64), far.allocate(count * 64)
        rng = np.random.default_rng(0)
        take, put = Pages(rng.permutation(count), 64), Pages(rng.permutation(count), 64)
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            transfer = near.write_pages(source, take, target.descriptor, put, 64)
            times.append(time.perf_counter() - begin)
            transfer.wait(10)
        near.close()
        far.close()
        assert sorted(times)[4] < 5e-3, times


@pytest.mark.parametrize("nics", [["tcp://127.0.0.1", "shm"], ["tcp://127.0.0.1"], ["shm"]], ids=["both", "tcp", "shm"])
def test_an_idle_engine_uses_no_cpu(child: Child, nics: list[str]) -> None:
    child.call(far_side.open_engine, nics)
    with TransferEngine(nics=nics, liveness=5.0) as engine:
        engine.connect(bytes(child.call(far_side_address)))
        time.sleep(0.3)
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = time.monotonic()
        time.sleep(1.5)
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert used / (time.monotonic() - begin) < 0.01


def far_side_address(state: far_side.State) -> bytes:
    return bytes(state.engine.address)


def test_nothing_is_left_behind(child: Child, nic: str) -> None:
    """File descriptors and files in /dev/shm, after many engines have come and gone."""
    child.call(far_side.open_engine, [nic])
    address = child.call(far_side_address)

    def once() -> None:
        with TransferEngine(nics=[nic]) as engine:
            engine.connect(address)
            engine.allocate(1 << 20)

    once()
    gc.collect()
    descriptors, files = len(os.listdir("/proc/self/fd")), len(os.listdir("/dev/shm"))
    for _ in range(5):
        once()
    gc.collect()  # engines refer to themselves
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    assert len(os.listdir("/dev/shm")) <= files + 1
