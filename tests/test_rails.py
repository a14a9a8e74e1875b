"""A peer is reached over sets of rails: memory that one kind of NIC does not take goes over another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from beds import patient

from railwire import ConfigurationError, RailwireError, ScatterTarget, TransferEngine
from railwire.testing import SimulatedFabric

LONGEST = 1000  # bytes of memory that the first kind takes


@dataclass
class Bed:
    first: SimulatedFabric
    near: TransferEngine
    far: TransferEngine

    def written(self) -> list[int]:
        """Bytes that left over each of the near side's NICs."""
        return [nic["bytes_written"] for nic in self.near.stats()["nics"]]


@pytest.fixture
def bed() -> Iterator[Bed]:
    with (
        SimulatedFabric(kind="sim", refuse_above=LONGEST) as first,
        SimulatedFabric(kind="other") as second,
        TransferEngine(nics=[first.nic("n"), second.nic("n0"), second.nic("n1")], name="near", liveness=1) as near,
        TransferEngine(nics=[second.nic("f"), first.nic("f")], name="far", liveness=1) as far,
    ):
        near.connect(far.address)
        yield Bed(first, near, far)


def test_a_write_goes_over_the_best_set_on_which_both_memories_are(bed: Bed) -> None:
    short, long = LONGEST, 4 * LONGEST
    rng = np.random.default_rng(1)
    sources = {n: bed.near.register(rng.integers(0, 256, n, np.uint8)) for n in (short, long)}
    targets = {n: bed.far.register(np.zeros(n, np.uint8)) for n in (short, long)}
    counter = bed.far.counter(5)
    for source, target in ((short, short), (short, long), (long, short), (long, long)):
        before = bed.written()
        bed.near.write(sources[source][:600], targets[target].descriptor[:600], imm=5).wait(patient(5))
        counter.expect(1).wait(patient(5))
        assert (targets[target].array[:600] == sources[source].array[:600]).all()
        first, *others = np.subtract(bed.written(), before)
        assert (first, sum(others)) == ((600, 0) if source == target == short else (0, 600))
    bed.near.read(targets[short].descriptor[600:], sources[long][:400]).wait(patient(5))
    assert (sources[long].array[:400] == targets[short].array[600:]).all()


def test_the_targets_of_one_scatter_may_need_different_rails(bed: Bed) -> None:
    source = bed.near.register(np.arange(200, dtype=np.uint8))
    short, long = (bed.far.register(np.zeros(n, np.uint8)) for n in (LONGEST, 4 * LONGEST))
    before = bed.written()
    (peer,) = bed.near.peers
    group = bed.near.peer_group([peer])
    targets = [ScatterTarget(0, short.descriptor[:100]), ScatterTarget(100, long.descriptor[50:150])]
    transfer = bed.near.scatter(group, source, targets, imm=6)
    bed.far.counter(6).expect(2).wait(patient(5))
    transfer.wait(patient(5))
    bed.near.barrier(group, 7).wait(patient(5))
    bed.far.counter(7).expect(1).wait(patient(5))
    assert (short.array[:100] == source.array[:100]).all() and (long.array[50:150] == source.array[100:]).all()
    first, *others = np.subtract(bed.written(), before)
    assert (first, sum(others)) == (100, 100)


def test_the_path_says_what_goes_where_and_why(bed: Bed) -> None:
    (peer,) = bed.near.peers
    best, other = peer.path
    assert (best.kind, best.carries, best.links, best.up) == ("sim", "host memory", 1, 1)
    assert (other.kind, other.carries, other.links, other.up) == ("other", "any memory", 2, 2)
    assert other.nics == tuple((nic.name, bed.far.nics[0].name) for nic in bed.near.nics[1:])
    assert "best kind" in best.why and "memory that sim does not take goes over other" in other.why


def test_rails_that_are_down_leave_the_work_to_others(bed: Bed) -> None:
    source, target = bed.near.register(np.ones(100, np.uint8)), bed.far.register(np.zeros(100, np.uint8))
    bed.first.kill("n")
    failed = 0
    deadline = time.monotonic() + patient(10)
    while True:
        try:
            bed.near.write(source, target.descriptor).wait(patient(5))
            break
        except RailwireError:
            failed += 1
            assert time.monotonic() < deadline
    (peer,) = bed.near.peers
    assert failed > 0 and peer.path[0].up == 0 and "none of its links is up" in peer.path[0].why
    assert (target.array == 1).all() and peer.state == "connected"


def test_memory_that_no_nic_takes_is_refused_with_each_ones_reason() -> None:
    with (
        SimulatedFabric(refuse_above=100) as fabric,
        TransferEngine(nics=[fabric.nic("a"), fabric.nic("b")]) as engine,
        pytest.raises(ConfigurationError, match=r"/a takes.*/b takes"),
    ):
        engine.register(np.zeros(101, np.uint8))


def test_two_nics_may_have_several_links() -> None:
    with (
        SimulatedFabric(links_per_pair=3) as fabric,
        TransferEngine(nics=[fabric.nic("a0"), fabric.nic("a1")], name="a") as a,
        TransferEngine(nics=[fabric.nic("b")], name="b") as b,
    ):
        peer = a.connect(b.address)
        assert peer.nics == (fabric.nic("a0"),) * 3 + (fabric.nic("a1"),) * 3
        source = a.register(np.random.default_rng(2).integers(0, 256, 1 << 20, np.uint8))
        target = b.register(np.zeros(1 << 20, np.uint8))
        a.write(source, target.descriptor, imm=1)
        b.counter(1).expect(1).wait(patient(5))
        assert (source.array == target.array).all()
