"""Which work is measured: the default sweep, and single scenarios from the command line's options."""

from __future__ import annotations

import msgspec

from railwire.bench.work import Work

KIB = 1024
MIB = 1024 * KIB
BUFFER_BYTES = 64 * MIB

_ONE_PAGE_OPS = ("write", "read", "send", "pingpong")


class Scenario(msgspec.Struct, frozen=True):
    """One row of the table. `pages` per round, `window` rounds in flight, `rounds` 0: as many as fill the time."""

    op: str
    page_bytes: int
    pages: int = 1
    window: int = 1
    pattern: str = "random"
    rounds: int = 0

    def work(self, rounds: int | None = None, buffer_bytes: int = BUFFER_BYTES) -> Work:
        return Work(
            op=self.op,
            page_bytes=self.page_bytes,
            pages=self.pages,
            rounds=rounds or self.rounds or 1,
            window=self.window,
            pattern=self.pattern,
            buffer_bytes=buffer_bytes,
        )

    @property
    def latency(self) -> bool:
        """Whether the row is about one operation at a time, so that its time matters and its rate does not."""
        return self.op == "pingpong" or self.window * self.pages == 1

    @property
    def title(self) -> str:
        size = format_bytes(self.page_bytes)
        if self.op == "pingpong":
            return f"{size} write, seen by the receiver's counter"
        if self.latency:
            return f"{size} {self.op}, to its completion"
        if self.op in _ONE_PAGE_OPS:
            return f"{size} {self.op}s"
        if self.op == "scatter":
            return f"{size} scatter targets"
        return f"{size} pages, {self.pattern}"


def format_bytes(nbytes: int) -> str:
    for unit, size in (("MiB", MIB), ("KiB", KIB)):
        if nbytes >= size and nbytes % size == 0:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"


SWEEP: tuple[Scenario, ...] = (
    Scenario("pages", 1 * KIB, pages=4096, window=4),
    Scenario("pages", 8 * KIB, pages=1024, window=4),
    Scenario("pages", 64 * KIB, pages=256, window=4),
    Scenario("pages", 1 * KIB, pages=4096, window=4, pattern="contiguous"),
    Scenario("write", 1 * MIB, window=16),
    Scenario("write", 16 * MIB, window=4),
    Scenario("write", 64, window=1),
    Scenario("pingpong", 64, window=1),
)

GPU_BUFFER_BYTES = 256 * MIB
GPU_SWEEP: tuple[Scenario, ...] = (
    Scenario("pages", 4 * KIB, pages=8192, window=2),
    Scenario("pages", 32 * KIB, pages=2048, window=2),
    Scenario("pages", 128 * KIB, pages=512, window=2),
    Scenario("pages", 1 * MIB, pages=64, window=2),
    Scenario("write", 16 * MIB, window=4),
    Scenario("write", 64, window=1),
    Scenario("pingpong", 64, window=1),
)


def single(
    op: str,
    page_bytes: int | None = None,
    pages: int | None = None,
    rounds: int = 0,
    pattern: str = "random",
    window: int | None = None,
) -> Scenario:
    """A scenario from what the user gave; the rest is chosen to keep about 16 MiB in flight.

    Raises ValueError for what cannot be measured.
    """
    size = page_bytes or {"pages": 64 * KIB, "scatter": 8 * KIB, "send": 8 * KIB, "pingpong": 64}.get(op, MIB)
    if op in _ONE_PAGE_OPS:
        if pages not in (None, 1):
            raise ValueError(f"a round of {op} is one page; --window says how many are in flight")
        count = 1
        in_flight = 1 if op == "pingpong" else max(1, min(64, 16 * MIB // size))
    else:
        count = pages or max(1, min(4096, 16 * MIB // size))
        in_flight = 4 if op == "pages" else 2
    scenario = Scenario(op, size, count, window or in_flight, pattern, rounds)
    scenario.work()  # checks it
    return scenario
