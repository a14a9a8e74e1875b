"""What may be registered: memory that its owner's process can write, or, as a source only, memory that it can read."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from processes import Children, State

from railwire import Pages, RailwireError, RemoteAccessError, RemoteRegion, ScatterTarget, TransferEngine
from railwire.testing import SimulatedFabric
from railwire.wire import decode_descriptor, encode

PAGE = mmap.PAGESIZE


class Pair:
    def __init__(self, fabric: SimulatedFabric) -> None:
        self.near, self.far = (TransferEngine(nics=[fabric.nic(name)], name=name, liveness=1.0) for name in "nf")
        self.peer = self.near.connect(self.far.address)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with SimulatedFabric() as fabric:
        made = Pair(fabric)
        yield made
        made.near.close()
        made.far.close()


def mapped(path: Path, pages: int = 4) -> mmap.mmap:
    """A read-only mapping of a file, as checkpoints are loaded."""
    path.write_bytes(np.random.bytes(pages * PAGE))
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def sources(path: Path) -> dict[str, Any]:
    locked = np.arange(256, dtype=np.uint8)
    locked.flags.writeable = False
    view = np.arange(256, dtype=np.uint8)
    view.flags.writeable = False
    made: dict[str, Any] = {
        "bytes": bytes(range(256)),
        "an array": locked,
        "a memoryview": memoryview(bytearray(range(256))).toreadonly(),
        "a mapping": mapped(path),
        "memory that could be written": np.arange(256, dtype=np.uint8),
    }
    try:
        import torch
    except ImportError:
        return made
    return made | {"a tensor over a mapping": torch.from_numpy(np.frombuffer(mapped(path), np.uint8))}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_read_only_memory_is_a_source(pair: Pair, tmp_path: Path) -> None:
    for what, buffer in sources(tmp_path / "weights").items():
        content = np.array(np.frombuffer(memoryview(np.asarray(buffer)).cast("B"), np.uint8))
        if what != "memory that could be written":
            with pytest.raises(ValueError, match=r"read-only.*readable_only=True"):
                pair.far.register(buffer)
        source = pair.far.register(buffer, readable_only=True)
        assert source.readable_only, what
        with pytest.raises(ValueError):
            source.array[0] = 1

        # We write from it, and peers read it.
        sink = pair.near.register(np.zeros(source.nbytes, np.uint8))
        pair.far.write(source, sink.descriptor).wait(5)
        assert np.array_equal(sink.array, content), what
        sink.array[:] = 0
        remote = RemoteRegion.from_bytes(bytes(source.descriptor))
        assert remote.readable_only and remote[1:9].readable_only
        pair.near.read(remote, sink).wait(5)
        assert np.array_equal(sink.array, content), what
        source.revoke()
        assert source.descriptor.readable_only
        source.close()


def test_a_write_to_a_source_is_refused_at_its_call(pair: Pair) -> None:
    source = pair.far.register(bytes(100), readable_only=True)
    mine = pair.near.register(np.ones(100, np.uint8))
    remote = RemoteRegion.from_bytes(bytes(source.descriptor))
    group = pair.near.peer_group([pair.peer])
    pages = Pages([0], 100)
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: pair.near.write(mine, remote, imm=1),
        "write to a slice": lambda: pair.near.write(mine[:10], remote[:10]),
        "write_pages": lambda: pair.near.write_pages(mine, pages, remote, pages, 100),
        "scatter": lambda: pair.near.scatter(group, mine, [ScatterTarget(0, remote)]),
        "over a connection": lambda: pair.near.write(mine, remote.over(pair.peer)),
        "read into a source of ours": lambda: pair.far.read(mine.descriptor, source),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match="readable_only"):
            call()
        assert what
    assert pair.near.stats()["transfers"]["submitted"] == 0


def lie(descriptor: RemoteRegion) -> RemoteRegion:
    """The same memory, as if it could be written."""
    return RemoteRegion(decode_descriptor(encode(msgspec.structs.replace(descriptor._message, readable_only=False))))


def test_a_writer_that_does_not_ask_is_refused_by_the_owners_nic(pair: Pair, tmp_path: Path) -> None:
    source = pair.far.register(mapped(tmp_path / "weights"), readable_only=True)
    mine = pair.near.register(np.ones(PAGE, np.uint8))
    before = source.array.copy()
    with pytest.raises(RemoteAccessError):
        pair.near.write(mine, lie(source.descriptor)[:PAGE]).wait(5)
    assert np.array_equal(source.array, before)


def own_a_mapping(state: State, nics: list[str], path: Path) -> tuple[bytes, bytes]:
    state.engine = TransferEngine(nics=nics, name="owner")
    state.source = state.engine.register(mapped(path), readable_only=True)
    state.before = state.source.array.copy()
    return bytes(state.engine.address), bytes(state.source.descriptor)


def is_as_it_was(state: State) -> bool:
    return bool(np.array_equal(state.source.array, state.before))


def test_its_owner_lives_on(children: Children, tmp_path: Path, nic: str) -> None:
    """Whose process the first byte would have ended."""
    nics = [nic]
    owner = children.spawn("owner")
    address, descriptor = owner.call(own_a_mapping, nics, tmp_path / "weights")
    with TransferEngine(nics=nics) as writer:
        writer.connect(address)
        mine, remote = writer.register(np.ones(PAGE, np.uint8)), lie(RemoteRegion.from_bytes(descriptor))[:PAGE]
        # libfabric's tcp does not always tell the writer of a refusal.
        told = pytest.raises(RemoteAccessError) if nic == "shm" else contextlib.suppress(RailwireError)
        with told:
            writer.write(mine, remote).wait(5)
    assert owner.call(is_as_it_was)


def test_memory_that_is_not_there_is_refused(pair: Pair, tmp_path: Path) -> None:
    area = mmap.mmap(-1, 4 * PAGE)
    address = int(np.frombuffer(area, np.uint8).ctypes.data)
    path = tmp_path / "short"
    path.write_bytes(bytes(4 * PAGE))
    with path.open("r+b") as file:
        short = mmap.mmap(file.fileno(), 4 * PAGE)
        file.truncate(PAGE)
    refused: dict[str, tuple[Any, str]] = {
        "address 0": ((0, PAGE), "not mapped"),
        "never mapped": ((0x20000, 1 << 20), "not mapped"),
        "beyond the end": ((address, 1 << 45), "not mapped|read-only|cannot be read"),
        "beyond everything": (((1 << 64) - 10, 100), "beyond the address space"),
        "a file that was cut": (short, "file that ends"),
    }
    regions = pair.near.stats()["regions"]
    for what, (buffer, why) in refused.items():
        for readable_only in (False, True):
            with pytest.raises(ValueError, match=why):
                pair.near.register(buffer, readable_only=readable_only)
        assert what
    for number in (1 << 64, 1 << 80):
        with pytest.raises((ValueError, TypeError)):
            pair.near.register((number, 1))
    assert pair.near.stats()["regions"] == regions
    region = pair.near.register((address + 5, 3 * PAGE))
    assert region.nbytes == 3 * PAGE
    region.close()
