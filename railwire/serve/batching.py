"""The compute thread of a decode worker: continuous batching. Sequences join and leave between any two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from railwire.kvcache.router.transport import Sampling
from railwire.runner import DecodeItem, Runner
from railwire.serve.sampling import choose

log = logging.getLogger("railwire.serve")


class BrokenKV(Exception):
    """The logits of a sequence are not finite."""


class Sequence:
    """One request from its last prompt token on.

    Args:
        token: the one to run next; its place is ``position``.
        blocks: by position, enough for ``position + max_tokens`` tokens.
        emit: called on the compute thread with each new token and the monotonic time.
    """

    def __init__(
        self,
        token: int,
        position: int,
        blocks: list[int],
        max_tokens: int,
        stop_tokens: frozenset[int],
        sampling: Sampling,
        emit: Callable[[int, float], None],
    ) -> None:
        self.token = token
        self.position = position
        self.blocks = blocks
        self.left = max_tokens
        self.stop_tokens = stop_tokens
        self.sampling = sampling
        self.emit = emit
        self.stopped = False
        self.finished: Future[str] = Future()
        """Why it ended ("stop", "length", "stopped"); from then on the thread touches its blocks no more."""


class DecodeLoop:
    """Args:
    max_batch: sequences per step; others wait in order.
    """

    def __init__(self, runner: Runner, *, max_batch: int) -> None:
        self._runner = runner
        self._max_batch = max_batch
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []
        self._condition = threading.Condition()
        self._closed = False
        self.steps = 0
        self.tokens = 0
        self.busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="railwire-decode", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, sequence: Sequence) -> None:
        with self._condition:
            if self._closed:
                sequence.finished.set_result("stopped")
                return
            self._waiting.append(sequence)
            self._condition.notify()

    def stop(self, sequence: Sequence) -> None:
        """Ends it before its next step; ``sequence.finished`` says when."""
        with self._condition:
            sequence.stopped = True
            if sequence in self._waiting:
                self._waiting.remove(sequence)
                sequence.finished.set_result("stopped")

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout=30.0)
        for sequence in [*self._waiting, *self._active]:
            if not sequence.finished.done():
                sequence.finished.set_result("stopped")

    # ---- the thread --------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting and not self._active and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                while self._waiting and len(self._active) < self._max_batch:
                    self._active.append(self._waiting.popleft())
            self._drop_stopped()
            if self._active:
                self._step()

    def _drop_stopped(self) -> None:
        for sequence in self._active:
            if sequence.stopped:
                sequence.finished.set_result("stopped")
        self._active = [sequence for sequence in self._active if not sequence.stopped]

    def _step(self) -> None:
        batch = self._active
        began = time.monotonic()
        try:
            logits = self._runner.decode([DecodeItem(s.token, s.position, s.blocks) for s in batch])
        except Exception as error:
            log.exception("railwire: a decode step of %d sequences failed", len(batch))
            for sequence in batch:
                sequence.finished.set_exception(error)
            self._active = []
            return
        now = time.monotonic()
        self.steps += 1
        self.busy_seconds += now - began
        going_on = []
        for row, sequence in zip(logits, batch, strict=True):
            try:
                token = choose(row, sequence.sampling, sequence.position)
            except ValueError as error:
                sequence.finished.set_exception(BrokenKV(str(error)))
                continue
            if token in sequence.stop_tokens:
                sequence.finished.set_result("stop")
                continue
            self.tokens += 1
            sequence.emit(token, now)
            sequence.left -= 1
            sequence.token = token
            sequence.position += 1
            if sequence.left == 0:
                sequence.finished.set_result("length")
            else:
                going_on.append(sequence)
        self._active = going_on
