"""The shm NIC's own promises: memory that both map, nothing left behind, strangers at its socket, another way to peers
that it does not reach."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable

import far_side
import msgspec
import numpy as np
import pytest
from processes import Child

from railwire import RemoteRegion, TransferEngine, wire
from railwire.errors import ConnectError
from railwire.peer import EngineAddress

Open = Callable[..., TransferEngine]


def maps(name: str) -> int:
    """How many mappings of memfds with that name this process has."""
    with open("/proc/self/maps") as lines:
        return sum(f"/memfd:{name} " in line for line in lines)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared_files() -> set[str]:
    """Of all engines on this host; what others put there comes and goes."""
    return {name for name in os.listdir("/dev/shm") if "railwire" in name}


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def allocate(state: far_side.State, nbytes: int) -> bytes:
    region = state.engine.allocate(nbytes)
    state.regions.append(region)
    return bytes(region.descriptor)


def free(state: far_side.State) -> None:
    state.regions.pop().close()


# ---- memory that both map --------------------------------------------------------------------------------------------
def test_allocated_memory_is_mapped_and_let_go_with_its_region(open_engine: Open, child: Child) -> None:
    engine = open_engine("shm")
    engine.connect(child.call(far_side.open_engine, ["shm"]))
    size = (1 << 20) + 4096 + 13
    remote = RemoteRegion.from_bytes(child.call(allocate, size))
    source = engine.allocate(size)
    source.array[:] = np.frombuffer(np.random.bytes(size), np.uint8)
    before = maps("railwire")
    engine.write(source, remote).wait(10)  # by CMA, and asks for the memory
    assert within(5, lambda: engine.write(source[:1], remote[:1]).wait(10) or maps("railwire") == before + 1)
    back = engine.register(np.zeros(size, np.uint8))
    for length in (1, 63, 4096, 8193, size - 7):
        source.array[:] = np.frombuffer(np.random.bytes(size), np.uint8)
        engine.write(source[:length], remote[7 : 7 + length], imm=3).wait(10)
        engine.read(remote, back).wait(10)
        assert np.array_equal(back.array[7 : 7 + length], source.array[:length])
    child.call(free)
    assert within(5, lambda: maps("railwire") == before), "the mapping outlives the region"
    with pytest.raises(Exception, match=r"revoked|wrong key|withdrawn"):
        engine.write(source, remote).wait(10)


def test_no_memory_is_none_to_allocate(open_engine: Open) -> None:
    with pytest.raises(ValueError, match="positive"):
        open_engine("shm").allocate(0)


# ---- nothing is left behind ------------------------------------------------------------------------------------------
def test_a_killed_peer_leaves_nothing_behind(open_engine: Open, child: Child) -> None:
    engine = open_engine("shm")
    gc.collect()
    before = descriptors(), maps("railwire-link"), maps("railwire-messages")
    files = shared_files()
    engine.connect(child.call(far_side.open_engine, ["shm"]))
    assert maps("railwire-link") == 2 and maps("railwire-messages") == 2
    child.kill()
    assert within(10, lambda: (descriptors(), maps("railwire-link"), maps("railwire-messages")) == before)
    assert not shared_files() - files


# ---- strangers and liars ---------------------------------------------------------------------------------------------
def name_of_socket(engine: TransferEngine) -> str:
    (nic,) = wire.decode_address(bytes(engine.address)).nics
    return "\0railwire-shm-" + nic.control[8:24].hex()


def dial(engine: TransferEngine) -> socket.socket:
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.connect(name_of_socket(engine))
    stranger.settimeout(5)
    return stranger


def test_garbage_at_the_socket_costs_the_stranger_its_connection(open_engine: Open, child: Child) -> None:
    engine = open_engine("shm")
    remote = RemoteRegion.from_bytes(bytes(engine.register(np.zeros(64, np.uint8)).descriptor))
    peer = engine.connect(child.call(far_side.open_engine, ["shm"]))
    before = descriptors()
    hello = struct.pack("<IHH", 0x48575231, 1, 1)
    for packet in (
        b"x" * 300,
        b"x" * 72,
        hello + bytes(64),  # without a ring
        hello[:4] + struct.pack("<HH", 2, 1) + bytes(64),  # another version
        struct.pack("<IHH", 0x48575231, 1, 2) + bytes(64),  # a link before an introduction
    ):
        with dial(engine) as stranger:
            stranger.send(packet)
            assert stranger.recv(100) == b""
    # Memory that could be shrunk under us is not mapped, nor is any that is too short.
    for nbytes, sealed in ((1 << 20, False), (4096, True)):
        fd = os.memfd_create("liar", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        if sealed:
            fcntl.fcntl(fd, 1033, 0x2)
        with dial(engine) as stranger:
            socket.send_fds(stranger, [hello + bytes(64)], [fd])
            assert stranger.recv(100) == b""
        os.close(fd)
    assert within(5, lambda: descriptors() == before)
    engine.send(peer, b"still here")
    assert remote.nbytes == 64


def test_silent_strangers_are_bounded(open_engine: Open, child: Child) -> None:
    engine = open_engine("shm")
    before = descriptors()
    strangers = [dial(engine) for _ in range(400)]
    time.sleep(0.2)
    assert descriptors() - before <= 400 + 256
    engine2 = open_engine("shm")
    for stranger in strangers:
        stranger.close()
    engine2.connect(engine.address)


# ---- peers that it does not reach ------------------------------------------------------------------------------------
def elsewhere(address: bytes) -> bytes:
    """The same engine, but with an shm NIC that nobody can dial, as in another network namespace."""
    message = wire.decode_address(address)
    nics = [
        msgspec.structs.replace(nic, control=nic.control[:8] + secrets.token_bytes(16) + nic.control[24:])
        if nic.kind == "shm"
        else nic
        for nic in message.nics
    ]
    return bytes(EngineAddress(msgspec.structs.replace(message, nics=tuple(nics))))


def test_where_shm_does_not_reach_tcp_does(open_engine: Open, child: Child, caplog: pytest.LogCaptureFixture) -> None:
    both = ["tcp://127.0.0.1", "shm"]
    engine = open_engine(*both)
    address = elsewhere(child.call(far_side.open_engine, both))
    with caplog.at_level(logging.WARNING, logger="railwire"):
        peer = engine.connect(address)
    assert "shm" not in peer.nics
    assert "shm does not reach it" in caplog.text and "network namespace" in caplog.text


def test_where_nothing_reaches_the_error_says_why(open_engine: Open, child: Child) -> None:
    engine = open_engine("shm")
    with pytest.raises(ConnectError, match="network namespace"):
        engine.connect(elsewhere(child.call(far_side.open_engine, ["shm"])))


def test_another_version_is_refused_by_name(open_engine: Open, child: Child) -> None:
    engine = open_engine("shm")
    message = wire.decode_address(child.call(far_side.open_engine, ["shm"]))
    (nic,) = message.nics
    newer = msgspec.structs.replace(nic, control=nic.control[:4] + b"\x02\x00" + nic.control[6:])
    with pytest.raises(ConnectError, match="version 2, ours 1"):
        engine.connect(EngineAddress(msgspec.structs.replace(message, nics=(newer,))))


def test_two_engines_of_one_process_use_it(open_engine: Open) -> None:
    one, two = open_engine("tcp://127.0.0.1", "shm"), open_engine("tcp://127.0.0.1", "shm")
    peer = one.connect(two.address)
    assert peer.nics == ("shm",)
    region = two.register(np.zeros(100_000, np.uint8))
    one.write(one.register(np.ones(100_000, np.uint8)), RemoteRegion.from_bytes(bytes(region.descriptor))).wait(5)
    assert region.array.all()
