"""One member of the soak test: an engine that lends memory to others and writes into theirs, and checks what it sees.

A writer asks an owner for memory (WANT), gets a descriptor and an immediate (LEASE), writes tagged contents, and tells
how that ended (TOLD). The owner waits for the arrivals and looks at the bytes; it fences the memory, looks that nothing
but the writer's own contents got there, and lends it again. All of it travels as messages of the engines themselves.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from checks import GUARD, REUSED, Bench, Bytes, Violation, contents

from railwire import (
    ClosedError,
    FenceError,
    MemoryRegion,
    Pages,
    Peer,
    PeerLostError,
    RailwireError,
    RemoteRegion,
    TransferEngine,
)

LIVENESS = 1.5
ENDS = 6 * LIVENESS + 10.0  # active seconds within which everything ends, on a machine that is busy
PAGE = 4096
_WRONG = int(os.environ.get("RAILWIRE_SOAK_WRONG", "0"))  # for the test of this test
SLOT_PAGES = 48


class Want(msgspec.Struct, tag="want"):
    tag: int
    pages: list[int]
    nbytes: int


class Lease(msgspec.Struct, tag="lease"):
    tag: int
    descriptor: bytes
    imm: int


class Told(msgspec.Struct, tag="told"):
    tag: int
    state: str


Said = Want | Lease | Told
_decode = msgspec.msgpack.Decoder(Said)


@dataclass(eq=False)
class Slot:
    """Memory that is lent to one writer at a time."""

    memory: Bytes
    region: MemoryRegion
    lent: bool = False


@dataclass(eq=False)
class Outgoing:
    """A write of ours that waits for its memory."""

    peer: Peer
    lease: asyncio.Future[Lease] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Member:
    """An engine and what it does until :meth:`close`.

    Args:
        bench: where counts and complaints go.
        directory: where members publish their addresses.
        nics: of the engine.
        rng: of all its choices.
    """

    def __init__(
        self, bench: Bench, name: str, directory: Path, nics: Callable[[], list[str]], rng: random.Random
    ) -> None:
        self.bench = bench
        self.name = name
        self.directory = directory
        self.nics = nics
        self.rng = rng
        self.engine: TransferEngine | None = None
        self._life: list[asyncio.Task[None]] = []

    # ---- its life ----------------------------------------------------------------------------------------------------
    async def open(self) -> None:
        engine = await asyncio.to_thread(TransferEngine, nics=self.nics(), liveness=LIVENESS, name=self.name)
        self.engine = engine
        self.slots: list[Slot] = []
        self.quarantine: list[Slot] = []  # a fence could not be had: its memory is nobody's
        for _ in range(6):
            memory = np.full(SLOT_PAGES * PAGE, GUARD, np.uint8)
            self.slots.append(Slot(memory, engine.register(memory)))
        self.outgoing: dict[int, Outgoing] = {}
        self.told: dict[int, str] = {}
        self.exact = contents(int.from_bytes(engine.incarnation[:4]), 1 << 16)
        self.readable = engine.register(self.exact, readable_only=True)
        self._life = [asyncio.create_task(self._listen(engine))]
        self._life += [asyncio.create_task(self._work(engine)) for _ in range(3)]
        path = self.directory / self.name
        temporary = path.with_suffix(".new")
        temporary.write_bytes(msgspec.msgpack.encode((bytes(engine.address), bytes(self.readable.descriptor))))
        temporary.rename(path)

    async def close(self) -> None:
        """In whatever state it is: everything that is under way ends."""
        engine, self.engine = self.engine, None
        if engine is None:
            return
        await self.bench.ends(asyncio.to_thread(engine.close), "engine.close()", ENDS + LIVENESS)
        for task in self._life:
            try:
                await self.bench.ends(task, "work on a closed engine", ENDS)
            except Violation as error:
                self.bench.wrong(str(error))
        for slot in self.slots:
            if not slot.lent and (slot.memory != GUARD).any():
                self.bench.wrong("memory that was lent to nobody has changed")
        self.bench.count("engines closed")

    async def _guarded(self, work: Any) -> None:
        """Errors of the library are part of this life; anything else is a violation."""
        try:
            await work
        except (RailwireError, TimeoutError) as error:
            self.bench.count(type(error).__name__)
        except Violation as error:
            self.bench.wrong(str(error))
        except Exception as error:
            import traceback

            self.bench.wrong(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")

    # ---- owner -------------------------------------------------------------------------------------------------------
    async def _listen(self, engine: TransferEngine) -> None:
        tasks: set[asyncio.Task[None]] = set()
        async for peer, data in engine.messages():
            said = _decode.decode(data)
            if isinstance(said, Want):
                task = asyncio.create_task(self._guarded(self._lend(engine, peer, said)))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            elif isinstance(said, Lease):
                waiting = self.outgoing.get(said.tag)
                if waiting is None or waiting.peer is not peer:
                    self.bench.count("late leases")
                elif not waiting.lease.done():
                    waiting.lease.set_result(said)
            else:
                self.told[said.tag] = said.state
        if tasks:
            await asyncio.wait(tasks, timeout=ENDS)

    async def _lend(self, engine: TransferEngine, peer: Peer, want: Want) -> None:
        free = [slot for slot in self.slots if not slot.lent]
        if not free:
            self.bench.count("no memory to lend")
            return
        slot = self.rng.choice(free)
        if (slot.memory != GUARD).any():
            raise Violation("memory that was lent to nobody has changed")
        slot.lent = True
        expected = contents(want.tag + _WRONG, want.nbytes)
        imm = engine.new_imm()
        expectation = engine.counter(imm).expect(max(len(want.pages), 1), peers=[peer], timeout=600)
        try:
            await self.bench.ends(
                engine.send(peer, msgspec.msgpack.encode(Lease(want.tag, bytes(slot.region.descriptor), imm))),
                "sending a message", ENDS,
            )  # fmt: skip
            arrived = await self._arrives(engine, peer, want, imm, expectation)
        except RailwireError:
            arrived = False
        if arrived:
            self._look(slot, want, expected, True, "when they had been counted")
            if engine.counter(imm).value != 0:
                raise Violation(f"{engine.counter(imm).value} arrivals too many")
            self.bench.count("arrived")
        # The writer may have been cut off, or may write once more though it must not: only a fence ends the lease.
        try:
            await self.bench.ends(slot.region.revoke_async(), "a fence", ENDS)
        except FenceError:
            self.bench.count("fences that could not be had")
            self._put_aside(engine, slot)
            return
        except ClosedError:
            return
        self._look(slot, want, expected, arrived, f"after the fence, counted: {arrived}")
        slot.memory[:] = GUARD
        slot.lent = False

    async def _arrives(self, engine: TransferEngine, peer: Peer, want: Want, imm: int, expectation: Any) -> bool:
        """Whether the arrivals come. Once the writer has said how its write ended, they have to, or to fail."""
        bench = self.bench
        begin = bench.clock.now
        said_at: float | None = None
        while not expectation.done():
            await asyncio.sleep(0.01)
            now = bench.clock.now
            if want.tag in self.told and said_at is None:
                said_at = now
            if said_at is not None and now - said_at > ENDS and peer.state == "connected":
                raise Violation(f"the writer said {self.told[want.tag]!r}, and the counter has not ended")
            if peer.state != "connected" and now - begin > ENDS + 5 and not expectation.done():
                raise Violation("the writer is lost, and the counter has not ended")
            if now - begin > 20 and said_at is None:
                expectation.cancel()  # the writer never wrote: the lease is called back
        state = expectation.state
        told = self.told.pop(want.tag, None)
        if told == "done" and state == "failed" and "writer_failed" in str(expectation.exception().reason):
            raise Violation("a write that is done was told to have failed")
        return bool(state == "done")

    def _look(self, slot: Slot, want: Want, expected: Bytes, whole: bool, when: str) -> None:
        """What is in the slot: the writer's contents, all or some of them where they belong, and nothing else."""
        inside = np.zeros(len(slot.memory), bool)
        wanted = np.full(len(slot.memory), GUARD, np.uint8)
        if want.pages:
            for i, page in enumerate(want.pages):
                inside[page * PAGE : (page + 1) * PAGE] = True
                wanted[page * PAGE : (page + 1) * PAGE] = expected[i * PAGE : (i + 1) * PAGE]
        else:
            inside[: want.nbytes] = True
            wanted[: want.nbytes] = expected
        if (slot.memory[~inside] != GUARD).any():
            raise Violation("bytes landed outside of what was named")
        wrong = slot.memory != wanted
        if not whole:
            wrong &= slot.memory != GUARD
        if wrong.any():
            where = int(np.flatnonzero(wrong)[0])
            seen = slot.memory[wrong]
            kinds = {"never written": GUARD, "of a reused source": REUSED}
            shares = ", ".join(f"{(seen == value).mean():.0%} {kind}" for kind, value in kinds.items())
            how = f"{len(want.pages)} pages" if want.pages else "one piece"
            raise Violation(f"{len(seen)} of {want.nbytes} bytes ({how}) are wrong, from {where} on: {shares}; {when}")

    def _put_aside(self, engine: TransferEngine, slot: Slot) -> None:
        self.quarantine.append(slot)
        memory = np.full(SLOT_PAGES * PAGE, GUARD, np.uint8)
        self.slots[self.slots.index(slot)] = Slot(memory, engine.register(memory))

    # ---- writer ------------------------------------------------------------------------------------------------------
    async def _work(self, engine: TransferEngine) -> None:
        while not engine.closed:
            await self._guarded(self._something(engine))
            await asyncio.sleep(self.rng.random() * 0.02)

    async def _something(self, engine: TransferEngine) -> None:
        others = [path for path in self.directory.iterdir() if path.name != self.name and not path.suffix]
        if not others:
            await asyncio.sleep(0.1)
            return
        address, readable = msgspec.msgpack.decode(self.rng.choice(others).read_bytes(), type=tuple[bytes, bytes])
        try:
            peer = await self.bench.ends(engine.connect_async(address, 2 * LIVENESS), "connect()", ENDS)
        except RailwireError as error:
            self.bench.count(f"connect: {type(error).__name__}")
            await asyncio.sleep(0.2)
            return
        dice = self.rng.random()
        if dice < 0.03:
            try:
                await self.bench.ends(peer.close_async(), "peer.close()", ENDS)
            except FenceError:
                self.bench.count("fences that could not be had")
        elif dice < 0.2:
            await self._read(engine, peer, RemoteRegion.from_bytes(readable))
        else:
            await self._write(engine, peer)

    async def _read(self, engine: TransferEngine, peer: Peer, remote: RemoteRegion) -> None:
        begin = self.rng.randrange(1 << 16)
        end = self.rng.randrange(begin, 1 << 16) + 1
        sink = engine.register(np.full(end - begin, GUARD, np.uint8))
        await self.bench.ends(engine.read(remote[begin:end], sink), "a read", ENDS)
        if not np.array_equal(sink.array, contents(int.from_bytes(remote.incarnation[:4]), 1 << 16)[begin:end]):
            raise Violation(f"a read of {begin}..{end} brought something else")
        self.bench.count("read")

    async def _write(self, engine: TransferEngine, peer: Peer) -> None:
        rng = self.rng
        pages = rng.sample(range(SLOT_PAGES), rng.randrange(1, SLOT_PAGES)) if rng.random() < 0.4 else []
        nbytes = len(pages) * PAGE or rng.choice([1, 100, 4096, 100_000, SLOT_PAGES * PAGE])
        tag = rng.getrandbits(48)
        waiting = self.outgoing[tag] = Outgoing(peer)
        try:
            await self.bench.ends(
                engine.send(peer, msgspec.msgpack.encode(Want(tag, pages, nbytes))), "sending a message", ENDS
            )
            await asyncio.wait([waiting.lease], timeout=2.0)
            if not waiting.lease.done():
                self.bench.count("no lease")
                return
            lease = waiting.lease.result()
        finally:
            del self.outgoing[tag]
        source = contents(tag, nbytes).copy()
        region = engine.register(source)
        remote = RemoteRegion.from_bytes(lease.descriptor)
        if rng.random() < 0.5:
            remote = remote.over(peer)
        if pages:
            transfer = engine.write_pages(
                region, Pages(range(len(pages)), PAGE), remote, Pages(pages, PAGE), PAGE, imm=lease.imm
            )
        else:
            transfer = engine.write(region, remote[:nbytes], imm=lease.imm)
        if rng.random() < 0.1:
            await asyncio.sleep(rng.random() * 0.005)
            transfer.cancel()
        try:
            await self.bench.ends(transfer, "a write", ENDS)
        except RailwireError as error:
            self.bench.count(f"write: {type(error).__name__}")
        source[:] = REUSED  # it has ended: nobody reads this any more
        self.bench.count(f"writes {transfer.state}")
        try:
            told = engine.send(peer, msgspec.msgpack.encode(Told(tag, transfer.state)))
            await self.bench.ends(told, "sending a message", ENDS)
        except (PeerLostError, ClosedError):
            pass


# ---- what happens to a process ---------------------------------------------------------------------------------------
async def fork_beside(bench: Bench, rng: random.Random) -> None:
    """A child that only ends, or has engines of its own."""
    own = rng.random() < 0.5

    def child() -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 0
        try:
            if own:
                with TransferEngine(nics=["tcp://127.0.0.1"]) as a, TransferEngine(nics=["tcp://127.0.0.1"]) as b:
                    a.connect(b.address)
                    target = b.register(np.zeros(1000, np.uint8))
                    a.write(a.register(np.ones(1000, np.uint8)), target.descriptor, imm=1).wait(30)
                    b.counter(1).expect(1).wait(30)
                    assert target.array.all()
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        os._exit(code)

    pid = await asyncio.to_thread(child)
    ended: list[int] = []

    def reap() -> bool:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended.append(os.waitstatus_to_exitcode(status))
        return bool(done)

    if not await bench.until(reap, 60.0):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        bench.wrong("a forked child hangs")
    elif ended != [0]:
        bench.wrong(f"a forked child ended with {ended[0]}")
    bench.count("forks")


async def live(member: Member, seconds: float) -> None:
    """Lends and writes; closes its engine and opens another, and forks, now and then."""
    clock = asyncio.create_task(member.bench.clock.run())
    end = time.monotonic() + seconds
    await member.open()
    beat = member.directory / f"{member.name}.beat"
    while time.monotonic() < end:
        fresh = beat.with_suffix(".fresh")
        fresh.write_text(str(time.monotonic()))
        fresh.rename(beat)  # whoever looks never sees half of it
        await asyncio.sleep(0.5)
        dice = member.rng.random()
        if dice < 0.03:
            await member.close()
            await member.open()
        elif dice < 0.06:
            await fork_beside(member.bench, member.rng)
    await member.close()
    clock.cancel()


def main() -> None:
    name, directory, nic, seed, seconds = sys.argv[1:]
    rng = random.Random(int(seed))
    bench = Bench(name)
    member = Member(bench, name, Path(directory), lambda: [nic], rng)
    try:
        asyncio.run(live(member, float(seconds)))
    except Violation as error:
        bench.wrong(str(error))
    print(msgspec.json.encode(bench.counts).decode(), flush=True)
    sys.exit(3 if bench.violations else 0)


def spawn(name: str, directory: Path, nic: str, seed: int, seconds: float) -> subprocess.Popen[str]:
    """A member in a process of its own. Its last line is what it counted; it ends with 3 after a violation."""
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", __file__, name, str(directory), nic, str(seed), str(seconds)],
        stdout=subprocess.PIPE, stderr=(directory / f"{name}.log").open("a"), text=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
