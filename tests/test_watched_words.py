"""Watched words: whoever stores to one, and however long it has been quiet, the callback comes."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from railwire import RailwireError, TransferEngine
from railwire.counter import MAX_IMM
from railwire.testing import SimulatedFabric


@pytest.fixture(params=["adaptive", "spin"])
def engine(request: pytest.FixtureRequest) -> Iterator[TransferEngine]:
    with SimulatedFabric() as fabric, TransferEngine(nics=[fabric.nic("a")], progress=request.param) as made:
        yield made


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.0005)


@pytest.mark.parametrize("quiet", [0.0, 0.03, 1.1])
def test_a_store_is_seen(engine: TransferEngine, quiet: float) -> None:
    seen: list[int] = []
    watcher = engine.watch(lambda old, new: seen.append(new))
    for value in range(1, 4):
        time.sleep(quiet)
        watcher.word[0] = value
        until(lambda value=value: seen and seen[-1] == value)  # type: ignore[misc]
    watcher.close()
    watcher.word[0] = 9
    time.sleep(0.02)
    assert seen[-1] == 3


def test_a_store_by_the_kernel_is_seen_after_a_quiet_time(engine: TransferEngine) -> None:
    """A system call that writes to the word neither fails nor waits for long."""
    seen: list[int] = []
    watcher = engine.watch(lambda old, new: seen.append(new))
    read, write = os.pipe()
    for value in (5, 6):
        time.sleep(0.05)
        os.write(write, np.uint64(value).tobytes())
        assert os.readv(read, [memoryview(watcher.word).cast("B")]) == 8
        until(lambda value=value: seen and seen[-1] == value)  # type: ignore[misc]
    os.close(read)
    os.close(write)


def test_words_come_and_go_while_others_move(engine: TransferEngine) -> None:
    stop = threading.Event()
    sums = [0, 0]

    def note(which: int) -> Callable[[int, int], object]:
        def moved(old: int, new: int) -> None:
            sums[which] += new - old

        return moved

    first, second = engine.watch(note(0)), engine.watch(note(1))

    def churn() -> None:
        while not stop.is_set():
            engine.watch(lambda old, new: None).close()

    thread = threading.Thread(target=churn)
    thread.start()
    for _ in range(300):
        first.word[0] += 1
        second.word[0] += 2
        time.sleep(0.0002)
    until(lambda: sums == [300, 600])
    stop.set()
    thread.join()


def test_other_events_come_while_words_are_watched(engine: TransferEngine) -> None:
    engine.watch(lambda old, new: None)
    for quiet in (0.0, 0.03, 1.1):
        time.sleep(quiet)
        done = threading.Event()
        engine.counter(3).expect(0).add_done_callback(lambda _, done=done: done.set())  # type: ignore[misc]
        assert done.wait(5)


def test_a_word_that_peers_write_to(engine: TransferEngine) -> None:
    """The watched word's memory may be registered: a peer's write moves it."""
    seen: list[int] = []
    watcher = engine.watch(lambda old, new: seen.append(new))
    with TransferEngine(nics=["tcp://127.0.0.1"]) as near, TransferEngine(nics=["tcp://127.0.0.1"]) as far:
        near.connect(far.address)
        target = far.register(watcher.word)
        source = near.register(np.zeros(1, np.uint64))
        for value in (7, 8):
            time.sleep(0.05)
            source.array.view(np.uint64)[0] = value
            near.write(source, target.descriptor).wait(5)
            until(lambda value=value: seen and seen[-1] == value)  # type: ignore[misc]


def test_a_forked_child_may_store_to_its_copy(engine: TransferEngine) -> None:
    watcher = engine.watch(lambda old, new: None)
    time.sleep(0.05)  # the page is write-protected now
    child = os.fork()
    if child == 0:
        watcher.word[0] = 3
        os._exit(int(watcher.word[0]))
    until(lambda: _exit_code(child) is not None)
    assert _exits[child] == 3


_exits: dict[int, int] = {}


def _exit_code(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        _exits[child] = os.waitstatus_to_exitcode(status)
    return _exits.get(child)


# ---- immediates ------------------------------------------------------------------------------------------------------
def test_an_immediate_in_use_is_not_given_again() -> None:
    with SimulatedFabric() as fabric:
        a, b = (TransferEngine(nics=[fabric.nic(name)], name=name) for name in "ab")
        a.connect(b.address)
        source, target = a.register(np.ones(8, np.uint8)), b.register(np.zeros(8, np.uint8))
        used = b.new_imm()
        a.write(source, target.descriptor, imm=used).wait(5)
        waiting = b.counter(used + 1).expect(1)
        until(lambda: b.counter(used).value == 1)
        b._next_imm = used - 1  # four million later
        assert b.new_imm() == used + 2
        b._next_imm = used - 3
        assert b.new_imms(2) == used - 2
        assert b.new_imms(3) == used + 2
        b.counter(used).reset()
        waiting.cancel()
        until(waiting.done)
        b._next_imm = used - 1
        assert [b.new_imm(), b.new_imm()] == [used, used + 1]
        b._next_imm = MAX_IMM
        assert b.new_imm() == 1
        b._next_imm = MAX_IMM - 2
        assert b.new_imms(3) == 1  # consecutive: not around the end
        a.write(source, target.descriptor, imm=MAX_IMM // 2).wait(5)
        b.counter(MAX_IMM // 2).expect(1, timeout=5).wait()
        a.write(source, target.descriptor, imm=MAX_IMM // 2).wait(5)
        until(lambda: b.counter(MAX_IMM // 2).value == 1)
        with pytest.raises(RailwireError, match="reset"):
            b.new_imms(MAX_IMM)
        a.close()
        b.close()


def test_without_file_descriptors_an_engine_says_so() -> None:
    code = """
import os, resource
from railwire import ConfigurationError, TransferEngine
from railwire.testing import SimulatedFabric
fabric = SimulatedFabric()
TransferEngine(nics=[fabric.nic("first")])
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(10)]
resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    TransferEngine(nics=[fabric.nic("second")])
except ConfigurationError as error:
    assert "ulimit -n" in str(error), error
else:
    raise SystemExit("it opened without a file descriptor to be woken by")
os._exit(0)
"""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


# ---- whoever sleeps is woken ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("over", ["shm", "tcp://127.0.0.1"])
def test_an_idle_engine_ends_a_write_that_is_only_awaited(over: str) -> None:
    """Nobody drives for it, and no immediate tells the peer: it must not wait for the next tick (a second)."""
    with TransferEngine(nics=[over]) as near, TransferEngine(nics=[over]) as far:
        near.connect(far.address)
        source, target = near.register(np.ones(1 << 20, np.uint8)), far.register(np.zeros(1 << 20, np.uint8))

        async def one() -> float:
            begin = time.perf_counter()
            await near.write(source, target.descriptor)
            return time.perf_counter() - begin

        times = []
        for _ in range(5):
            time.sleep(0.12)
            times.append(asyncio.run(one()))
        assert sorted(times)[1] < 0.3, times
