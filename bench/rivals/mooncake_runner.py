"""Mooncake's transfer engine (tcp) as a contender: https://github.com/kvcache-ai/Mooncake

Page lists go as asynchronous batches of 16 pages, eight in flight, the fastest of what was tried: it opens a
connection per page in flight, and batches of thousands fail. A plain transfer tells the receiver nothing, so a run
ends with the initiator's last completion; in ping-pong it sends its notification with each write.

Runs in the measured processes: standard library, numpy and mooncake only.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from railwire.bench.buffers import Bytes
from railwire.bench.runner import Runner, RunnerConfig, main
from railwire.bench.work import Laps, Work


class _Batch(NamedTuple):
    ours: list[int]
    theirs: list[int]
    lengths: list[int]


class MooncakeRunner(Runner):
    def __init__(self, config: RunnerConfig, buffer: Bytes) -> None:
        super().__init__(config, buffer)
        from mooncake.engine import (
            TransferEngine,
            TransferNotify,
            TransferOpcode,
        )

        self._write_opcode = TransferOpcode.Write
        self._note = TransferNotify("ping", "landed")
        self._engine: Any = TransferEngine()
        if self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("TransferEngine.initialize failed")
        if self._engine.register_memory(buffer.ctypes.data, buffer.nbytes) != 0:
            raise RuntimeError("register_memory failed")
        self._peer = ""
        self._peer_address = 0
        self._rounds: list[list[_Batch]] = []

    def version(self) -> str:
        from importlib.metadata import version

        return f"Mooncake {version('mooncake-transfer-engine-non-cuda')} tcp"

    def offer(self) -> bytes:
        return json.dumps([f"127.0.0.1:{self._engine.get_rpc_port()}", self.buffer.ctypes.data]).encode()

    def connect(self, offer: bytes) -> None:
        self._peer, self._peer_address = json.loads(offer)

    def prepare(self, work: Work) -> None:
        if work.op not in ("write", "pages", "read", "pingpong"):
            raise NotImplementedError(f"Mooncake has no {work.op} of this kind")
        source, destination = (slots * work.page_bytes for slots in work.order())
        local, remote = (destination, source) if work.op == "read" else (source, destination)
        ours, theirs = local + self.buffer.ctypes.data, remote + self._peer_address
        most = int(self.config.option("batch", "16"))
        cuts = [slice(i, i + most) for i in range(0, work.pages, most)]
        self._rounds = [
            [_Batch(a[cut].tolist(), b[cut].tolist(), [work.page_bytes] * len(a[cut])) for cut in cuts]
            for a, b in zip(ours, theirs, strict=True)
        ]

    def initiate(self, work: Work) -> Laps:
        if work.op == "pingpong":
            return self._ping(work)
        if work.window == 1 and work.pages == 1:
            return self._one_by_one(work)
        engine = self._engine
        post = engine.batch_transfer_async_read if work.op == "read" else engine.batch_transfer_async_write
        most = work.window if work.pages == 1 else int(self.config.option("batches", "8"))
        laps = np.zeros(work.rounds)
        in_flight: deque[tuple[int, int, int]] = deque()

        def finish_oldest() -> None:
            batch_id, index, began = in_flight.popleft()
            if engine.get_batch_transfer_status([batch_id]) != 0:
                raise RuntimeError("a batch failed")
            laps[index] = time.monotonic_ns() - began  # the round's last batch writes last

        start = time.monotonic_ns()
        for index in range(work.rounds):
            began = time.monotonic_ns()
            for batch in self._rounds[index % len(self._rounds)]:
                if len(in_flight) >= most:
                    finish_oldest()
                batch_id = post(self._peer, batch.ours, batch.theirs, batch.lengths)
                if batch_id == 0:
                    raise RuntimeError("a batch was not taken")
                in_flight.append((batch_id, index, began))
        while in_flight:
            finish_oldest()
        return Laps(start, time.monotonic_ns(), laps / 1e3)

    def _one_by_one(self, work: Work) -> Laps:
        transfer: Callable[[str, int, int, int], int] = (
            self._engine.transfer_sync_read if work.op == "read" else self._engine.transfer_sync_write
        )
        laps = np.zeros(work.rounds)
        start = time.monotonic_ns()
        for index in range(work.rounds):
            batch = self._rounds[index % len(self._rounds)][0]
            began = time.monotonic_ns()
            if transfer(self._peer, batch.ours[0], batch.theirs[0], batch.lengths[0]) != 0:
                raise RuntimeError("a transfer failed")
            laps[index] = time.monotonic_ns() - began
        return Laps(start, time.monotonic_ns(), laps / 1e3)

    def _write_and_notify(self, remote_offset: int, nbytes: int) -> None:
        ours, theirs = self.buffer.ctypes.data, self._peer_address + remote_offset
        if self._engine.transfer_sync(self._peer, ours, theirs, nbytes, self._write_opcode, self._note) != 0:
            raise RuntimeError("a transfer failed")

    def _await_notification(self) -> None:
        deadline = self.deadline()
        while not self._engine.get_notifies():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no notification within {self.config.timeout_s:g} s")

    def _ping(self, work: Work) -> Laps:
        laps = np.zeros(work.rounds)
        start = time.monotonic_ns()
        for index in range(work.rounds):
            began = time.monotonic_ns()
            self._write_and_notify(0, work.page_bytes)
            self._await_notification()
            laps[index] = time.monotonic_ns() - began
        return Laps(start, time.monotonic_ns(), laps / 2e3)

    def serve(self, work: Work) -> int:
        if work.op == "pingpong":
            for _ in range(work.rounds):
                self._await_notification()
                self._write_and_notify(work.echo_offset, work.page_bytes)
        return 0

    def close(self) -> None:
        self._engine.unregister_memory(self.buffer.ctypes.data)


if __name__ == "__main__":
    main(MooncakeRunner)
