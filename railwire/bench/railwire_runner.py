"""Railwire itself as a contender: what a user's program would do, nothing reached into.

The target waits on an immediate counter; in ping-pong both sides do.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from railwire import __version__
from railwire.bench.buffers import Bytes
from railwire.bench.runner import Runner, RunnerConfig, main
from railwire.bench.work import Laps, Slots, Work
from railwire.cuda import GpuMemory
from railwire.engine import TransferEngine
from railwire.group import PeerGroup
from railwire.memory import MemoryRegion, Pages, RemoteRegion, ScatterTarget
from railwire.peer import Peer
from railwire.transfer import Transfer

_LANDED = 1
_END = 2
_NOT_COUNTED = ("read", "send", "pingpong")


class RailwireRunner(Runner):
    """`options`: `receivers` engines share a scatter's target process; `progress` and `copy_sms` are the engine's;
    `memory` "allocated" takes `engine.allocate`'s instead of the buffer."""

    def __init__(self, config: RunnerConfig, buffer: Bytes) -> None:
        super().__init__(config, buffer)
        count = 1 if config.initiator else int(config.option("receivers", "1"))
        progress: Any = config.option("progress", "adaptive")
        sms = config.option("copy_sms", "")
        options = {"copy_sms": sms} if sms else {}
        nics: Any = "auto" if config.nic == "auto" else [config.nic]
        self._engines = [
            TransferEngine(config.device, nics=nics, progress=progress, options=options) for _ in range(count)
        ]
        self._share = config.buffer_bytes // count  # bytes of the target's buffer that each of its engines owns
        self._gpu: GpuMemory | None = None
        if config.device != "cpu":
            self._gpu = GpuMemory(config.buffer_bytes, int(config.device.partition(":")[2]))
        self._regions: list[MemoryRegion] = []
        if config.option("memory") == "allocated" and count == 1 and self._gpu is None:
            self._regions = [self._engine.allocate(config.buffer_bytes)]
            self.buffer = np.asarray(self._regions[0].array)
        else:
            self._regions = [
                engine.register(
                    buffer[i * self._share : (i + 1) * self._share]
                    if self._gpu is None
                    else (self._gpu.address + i * self._share, self._share)
                )
                for i, engine in enumerate(self._engines)
            ]
        self._peers: list[Peer] = []
        self._remotes: list[RemoteRegion] = []
        self._group: PeerGroup | None = None
        self._submit: list[Callable[[], Transfer]] = []
        self._arrivals: Slots = np.zeros((0, 0), dtype=np.int64)

    def upload(self) -> None:
        if self._gpu is not None:
            self._gpu.fill(self.buffer)

    def download(self) -> None:
        if self._gpu is not None:
            self._gpu.read_into(self.buffer)

    @property
    def _engine(self) -> TransferEngine:
        return self._engines[0]

    def version(self) -> str:
        return f"Railwire {__version__}, {self._engine.nics[0].provider}"

    def details(self) -> dict[str, Any]:
        nic = self._engine.nics[0]
        return {"library": nic.library, "link_depth": nic.link_depth}

    def offer(self) -> bytes:
        return json.dumps(
            [
                [bytes(engine.address).hex(), bytes(region.descriptor).hex()]
                for engine, region in zip(self._engines, self._regions, strict=True)
            ]
        ).encode()

    def connect(self, offer: bytes) -> None:
        ends = [(bytes.fromhex(address), bytes.fromhex(descriptor)) for address, descriptor in json.loads(offer)]
        self._remotes = [RemoteRegion.from_bytes(descriptor) for _, descriptor in ends]
        if self.config.initiator:
            self._share = self.config.buffer_bytes // len(ends)
            self._peers = [self._engine.connect(address) for address, _ in ends]
            self._group = self._engine.peer_group(self._peers)
        else:
            self._peers = [self._await_peer(engine) for engine in self._engines]

    def _await_peer(self, engine: TransferEngine) -> Peer:
        deadline = self.deadline()
        while not engine.peers:
            if time.monotonic() > deadline:
                raise TimeoutError("the initiator did not connect")
            time.sleep(0.001)
        return engine.peers[0]

    def prepare(self, work: Work) -> None:
        """One ready call for each of the work's page lists, as an application has its lists at hand."""
        if work.op == "scatter" and self._share % work.page_bytes:
            raise ValueError(f"pages of {work.page_bytes} bytes do not divide a receiver's {self._share} bytes")
        if not self.config.initiator and work.op not in _NOT_COUNTED:
            self._arrivals = work.arrivals(work.slots // len(self._engines))
        if self.config.initiator and work.op != "pingpong":
            make = {"pages": self._pages, "scatter": self._scatter, "send": self._send}.get(work.op, self._single)
            source, destination = work.order()
            self._submit = [make(work, a, b) for a, b in zip(source, destination, strict=True)]

    def _pages(self, work: Work, source: Any, destination: Any) -> Callable[[], Transfer]:
        src, dst = Pages(source, work.page_bytes), Pages(destination, work.page_bytes)
        engine, region, remote = self._engine, self._regions[0], self._remotes[0]
        return lambda: engine.write_pages(region, src, remote, dst, work.page_bytes, imm=_LANDED)

    def _single(self, work: Work, source: Any, destination: Any) -> Callable[[], Transfer]:
        if work.pages != 1:
            raise ValueError(f"a round of {work.op} is one page")
        n = work.page_bytes
        a, b = int(source[0]) * n, int(destination[0]) * n
        engine, region, remote = self._engine, self._regions[0], self._remotes[0]
        if work.op == "read":
            far, near = remote[a : a + n], region[b : b + n]
            return lambda: engine.read(far, near)
        src, dst = region[a : a + n], remote[b : b + n]
        return lambda: engine.write(src, dst, imm=_LANDED)

    def _scatter(self, work: Work, source: Any, destination: Any) -> Callable[[], Transfer]:
        n = work.page_bytes
        targets = []
        for a, b in zip(source.tolist(), destination.tolist(), strict=True):
            receiver, at = divmod(b * n, self._share)
            targets.append(ScatterTarget(a * n, self._remotes[receiver][at : at + n]))
        engine, region, group = self._engine, self._regions[0], self._group
        assert group is not None
        return lambda: engine.scatter(group, region, targets, imm=_LANDED)

    def _send(self, work: Work, source: Any, destination: Any) -> Callable[[], Transfer]:
        if work.pages != 1:
            raise ValueError("a round of send is one message")
        engine, peer, n = self._engine, self._peers[0], work.page_bytes
        message = memoryview(self.buffer.data)[int(source[0]) * n :][:n]
        return lambda: engine.send(peer, message)

    def initiate(self, work: Work) -> Laps:
        if work.op == "pingpong":
            return self._ping(work)
        laps = np.zeros(work.rounds)
        in_flight: deque[tuple[Transfer, int, int]] = deque()
        timeout, submit, lists = self.config.timeout_s, self._submit, len(self._submit)

        def finish_oldest() -> None:
            transfer, index, began = in_flight.popleft()
            transfer.wait(timeout)
            laps[index] = time.monotonic_ns() - began

        start = time.monotonic_ns()
        for index in range(work.rounds):
            if len(in_flight) == work.window:
                finish_oldest()
            began = time.monotonic_ns()
            in_flight.append((submit[index % lists](), index, began))
        while in_flight:
            finish_oldest()
        end = time.monotonic_ns()
        if work.op == "read":
            self._engine.barrier(self._engine.peer_group(self._peers), _END).wait(timeout)
        return Laps(start, end, laps / 1e3)

    def _ping(self, work: Work) -> Laps:
        laps = np.zeros(work.rounds)
        engine, counter, timeout = self._engine, self._engine.counter(_LANDED), self.config.timeout_s
        src, dst = self._regions[0][: work.page_bytes], self._remotes[0][: work.page_bytes]
        start = time.monotonic_ns()
        for index in range(work.rounds):
            began = time.monotonic_ns()
            engine.write(src, dst, imm=_LANDED)
            counter.expect(1, timeout=timeout).wait()
            laps[index] = time.monotonic_ns() - began
        return Laps(start, time.monotonic_ns(), laps / 2e3)

    def serve(self, work: Work) -> int:
        timeout = self.config.timeout_s
        if work.op == "pingpong":
            engine, counter, n = self._engine, self._engine.counter(_LANDED), work.page_bytes
            src, dst = self._regions[0][:n], self._remotes[0][work.echo_offset : work.echo_offset + n]
            for _ in range(work.rounds):
                counter.expect(1, timeout=timeout).wait()
                engine.write(src, dst, imm=_LANDED)
            return 0
        if work.op == "read":
            self._engine.counter(_END).expect(1, timeout=timeout).wait()
            return 0
        if work.op == "send":
            return self._receive(work)
        expectations = [
            engine.counter(_LANDED).expect(int(count), timeout=timeout)
            for engine, count in zip(self._engines, work.total(self._arrivals), strict=True)
        ]
        for expectation in expectations:
            expectation.wait()
        return time.monotonic_ns()

    def _receive(self, work: Work) -> int:
        """Messages come in order: the k-th is page k of the round-robin over all page lists."""
        slots = work.order()[1].ravel().tolist()
        n, buffer, engine = work.page_bytes, memoryview(self.buffer.data), self._engine
        for index in range(work.rounds):
            _, message = engine.receive(self.config.timeout_s)
            at = slots[index % len(slots)] * n
            buffer[at : at + n] = message
        return time.monotonic_ns()

    def close(self) -> None:
        for engine in self._engines:
            engine.close()


if __name__ == "__main__":
    main(RailwireRunner)
