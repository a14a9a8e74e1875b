"""The compute thread of a prefill worker: one prompt after the other, chunk by chunk, each layer pushed as soon as it
is there."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from railwire.runner import BlockPool, OutOfBlocks, Runner
from railwire.serve.ranks import RankPushes

log = logging.getLogger("railwire.serve")


class Stopped(Exception):
    """The job was stopped; the text says why."""


class Job:
    """A prompt to be computed and pushed. Times are monotonic seconds; 0 for what has not been."""

    def __init__(self, request_id: str, tokens: list[int], push: RankPushes, deadline: float) -> None:
        self.request_id = request_id
        self.tokens = tokens
        self.count = len(tokens) - 1
        """Tokens whose KV is computed: all but the last."""
        self.push = push
        self.deadline = deadline
        self.blocks: list[int] = []
        self.cached = 0
        self.done = 0
        self.queued = time.monotonic()
        self.began = 0.0
        self.ended = 0.0
        self.computed: Future[None] = Future()
        """Ends when the thread touches neither the job nor its blocks any more. Fails with Stopped, or what the
        runner raised."""
        self.why_stopped = ""

    @property
    def left(self) -> int:
        """Tokens that still have to be computed."""
        return 0 if self.computed.done() else self.count - self.done


class PrefillQueue:
    """First come, first served; a stopped job ends at its next layer.

    Args:
        chunk: tokens computed at a time.
        max_waiting: jobs that may wait.
        block_timeout: seconds that a job waits for free blocks, once it is its turn.
    """

    def __init__(self, runner: Runner, pool: BlockPool, *, chunk: int, max_waiting: int, block_timeout: float) -> None:
        self._runner = runner
        self._pool = pool
        self._chunk = chunk
        self._max_waiting = max_waiting
        self._block_timeout = block_timeout
        self._waiting: deque[Job] = deque()
        self._condition = threading.Condition()
        self._closed = False
        self._present: Job | None = None
        self.busy_seconds = 0.0
        self.computed_tokens = 0
        self.cached_tokens = 0
        self._thread = threading.Thread(target=self._run, name="railwire-prefill", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, job: Job) -> bool:
        """False if too many are waiting."""
        with self._condition:
            if self._closed or len(self._waiting) >= self._max_waiting:
                return False
            self._waiting.append(job)
            self._condition.notify_all()
            return True

    def stop(self, job: Job, why: str) -> None:
        """Takes it out of the queue, or has it end at the next layer."""
        with self._condition:
            job.why_stopped = job.why_stopped or why
            if job in self._waiting:
                self._waiting.remove(job)
                job.computed.set_exception(Stopped(why))
            self._condition.notify_all()

    def blocks_are_free(self) -> None:
        """Somebody has given blocks back."""
        with self._condition:
            self._condition.notify_all()

    @property
    def queued_tokens(self) -> int:
        with self._condition:
            present = self._present
            return sum(job.left for job in self._waiting) + (present.left if present else 0)

    def close(self) -> None:
        with self._condition:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            if self._present is not None:
                self._present.why_stopped = self._present.why_stopped or "the prefiller is closing"
            self._condition.notify_all()
        for job in waiting:
            job.computed.set_exception(Stopped("the prefiller is closing"))
        if self._thread.ident is not None:
            self._thread.join(timeout=30.0)

    # ---- the thread --------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self._condition:
                self._present = None
                while not self._waiting and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                job = self._present = self._waiting.popleft()
            try:
                self._compute(job)
            except Stopped as stopped:
                job.computed.set_exception(stopped)
            except Exception as error:
                log.exception("railwire: prefill of request %s failed", job.request_id)
                job.computed.set_exception(error)
            else:
                job.computed.set_result(None)

    def _compute(self, job: Job) -> None:
        self._take_blocks(job)
        job.began = time.monotonic()
        job.push.append_blocks(job.blocks)
        job.done = job.cached
        self.cached_tokens += job.cached
        if job.cached == job.count:
            job.push.all_ready(job.count)
        try:
            for start in range(job.cached, job.count, self._chunk):
                end = min(job.count, start + self._chunk)
                self._runner.prefill(job.tokens, job.blocks, start, end, self._on_layer(job))
                job.done = end
                self.computed_tokens += end - start
            self._pool.commit(job.tokens[: job.count], job.blocks)
        finally:
            job.ended = time.monotonic()
            self.busy_seconds += job.ended - job.began

    def _on_layer(self, job: Job) -> Callable[[int, int], None]:
        def on_layer(layer: int, end: int) -> None:
            self._check(job)
            job.push.layer_ready(layer, end)

        return on_layer

    def _take_blocks(self, job: Job) -> None:
        """A known prefix and new blocks for the rest. While there are too few, those of other requests that are still
        being read will come back."""
        give_up = min(job.deadline, time.monotonic() + self._block_timeout)
        while True:
            self._check(job)
            hit = self._pool.lookup(job.tokens, limit=job.count)
            try:
                fresh = self._pool.allocate(self._pool.blocks_for(job.count) - len(hit.blocks))
            except OutOfBlocks as error:
                # Nothing is held while waiting: two that wait for each other's blocks would wait for ever.
                self._pool.free(hit.blocks)
                left = give_up - time.monotonic()
                if left <= 0:
                    raise Stopped(str(error)) from None
                with self._condition:
                    self._condition.wait(min(left, 0.1))
                continue
            job.blocks = hit.blocks + fresh
            job.cached = hit.tokens
            return

    @staticmethod
    def _check(job: Job) -> None:
        if job.why_stopped:
            raise Stopped(job.why_stopped)
        if job.push.failed:
            raise Stopped("the decoder wants it no more, or is lost")
        if time.monotonic() > job.deadline:
            raise Stopped("its time is over")
