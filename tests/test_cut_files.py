"""Mapped files that are cut while they are registered: over tcp, what reaches the missing pages fails alone."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from railwire import MemoryRegion, RemoteAccessError, TransferEngine, TransferError

PAGE, NBYTES = mmap.PAGESIZE, 1 << 20
FAULTS = 10  # in a row: more often than a link that never works is made anew


class Bed:
    def __init__(self, folder: Path) -> None:
        self.near, self.far = (TransferEngine(nics=["tcp://127.0.0.1"], name=name) for name in ("near", "far"))
        self.near.connect(self.far.address)
        self._folder = folder
        self.memory = self.near.register(np.full(NBYTES, 9, np.uint8))
        self.good_bytes = np.zeros(NBYTES, np.uint8)
        self.regions = [self.far.register(self.good_bytes)]
        self.good = self.regions[0].descriptor
        self.healthy = 0

    def cut(self, engine: TransferEngine, left: int) -> MemoryRegion:
        path = self._folder / f"{len(list(self._folder.iterdir()))}"
        path.write_bytes(bytes([1]) * NBYTES)
        with path.open("r+b") as file:
            region = engine.register(mmap.mmap(file.fileno(), NBYTES))
            file.truncate(left)
        self.regions.append(region)
        return region

    def write_healthy(self) -> None:
        self.healthy += 1
        self.near.write(self.memory[:PAGE], self.good[:PAGE], imm=4).wait(20)

    def check(self) -> None:
        """Whatever was healthy has landed once, and nothing else has been counted."""
        self.write_healthy()
        self.far.counter(4).expect(self.healthy, timeout=20).wait()
        assert self.far.counter(4).value == 0 and self.far.counter(3).value == 0
        assert [peer.state for engine in (self.near, self.far) for peer in engine.peers] == ["connected"] * 2


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    yield made
    made.near.close()
    made.far.close()


@pytest.mark.parametrize("left", [0, 40 * PAGE + 5], ids=["to nothing", "in the middle"])
@pytest.mark.parametrize("size", [100, 5 * PAGE, NBYTES])
def test_a_write_from_a_cut_file(bed: Bed, left: int, size: int) -> None:
    source, part = bed.cut(bed.near, left), slice(NBYTES - size, NBYTES)
    for _ in range(FAULTS):
        before = bed.near.write(bed.memory[:64], bed.good[:64], imm=4)
        faulty = bed.near.write(source[part], bed.good[part], imm=3)
        behind = bed.near.write(bed.memory[:64], bed.good[:64], imm=4)
        with pytest.raises(TransferError, match="not there any more") as failure:
            faulty.wait(20)
        assert failure.value.reason == "local"
        before.wait(20)
        behind.wait(20)
        bed.healthy += 2
    if left:  # what is left of it goes on
        bed.near.write(source[: 20 * PAGE], bed.good[: 20 * PAGE]).wait(20)
        assert (bed.good_bytes[PAGE : 20 * PAGE] == 1).all()
    bed.check()


@pytest.mark.parametrize("left", [0, 40 * PAGE + 5], ids=["to nothing", "in the middle"])
@pytest.mark.parametrize("size", [100, NBYTES])
def test_a_read_of_a_cut_file(bed: Bed, left: int, size: int) -> None:
    source, part = bed.cut(bed.far, left).descriptor, slice(NBYTES - size, NBYTES)
    for _ in range(FAULTS):
        with pytest.raises(RemoteAccessError):
            bed.near.read(source[part], bed.memory[part]).wait(20)
        bed.write_healthy()
    if left:
        bed.near.read(source[: 20 * PAGE], bed.memory[: 20 * PAGE]).wait(20)
    bed.check()


def test_a_long_write_to_a_cut_file(bed: Bed) -> None:
    """Where the kernel puts the bytes into place: it says so, and kills nobody."""
    target = bed.cut(bed.far, 40 * PAGE + 5).descriptor
    faulty = bed.near.write(bed.memory, target, imm=3)
    bed.write_healthy()
    with pytest.raises(RemoteAccessError):
        faulty.wait(20)
    bed.check()


def test_a_long_read_into_a_cut_file(bed: Bed) -> None:
    target = bed.cut(bed.near, 40 * PAGE + 5)
    faulty = bed.near.read(bed.good, target)
    bed.write_healthy()
    with pytest.raises(TransferError, match="not there any more") as failure:
        faulty.wait(20)
    assert failure.value.reason == "local"
    bed.check()
