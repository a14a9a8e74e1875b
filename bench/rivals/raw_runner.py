"""The yardstick: a bare libfabric loop (native/bench/raw_libfabric.cpp) in the same kind of process.

Runs in the measured processes: standard library and numpy only.
"""

from __future__ import annotations

import ctypes
import json
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from railwire.bench.buffers import Bytes
from railwire.bench.runner import Runner, RunnerConfig, main
from railwire.bench.work import Laps, Work

_OFFSETS = np.ctypeslib.ndpointer(dtype=np.uint64, flags="C_CONTIGUOUS")
_LAPS = np.ctypeslib.ndpointer(dtype=np.int64, flags="C_CONTIGUOUS")
_U64 = ctypes.c_uint64
_OUT_U64 = ctypes.POINTER(ctypes.c_uint64)

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "raw_error": (ctypes.c_char_p, []),
    "raw_open": (ctypes.c_int, [ctypes.c_char_p] * 4 + [ctypes.POINTER(ctypes.c_void_p)]),
    "raw_close": (None, [ctypes.c_void_p]),
    "raw_description": (ctypes.c_char_p, [ctypes.c_void_p]),
    "raw_depth": (_U64, [ctypes.c_void_p]),
    "raw_address": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p, _OUT_U64]),
    "raw_register": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, _U64, _OUT_U64, _OUT_U64]),
    "raw_connect": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p, _U64, _U64]),
    "raw_post_all": (
        ctypes.c_int,
        [ctypes.c_void_p, _OFFSETS, _OFFSETS, _U64, _U64, _U64, _U64, _U64, ctypes.c_int, ctypes.c_int, _LAPS],
    ),
    "raw_post_one": (ctypes.c_int, [ctypes.c_void_p, _U64, _U64, _U64]),
    "raw_wait": (ctypes.c_int, [ctypes.c_void_p, _U64, ctypes.c_int64]),
    "raw_pingpong": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int, _U64, _U64, _U64, _LAPS, ctypes.c_int64]),
}


def provider_of(nic: str) -> tuple[str, str, str]:
    """Provider, domain and node for libfabric of a NIC specification ("tcp://127.0.0.1", "shm", "libfabric:X:Y")."""
    kind, _, rest = nic.partition("://")
    if kind == "tcp":
        return "tcp", "", rest.partition(":")[0] or "127.0.0.1"
    if nic == "shm":
        return "shm", "", ""
    kind, _, rest = nic.partition(":")
    if kind == "efa":
        return "efa", rest, ""
    if kind == "libfabric":
        provider, _, domain = rest.partition(":")
        return provider, domain, ""
    raise ValueError(f"a bare libfabric loop cannot use NIC {nic!r}")


class RawRunner(Runner):
    def __init__(self, config: RunnerConfig, buffer: Bytes) -> None:
        super().__init__(config, buffer)
        if not config.option("tool"):
            raise ImportError("the bare loop was not built")  # said as of any contender that is not there
        self._lib = ctypes.CDLL(config.option("tool"))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        self._nic = ctypes.c_void_p()
        names = [name.encode() for name in (config.option("libfabric"), *provider_of(config.nic))]
        self._check(self._lib.raw_open(*names, ctypes.byref(self._nic)))
        self._timeout_ns = int(config.timeout_s * 1e9)
        self._window = int(config.option("wr_window", "0")) or int(self._lib.raw_depth(self._nic))
        self._source = self._destination = np.zeros(0, dtype=np.uint64)

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(self._lib.raw_error().decode())

    def version(self) -> str:
        return f"bare {self._lib.raw_description(self._nic).decode()}, window {self._window}"

    def offer(self) -> bytes:
        address, size = ctypes.create_string_buffer(512), _U64(512)
        self._check(self._lib.raw_address(self._nic, address, ctypes.byref(size)))
        base, key = _U64(), _U64()
        pointer, length = self.buffer.ctypes.data, self.buffer.nbytes
        self._check(self._lib.raw_register(self._nic, pointer, length, ctypes.byref(base), ctypes.byref(key)))
        return json.dumps([address.raw[: size.value].hex(), base.value, key.value]).encode()

    def connect(self, offer: bytes) -> None:
        address, base, key = json.loads(offer)
        self._check(self._lib.raw_connect(self._nic, bytes.fromhex(address), base, key))

    def prepare(self, work: Work) -> None:
        if work.op not in ("write", "pages", "read", "pingpong"):
            raise NotImplementedError(f"the bare loop has no {work.op}")
        source, destination = ((slots.ravel() * work.page_bytes).astype(np.uint64) for slots in work.order())
        self._source, self._destination = source, destination

    def initiate(self, work: Work) -> Laps:
        laps = np.zeros(work.rounds, dtype=np.int64)
        start = time.monotonic_ns()
        if work.op == "pingpong":
            self._pingpong(work, laps)
            return Laps(start, time.monotonic_ns(), laps / 2e3)
        read = work.op == "read"
        local, remote = (self._destination, self._source) if read else (self._source, self._destination)
        window = min(self._window, work.window * work.pages)
        # One at a time: its time is asked, so it must have landed.
        delivered = work.window * work.pages == 1 or bool(self.config.option("landed", ""))
        self._check(
            self._lib.raw_post_all(
                self._nic, local, remote, len(local), work.pages, work.rounds, work.page_bytes, window, read,
                delivered, laps,
            )
        )  # fmt: skip
        end = time.monotonic_ns()
        if read:  # tells the target that it need not make progress any more
            self._check(self._lib.raw_post_one(self._nic, 0, 0, 0))
        return Laps(start, end, laps / 1e3)

    def serve(self, work: Work) -> int:
        if work.op == "pingpong":
            self._pingpong(work, np.zeros(work.rounds, dtype=np.int64))
            return 0
        arrivals = 1 if work.op == "read" else work.total_pages
        self._check(self._lib.raw_wait(self._nic, arrivals, self._timeout_ns))
        return 0 if work.op == "read" else time.monotonic_ns()

    def _pingpong(self, work: Work, laps: npt.NDArray[np.int64]) -> None:
        first = self.config.initiator
        remote = 0 if first else work.echo_offset
        self._check(
            self._lib.raw_pingpong(self._nic, first, remote, work.rounds, work.page_bytes, laps, self._timeout_ns)
        )

    def close(self) -> None:
        self._lib.raw_close(self._nic)


if __name__ == "__main__":
    main(RawRunner)
