"""Who drives the engine: threads that wait do it themselves, undisturbed; when they have gone, the worker is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from railwire import MemoryRegion, RemoteRegion, Transfer, TransferEngine

SOON = 0.5  # seconds; what is allowed are 5 ms, on a machine that has nothing else to do


def threads() -> set[Path]:
    return set(Path("/proc/self/task").iterdir())


def sleeps(workers: list[Path]) -> int:
    """Times that they have gone to sleep."""
    statuses = [(worker / "status").read_text() for worker in workers]
    return sum(int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0]) for status in statuses)


class Pair:
    def __init__(self, nic: str) -> None:
        self.workers: list[Path] = []
        self.a, self.b = self.engine(nic, "a"), self.engine(nic, "b")
        self.a.connect(self.b.address)
        self.regions = [engine.register(np.zeros(4096, np.uint8)) for engine in (self.a, self.b)]

    def engine(self, nic: str, name: str) -> TransferEngine:
        before = threads()
        made = TransferEngine(nics=[nic], name=name)
        self.workers += [task for task in threads() - before if (task / "comm").read_text().strip() == "railwire"]
        return made

    @property
    def out(self) -> tuple[MemoryRegion, RemoteRegion]:
        return self.regions[0], self.regions[1].descriptor

    def waits(self, seconds: float) -> int:
        """A thread that writes and waits, one after the other."""
        source, target = self.out
        rounds, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            self.a.write(source, target, imm=1).wait(10)
            rounds += 1
        return rounds


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair("tcp://127.0.0.1")
    yield made
    made.a.close()
    made.b.close()


def test_the_worker_does_not_disturb_threads_that_wait(pair: Pair) -> None:
    """It looked every 200 us once, and each look took the core from whoever waited there."""
    ping, pong = pair.a.counter(2), pair.b.counter(2)
    back = (pair.regions[1], pair.regions[0].descriptor)
    end = time.monotonic() + 1.2
    over = threading.Event()

    def answer() -> None:
        while True:
            pong.expect(1, timeout=10).wait()
            if over.is_set():
                return
            pair.b.write(*back, imm=2)

    thread = threading.Thread(target=answer)
    thread.start()
    before = began = 0.0
    rounds = 0
    while time.monotonic() < end:
        pair.a.write(*pair.out, imm=2)
        ping.expect(1, timeout=10).wait()
        rounds += 1
        if not began and time.monotonic() > end - 1.0:  # they have found each other
            before, began = sleeps(pair.workers), time.monotonic()
    rate = (sleeps(pair.workers) - before) / (time.monotonic() - began)
    over.set()
    pair.a.write(*pair.out, imm=2)  # lets the other out
    thread.join(10)
    assert not thread.is_alive()
    assert rounds > 100 and len(pair.workers) == 2
    assert rate < 2 * 1500, f"{rate:.0f} sleeps a second of two workers"


def test_the_worker_does_not_disturb_a_thread_that_keeps_many_under_way(pair: Pair) -> None:
    """Whoever waits for the oldest of many writes finds it ended. It was woken for each of them once, on the core of
    the thread that writes, which then never had to wait: single 4 KiB writes ran at a third of their rate."""
    source, target = pair.out
    under_way: list[Transfer] = []
    rounds, before, began = 0, 0, 0.0
    start = time.monotonic()
    while time.monotonic() < start + 1.2:
        under_way.append(pair.a.write(source, target, imm=1))
        if len(under_way) > 64:
            under_way.pop(0).wait(10)
        time.sleep(0.0001)
        if not began and time.monotonic() > start + 0.2:
            before, began = sleeps(pair.workers[:1]), time.monotonic()
        rounds += 1
    rate = (sleeps(pair.workers[:1]) - before) / (time.monotonic() - began)
    assert rounds > 500
    assert rate < 1500, f"{rate:.0f} sleeps a second of the writer's worker, with {rounds} writes"


def test_who_wants_to_be_told_is_told_while_a_thread_keeps_many_under_way(pair: Pair) -> None:
    source, target = pair.out
    under_way: list[Transfer] = []
    late: list[float] = []

    def ended(posted: float, transfer: Transfer) -> None:
        late.append(time.monotonic() - posted)

    start = time.monotonic()
    while time.monotonic() < start + 1:
        transfer = pair.a.write(source, target, imm=1)
        posted = time.monotonic()
        transfer.add_done_callback(partial(ended, posted))
        under_way.append(transfer)
        if len(under_way) > 64:
            under_way.pop(0).wait(10)
        time.sleep(0.001)
    assert len(late) > 100
    assert sorted(late)[len(late) // 2] < 0.02, "with 64 under way, a millisecond apart, the wait would be 64 ms"


def test_what_nobody_waits_for_comes_soon_after_threads_have_waited_for_long(pair: Pair) -> None:
    assert pair.waits(0.4) > 100
    arrived = threading.Event()
    pair.a.on_message(lambda peer, message: arrived.set())
    sent = time.monotonic()
    pair.b.send(pair.b.peers[0], b"hello")
    assert arrived.wait(10)
    assert time.monotonic() - sent < SOON


def test_who_only_submits_after_waiting_is_served_too(pair: Pair) -> None:
    assert pair.waits(0.4) > 100
    source, target = pair.out
    done = threading.Event()
    began = time.monotonic()
    pair.a.write(source, target, imm=3).add_done_callback(lambda transfer: done.set())
    while not done.is_set() and time.monotonic() - began < 10:
        pair.a.write(source, target, imm=3)
        time.sleep(0.0001)
    assert time.monotonic() - began < SOON
