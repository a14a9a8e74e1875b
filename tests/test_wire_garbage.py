"""Bytes from the network that are not what they should be: only the documented errors, and the engine goes on.

The generator starts from real bytes and flips, cuts, repeats and splices them, because purely random bytes rarely get
past the first check.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from railwire import (
    DescriptorError,
    EngineAddress,
    RailwireError,
    RemoteRegion,
    TransferEngine,
    wire,
)
from railwire.testing import SimulatedFabric


def garbage(originals: list[bytes], count: int) -> Iterator[bytes]:
    for _ in range(count):
        data = bytearray(random.choice(originals))
        for _ in range(random.randint(1, 4)):
            kind = random.randrange(7)
            at = random.randrange(len(data) + 1)
            if kind == 0 and data:
                data[at % len(data)] ^= 1 << random.randrange(8)
            elif kind == 1:
                del data[at:]
            elif kind == 2:
                data[at:at] = random.randbytes(random.randint(1, 9))
            elif kind == 3:
                other = random.choice(originals)
                data[at:] = other[random.randrange(len(other) + 1) :]
            elif kind == 4 and data:
                data[at % len(data)] = random.choice([0, 0x7F, 0x80, 0xC0, 0xCF, 0xDD, 0xFF])
            elif kind == 5:
                data[at : at + 8] = struct.pack("<Q", random.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
            else:
                data = bytearray(random.randbytes(random.randrange(300)))
        yield bytes(data)


@pytest.fixture
def engine() -> Iterator[TransferEngine]:
    with SimulatedFabric() as fabric, TransferEngine(nics=[fabric.nic("a")]) as made:
        yield made


def test_addresses_and_descriptors(engine: TransferEngine) -> None:
    region = engine.register(np.zeros(100, np.uint8))
    originals = [bytes(engine.address), bytes(region.descriptor), bytes(region[3:50].descriptor)]
    for data in garbage(originals, 20_000):
        for parse in (EngineAddress.from_bytes, RemoteRegion.from_bytes):
            try:
                parse(data)
            except DescriptorError as error:
                assert str(error)


def test_descriptors_that_parse_but_lie(engine: TransferEngine) -> None:
    """A descriptor that was changed on its way must not let a write leave the region at the peer."""
    with SimulatedFabric() as fabric:
        near, far = (TransferEngine(nics=[fabric.nic(n)], name=n, liveness=0.5) for n in "nf")
        near.connect(far.address)
        whole = np.zeros(300, np.uint8)
        region = far.register(whole[100:200])
        source = near.register(np.full(1000, 7, np.uint8))
        tried = 0
        for data in garbage([bytes(region.descriptor)], 3000):
            try:
                lie = RemoteRegion.from_bytes(data)
                near.write(source[: lie.nbytes], lie).wait(5)
                tried += 1
            except (RailwireError, IndexError, ValueError):
                pass
            if not near.peers:
                near.connect(far.address)
            assert not whole[:100].any()
            assert not whole[200:].any()
        near.close()
        far.close()


def handshakes() -> list[bytes]:
    """One of each handshake message, as msgpack, made from real ones."""
    seen: list[bytes] = []
    original = wire.encode

    def keep(message: msgspec.Struct) -> bytes:
        data = original(message)
        seen.append(data)
        return data

    wire.encode = keep
    try:
        with SimulatedFabric() as fabric:
            a = TransferEngine(nics=[fabric.nic("a")], secret="s")
            b = TransferEngine(nics=[fabric.nic("b")], secret="s")
            c = TransferEngine(nics=[fabric.nic("c")], secret="other", liveness=0.2)
            a.connect(b.address)
            with pytest.raises(RailwireError):
                c.connect(b.address)
            for engine in (a, b, c):
                engine.close()
    finally:
        wire.encode = original
    assert len(seen) >= 5
    return seen


def test_handshakes(engine: TransferEngine) -> None:
    originals = handshakes()
    for data in garbage(originals, 20_000):
        try:
            wire.decode_handshake(data)
        except DescriptorError:
            pass
    # And as they come from a NIC: nothing is raised, nothing is answered that would make it a peer.
    for data in garbage(originals, 5_000):
        engine._connector.on_frame(0, data)
    assert engine.peers == ()
    assert_usable(engine)


def test_bytes_at_the_tcp_port() -> None:
    """Somebody else's program talks to our port."""
    with TransferEngine(nics=["tcp://127.0.0.1"], liveness=0.5) as engine:
        port = int(engine.nics[0].name.rpartition(":")[2])
        for size in (0, 1, 16, 100, 5000):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                stranger.settimeout(0.2)
                try:
                    stranger.sendall(random.randbytes(size))
                    stranger.recv(100)
                except OSError:
                    pass
        assert_usable(engine)


def test_messages_of_every_kind_of_content(engine: TransferEngine) -> None:
    """The user's messages are opaque: whatever looks like our own frames arrives as it was sent."""
    with SimulatedFabric() as fabric:
        near, far = (TransferEngine(nics=[fabric.nic(n)], name=n) for n in "nf")
        peer = near.connect(far.address)
        originals = [*handshakes(), b"", b"\0" * 64]
        sent = list(garbage(originals, 300))
        for data in sent:
            near.send(peer, data)
        assert [far.receive(5)[1] for _ in sent] == sent
        near.close()
        far.close()


def assert_usable(engine: TransferEngine) -> None:
    nic = engine.nics[0].name
    nic = nic.rpartition("/")[0] + "/other" if nic.startswith("sim://") else nic.rpartition(":")[0]
    region = engine.register(np.zeros(64, np.uint8))
    with TransferEngine(nics=[nic], name="other") as other:
        other.connect(engine.address)
        other.write(other.register(np.ones(64, np.uint8)), region.descriptor, imm=1).wait(5)
        engine.counter(1).expect(1).wait(5)
        assert region.array.all()


def test_no_pickle_anywhere() -> None:
    for path in (Path(__file__).parent.parent / "railwire").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text and "pickle." not in text, path
