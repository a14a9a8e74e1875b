"""The nine guarantees of docs/guarantees.md, each on its own, on a network in memory that one can steer.

What needs real processes is in test_two_processes.py, what needs many examples in test_properties.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from beds import patient, verbs_nic

from railwire import (
    AuthenticationError,
    ConnectTimeout,
    ExpectationTimeout,
    FenceError,
    LinkError,
    Pages,
    PeerLostError,
    RailwireError,
    RemoteAccessError,
    RemoteRegion,
    StaleAddressError,
    TransferEngine,
    TransferError,
    WriterFailed,
    WriterLost,
)
from railwire.testing import SimulatedFabric

LIVENESS = patient(0.5)


class World:
    """A fabric and engines on it, all closed with the test."""

    def __init__(self, **settings: Any) -> None:
        self.fabric = SimulatedFabric(**settings)
        self.engines: list[TransferEngine] = []

    def specs(self, name: str, nics: int) -> list[str]:
        return [self.fabric.nic(f"{name}{i}") for i in range(nics)]

    def engine(self, name: str, nics: int = 1, **options: Any) -> TransferEngine:
        made = TransferEngine(nics=self.specs(name, nics), name=name, liveness=LIVENESS, **options)
        self.engines.append(made)
        return made

    def pair(self, near: int = 1, far: int = 1, nbytes: int = 1 << 16) -> None:
        self.near, self.far = self.engine("near", near), self.engine("far", far)
        self.peer = self.near.connect(self.far.address)
        self.source = self.near.register(np.random.default_rng(1).integers(1, 256, nbytes, dtype=np.uint8))
        self.target = self.far.register(np.zeros(nbytes, np.uint8))
        self.remote = RemoteRegion.from_bytes(bytes(self.target.descriptor))

    def close(self) -> None:
        for engine in self.engines:
            engine.close(0.5)
        if "fabric" in vars(self):
            self.fabric.close()


class VerbsWorld(World):
    """The same on devices: real queue pairs, which do not misbehave on purpose (test_verbs.py makes them)."""

    def __init__(self, **settings: Any) -> None:
        if settings:
            pytest.skip("needs a wire that misbehaves on purpose")
        self.engines = []

    def __getattr__(self, name: str) -> Any:
        if name == "fabric":
            pytest.skip("needs a wire that misbehaves on purpose")
        raise AttributeError(name)

    def specs(self, name: str, nics: int) -> list[str]:
        return [verbs_nic(i + (name != "near")) for i in range(nics)]


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    kind = VerbsWorld if request.config.getoption("--nic") == "verbs" else World
    made = kind(**getattr(request, "param", {}))
    yield made
    made.close()


def with_wire(**settings: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("world", [settings], indirect=True, ids=["wire"])


# 1 ----------------------------------------------------------------------------------------------------------------
@with_wire(max_write_bytes=1000, reorder=True, max_delay_us=100, seed=3)
def test_1_byte_exact_when_cut_into_pieces(world: World) -> None:
    world.pair(3, 2)
    for length in (0, 1, 999, 1000, 1001, 33_333):
        world.target.array[:] = 0
        world.near.write(world.source[7 : 7 + length], world.remote[11 : 11 + length]).wait(5)
        expected = np.zeros(1 << 16, np.uint8)
        expected[11 : 11 + length] = world.source.array[7 : 7 + length]
        assert np.array_equal(world.target.array, expected)


def test_1_empty_page_lists(world: World) -> None:
    world.pair()
    none = Pages(np.array([], np.int64), 4096)
    world.near.write_pages(world.source, none, world.remote, none, 4096, imm=1).wait(5)
    world.far.counter(1).expect(0).wait(5)
    assert not world.target.array.any()


# 2 ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("near", "far"), [(1, 1), (4, 2), (2, 3)])
def test_2_counted_as_you_would_count(world: World, near: int, far: int) -> None:
    world.pair(near, far)
    contiguous, scattered = Pages(np.arange(16), 4096), Pages(np.arange(16)[::-1].copy(), 4096)
    world.near.write(world.source, world.remote, imm=3).wait(5)  # 1: striped
    world.near.write_pages(world.source, contiguous, world.remote, contiguous, 4096, imm=3).wait(5)  # 16: merged
    world.near.write_pages(world.source, scattered, world.remote, contiguous, 4096, imm=3).wait(5)  # 16
    world.near.write(world.source[:0], world.remote[:0], imm=3).wait(5)  # 1
    world.near.barrier(world.near.peer_group([world.peer]), imm=3).wait(5)  # 1
    end = time.monotonic() + 5
    while world.far.counter(3).value < 35:  # the bytes have landed; the receiver still has to look
        assert time.monotonic() < end
    assert world.far.counter(3).value == 35
    world.far.counter(3).expect(30).wait(1)
    assert world.far.counter(3).value == 5
    with pytest.raises(ExpectationTimeout):
        world.far.counter(3).expect(6, timeout=0.05).wait()
    assert world.far.counter(3).value == 5
    world.far.counter(3).expect(5).wait(1)


@with_wire(max_write_bytes=1000)
def test_2_more_pieces_than_an_arrival_has_sixteenths(world: World) -> None:
    world.pair()
    world.near.write(world.source, world.remote, imm=3).wait(5)  # 66 pieces
    world.far.counter(3).expect(1).wait(5)
    assert world.far.counter(3).value == 0
    assert np.array_equal(world.target.array, world.source.array)


# 3 ----------------------------------------------------------------------------------------------------------------
def test_3_the_count_is_never_reached_before_the_bytes(world: World) -> None:
    """Everything is delivered one by one, in random order; whenever the count is reached, the bytes must be there."""
    world.pair(2, 2)
    world.near.write(world.source[:64], world.remote[:64]).wait(5)
    world.fabric.set(reorder=True)
    world.fabric.hold()
    pages = Pages(np.arange(64), 1024)
    arrived = world.far.counter(3).expect(64, timeout=20)
    transfer = world.near.write_pages(world.source, pages, world.remote, pages, 1024, imm=3)
    end = time.monotonic() + 10
    while not arrived.done():
        assert time.monotonic() < end
        world.fabric.deliver_one()
    assert np.array_equal(world.target.array, world.source.array)
    world.fabric.release()
    transfer.wait(5)


# 4 ----------------------------------------------------------------------------------------------------------------
@with_wire(completion_proves_landing=False)
def test_4_done_means_landed_where_completions_do_not(world: World) -> None:
    world.pair()
    world.fabric.set(max_delay_us=3000)
    for _ in range(20):
        world.target.array[:] = 0
        world.near.write(world.source, world.remote).wait(5)
        assert np.array_equal(world.target.array, world.source.array)


def test_4_failed_means_quiet(world: World) -> None:
    world.pair(2, 2)
    world.fabric.fail_next("near0", 1)
    transfer = world.near.write(world.source, world.remote, imm=3)
    with pytest.raises(TransferError) as failed:
        transfer.wait(5)
    assert failed.value.peer == "far"
    assert "near0" in failed.value.nic
    assert not transfer.may_still_land
    before = world.target.array.copy()
    world.source.array[:] = 0
    time.sleep(0.05)
    assert np.array_equal(world.target.array, before)


def test_4_a_time_out_is_no_end(world: World) -> None:
    world.pair()
    world.fabric.hold()
    transfer = world.near.write(world.source, world.remote)
    with pytest.raises(TimeoutError):
        transfer.wait(0.05)
    assert transfer.state == "pending"
    world.fabric.release()
    transfer.wait(5)


# 5 ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["freeze", "kill", "partition"])
def test_5_every_wait_ends(world: World, how: str) -> None:
    world.pair()
    waits = [
        world.far.counter(1).expect(1, timeout=60),
        world.near.counter(1).expect(1, peers=[world.peer], timeout=60),
    ]
    world.fabric.hold()  # all of it is under way, and nothing has ended, when it happens
    transfers = [world.near.write(world.source, world.remote, imm=1) for _ in range(3)]
    read = world.near.read(world.remote, world.source)
    message = world.near.send(world.peer, b"anybody there?")
    if how == "partition":
        world.fabric.partition("near0", "far0")
    elif how == "kill":
        world.fabric.kill("far0")
    else:
        world.fabric.freeze("far0")
    world.fabric.release()
    begin = time.monotonic()
    for ending in (*transfers, read, message):
        with pytest.raises(PeerLostError) as lost:
            ending.wait(10)
        assert "far" in str(lost.value)
    for wait in waits:
        with pytest.raises(WriterLost):
            wait.wait(10)
    if how == "freeze":  # not before: what was on the wire may land, as long as the far side has not given us up, too
        world.fabric.thaw("far0")
    assert time.monotonic() - begin < 3 * LIVENESS + 1
    assert world.peer.state == "lost"
    assert world.peer.lost.wait(1)


def test_5_a_failed_write_tells_its_receiver(world: World) -> None:
    world.pair(2, 2)
    arrived = world.far.counter(3).expect(1, timeout=60)
    world.fabric.fail_next("near0", 1)
    world.fabric.fail_next("near1", 1)
    with pytest.raises((LinkError, TransferError)):
        world.near.write(world.source, world.remote, imm=3).wait(5)
    with pytest.raises((WriterFailed, WriterLost)):
        arrived.wait(5)


def test_5_one_of_two_links_is_enough(world: World) -> None:
    world.pair(2, 2)
    world.fabric.kill("near0")
    end = time.monotonic() + 10
    while True:
        try:
            world.near.write(world.source, world.remote, imm=3).wait(5)
            break
        except TransferError:
            assert time.monotonic() < end
            assert world.peer.state == "connected"
    assert np.array_equal(world.target.array, world.source.array)


def test_5_connect_ends(world: World) -> None:
    world.pair()
    third = world.engine("third")
    world.fabric.freeze("third0")
    begin = time.monotonic()
    with pytest.raises(ConnectTimeout):
        world.near.connect(third.address)
    assert time.monotonic() - begin < 3 * LIVENESS
    world.fabric.thaw("third0")


# 6 ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fence", ["revoke", "close"])
def test_6_a_frozen_writer_is_cut_off(world: World, fence: str) -> None:
    world.pair()
    while not (writers := world.far.peers):  # it hears a little later that it is connected
        time.sleep(0.001)
    world.fabric.hold()
    transfer = world.near.write(world.source, world.remote)
    world.fabric.freeze("near0")
    world.fabric.release()
    begin = time.monotonic()
    if fence == "revoke":
        world.target.revoke()
    else:
        (writer,) = writers
        writer.close()
    assert time.monotonic() - begin < 3 * LIVENESS
    world.target.array[:] = 0
    world.fabric.thaw("near0")
    with pytest.raises(RailwireError):
        transfer.wait(10)
    time.sleep(0.05)
    assert not world.target.array.any()


@with_wire(closing_fences=False)
def test_6_no_fence_is_claimed_that_is_none(world: World) -> None:
    """Where the writer's own process writes (shm), silence proves nothing."""
    world.pair()
    world.near.write(world.source[:8], world.remote[:8]).wait(5)
    world.fabric.freeze("near0")
    with pytest.raises(FenceError):
        world.target.revoke(timeout=0.2)
    world.fabric.thaw("near0")


# 7 ----------------------------------------------------------------------------------------------------------------
def test_7_incarnations(world: World) -> None:
    world.pair()
    old_address, old_remote = bytes(world.far.address), world.remote
    world.far.close()
    world.peer.lost.wait(5)
    again = TransferEngine(nics=world.specs("far", 1), name="far", liveness=LIVENESS)
    world.engines.append(again)
    region = again.register(np.zeros(1 << 16, np.uint8))
    # On devices the old address ends in a queue pair that is no more, and nobody is there to say so.
    with pytest.raises(ConnectTimeout if isinstance(world, VerbsWorld) else StaleAddressError):
        world.near.connect(old_address)
    with pytest.raises(StaleAddressError):
        world.near.write(world.source, old_remote)
    world.near.connect(again.address)
    with pytest.raises(StaleAddressError):
        world.near.write(world.source, old_remote)
    assert not region.array.any()
    world.near.write(world.source, region.descriptor, imm=1).wait(5)
    again.counter(1).expect(1).wait(5)


# 8: test_callbacks.py; 9: test_bad_input.py, test_wire_garbage.py, and: -------------------------------------------
def test_9_secrets(world: World) -> None:
    a = world.engine("a", secret=b"right")
    b = world.engine("b", secret="right")
    wrong = world.engine("wrong", secret="wrong")
    none = world.engine("none")
    a.connect(b.address)
    for stranger in (wrong, none):
        with pytest.raises(AuthenticationError):
            stranger.connect(b.address)
        with pytest.raises(AuthenticationError):
            b.connect(stranger.address)
    assert [peer.name for peer in b.peers] == ["a"]


def test_9_a_wrong_key_reaches_nothing(world: World) -> None:
    world.pair()
    message = world.remote._message
    keys = tuple(blob[:8] + bytes([blob[8] ^ 1]) + blob[9:] for blob in message.keys)  # of the rkey
    forged = RemoteRegion(
        type(message)(
            message.version, message.incarnation, message.region, message.region_nbytes, 0, message.region_nbytes, keys
        )
    )
    with pytest.raises((RemoteAccessError, PeerLostError)):
        world.near.write(world.source, forged).wait(5)
    assert not world.target.array.any()
