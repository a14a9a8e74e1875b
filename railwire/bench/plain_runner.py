"""The yardstick without a library: a loop of sockets, or of memcpy (native/bench/plain_loops.cpp).

Runs in the measured processes: standard library and numpy only.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from railwire.bench.buffers import Bytes
from railwire.bench.runner import Runner, RunnerConfig, main
from railwire.bench.work import Laps, Work

_OFFSETS = np.ctypeslib.ndpointer(dtype=np.uint64, flags="C_CONTIGUOUS")
_LAPS = np.ctypeslib.ndpointer(dtype=np.int64, flags="C_CONTIGUOUS")
_U64, _I64, _INT, _PTR = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "plain_error": (ctypes.c_char_p, []),
    "plain_socket_send": (_INT, [_INT, _PTR, _OFFSETS, _OFFSETS, _U64, _U64, _U64, _U64, _INT, _LAPS, _I64]),
    "plain_socket_receive": (_INT, [_INT, _PTR, _U64, _U64, _INT, _I64]),
    "plain_socket_pingpong": (_INT, [_INT, _INT, _PTR, _PTR, _U64, _U64, _LAPS, _I64]),
    "plain_copy_send": (_INT, [_PTR, _PTR, _PTR, _OFFSETS, _OFFSETS, _U64, _U64, _U64, _U64, _LAPS]),
    "plain_copy_wait": (_INT, [_PTR, _U64, _I64]),
    "plain_copy_pingpong": (_INT, [_PTR, _INT, _PTR, _PTR, _U64, _U64, _U64, _LAPS, _I64]),
}
_COUNTERS_BYTES = mmap.PAGESIZE  # behind the buffer


class PlainRunner(Runner):
    """What the two kinds share."""

    def __init__(self, config: RunnerConfig, buffer: Bytes) -> None:
        super().__init__(config, buffer)
        self.lib = ctypes.CDLL(config.option("tool"))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.timeout_ns = int(config.timeout_s * 1e9)
        self.source = self.destination = np.zeros(0, dtype=np.uint64)

    def check(self, code: int) -> None:
        if code:
            raise RuntimeError(self.lib.plain_error().decode())

    def prepare(self, work: Work) -> None:
        if work.op not in ("write", "pages", "pingpong"):
            raise NotImplementedError(f"the plain loops have no {work.op}")
        source, destination = ((slots.ravel() * work.page_bytes).astype(np.uint64) for slots in work.order())
        self.source, self.destination = source, destination

    def initiate(self, work: Work) -> Laps:
        laps = np.zeros(work.rounds, dtype=np.int64)
        start = time.monotonic_ns()
        if work.op == "pingpong":
            self.pingpong(work, laps)
            return Laps(start, time.monotonic_ns(), laps / 2e3)
        self.send(work, laps)
        return Laps(start, time.monotonic_ns(), laps / 1e3)

    def serve(self, work: Work) -> int:
        if work.op == "pingpong":
            self.pingpong(work, np.zeros(work.rounds, dtype=np.int64))
            return 0
        self.receive(work)
        return time.monotonic_ns()

    def send(self, work: Work, laps: npt.NDArray[np.int64]) -> None:
        raise NotImplementedError

    def receive(self, work: Work) -> None:
        raise NotImplementedError

    def pingpong(self, work: Work, laps: npt.NDArray[np.int64]) -> None:
        raise NotImplementedError


class SocketRunner(PlainRunner):
    """One connection."""

    def __init__(self, config: RunnerConfig, buffer: Bytes) -> None:
        super().__init__(config, buffer)
        host = config.nic.partition("://")[2].rpartition(":")[0] or config.nic.partition("://")[2] or "127.0.0.1"
        self._listener = None if config.initiator else socket.create_server((host, 0))
        self._socket: socket.socket | None = None

    def version(self) -> str:
        return "plain sockets, frames of 500 pages"

    def offer(self) -> bytes:
        return json.dumps(self._listener.getsockname() if self._listener else None).encode()

    def connect(self, offer: bytes) -> None:
        if self._listener is None:
            self._socket = socket.create_connection(tuple(json.loads(offer))[:2], self.config.timeout_s)
        else:
            self._listener.settimeout(self.config.timeout_s)
            self._socket = self._listener.accept()[0]
        self._socket.setblocking(True)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def _fd(self) -> int:
        assert self._socket is not None
        return self._socket.fileno()

    def send(self, work: Work, laps: npt.NDArray[np.int64]) -> None:
        self.check(
            self.lib.plain_socket_send(
                self._fd, self.buffer.ctypes.data, self.source, self.destination, len(self.source), work.pages,
                work.rounds, work.page_bytes, _one_by_one(work), laps, self.timeout_ns,
            )
        )  # fmt: skip

    def receive(self, work: Work) -> None:
        self.check(
            self.lib.plain_socket_receive(
                self._fd, self.buffer.ctypes.data, work.pages, work.rounds, _one_by_one(work), self.timeout_ns
            )
        )

    def pingpong(self, work: Work, laps: npt.NDArray[np.int64]) -> None:
        first, base = self.config.initiator, self.buffer.ctypes.data
        put = base + work.echo_offset if first else base
        self.check(
            self.lib.plain_socket_pingpong(
                self._fd, first, base, put, work.rounds, work.page_bytes, laps, self.timeout_ns
            )
        )

    def close(self) -> None:
        for one in (self._socket, self._listener):
            if one is not None:
                one.close()


class CopyRunner(PlainRunner):
    """The target's buffer is a file without a name that the initiator maps, and the other way round."""

    def __init__(self, config: RunnerConfig, buffer: Bytes) -> None:
        super().__init__(config, buffer)
        self._fd = os.memfd_create("railwire-plain")
        os.ftruncate(self._fd, config.buffer_bytes + _COUNTERS_BYTES)
        self._mine = self._map(self._fd)
        self.buffer = self._mine[: config.buffer_bytes]
        self._theirs: Bytes | None = None
        self._counted = self._answered = 0  # of the writes to the target, and to the initiator

    def _map(self, fd: int) -> Bytes:
        area = mmap.mmap(fd, self.config.buffer_bytes + _COUNTERS_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                area.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # ordinary pages, then
                pass
        memory = np.frombuffer(area, dtype=np.uint8)
        memory[:: mmap.PAGESIZE] |= 0  # faulted in now
        return memory

    def version(self) -> str:
        return "plain memcpy into mapped memory"

    def offer(self) -> bytes:
        return json.dumps([os.getpid(), self._fd]).encode()

    def connect(self, offer: bytes) -> None:
        pid, number = json.loads(offer)
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        self._theirs = self._map(fd)
        os.close(fd)

    @property
    def _there(self) -> int:
        assert self._theirs is not None
        return int(self._theirs.ctypes.data)

    @property
    def _counters(self) -> int:
        """The target's, of which each side has a mapping of its own."""
        base = self._there if self.config.initiator else int(self._mine.ctypes.data)
        return base + self.config.buffer_bytes

    def send(self, work: Work, laps: npt.NDArray[np.int64]) -> None:
        self.check(
            self.lib.plain_copy_send(
                self._mine.ctypes.data, self._there, self._counters, self.source, self.destination, len(self.source),
                work.pages, work.rounds, work.page_bytes, laps,
            )
        )  # fmt: skip

    def receive(self, work: Work) -> None:
        self._counted += work.total_pages
        self.check(self.lib.plain_copy_wait(self._counters, self._counted, self.timeout_ns))

    def pingpong(self, work: Work, laps: npt.NDArray[np.int64]) -> None:
        first = self.config.initiator
        put = self._there if first else self._there + work.echo_offset
        done = self._answered if first else self._counted
        self._counted += work.rounds
        self._answered += work.rounds
        self.check(
            self.lib.plain_copy_pingpong(
                self._counters, first, self._mine.ctypes.data, put, done, work.rounds, work.page_bytes, laps,
                self.timeout_ns,
            )
        )  # fmt: skip

    def close(self) -> None:
        os.close(self._fd)


def _one_by_one(work: Work) -> bool:
    """Its time is asked, so the receiver has to say that it has come."""
    return work.window * work.pages == 1


def make(config: RunnerConfig, buffer: Bytes) -> PlainRunner:
    return (CopyRunner if config.nic == "shm" else SocketRunner)(config, buffer)


if __name__ == "__main__":
    main(make)
