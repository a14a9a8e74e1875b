"""What is native needs no GIL: a process whose Python stands still moves bytes, and is not taken for dead."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from railwire import MemoryRegion, Pages, PeerGroup, RemoteRegion, ScatterTarget, Transfer, TransferEngine
from railwire.testing import SimulatedFabric

_c = ctypes.PyDLL(None)  # unlike CDLL, it keeps the GIL

Submit = Callable[[TransferEngine, PeerGroup, MemoryRegion, RemoteRegion], Transfer]


def write(engine: TransferEngine, _: PeerGroup, source: MemoryRegion, target: RemoteRegion) -> Transfer:
    return engine.write(source, target, imm=1)


def read(engine: TransferEngine, _: PeerGroup, source: MemoryRegion, target: RemoteRegion) -> Transfer:
    return engine.read(target, source)


def write_pages(engine: TransferEngine, _: PeerGroup, source: MemoryRegion, target: RemoteRegion) -> Transfer:
    pages = Pages(np.arange(4), stride=1024)
    return engine.write_pages(source, pages, target, pages, 1024, imm=1)


def scatter(engine: TransferEngine, group: PeerGroup, source: MemoryRegion, target: RemoteRegion) -> Transfer:
    return engine.scatter(group, source, [ScatterTarget(0, target)], imm=1)


@pytest.mark.parametrize("submit", [write, read, write_pages, scatter], ids=lambda submit: submit.__name__)
def test_transfers_end_while_the_gil_is_held(open_engine: Callable[..., TransferEngine], submit: Submit) -> None:
    """The end of the first one waited for the GIL, with the engine's lock in its hands: descriptors and regions were
    held by references of Python's."""
    with SimulatedFabric(max_delay_us=100_000) as fabric:
        a, b = open_engine(fabric.nic("a")), open_engine(fabric.nic("b"))
        group = a.peer_group([a.connect(b.address)])
        source, there = (engine.register(np.zeros(4096, np.uint8)) for engine in (a, b))
        transfers = [submit(a, group, source, there.descriptor) for _ in range(20)]
        # No switch of threads, and no dispatcher, is needed for what is looked at below.
        _c.usleep(600_000)
        states = [transfer.state for transfer in transfers]
    assert states == ["done"] * len(transfers)


def test_a_process_whose_python_stands_still_is_not_lost(open_engine: Callable[..., TransferEngine]) -> None:
    liveness = 0.5
    with SimulatedFabric(max_delay_us=50_000) as fabric:
        a, b = (open_engine(fabric.nic(name), liveness=liveness) for name in "ab")
        peer = a.connect(b.address)
        source, there = (engine.register(np.zeros(4096, np.uint8)) for engine in (a, b))
        transfers = [a.write(source, there.descriptor) for _ in range(20)]
        _c.usleep(999_999)  # its longest
        _c.usleep(999_999)
        assert [transfer.state for transfer in transfers] == ["done"] * len(transfers)
        assert (peer.state, a.peers[0].state, b.peers[0].state) == ("connected",) * 3
        a.write(source, there.descriptor).wait(10)
