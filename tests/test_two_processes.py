"""Two real processes over tcp and shm: data, counters, messages; and what happens when one is killed, stopped or
restarted."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable

import far_side
import numpy as np
import pytest
from beds import EMULATED, patient
from processes import Child, Children

from railwire import (
    FenceError,
    Pages,
    PeerLostError,
    RailwireError,
    RemoteRegion,
    ScatterTarget,
    StaleAddressError,
    Transfer,
    TransferEngine,
)

LIVENESS = patient(1.0)
MIB = 1 << 20
MUCH = MIB if EMULATED else 16 * MIB  # bytes per transfer where several are to be under way for a while
Open = Callable[..., TransferEngine]


def sha(data: np.ndarray | bytes) -> str:
    return hashlib.sha256(bytes(data)).hexdigest()


def linked(open_engine: Open, child: Child, nic: str, nbytes: int) -> tuple[TransferEngine, RemoteRegion]:
    """An engine here, connected to one in the child that offers `nbytes` of zeros."""
    engine = open_engine(nic)
    engine.connect(child.call(far_side.open_engine, [nic]))
    return engine, RemoteRegion.from_bytes(child.call(far_side.offer, nbytes))


@pytest.mark.parametrize("nbytes", [1, 3, 64, 4095, 16385, 100_003, 5_000_001])
def test_a_write_lands_byte_exact_and_counts_once(open_engine: Open, child: Child, nic: str, nbytes: int) -> None:
    engine, remote = linked(open_engine, child, nic, nbytes + 64)
    source = engine.register(np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8))
    engine.write(source, remote[32 : 32 + nbytes], imm=5).wait(20)
    child.call(far_side.expect, 5, 1)
    assert child.call(far_side.bytes_of, 0, 32, 32 + nbytes) == source.array.tobytes()
    assert child.call(far_side.bytes_of, 0, 0, 32) == bytes(32)
    assert child.call(far_side.bytes_of, 0, 32 + nbytes) == bytes(32)
    assert child.call(far_side.counter_value, 5) == 0


def test_an_empty_write_is_an_arrival(open_engine: Open, child: Child, nic: str) -> None:
    engine, remote = linked(open_engine, child, nic, 64)
    source = engine.register(np.ones(64, np.uint8))
    engine.write(source[0:0], remote[0:0], imm=6).wait(10)
    engine.barrier(engine.peer_group(engine.peers), imm=6).wait(10)
    child.call(far_side.expect, 6, 2)
    assert child.call(far_side.untouched, 0)


@pytest.mark.parametrize("pages", [1, 1000, 100_000])
def test_random_pages(open_engine: Open, child: Child, nic: str, rng: np.random.Generator, pages: int) -> None:
    page_bytes = 256
    engine, remote = linked(open_engine, child, nic, pages * page_bytes)
    source = engine.register(rng.integers(0, 256, pages * page_bytes, dtype=np.uint8))
    take, put = rng.permutation(pages), rng.permutation(pages)
    child.call(far_side.begin_expect, 7, pages)
    engine.write_pages(source, Pages(take, page_bytes), remote, Pages(put, page_bytes), page_bytes, imm=7).wait(30)
    assert child.call(far_side.outcome_of_expect, 7)[0] == "done"
    expected = np.zeros((pages, page_bytes), np.uint8)
    expected[put] = source.array.reshape(pages, page_bytes)[take]
    assert child.call(far_side.digest) == sha(expected.tobytes())


def test_reads(open_engine: Open, child: Child, nic: str) -> None:
    engine, remote = linked(open_engine, child, nic, 3_000_001)
    expected = child.call(far_side.fill, 3)
    local = engine.register(np.zeros(3_000_001, np.uint8))
    engine.read(remote, local).wait(20)
    assert sha(local.array) == expected


def test_messages_come_in_order_and_back(open_engine: Open, child: Child, nic: str) -> None:
    engine, _ = linked(open_engine, child, nic, 64)
    (peer,) = engine.peers
    sent = [bytes([i % 251]) * (i * 97 % 5000) for i in range(200)]
    child.begin(far_side.send_back, len(sent))
    for message in sent:
        engine.send(peer, message)
    assert [engine.receive(10)[1] for _ in sent] == [b"re:" + message for message in sent]
    assert child.answer() == len(sent)


def test_scatter_and_barrier_to_two_processes(open_engine: Open, children: Children, nic: str) -> None:
    engine = open_engine(nic)
    ends = [children.spawn(f"end{i}") for i in range(2)]
    group = engine.peer_group([engine.connect(end.call(far_side.open_engine, [nic])) for end in ends])
    remotes = [RemoteRegion.from_bytes(end.call(far_side.offer, 1000)) for end in ends]
    source = engine.register(np.arange(4000, dtype=np.int64).astype(np.uint8))
    targets = [ScatterTarget(i * 500, remotes[i % 2][i * 100 : i * 100 + 100]) for i in range(8)]
    engine.scatter(group, source, targets, imm=9).wait(10)
    engine.barrier(group, imm=10).wait(10)
    for number, end in enumerate(ends):
        end.call(far_side.expect, 9, 4)
        end.call(far_side.expect, 10, 1)
        expected = np.zeros(1000, np.uint8)
        for i in range(number, 8, 2):
            expected[i * 100 : i * 100 + 100] = source.array[i * 500 : i * 500 + 100]
        assert end.call(far_side.bytes_of) == expected.tobytes()


def test_odd_lengths_over_several_tcp_nics(open_engine: Open, child: Child, rng: np.random.Generator) -> None:
    """3 B over 4 NICs, 16385 B over 2, and more NICs on one side than on the other."""
    for ours, theirs in ((4, 4), (2, 2), (3, 1)):
        engine = open_engine(*[f"tcp://127.0.0.{i + 1}" for i in range(ours)])
        engine.connect(child.call(far_side.open_engine, [f"tcp://127.0.1.{i + 1}" for i in range(theirs)]))
        remote = RemoteRegion.from_bytes(child.call(far_side.offer, 4_000_000))
        source = engine.register(rng.integers(1, 256, 4_000_000, dtype=np.uint8))
        at = 0
        lengths = (3, 16385, 0, 1, 1_000_003)
        for length in lengths:
            engine.write(source[at : at + length], remote[at : at + length], imm=3).wait(10)
            at += length
        child.call(far_side.expect, 3, len(lengths))
        assert child.call(far_side.counter_value, 3) == 0
        expected = np.zeros(4_000_000, np.uint8)
        expected[:at] = source.array[:at]
        assert child.call(far_side.digest) == sha(expected)
        if ours == theirs:
            used = [nic["bytes_written"] for nic in engine.stats()["nics"]]
            assert min(used) > max(used) / 8, used  # whoever has room takes the next part
        child.call(far_side.close)


def test_shm_is_chosen_on_one_host(open_engine: Open, child: Child) -> None:
    engine = open_engine("tcp://127.0.0.1", "shm")
    peer = engine.connect(child.call(far_side.open_engine, ["tcp://127.0.0.1", "shm"]))
    assert peer.nics == ("shm",)


# ---- ends ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("progress", ["adaptive", "spin"])
def test_the_death_of_a_local_process_is_known_long_before_the_liveness_time(
    open_engine: Open, child: Child, nic: str, progress: str
) -> None:
    engine = open_engine(nic, liveness=5.0, progress=progress)
    peer = engine.connect(child.call(far_side.open_engine, [nic], liveness=5.0))
    child.call(far_side.offer, 64)
    time.sleep(0.3)  # past the first tick, that comes at once
    child.kill()
    begin = time.monotonic()
    peer.lost.wait(5)
    assert time.monotonic() - begin < 0.5


def test_the_fence_of_a_stopped_writer_that_copies_comes_with_its_death(open_engine: Open, child: Child) -> None:
    engine = open_engine("libfabric:shm", liveness=0.5)
    peer = engine.connect(child.call(far_side.open_engine, ["libfabric:shm"], liveness=0.5))
    child.stop()
    peer.lost.wait(5)
    for _ in range(2):  # it may go on at any time
        with pytest.raises(FenceError):
            peer.close()
    child.kill()
    peer.close()


def test_a_stopped_shm_peer_that_was_not_copying_is_fenced_at_once(open_engine: Open, child: Child) -> None:
    engine = open_engine("shm", liveness=0.5)
    peer = engine.connect(child.call(far_side.open_engine, ["shm"], liveness=0.5))
    child.stop()
    peer.lost.wait(5)
    peer.close()
    child.resume()


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_killed_peer_ends_everything_in_time(
    open_engine: Open, children: Children, child: Child, nic: str, when: str
) -> None:
    engine, remote = linked(open_engine, child, nic, MUCH)
    (peer,) = engine.peers
    source = engine.register(np.ones(MUCH, np.uint8))
    pages = Pages(np.arange(MUCH // 4096), 4096)
    waiting = engine.counter(2).expect(1, peers=[peer], timeout=30)
    transfers = []
    if when == "before":
        child.kill()
    for _ in range(20):
        try:
            transfers.append(engine.write_pages(source, pages, remote, pages, 4096, imm=1))
        except PeerLostError:
            assert when == "before"
        except StaleAddressError:  # of one whose `lost` is set
            assert when == "before" and peer.lost.done()
    if when == "during":
        child.kill()
    if when == "after":
        for transfer in transfers:
            transfer.wait(20)
        child.kill()
    begin = time.monotonic()
    for transfer in transfers:
        try:
            transfer.wait(20)
        except PeerLostError as error:
            assert "far" in str(error) or "lost" in str(error)
    with pytest.raises(PeerLostError):
        waiting.wait(20)
    peer.lost.wait(20)
    assert time.monotonic() - begin < LIVENESS + 2
    with pytest.raises(RailwireError):
        engine.write(source[:8], remote[:8])
    # The engine goes on with others.
    other = children.spawn("other")
    engine.connect(other.call(far_side.open_engine, [nic]))
    fresh = RemoteRegion.from_bytes(other.call(far_side.offer, 64))
    engine.write(source[:64], fresh, imm=4).wait(10)
    other.call(far_side.expect, 4, 1)


def test_a_stopped_peer_ends_everything_in_time(open_engine: Open, child: Child, nic: str) -> None:
    engine, remote = linked(open_engine, child, nic, 1 << 20)
    (peer,) = engine.peers
    source = engine.register(np.ones(1 << 20, np.uint8))
    engine.write(source, remote).wait(10)
    child.stop()
    begin = time.monotonic()
    waiting = engine.counter(2).expect(1, timeout=30)
    transfers = [engine.write(source, remote, imm=1) for _ in range(50)]
    lost = 0
    for transfer in transfers:
        try:
            transfer.wait(20)
        except PeerLostError:
            lost += 1
    with pytest.raises(PeerLostError):
        waiting.wait(20)
    assert time.monotonic() - begin < LIVENESS + 2
    # An RDMA NIC goes on serving a process that stands: what the writes need of it has all been posted before.
    # On shm a long write is copied by its writer.
    assert lost > 0 or nic == "shm" or nic.startswith("verbs")
    peer.lost.wait(1)
    child.resume()


def test_a_short_stop_is_survived(open_engine: Open, child: Child, nic: str) -> None:
    engine, remote = linked(open_engine, child, nic, 1 << 20)
    source = engine.register(np.full(1 << 20, 9, np.uint8))
    child.stop()
    transfer = engine.write(source, remote, imm=1)
    time.sleep(0.3)
    child.resume()
    transfer.wait(10)
    child.call(far_side.expect, 1, 1)
    assert child.call(far_side.untouched, 9)


def test_we_ourselves_stopped_for_long_blame_nobody(open_engine: Open, child: Child, nic: str) -> None:
    """A process that slept must not take its own silence for its peers'."""
    engine = open_engine(nic, liveness=1.0)
    address = bytes(engine.address)
    region = engine.register(np.zeros(64, np.uint8))
    child.call(far_side.open_engine, [nic], liveness=1.0)
    child.call(connect_to, address)
    child.stop()
    time.sleep(0.7)
    child.resume()
    time.sleep(0.3)
    child.call(write_once, bytes(region.descriptor), 3)
    engine.counter(3).expect(1, timeout=5).wait()


def connect_to(state: far_side.State, address: bytes) -> None:
    state.engine.connect(address)


def write_once(state: far_side.State, descriptor: bytes, imm: int) -> None:
    remote = RemoteRegion.from_bytes(descriptor)
    region = state.engine.register(np.ones(remote.nbytes, np.uint8))
    state.engine.write(region, remote, imm=imm).wait(10)


def test_restart_on_the_same_port_is_a_new_peer(open_engine: Open, children: Children) -> None:
    old = children.spawn("old")
    engine = open_engine("tcp://127.0.0.1")
    address = old.call(far_side.open_engine, ["tcp://127.0.0.1"])
    port = old.call(own_nic).rpartition(":")[2]
    engine.connect(address)
    stale = RemoteRegion.from_bytes(old.call(far_side.offer, 4096))
    source = engine.register(np.ones(4096, np.uint8))
    engine.write(source, stale).wait(10)
    old.kill()
    (peer,) = engine.peers or (None,)
    if peer is not None:
        peer.lost.wait(5)
    new = children.spawn("new")
    fresh_address = new.call(far_side.open_engine, [f"tcp://127.0.0.1:{port}"])
    fresh = RemoteRegion.from_bytes(new.call(far_side.offer, 4096))
    with pytest.raises(StaleAddressError):
        engine.connect(address)
    with pytest.raises(StaleAddressError):
        engine.write(source, stale)
    engine.connect(fresh_address)
    with pytest.raises(StaleAddressError):
        engine.write(source, stale)
    engine.write(source[:10], fresh[:10], imm=1).wait(10)
    new.call(far_side.expect, 1, 1)
    assert new.call(far_side.bytes_of) == b"\1" * 10 + bytes(4086)


def own_nic(state: far_side.State) -> str:
    return state.engine.nics[0].name


def test_close_with_transfers_in_flight(open_engine: Open, child: Child, nic: str) -> None:
    engine, remote = linked(open_engine, child, nic, MUCH)
    source = engine.register(np.ones(MUCH, np.uint8))
    transfers = [engine.write(source, remote) for _ in range(30)]
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < LIVENESS + 2
    assert all(transfer.done() for transfer in transfers)
    assert {transfer.state for transfer in transfers} <= {"done", "failed", "cancelled"}


def test_the_other_side_closes_with_transfers_in_flight(open_engine: Open, child: Child, nic: str) -> None:
    engine, remote = linked(open_engine, child, nic, MUCH)
    source = engine.register(np.ones(MUCH, np.uint8))
    transfers = [engine.write(source, remote) for _ in range(30)]
    assert child.call(far_side.close) < LIVENESS + 2
    for transfer in transfers:
        try:
            transfer.wait(10)
        except RailwireError:
            pass


# ---- fences ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fence", [far_side.revoke, far_side.close_peers])
def test_nothing_lands_after_a_fence(
    open_engine: Open, child: Child, nic: str, fence: Callable[..., tuple[str, float]]
) -> None:
    engine, remote = linked(open_engine, child, nic, 8 << 20)
    source = engine.register(np.full(8 << 20, 0x11, np.uint8))
    pages = Pages(np.arange(2048), 4096)
    fenced = threading.Event()
    ends: list[str] = []

    def flood() -> None:
        """Until after the fence, however long it takes to come: several writes are always under way."""
        under_way: deque[Transfer] = deque()
        while not fenced.is_set():
            try:
                under_way.append(engine.write_pages(source, pages, remote, pages, 4096))
                if len(under_way) > 8:
                    under_way.popleft().wait(10)
            except RailwireError as error:
                ends.append(type(error).__name__)
                time.sleep(0.001)
        for transfer in under_way:
            try:
                transfer.wait(10)
            except RailwireError as error:
                ends.append(type(error).__name__)

    writer = threading.Thread(target=flood)
    writer.start()
    try:
        outcome = child.call(fence)[0]
    finally:
        fenced.set()
        writer.join(60)
    assert outcome == "fenced"
    assert ends and not writer.is_alive()
    time.sleep(0.2)
    assert child.call(far_side.untouched, 0xEE)


def test_a_stopped_writer_cannot_write_after_the_fence(open_engine: Open, child: Child, nic: str) -> None:
    """The writer is frozen in the middle of its writes, the pages are fenced and used again, the writer wakes up."""
    engine = open_engine(nic, liveness=0.5)
    region = engine.register(np.zeros(64 << 20, np.uint8))
    child.call(far_side.open_engine, [nic], liveness=0.5)
    child.call(far_side.write_for_ever, bytes(region.descriptor), bytes(engine.address), 4096)
    child.stop()
    try:
        region.revoke()
        fenced = True
    except RailwireError as error:
        # Stopped in the middle of a copy.
        assert nic == "shm" and type(error).__name__ == "FenceError", error
        fenced = False
    if fenced:
        region.array[:] = 0xEE
    child.resume()
    outcomes = set(child.call(far_side.outcome_of_flood, 10.0))
    assert outcomes - {"done"}, outcomes
    time.sleep(0.2)
    if fenced:
        assert (region.array == 0xEE).all()
    child.signal(signal.SIGKILL)
