"""Bad input is an exception at the call, and changes nothing."""

from __future__ import annotations

import array
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from railwire import (
    ClosedError,
    ConfigurationError,
    ConnectTimeout,
    DescriptorError,
    EngineAddress,
    Pages,
    PeerLostError,
    RailwireError,
    RemoteRegion,
    RevokedError,
    ScatterTarget,
    TransferEngine,
)
from railwire.testing import SimulatedFabric


class Bench:
    """Two engines, and a third that is nobody's peer."""

    def __init__(self) -> None:
        self.fabric = SimulatedFabric()
        self.near, self.far, self.stranger = (
            TransferEngine(nics=[self.fabric.nic(name)], name=name, liveness=0.5)
            for name in ("near", "far", "stranger")
        )
        self.peer = self.near.connect(self.far.address)
        self.source = self.near.register(np.arange(1000, dtype=np.int64).astype(np.uint8))
        self.target = self.far.register(np.zeros(1000, np.uint8))
        self.remote = RemoteRegion.from_bytes(bytes(self.target.descriptor))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    submitted = made.near.stats()["transfers"]["submitted"] if not made.near.closed else 0
    # Whatever was refused left no trace: the next write is the first one.
    if not made.near.closed and not made.source._closed and made.peer.state == "connected" and not made.target._closed:
        assert submitted == 0
        assert not made.target.array.any()
        made.near.write(made.source, made.target.descriptor, imm=1).wait(5)
        made.far.counter(1).expect(1).wait(5)
        assert made.far.counter(1).value == 0
        assert np.array_equal(made.target.array, made.source.array)
    for engine in (made.near, made.far, made.stranger):
        engine.close()
    made.fabric.close()


NAN = float("nan")
CALLS: dict[str, tuple[type[Exception], Callable[[Bench], Any]]] = {
    "write of other length": (ValueError, lambda b: b.near.write(b.source[:10], b.remote[:11])),
    "read of other length": (ValueError, lambda b: b.near.read(b.remote[:11], b.source[:10])),
    "slice beyond the end": (IndexError, lambda b: b.source[0:1001]),
    "remote slice beyond the end": (IndexError, lambda b: b.remote[990:1001]),
    "slice backwards": (IndexError, lambda b: b.source[10:5]),
    "slice with a step": (TypeError, lambda b: b.source[0:10:2]),
    "an index for a slice": (TypeError, lambda b: b.source[3]),
    "negative immediate": (ValueError, lambda b: b.near.write(b.source, b.remote, imm=-1)),
    "immediate of 23 bits": (ValueError, lambda b: b.near.write(b.source, b.remote, imm=1 << 22)),
    "immediate that is no int": (TypeError, lambda b: b.near.write(b.source, b.remote, imm=1.5)),  # type: ignore[arg-type]
    "immediate that is a bool": (TypeError, lambda b: b.near.write(b.source, b.remote, imm=True)),
    "counter of 23 bits": (ValueError, lambda b: b.near.counter(1 << 22)),
    "negative count": (ValueError, lambda b: b.far.counter(1).expect(-1)),
    "no time at all": (ValueError, lambda b: b.far.counter(1).expect(1, timeout=0)),
    "expectation of nobody": (ValueError, lambda b: b.far.counter(1).expect(1, peers=[])),
    "page beyond the source": (IndexError, lambda b: pages(b, [10], [0])),
    "page beyond the destination": (IndexError, lambda b: pages(b, [0], [10])),
    "negative page": (IndexError, lambda b: pages(b, [-1], [0])),
    "page of 2^40": (IndexError, lambda b: pages(b, [1 << 40], [0])),
    "lists of other length": (ValueError, lambda b: pages(b, [0, 1], [0])),
    "negative page bytes": (ValueError, lambda b: pages(b, [0], [0], page_bytes=-1)),
    "page longer than the region": (IndexError, lambda b: pages(b, [0], [0], page_bytes=1001)),
    "runs that do not divide": (ValueError, lambda b: pages(b, [0], [0], runs=(3, 40))),
    "runs that leave the region": (IndexError, lambda b: pages(b, [9], [0], runs=(2, 100))),
    "stride that overflows": (IndexError, lambda b: pages(b, [1 << 31], [0], stride=1 << 40)),
    "float pages": (TypeError, lambda b: Pages(np.array([1.0]), 100)),
    "string pages": (TypeError, lambda b: Pages(["a"], 100)),
    "two-dimensional pages": (ValueError, lambda b: Pages(np.zeros((2, 2), np.int64), 100)),
    "negative stride": (ValueError, lambda b: Pages([0], -1)),
    "negative offset": (ValueError, lambda b: Pages([0], 1, -1)),
    "no runs": (ValueError, lambda b: Pages([0], 1, 0, (0, 1))),
    "scatter outside the group": (
        ValueError,
        lambda b: b.near.scatter(b.near.peer_group([]), b.source, [ScatterTarget(0, b.remote)]),
    ),
    "scatter beyond the source": (
        IndexError,
        lambda b: b.near.scatter(b.near.peer_group([b.peer]), b.source, [ScatterTarget(1, b.remote)]),
    ),
    "scatter from before the source": (
        IndexError,
        lambda b: b.near.scatter(b.near.peer_group([b.peer]), b.source, [ScatterTarget(-1, b.remote)]),
    ),
    "a group with doubles": (ValueError, lambda b: b.near.peer_group([b.peer, b.peer])),
    "a group of another engine's peers": (ValueError, lambda b: b.far.peer_group([b.peer])),
    "a scatter to another engine's group": (
        ValueError,
        lambda b: b.far.scatter(b.near.peer_group([b.peer]), b.target, []),
    ),
    "a barrier of another engine's group": (ValueError, lambda b: b.far.barrier(b.near.peer_group([b.peer]), 1)),
    "a message to another engine's peer": (ValueError, lambda b: b.far.send(b.peer, b"")),
    "an expectation of another engine's peer": (ValueError, lambda b: b.far.counter(1).expect(1, peers=[b.peer])),
    "an expectation of a name": (ValueError, lambda b: b.far.counter(1).expect(1, peers=["near"])),  # type: ignore[list-item]
    "a word that calls nothing": (TypeError, lambda b: b.near.watch(None)),  # type: ignore[arg-type]
    "a connect without a number of seconds": (ValueError, lambda b: b.near.connect(b.stranger.address, NAN)),
    "a receive without a number of seconds": (ValueError, lambda b: b.near.receive(NAN)),
    "a wait without a number of seconds": (ValueError, lambda b: b.near.counter(1).expect(1).wait(NAN)),
    "an expectation without a number of seconds": (ValueError, lambda b: b.near.counter(1).expect(1, timeout=NAN)),
    "a stranger's descriptor": (
        DescriptorError,
        lambda b: b.near.write(b.source, b.stranger.register(np.zeros(1000, np.uint8)).descriptor),
    ),
    "our own descriptor": (DescriptorError, lambda b: b.near.write(b.source, b.source.descriptor)),
    "another engine's region": (ValueError, lambda b: b.near.write(b.target, b.remote)),
    "message that is too long": (ValueError, lambda b: b.near.send(b.peer, bytes(61 * 1024))),
    "message that is a string": (TypeError, lambda b: b.near.send(b.peer, "text")),  # type: ignore[arg-type]
    "registering text": (TypeError, lambda b: b.near.register("text")),
    "registering a number": (TypeError, lambda b: b.near.register(7)),
    "registering nothing": (ValueError, lambda b: b.near.register(np.zeros(0))),
    "registering bytes": (ValueError, lambda b: b.near.register(b"read-only")),
    "registering a transposed array": (ValueError, lambda b: b.near.register(np.zeros((3, 4)).T)),
    "registering half a tuple": (TypeError, lambda b: b.near.register((1,))),
    "registering a negative address": (TypeError, lambda b: b.near.register((-4096, 10))),
    "allocating less than nothing": (ValueError, lambda b: b.near.allocate(-1)),
    "garbage for an address": (DescriptorError, lambda b: b.near.connect(b"garbage")),
    "nothing for an address": (DescriptorError, lambda b: EngineAddress.from_bytes(b"")),
    "garbage for a descriptor": (DescriptorError, lambda b: RemoteRegion.from_bytes(b"\x93garbage")),
}


def pages(
    bench: Bench, take: list[int], put: list[int], page_bytes: int = 100, stride: int = 100, runs: Any = None
) -> Any:
    return bench.near.write_pages(
        bench.source, Pages(take, stride, 0, runs), bench.remote, Pages(put, stride), page_bytes, imm=1
    )


@pytest.mark.parametrize("what", CALLS)
def test_bad_calls(bench: Bench, what: str) -> None:
    error, call = CALLS[what]
    with pytest.raises(error) as raised:
        call(bench)
    assert str(raised.value), "an error without words"


OPTIONS: dict[str, dict[str, Any]] = {
    "no NIC": {"nics": []},
    "a string of NICs": {"nics": "tcp://127.0.0.1"},
    "an unknown kind of NIC": {"nics": ["carrier-pigeon"]},
    "an address that is not ours": {"nics": ["tcp://203.0.113.7"]},
    "a port that is none": {"nics": ["tcp://127.0.0.1:99999"]},
    "an unknown provider": {"nics": ["libfabric:nothing"]},
    "a fabric that does not exist": {"nics": ["sim://nowhere/a"]},
    "an unknown progress mode": {"progress": "fast"},
    "no liveness": {"liveness": 0},
    "a liveness of a day": {"liveness": 86400.0},
    "a core that does not exist": {"cpu": 4095},
    "a core below the first": {"cpu": -1},
    "a device that does not exist": {"device": "tpu:0", "nics": "auto"},
    "a link depth of nothing": {"options": {"link_depth": "0"}},
}


@pytest.mark.parametrize("what", OPTIONS)
def test_bad_options(what: str) -> None:
    options = {"nics": ["tcp://127.0.0.1"], **OPTIONS[what]}
    with pytest.raises(ConfigurationError) as raised:
        TransferEngine(**options)
    assert len(str(raised.value)) > 20


def test_a_port_in_use_says_so() -> None:
    with TransferEngine(nics=["tcp://127.0.0.1"]) as engine, pytest.raises(ConfigurationError, match="use"):
        TransferEngine(nics=[engine.nics[0].name])


def test_nobody_answers(bench: Bench) -> None:
    address = bench.stranger.address
    bench.stranger.close()
    with pytest.raises((ConnectTimeout, RailwireError)):
        bench.near.connect(address, timeout=0.3)


def test_no_nic_in_common(bench: Bench) -> None:
    with TransferEngine(nics=["tcp://127.0.0.1"]) as other, pytest.raises(ConfigurationError, match="in common"):
        bench.near.connect(other.address)


def test_closed_things(bench: Bench) -> None:
    region = bench.near.register(np.zeros(10, np.uint8))
    region.close()
    region.close()
    with pytest.raises(ClosedError):
        bench.near.write(region, bench.remote[:10])
    with pytest.raises(ClosedError):
        _ = region.descriptor
    bench.peer.close()
    with pytest.raises(PeerLostError):
        bench.near.send(bench.peer, b"x")
    with pytest.raises(RailwireError):
        bench.near.write(bench.source, bench.remote)
    bench.near.close()
    bench.near.close()
    for call in (
        lambda: bench.near.register(np.zeros(10)),
        lambda: bench.near.write(bench.source, bench.remote),
        lambda: bench.near.counter(1).expect(1),
        lambda: bench.near.connect(bench.far.address),
        lambda: bench.near.watch(print),
        lambda: bench.near.stats(),
        lambda: bench.near.receive(0.1),
    ):
        with pytest.raises(ClosedError):
            call()


def test_a_revoked_descriptor(bench: Bench) -> None:
    old = RemoteRegion.from_bytes(bytes(bench.target.descriptor))
    bench.target.revoke()
    with pytest.raises(RevokedError):
        bench.near.write(bench.source, old).wait(5)
    assert not bench.target.array.any()
    bench.near.write(bench.source, bench.target.descriptor).wait(5)
    assert np.array_equal(bench.target.array, bench.source.array)
    bench.peer.close()  # the fixture's own write would not be the first


def test_a_descriptor_that_was_taken_during_a_revoke_is_not_kept(bench: Bench) -> None:
    near, source, region = bench.near, bench.source, bench.target
    for _ in range(20):
        fence = region.revoke_async()
        old = region.descriptor  # perhaps still the one that goes
        fence.wait(5)
        near.write(source, region.descriptor).wait(5)
        with contextlib.suppress(RailwireError):
            near.write(source, old).wait(5)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            assert region.descriptor is not None

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(200):
        region.revoke()
    stop.set()
    looking.join()
    near.write(source, region.descriptor).wait(5)
    bench.peer.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(64),
        lambda: array.array("d", [0.0] * 8),
        lambda: np.zeros((2, 4), np.float64),
        lambda: memoryview(bytearray(64)),
    ],
)
def test_what_can_be_registered(bench: Bench, make: Callable[[], Any]) -> None:
    region = bench.far.register(make())
    assert region.nbytes == 64
    region.close()


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    with SimulatedFabric() as fabric, TransferEngine(nics=[fabric.nic("a")]) as engine:
        tensor = torch.zeros(4, 8, dtype=torch.bfloat16)
        region = engine.register(tensor)
        assert region.nbytes == 64
        assert region.address == tensor.data_ptr()
        with pytest.raises(ValueError):
            engine.register(tensor.t())
        assert len(Pages(torch.tensor([1, 2, 3]), 4)) == 3
