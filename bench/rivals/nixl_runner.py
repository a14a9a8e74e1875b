"""NIXL (UCX back-end) as a contender: https://github.com/ai-dynamo/nixl

At its best on two cores: no progress thread, requests prepared ahead and reposted, the target looping on
`get_new_notifs()`. A round ends when the target has seen its notification. UCX_TLS is set by the parent.

Runs in the measured processes: standard library, numpy and nixl only (and torch, for GPU memory).
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from railwire.bench.buffers import Bytes, device_memory
from railwire.bench.runner import Runner, RunnerConfig, main
from railwire.bench.work import Laps, Work

_END = b"end"


class NixlRunner(Runner):
    # The wheel's bundled libnl crashes at interpreter exit in any process that has created the UCX back-end.
    hard_exit: ClassVar[bool] = True

    def __init__(self, config: RunnerConfig, buffer: Bytes) -> None:
        super().__init__(config, buffer)
        from nixl._api import nixl_agent, nixl_agent_config

        settings = nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"])
        self._agent: Any = nixl_agent(config.role, settings)
        self._gpu = device_memory(config.device, config.buffer_bytes)
        self._kind = "DRAM" if self._gpu is None else "VRAM"
        self._number = 0 if self._gpu is None else self._gpu.number
        self._address = buffer.ctypes.data if self._gpu is None else self._gpu.address
        self._region = self._agent.register_memory([(self._address, buffer.nbytes, self._number, "")], self._kind)
        self._peer = ""
        self._peer_address = self._peer_number = 0
        self._prepared: list[Any] = []
        self._handles: list[Any] = []

    def upload(self) -> None:
        if self._gpu is not None:
            self._gpu.fill(self.buffer)

    def download(self) -> None:
        if self._gpu is not None:
            self._gpu.read_into(self.buffer)

    def version(self) -> str:
        from importlib.metadata import version

        return f"NIXL {version('nixl')}, UCX_TLS={os.environ.get('UCX_TLS', '')}"

    def offer(self) -> bytes:
        return json.dumps([self._agent.get_agent_metadata().hex(), self._address, self._number]).encode()

    def connect(self, offer: bytes) -> None:
        metadata, self._peer_address, self._peer_number = json.loads(offer)
        name = self._agent.add_remote_agent(bytes.fromhex(metadata))
        self._peer = name.decode() if isinstance(name, bytes) else name
        if self.config.initiator:
            self._agent.make_connection(self._peer)

    def prepare(self, work: Work) -> None:
        if work.op not in ("write", "pages", "read", "pingpong"):
            raise NotImplementedError(f"NIXL has no {work.op} of this kind")
        self._release()
        if work.op == "pingpong":
            to = 0 if self.config.initiator else work.echo_offset
            self._handles = self._requests("WRITE", np.zeros((1, 1)), np.full((1, 1), to), work.page_bytes, b"ping")
        elif self.config.initiator:
            source, destination = (slots * work.page_bytes for slots in work.order())
            if work.op == "read":
                self._handles = self._requests("READ", destination, source, work.page_bytes, b"")
            else:
                self._handles = self._requests("WRITE", source, destination, work.page_bytes, b"landed")

    def _requests(
        self, direction: str, local: npt.NDArray[Any], remote: npt.NDArray[Any], nbytes: int, tag: bytes
    ) -> list[Any]:
        """One prepared request per row of offsets."""

        def side(agent: str, base: int, number: int, offsets: npt.NDArray[Any]) -> Any:
            descriptors = np.zeros((offsets.size, 3), dtype=np.uint64)
            descriptors[:, 0] = offsets.ravel().astype(np.uint64) + np.uint64(base)
            descriptors[:, 1] = nbytes
            descriptors[:, 2] = number
            return self._agent.prep_xfer_dlist(agent, descriptors, self._kind)

        ours = side("", self._address, self._number, local)
        theirs = side(self._peer, self._peer_address, self._peer_number, remote)
        self._prepared = [ours, theirs]
        indices = np.arange(local.size, dtype=np.int32).reshape(local.shape)
        return [self._agent.make_prepped_xfer(direction, ours, row, theirs, row, tag) for row in indices]

    def _release(self) -> None:
        for handle in self._handles:
            self._agent.release_xfer_handle(handle)
        for prepared in self._prepared:
            self._agent.release_dlist_handle(prepared)
        self._handles, self._prepared = [], []

    def _until(self, reached: Callable[[], bool]) -> None:
        deadline = self.deadline()
        spins = 0
        while not reached():
            spins += 1
            if spins % 4096 == 0 and time.monotonic() > deadline:
                raise TimeoutError(f"not reached within {self.config.timeout_s:g} s")

    def _finish(self, handle: Any) -> None:
        def finished() -> bool:
            state = self._agent.check_xfer_state(handle)
            if state == "ERR":
                raise RuntimeError("a transfer failed")
            return bool(state == "DONE")

        self._until(finished)

    def _notified(self, count: int) -> None:
        seen = 0

        def enough() -> bool:
            nonlocal seen
            for messages in self._agent.get_new_notifs().values():
                seen += len(messages)
            return seen >= count

        self._until(enough)

    def initiate(self, work: Work) -> Laps:
        if work.op == "pingpong":
            return self._ping(work)
        laps = np.zeros(work.rounds)
        in_flight: deque[tuple[Any, int, int]] = deque()
        window = min(work.window, len(self._handles))

        def finish_oldest() -> None:
            handle, index, began = in_flight.popleft()
            self._finish(handle)
            laps[index] = time.monotonic_ns() - began

        start = time.monotonic_ns()
        for index in range(work.rounds):
            if len(in_flight) == window:
                finish_oldest()
            handle = self._handles[index % len(self._handles)]
            began = time.monotonic_ns()
            self._agent.transfer(handle)
            in_flight.append((handle, index, began))
        while in_flight:
            finish_oldest()
        end = time.monotonic_ns()
        if work.op == "read":
            self._agent.send_notif(self._peer, _END)
        # The notifications still have to leave, and this process has no progress thread.
        for _ in range(64):
            self._agent.get_new_notifs()
        return Laps(start, end, laps / 1e3)

    def _ping(self, work: Work) -> Laps:
        laps = np.zeros(work.rounds)
        start = time.monotonic_ns()
        for index in range(work.rounds):
            began = time.monotonic_ns()
            self._agent.transfer(self._handles[0])
            self._finish(self._handles[0])  # NIXL sends the notification when the initiator polls the end
            self._notified(1)
            laps[index] = time.monotonic_ns() - began
        return Laps(start, time.monotonic_ns(), laps / 2e3)

    def serve(self, work: Work) -> int:
        if work.op == "pingpong":
            for _ in range(work.rounds):
                self._notified(1)
                self._agent.transfer(self._handles[0])
                self._finish(self._handles[0])
            return 0
        if work.op == "read":
            self._notified(1)
            return 0
        self._notified(work.rounds)
        return time.monotonic_ns()

    def close(self) -> None:
        """Nothing: the process ends with os._exit()."""


if __name__ == "__main__":
    main(NixlRunner)
