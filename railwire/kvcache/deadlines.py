"""One thread that calls functions at their time: what bounds every wait of a receiver or sender."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger("railwire.kvcache")


class Deadline:
    """A call to come. :meth:`cancel` is for when it is not needed any more."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], object]) -> None:
        self._call: Callable[[], object] | None = call

    def cancel(self) -> None:
        self._call = None

    def _run(self) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        try:
            call()
        except Exception:  # our own code: the others still get their turn
            log.exception("railwire: exception at a deadline")


def cancel(deadline: Deadline | None) -> None:
    """As ``deadline.cancel()``, where there may be none."""
    if deadline is not None:
        deadline.cancel()


class Deadlines:
    """Calls run one after the other, on a daemon thread that lives until :meth:`close`."""

    def __init__(self, name: str) -> None:
        self._condition = threading.Condition()
        self._heap: list[tuple[float, int, Deadline]] = []
        self._order = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def after(self, seconds: float, call: Callable[[], object]) -> Deadline:
        """Calls ``call()`` in ``seconds``, unless it is cancelled or the clock is closed before."""
        deadline = Deadline(call)
        with self._condition:
            heapq.heappush(self._heap, (time.monotonic() + seconds, next(self._order), deadline))
            if self._heap[0][2] is deadline:
                self._condition.notify()
        return deadline

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._heap.clear()
            self._condition.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._heap and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                wait = self._heap[0][0] - time.monotonic()
                if wait > 0 and self._heap[0][2]._call is not None:
                    self._condition.wait(wait)
                    continue
                deadline = heapq.heappop(self._heap)[2]
            deadline._run()
