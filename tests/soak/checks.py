"""What the soak test holds against the library: contents that tell where they come from, waits that must end, and a
list of what was wrong."""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import sys
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]

GUARD = 0xA5  # in memory that is lent to nobody
REUSED = 0xEE  # in a source whose transfer has ended: no receiver may ever see it


def contents(tag: int, nbytes: int) -> Bytes:
    """Random bytes that only this tag has."""
    return np.frombuffer(np.random.default_rng(tag).bytes(nbytes), np.uint8)


class Violation(Exception):
    """The library broke a promise."""


class ActiveClock:
    """Seconds that this process was allowed to run: it is stopped now and then, and that is nobody's delay."""

    def __init__(self) -> None:
        self.now = 0.0
        self._last = time.monotonic()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            now = time.monotonic()
            self.now += min(now - self._last, 0.2)
            self._last = now


class Bench:
    """The clock, the counts and the complaints of one process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = ActiveClock()
        self.counts: dict[str, int] = {}
        self.violations: list[str] = []
        self._numbers = itertools.count(1)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def wrong(self, what: str) -> None:
        self.violations.append(what)
        print(f"VIOLATION in {self.name}: {what}", file=sys.stderr, flush=True)

    def number(self) -> int:
        return next(self._numbers)

    async def ends(self, awaitable: Awaitable[T], what: str, seconds: float) -> T:
        """Its result; raises Violation if it has not ended after so many active seconds."""
        task = asyncio.ensure_future(awaitable)
        begin = self.clock.now
        while not task.done():
            await asyncio.wait([task], timeout=0.5)
            if self.clock.now - begin > seconds and not task.done():
                task.cancel()
                faulthandler.dump_traceback(file=sys.stderr)  # what the threads are at
                raise Violation(f"{what} has not ended after {seconds:g} s: {awaitable!r}")
        return task.result()

    async def until(self, condition: Any, seconds: float) -> bool:
        begin = self.clock.now
        while not condition():
            if self.clock.now - begin > seconds:
                return False
            await asyncio.sleep(0.02)
        return True
