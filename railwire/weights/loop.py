"""One thread that does what it is given, in order, and knows one deadline: where a machine and its events live."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger("railwire.weights")

Task = Callable[[], object]


class Loop:
    """Args:
    on_deadline: called on the thread when the deadline has passed; there is none until one is set.
    """

    def __init__(self, name: str, on_deadline: Task) -> None:
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._on_deadline = on_deadline
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def soon(self, task: Task) -> None:
        """Runs it on the thread, after what was given before."""
        self._queue.put(task)

    def set_deadline(self, seconds: float | None) -> None:
        """On the thread only."""
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def close(self, timeout: float = 5.0) -> None:
        """What was given before is still done."""
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            try:
                task = self._queue.get(timeout=left)
            except queue.Empty:
                self._deadline = None
                task = self._on_deadline
            if task is None:
                return
            try:
                task()
            except Exception:
                log.exception("railwire.weights: an error in %s", self._thread.name)
