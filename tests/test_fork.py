"""fork() beside an engine: the child's end costs the parent nothing, and the child can have engines of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Children, State

from railwire import ClosedError, RemoteRegion, ScatterTarget, TransferEngine

SECONDS = 30.0


def in_a_fork(function: Callable[[], object]) -> str:
    """What ``function()`` returns in a child, as text, or its traceback; fails if the child does not end by itself."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(function())
        except BaseException:
            said = traceback.format_exc()
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    try:
        end = time.monotonic() + SECONDS
        while not select.select([reader], [], [], 0.05)[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                pytest.fail("the child hangs")
        return os.read(reader, 1 << 16).decode()
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


def own_engines(nic: str = "tcp://127.0.0.1") -> str:
    """Two engines of this process, a connection and a write."""
    with TransferEngine(nics=[nic], liveness=5.0) as a, TransferEngine(nics=[nic], liveness=5.0) as b:
        a.connect(b.address)
        target = b.register(np.zeros(4096, np.uint8))
        a.write(a.register(np.ones(4096, np.uint8)), target.descriptor, imm=3).wait(10)
        b.counter(3).expect(1).wait(10)
        done = threading.Event()
        a.write(a.register(np.ones(4096, np.uint8)), target.descriptor).add_done_callback(lambda _: done.set())
        assert done.wait(10), "no callback"
        assert target.array.all()
    return "written"


# ---- the parent ------------------------------------------------------------------------------------------------------
def far_memory(state: State, nics: list[str]) -> tuple[bytes, bytes]:
    state.engine = TransferEngine(nics=nics, name="far", liveness=2.0)
    state.region = state.engine.register(np.zeros(1 << 16, np.uint8))
    return bytes(state.engine.address), bytes(state.region.descriptor)


EXITS = """
    import os, sys
    import numpy as np
    from railwire import RemoteRegion, TransferEngine
    nic, address, descriptor = sys.argv[1:]
    engine = TransferEngine(nics=[nic], liveness=2.0)
    peer = engine.connect(bytes.fromhex(address))
    remote = RemoteRegion.from_bytes(bytes.fromhex(descriptor))
    source = engine.register(np.ones(remote.nbytes, np.uint8))
    engine.write(source, remote).wait(10)
    for how in ("only exits", "closes", "lets go"):
        pid = os.fork()
        if pid == 0:
            if how == "closes":
                engine.close()
            if how == "lets go":
                del engine, peer, source, remote
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        engine.write(source, remote).wait(10)
        engine.send(peer, b"x").wait(10)
    print("well")
"""


def test_a_child_that_ends_costs_the_parent_nothing(children: Children, nic: str) -> None:
    address, descriptor = children.spawn("far").call(far_memory, [nic])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXITS), nic, address.hex(), descriptor.hex()],
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


# ---- what the child has inherited ------------------------------------------------------------------------------------
class Inherited:
    def __init__(self, children: Children, nic: str) -> None:
        address, descriptor = children.spawn("far").call(far_memory, [nic])
        self.engine = TransferEngine(nics=[nic], name="parent", liveness=5.0)
        self.peer = self.engine.connect(address)
        self.remote = RemoteRegion.from_bytes(descriptor)
        self.source = self.engine.register(np.ones(self.remote.nbytes, np.uint8))
        self.group = self.engine.peer_group([self.peer])
        self.pending = self.engine.counter(9).expect(1, timeout=600)
        self.ended = self.engine.write(self.source, self.remote)
        self.ended.wait(10)

    def calls(self) -> dict[str, Callable[[], Any]]:
        e = self.engine

        async def wait_for_it(awaitable: Any) -> None:
            await awaitable

        return {
            "write": lambda: e.write(self.source, self.remote),
            "read": lambda: e.read(self.remote, self.source),
            "scatter": lambda: e.scatter(self.group, self.source, [ScatterTarget(0, self.remote)]),
            "barrier": lambda: e.barrier(self.group, 1),
            "send": lambda: e.send(self.peer, b"x"),
            "receive": lambda: e.receive(5),
            "register": lambda: e.register(np.zeros(8)),
            "watch": lambda: e.watch(print),
            "stats": e.stats,
            "connect": lambda: e.connect(self.peer.address),
            "expect": lambda: e.counter(1).expect(1),
            "count": lambda: e.counter(1).value,
            "reset": lambda: e.counter(1).reset(),
            "wait": lambda: self.pending.wait(20),
            "await": lambda: asyncio.run(wait_for_it(self.pending)),
            "callback": lambda: self.pending.add_done_callback(print),
            "revoke": self.source.revoke,
            "close the region": self.source.close,
            "close the peer": self.peer.close,
        }

    def look(self) -> str:
        start = time.monotonic()
        for what, call in self.calls().items():
            try:
                call()
                raise AssertionError(f"{what} raises nothing")
            except ClosedError as error:
                if what not in ("receive",):
                    assert "forked" in str(error), (what, error)
        assert self.engine.closed
        assert self.engine.peers == ()
        assert self.peer.state == "closed"
        assert "forked" in self.peer.lost.wait(0)
        assert self.pending.state == "pending"
        self.pending.cancel()
        assert self.ended.state == "done"
        self.ended.wait()
        self.engine.close()
        assert time.monotonic() - start < 10
        return own_engines()


def test_inherited_things_raise_closed_error(children: Children, nic: str) -> None:
    parent = Inherited(children, nic)
    said = in_a_fork(parent.look)
    assert said == "written", said
    # The parent has seen nothing of it.
    parent.engine.write(parent.source, parent.remote).wait(10)
    assert parent.pending.state == "pending"
    assert parent.engine.stats()["pending_expectations"] == 1
    assert in_a_fork(lambda: in_a_fork(parent.look)) == "written"  # a child's child
    parent.source.revoke()
    parent.engine.close()


# ---- engines of the child --------------------------------------------------------------------------------------------
def into_queue(queue: Any) -> None:
    try:
        queue.put(own_engines())
    except BaseException:
        queue.put(traceback.format_exc())


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("when", ["open", "closed"])
def test_multiprocessing(method: str, when: str) -> None:
    engine = TransferEngine(nics=["tcp://127.0.0.1"])
    if when == "closed":
        engine.close()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=into_queue, args=(queue,))
    process.start()
    assert queue.get(timeout=SECONDS) == "written"
    process.join(SECONDS)
    assert process.exitcode == 0
    engine.close()


def test_forks_while_the_parents_engines_are_at_work(children: Children, nic: str) -> None:
    """Threads write, wait, register and run callbacks; whatever is held at the moment of a fork, no child hangs."""
    address, descriptor = children.spawn("far").call(far_memory, [nic])
    stop = threading.Event()
    errors: list[BaseException] = []
    rounds = [0, 0, 0]
    with TransferEngine(nics=[nic], liveness=20.0) as engine:
        peer = engine.connect(address)
        remote = RemoteRegion.from_bytes(descriptor)

        def work(index: int) -> None:
            try:
                while not stop.is_set():
                    source = engine.register(np.ones(remote.nbytes, np.uint8))
                    called = threading.Event()
                    transfer = engine.write(source, remote, imm=1)
                    transfer.add_done_callback(lambda _: called.set())  # noqa: B023
                    engine.send(peer, b"x" * 100)
                    transfer.wait(20)
                    assert called.wait(20)
                    rounds[index] += 1
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(rounds))]
        for thread in threads:
            thread.start()
        for _ in range(5):
            assert in_a_fork(own_engines) == "written"
        stop.set()
        for thread in threads:
            thread.join(SECONDS)
        assert not errors
        assert min(rounds) > 0


def test_a_fork_in_a_callback(children: Children) -> None:
    address, descriptor = children.spawn("far").call(far_memory, ["tcp://127.0.0.1"])
    with TransferEngine(nics=["tcp://127.0.0.1"], liveness=5.0) as engine:
        engine.connect(address)
        remote = RemoteRegion.from_bytes(descriptor)
        source = engine.register(np.ones(remote.nbytes, np.uint8))
        said: list[str] = []
        called = threading.Event()

        def fork(_: object) -> None:
            said.append(in_a_fork(own_engines))
            called.set()

        engine.write(source, remote).add_done_callback(fork)
        assert called.wait(SECONDS)
        assert said == ["written"]
        pids = []
        forked = threading.Event()

        def fork_and_return(_: object) -> None:
            pids.append(os.fork())  # the child's only thread goes back to the dispatcher, and ends there
            forked.set()

        engine.write(source, remote).add_done_callback(fork_and_return)
        assert forked.wait(SECONDS)
        end = time.monotonic() + SECONDS
        while os.waitpid(pids[0], os.WNOHANG)[0] == 0:
            assert time.monotonic() < end, "the child hangs"
            time.sleep(0.01)
        engine.write(source, remote).wait(10)


def test_data_loader_workers(tmp_path: Path) -> None:
    """A torch DataLoader forks its workers beside the engine, and they read memory that it has registered."""
    torch = pytest.importorskip("torch")
    with TransferEngine(nics=["tcp://127.0.0.1"]) as a, TransferEngine(nics=["tcp://127.0.0.1"]) as b:
        a.connect(b.address)
        samples = b.register(np.zeros(64, np.uint8))
        source = a.register(np.arange(64, dtype=np.uint8))
        a.write(source, samples.descriptor).wait(10)

        class Samples(torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
            def __len__(self) -> int:
                return 64

            def __getitem__(self, index: int) -> int:
                return int(samples.array[index])

        for _ in range(2):
            loader = torch.utils.data.DataLoader(Samples(), batch_size=8, num_workers=2, multiprocessing_context="fork")
            assert sorted(torch.cat(list(loader)).tolist()) == list(range(64))
            a.write(source, samples.descriptor).wait(10)
