"""What a rank waits for, and for how long: one expectation for each arrival that the machine awaits, and its clock."""

from __future__ import annotations

import time
from collections.abc import Iterator

from railwire.errors import RailwireError
from railwire.moe.actions import Wait
from railwire.moe.wires import Wires
from railwire.transfer import Expectation

SLICE = 0.0002  # seconds that one wait may keep us from looking at the others
_MOST_EXCUSES = 20  # each is worth half a time-out
_WHAT = {Wait.HEADER: "its tokens", Wait.COMBINED: "its results"}

Key = tuple[Wait, int]


class Waiting:
    """Attributes: ``timeout``: seconds that a rank may give no sign."""

    def __init__(self, wires: Wires, timeout: float) -> None:
        self._wires = wires
        self.timeout = timeout
        self._pending: dict[Key, tuple[Expectation, float, int]] = {}
        self._excuses: dict[Key, int] = {}

    def __bool__(self) -> bool:
        return bool(self._pending)

    def watch(self, awaiting: set[Key], generation: int) -> None:
        """One expectation for everything that is awaited, and none for what no longer is."""
        for key in [key for key in self._pending if key not in awaiting]:
            self._pending.pop(key)[0].cancel()
        end = time.monotonic() + self.timeout
        for key in awaiting - self._pending.keys():
            wait, rank = key
            self._pending[key] = (self._wires.expect(wait, rank, generation), end, self._wires.beats(rank))

    def begin(self) -> None:
        """Excuses count anew."""
        self._excuses.clear()

    def ended(self) -> Iterator[tuple[Wait, int, RailwireError | None]]:
        """What has come, or failed. :meth:`watch` may be called in between."""
        for key in sorted(self._pending, key=lambda key: (key[0].value, key[1])):
            entry = self._pending.get(key)
            if entry is not None and entry[0].done():
                del self._pending[key]
                yield *key, entry[0].exception()

    def overdue(self, now: float) -> Iterator[tuple[int, str]]:
        """Ranks that are waited for too long, unless they have said since then that they wait themselves; and why."""
        for key, (expectation, end, beats) in list(self._pending.items()):
            if now < end or key not in self._pending or expectation.done():
                continue
            wait, rank = key
            seen = self._wires.beats(rank)
            excuses = self._excuses.get(key, 0)
            if seen != beats and excuses < _MOST_EXCUSES:
                self._excuses[key] = excuses + 1
                self._pending[key] = (expectation, now + self.timeout / 2, seen)
                continue
            what = _WHAT.get(wait, "its second round")
            yield rank, f"{what} did not come within {self.timeout * 1e3:.0f} ms"

    def pause(self, now: float, others: bool) -> None:
        """Waits for one of them, not for long. ``others``: there is more to look at."""
        keys = list(self._pending)
        left = min(end for _, end, _ in self._pending.values()) - now
        alone = len({wait for wait, _ in keys}) == 1 and keys[0][0] in (Wait.HEADER, Wait.COMBINED)
        limit = min(max(left, 0.0001), self.timeout / 4)
        if not alone or others:
            limit = min(limit, SLICE)
        try:
            self._pending[keys[0]][0].wait(limit)
        except (TimeoutError, RailwireError):
            pass  # looked at by the caller

    def drop(self) -> None:
        """Nothing is awaited any more."""
        for expectation, _, _ in self._pending.values():
            expectation.cancel()
        self._pending.clear()
