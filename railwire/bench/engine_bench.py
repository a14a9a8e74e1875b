"""`railwire bench engine`: what the engine itself costs, on a simulated NIC that completes everything at once."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec
import numpy as np
from rich.table import Table

from railwire.engine import TransferEngine
from railwire.memory import MemoryRegion, Pages, RemoteRegion
from railwire.testing import SimulatedFabric
from railwire.transfer import Transfer

PAGE_BYTES = 1024
PAGES = 100_000
_IN_FLIGHT = 2


class EngineFigures(msgspec.Struct, frozen=True):
    """`pages` are random, so that nothing merges: each page is one work request.

    page_mops: million page work requests a second; the thread that waits drives the engine, so one core does it all.
    call_us: median time of one write_pages call of 100,000 pages until it returns, microseconds.
    post_ns_p50, post_ns_p99: from a submission to its first work request at the NIC, spinning worker, nanoseconds.
    idle_percent: share of one core that an idle, connected engine with tcp and shm uses.
    """

    page_mops: float
    call_us: float
    post_ns_p50: float
    post_ns_p99: float
    idle_percent: float
    pages: int = PAGES
    page_bytes: int = PAGE_BYTES


TARGETS = {
    "page_mops": ("page work requests, M/s", "at least 15"),
    "call_us": (f"one call of {PAGES:,} pages, µs", "under 1000"),
    "post_ns_p50": ("submission to first post, ns, p50", "under 1000"),
    "post_ns_p99": ("submission to first post, ns, p99", ""),
    "idle_percent": ("idle engine, % of a core", "under 1"),
}


class _Loop:
    """A sender and a receiver on a fabric that discards, and one random page list."""

    def __init__(self, sender: TransferEngine, receiver: TransferEngine) -> None:
        sender.connect(receiver.address)
        self.engine = sender
        self.receiver = receiver
        self.region: MemoryRegion = sender.allocate(PAGES * PAGE_BYTES)
        self.landing: MemoryRegion = receiver.allocate(PAGES * PAGE_BYTES)
        self.remote: RemoteRegion = self.landing.descriptor
        rng = np.random.default_rng(1)
        self.source = Pages(rng.permutation(PAGES), PAGE_BYTES)
        self.destination = Pages(rng.permutation(PAGES), PAGE_BYTES)

    def write_pages(self) -> Transfer:
        return self.engine.write_pages(self.region, self.source, self.remote, self.destination, PAGE_BYTES, imm=1)

    @property
    def work_requests(self) -> int:
        """Posted so far."""
        return int(self.engine.stats()["nics"][0]["work_requests"])

    def write_small(self) -> Transfer:
        return self.engine.write(self.region[:64], self.remote[:64], imm=1)


@contextmanager
def _loop(progress: Literal["adaptive", "spin"]) -> Iterator[_Loop]:
    with (
        SimulatedFabric(discard=True) as fabric,
        TransferEngine(nics=[fabric.nic("receiver")]) as receiver,
        TransferEngine(nics=[fabric.nic("sender")], progress=progress) as sender,
    ):
        yield _Loop(sender, receiver)


def page_rate(seconds: float) -> float:
    """Million page work requests a second: the median over slices of the time."""
    with _loop("adaptive") as loop:
        loop.write_pages().wait()
        rates = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start, posted = time.perf_counter(), loop.work_requests
            in_flight = [loop.write_pages() for _ in range(_IN_FLIGHT)]
            for _ in range(8):
                in_flight.pop(0).wait()
                in_flight.append(loop.write_pages())
            for transfer in in_flight:
                transfer.wait()
            elapsed = time.perf_counter() - start
            rates.append((loop.work_requests - posted) / elapsed / 1e6)
        return statistics.median(rates)


def call_cost(seconds: float) -> float:
    """Median time of one write_pages call until it returns, microseconds."""
    with _loop("adaptive") as loop:
        loop.write_pages().wait()
        times = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.perf_counter_ns()
            transfer = loop.write_pages()
            times.append((time.perf_counter_ns() - start) / 1e3)
            transfer.wait()
        return statistics.median(times)


def post_latency(seconds: float) -> tuple[float, float]:
    """p50 and p99 of submission to first post, ns, one write at a time, with a spinning worker."""
    with _loop("spin") as loop:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(64):
                loop.write_small().wait()
        samples = loop.engine.stats()["worker"]["post_latency_ns"]
        p50, p99 = np.percentile(samples, [50, 99])
        return float(p50), float(p99)


def idle_share(seconds: float, nics: tuple[str, ...] = ("tcp://127.0.0.1", "shm")) -> float:
    """Percent of a core that one engine uses which is connected and has nothing to do."""
    with TransferEngine(nics=nics) as a, TransferEngine(nics=nics) as b:
        peer = a.connect(b.address)
        time.sleep(0.3)
        cpu, wall = time.process_time(), time.monotonic()
        time.sleep(max(2.0, seconds))
        share = (time.process_time() - cpu) / (time.monotonic() - wall)
        if peer.state != "connected":
            raise RuntimeError("the connection was lost while idle")
        return 100 * share / 2


def measure(seconds: float = 1.0) -> EngineFigures:
    """All figures; takes about five times `seconds`."""
    p50, p99 = post_latency(seconds)
    return EngineFigures(
        page_mops=page_rate(seconds),
        call_us=call_cost(seconds),
        post_ns_p50=p50,
        post_ns_p99=p99,
        idle_percent=idle_share(seconds),
    )


def json_line(figures: EngineFigures) -> str:
    return msgspec.json.encode(figures).decode()


def table(figures: EngineFigures) -> Table:
    grid = Table(title=f"The engine on a NIC that completes at once ({os.cpu_count()} cores)", title_justify="left")
    grid.add_column("What")
    grid.add_column("Here", justify="right")
    grid.add_column("Target")
    values: dict[str, Any] = msgspec.structs.asdict(figures)
    for key, (title, target) in TARGETS.items():
        grid.add_row(title, f"{values[key]:.3g}" if values[key] < 100 else f"{values[key]:.0f}", target)
    return grid
