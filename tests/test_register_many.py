"""Many regions in one call, and their descriptors in one table: the same as one by one, and far less of it."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from railwire import (
    ClosedError,
    DescriptorError,
    RemoteRegions,
    StaleAddressError,
    TransferEngine,
    TransferError,
    region_table,
    wire,
)
from railwire.testing import SimulatedFabric


@pytest.fixture(params=["sim", "tcp://127.0.0.1", "shm"])
def two(request: pytest.FixtureRequest) -> Iterator[tuple[TransferEngine, TransferEngine]]:
    with SimulatedFabric() as fabric:
        a, b = (
            TransferEngine(
                nics=[fabric.nic(n), fabric.nic(n + "2")] if request.param == "sim" else [request.param], name=n
            )
            for n in "ab"
        )
        a.connect(b.address)
        yield a, b
        a.close(0.5)
        b.close(0.5)


def buffers(count: int, rng: random.Random) -> list[Any]:
    kinds = [
        lambda n: np.zeros(n, np.uint8),
        lambda n: bytearray(n),
        lambda n: memoryview(bytearray(n)),
        lambda n: np.zeros((n, 3), np.float32),
    ]
    return [rng.choice(kinds)(rng.randrange(1, 300)) for _ in range(count)]


def test_every_region_is_the_one_it_says(two: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = two
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    into = buffers(200, rng)
    regions = b.register_many(into)
    table = RemoteRegions.from_bytes(bytes(regions.descriptor))
    assert len(regions) == len(table) == 200
    source = a.register(np.arange(4096, dtype=np.uint8))
    for i in rng.sample(range(200), 60):
        n = memoryview(into[i]).nbytes
        assert regions[i].nbytes == table[i].nbytes == n
        assert regions[i].descriptor == table[i]
        a.write(source[i : i + n], table[i]).wait(5)
        assert bytes(regions[i].array) == bytes(source.array[i : i + n])
        back = a.register(np.zeros(n, np.uint8))
        b.write(regions[i], back.descriptor).wait(5)
        assert (back.array == source.array[i : i + n]).all()
    assert [r.nbytes for r in regions[3:7]] == [t.nbytes for t in table[3:7]]
    assert table[-1] == table[199]
    with pytest.raises(IndexError):
        table[200]


def test_a_revoked_region_has_another_place_in_the_next_table(two: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = two
    regions = b.register_many([np.zeros(64, np.uint8) for _ in range(10)])
    old = regions.descriptor
    regions[4].revoke()
    new = RemoteRegions.from_bytes(bytes(regions.descriptor))
    source = a.register(np.ones(64, np.uint8))
    with pytest.raises(TransferError):
        a.write(source, old[4]).wait(5)
    a.write(source, new[4]).wait(5)
    a.write(source, old[5]).wait(5)
    assert regions[4].array.all() and regions[5].array.all() and not regions[6].array.any()


def test_all_or_none(two: tuple[TransferEngine, TransferEngine]) -> None:
    _, b = two
    before = b.stats()["regions"]
    fine = [np.zeros(64, np.uint8) for _ in range(5)]
    frozen = np.zeros(64, np.uint8)
    frozen.flags.writeable = False
    for bad, error in (
        (frozen, ValueError),
        (np.zeros((8, 8), np.uint8)[:, ::2], ValueError),
        (np.zeros(0, np.uint8), ValueError),
        ("text", TypeError),
        ((64, 64), ValueError),
    ):
        with pytest.raises(error):
            b.register_many([*fine, bad])
    end = time.monotonic() + 5
    while b.stats()["regions"] != before:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert len(b.register_many([*fine, frozen], readable_only=True)) == 6
    assert len(b.register_many([])) == 0
    assert len(RemoteRegions.from_bytes(bytes(b.register_many([]).descriptor))) == 0


def test_the_owners_are_kept_as_long_as_any_region(two: tuple[TransferEngine, TransferEngine]) -> None:
    _, b = two

    class Owner(bytearray):
        pass

    made = [Owner(64) for _ in range(3)]
    alive = weakref.ref(made[0])
    regions = b.register_many(made)
    one = regions[2]
    del made, regions
    gc.collect()
    assert alive() is not None
    del one
    gc.collect()
    end = time.monotonic() + 5
    while alive() is not None:
        assert time.monotonic() < end, "nobody lets go of the owners"
        time.sleep(0.005)


def test_closing(two: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = two
    peers = a.peers
    regions = b.register_many([np.zeros(64, np.uint8) for _ in range(20)])
    table = regions.descriptor
    regions.close()
    with pytest.raises(ClosedError):
        _ = regions.descriptor
    with pytest.raises(TransferError):
        a.write(a.register(np.ones(64, np.uint8)), table[7]).wait(5)
    b.close(0.5)
    with pytest.raises(ClosedError):
        b.register_many([np.zeros(8, np.uint8)])
    regions.close()
    for peer in peers:  # whose news come a little later than the end of the connection
        peer.lost.wait(5)
    with pytest.raises(StaleAddressError):
        a.write(a.register(np.ones(64, np.uint8)), table[7])


def test_size_and_id() -> None:
    with SimulatedFabric() as fabric, TransferEngine(nics=[fabric.nic("a")]) as engine:
        whole = np.zeros(20_000 * 64, np.uint8)
        parts = list(whole.reshape(20_000, 64))
        regions = engine.register_many(parts)
        table = bytes(regions.descriptor)
        assert len(table) < 20 * len(parts)
        ids = RemoteRegions.from_bytes(table)._decoded.ids
        assert len(np.unique(ids)) == len(parts)
        assert int(np.abs(np.diff(ids.astype(np.float64))).min()) > 0


# ---- the table, as bytes ---------------------------------------------------------------------------------------------
def test_siphash_is_siphash() -> None:
    """The reference vectors of SipHash-2-4 with key 00..0f, for the message 00..07."""
    message = np.array([int.from_bytes(bytes(range(8)), "little")], np.uint64)
    assert int(region_table.siphash(bytes(range(16)), message)[0]) == 0x93F5F5799A932462


@pytest.mark.parametrize("values", [[], [0], [2**64 - 1], [5, 5, 5], [0, 2**64 - 1], [2**40, 2**40 + 255, 2**40 + 256]])
def test_columns(values: list[int]) -> None:
    column = region_table.pack(np.array(values, np.uint64))
    assert list(map(int, region_table.unpack(column, len(values)))) == values
    with pytest.raises(DescriptorError):
        region_table.unpack(msgspec.structs.replace(column, data=column.data + b"x"), len(values))


def test_a_table_from_a_liar_is_an_error() -> None:
    column = region_table.Column(0, 1, b"\1\2")
    good = region_table.Table(
        wire.VERSION, bytes(16), 2, bytes(16), 0, None, column, (region_table.PlainKeys(column, None),), False
    )
    assert region_table.decode(wire.encode(good)).keys(1) == (
        (2).to_bytes(8, "little") + int(region_table.ids_of(bytes(16), 1, 1)[0]).to_bytes(8, "little"),
    )
    change = msgspec.structs.replace
    opaque = region_table.OpaqueKeys(column, b"abc")
    assert region_table.decode(wire.encode(change(good, keys=(opaque,)))).keys(1) == (b"bc",)
    for bad in (
        change(good, version=1),
        change(good, count=3),
        change(good, count=1 << 25),
        change(
            good,
            count=1 << 20,
            nbytes=region_table.Column(1, 0, b""),
            keys=(region_table.PlainKeys(region_table.Column(1, 0, b""), None),),
        ),
        change(good, first=2**64 - 1),
        change(good, incarnation=b"short"),
        change(good, nbytes=region_table.Column(2**64 - 1, 1, b"\0\1")),
        change(good, nbytes=region_table.Column(2**64, 1, b"\0\1")),
        change(good, nbytes=region_table.Column(0, 9, b"\0" * 18)),
        change(good, keys=()),
        change(good, keys=(region_table.OpaqueKeys(column, b"abcd"),)),
        change(good, keys=(region_table.OpaqueKeys(region_table.Column(257, 0, b""), b"x" * 514),)),
        change(good, keys=(region_table.OpaqueKeys(region_table.Column(0, 8, b"\xff" * 16), b""),)),
    ):
        with pytest.raises((DescriptorError, OverflowError)):
            region_table.decode(wire.encode(bad))
    data = wire.encode(good)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(2000):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            region_table.decode(bytes(broken[: rng.randrange(1, len(broken) + 1)]))
        except DescriptorError:
            pass
