"""User code beside the engine: callbacks that raise or block, event loops, many threads."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from railwire import (
    ExpectationCancelled,
    ExpectationTimeout,
    PeerLostError,
    TransferCancelled,
    TransferEngine,
)
from railwire.testing import SimulatedFabric


class Two:
    def __init__(self, fabric: SimulatedFabric) -> None:
        self.fabric = fabric
        self.a = TransferEngine(nics=[fabric.nic("a")], name="a", liveness=0.5)
        self.b = TransferEngine(nics=[fabric.nic("b")], name="b", liveness=0.5)
        self.to_b = self.a.connect(self.b.address)
        self.source = self.a.register(np.ones(1 << 16, np.uint8))
        self.target = self.b.register(np.zeros(1 << 16, np.uint8))
        self.remote = self.target.descriptor


@pytest.fixture
def two() -> Iterator[Two]:
    with SimulatedFabric(max_delay_us=50) as fabric:
        made = Two(fabric)
        yield made
        made.a.close()
        made.b.close()


def until(condition: object, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


# ---- callbacks -------------------------------------------------------------------------------------------------------
def test_a_callback_that_raises_is_logged_and_stops_nothing(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    before = two.a.stats()["callback_errors"]
    called = []

    def bad(_: object) -> None:
        called.append(1)
        raise RuntimeError("a user's mistake")

    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            two.a.write(two.source, two.remote, imm=1).add_done_callback(bad)
        two.b.counter(1).expect(3).wait(5)
        until(lambda: len(called) == 3)
        until(lambda: two.a.stats()["callback_errors"] == before + 3)
    assert "a user's mistake" in caplog.text
    done = threading.Event()
    two.a.write(two.source, two.remote).add_done_callback(lambda _: done.set())
    assert done.wait(5)


def test_a_callback_that_blocks_stalls_no_transfer(two: Two) -> None:
    release = threading.Event()
    blocked = threading.Event()

    def block(_: object) -> None:
        blocked.set()
        release.wait(10)

    try:
        two.a.write(two.source, two.remote).add_done_callback(block)
        assert blocked.wait(5)
        for _ in range(50):
            two.a.write(two.source, two.remote, imm=2).wait(5)
        two.b.counter(2).expect(50).wait(5)
    finally:
        release.set()


def test_callbacks_after_the_end_and_several(two: Two) -> None:
    transfer = two.a.write(two.source, two.remote)
    transfer.wait(5)
    seen: list[str] = []
    for name in "xyz":
        transfer.add_done_callback(lambda t, name=name: seen.append(name + t.state))
    until(lambda: len(seen) == 3)
    assert sorted(seen) == ["xdone", "ydone", "zdone"]


def test_message_handlers_that_raise_lose_only_their_message(two: Two) -> None:
    got: list[bytes] = []

    def handler(_: object, message: bytes) -> None:
        if message == b"bad":
            raise ValueError("no")
        got.append(message)

    two.b.on_message(handler)
    for message in (b"1", b"bad", b"2"):
        two.a.send(two.to_b, message).wait(5)
    until(lambda: got == [b"1", b"2"])


def test_watchers(two: Two) -> None:
    seen: list[tuple[int, int]] = []
    watcher = two.a.watch(lambda old, new: seen.append((old, new)))
    for value in range(1, 50):
        watcher.word[0] = value
        if value % 10 == 0:
            until(lambda value=value: bool(seen) and seen[-1][1] == value)
    until(lambda: seen[-1][1] == 49)
    assert [old for old, _ in seen] == [0, *[new for _, new in seen[:-1]]]
    watcher.close()
    watcher.close()
    watcher.word[0] = 100
    time.sleep(0.05)
    assert seen[-1][1] == 49


def test_on_peer_is_told_of_everyone_who_connects(two: Two) -> None:
    names: list[str] = []
    two.b.on_peer(lambda peer: names.append(peer.name))
    with TransferEngine(nics=[two.fabric.nic("c")], name="c") as c:
        c.connect(two.b.address)
        until(lambda: names == ["c"])


# ---- asyncio ---------------------------------------------------------------------------------------------------------
def test_everything_can_be_awaited(two: Two) -> None:
    async def main() -> None:
        arrived = two.b.counter(5).expect(10)
        await asyncio.gather(*[two.a.write(two.source, two.remote, imm=5) for _ in range(10)])
        await arrived
        await two.a.send(two.to_b, b"hello")
        async for peer, message in two.b.messages():
            assert (peer.name, message) == ("a", b"hello")
            break
        await two.target.revoke_async()
        with pytest.raises(ExpectationTimeout):
            await two.b.counter(6).expect(1, timeout=0.05)
        reader = asyncio.ensure_future(anext(two.b.messages()))
        await asyncio.sleep(0.01)
        reader.cancel()
        await two.to_b.close_async()
        await two.to_b.lost

    asyncio.run(asyncio.wait_for(main(), 20))


def test_cancelling_a_task_leaves_the_operation(two: Two) -> None:
    async def main() -> None:
        arrived = two.b.counter(5).expect(1)

        async def wait() -> None:
            await arrived

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not arrived.done()
        two.a.write(two.source, two.remote, imm=5)
        await arrived

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_loop_that_is_gone_harms_nobody(two: Two) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(_await(two.b.counter(5).expect(1)))
        await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())
    two.a.write(two.source, two.remote, imm=5).wait(5)
    two.b.counter(6).expect(0).wait(5)


async def _await(thing: object) -> None:
    await thing  # type: ignore[misc]


def test_cancel(two: Two) -> None:
    expectation = two.b.counter(7).expect(1)
    expectation.cancel()
    with pytest.raises(ExpectationCancelled):
        expectation.wait(5)
    two.fabric.hold()
    transfer = two.a.write(two.source, two.remote, imm=8)
    transfer.cancel()
    two.fabric.release()
    try:
        transfer.wait(5)
    except TransferCancelled:
        pass


# ---- threads ---------------------------------------------------------------------------------------------------------
def test_many_threads_submit_and_wait(two: Two) -> None:
    errors: list[BaseException] = []
    each = 200

    def work(number: int) -> None:
        try:
            for i in range(each):
                at = (number * each + i) % 60000
                transfer = two.a.write(two.source[at : at + 64], two.remote[at : at + 64], imm=number)
                if i % 3 == 0:
                    transfer.wait(10)
            two.b.counter(number).expect(each, timeout=20).wait()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not errors
    assert [two.b.counter(number).value for number in range(8)] == [0] * 8


def test_waiting_threads_end_when_the_peer_dies(two: Two) -> None:
    ended = []

    def wait() -> None:
        try:
            two.b.counter(3).expect(1, timeout=30).wait()
        except PeerLostError:
            ended.append(time.monotonic())

    threads = [threading.Thread(target=wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    begin = time.monotonic()
    two.fabric.kill("a")
    for thread in threads:
        thread.join(5)
    assert len(ended) == 5
    assert max(ended) - begin < 2


def test_threads_that_wait_while_the_engine_closes(two: Two) -> None:
    ended = []

    def wait() -> None:
        try:
            two.b.counter(3).expect(1, timeout=30).wait()
        except Exception as error:
            ended.append(type(error).__name__)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    two.b.close()
    for thread in threads:
        thread.join(5)
    assert ended == ["ClosedError"] * 3


# ---- waiting in a callback -------------------------------------------------------------------------------------------
def in_a_callback(two: Two, function: object) -> object:
    """What ``function()`` raises on the dispatcher; None if it returns."""
    ended: list[object] = []

    def run(_: object) -> None:
        try:
            function()  # type: ignore[operator]
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    two.a.write(two.source, two.remote).add_done_callback(run)
    until(lambda: ended)
    return ended[0]


async def the_end(future: Any) -> None:
    await future


async def one_write(two: Two) -> None:
    await two.a.write(two.source, two.remote)


async def one_message(two: Two) -> None:
    async for _ in two.a.messages():
        return


async def the_loss(two: Two) -> None:
    await two.to_b.lost


def test_waiting_in_a_callback_is_refused_at_once_and_spoils_nothing(two: Two) -> None:
    """Only the dispatcher can bring what is waited for (await, messages, the loss of a peer), or everybody else's
    callbacks would wait, too."""
    pending = two.a.counter(3).expect(1)
    waits = {
        "await": lambda: asyncio.run(the_end(pending)),  # of what is pending: a write may have ended before its await
        "await messages": lambda: asyncio.run(one_message(two)),
        "await lost": lambda: asyncio.run(the_loss(two)),
        "wait": lambda: pending.wait(20),
        "wait for ever": lambda: pending.wait(),
        "lost.wait": lambda: two.to_b.lost.wait(20),
        "receive": lambda: two.a.receive(20),
        "revoke": lambda: two.source.revoke(),
        "region close": lambda: two.source.close(),
        "peer close": lambda: two.to_b.close(),
    }
    for what, function in waits.items():
        start = time.monotonic()
        error = in_a_callback(two, function)
        assert isinstance(error, RuntimeError), (what, error)
        assert "callback" in str(error), what
        assert time.monotonic() - start < 4, what
        asyncio.run(asyncio.wait_for(one_write(two), 10))
    assert pending.state == "pending"
    assert two.to_b.state == "connected"
    two.source.check_open()


def test_what_waits_for_nothing_may_be_called_in_a_callback(two: Two) -> None:
    done = two.a.write(two.source, two.remote)
    done.wait()
    assert in_a_callback(two, done.wait) is None
    pending = two.a.counter(3).expect(1)
    assert isinstance(in_a_callback(two, lambda: pending.wait(0)), TimeoutError)
    fences = []
    spare = two.a.register(np.ones(64, np.uint8))
    assert in_a_callback(two, lambda: fences.append(spare.close_async())) is None
    fences[0].wait(5)
    assert in_a_callback(two, two.a.close) is None
