"""The prefill worker: computes the KV of prompts, and pushes it to the decoders that come with tickets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram

from railwire.errors import RailwireError
from railwire.kvcache.errors import PushAborted
from railwire.kvcache.router.membership import Member, Role
from railwire.kvcache.router.registry import open_membership
from railwire.serve.config import WorkerConfig
from railwire.serve.legs import LegError, PrefillBody, check, clock, read_body
from railwire.serve.prefill_queue import Job, PrefillQueue, Stopped
from railwire.serve.process import new_registry, serve
from railwire.serve.ranks import SenderRanks
from railwire.serve.worker import Worker


class PrefillWorker(Worker):
    """A :class:`~railwire.serve.process.Service`."""

    role: Role = "prefill"

    def __init__(self, config: WorkerConfig, registry: CollectorRegistry) -> None:
        super().__init__(config)
        self.ranks = SenderRanks(config, self.runner, self.id)
        self.queue = PrefillQueue(
            self.runner,
            self.pool,
            chunk=config.chunk,
            max_waiting=config.max_waiting,
            block_timeout=config.block_timeout,
        )
        self._running: dict[asyncio.Task[dict[str, Any]], Job] = {}
        self._measure(registry)

    def _measure(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "railwire_prefill_requests", "Prefill legs by how they ended.", ["outcome"], registry=registry
        )
        self._seconds = Histogram("railwire_prefill_seconds", "Seconds of computing, per leg.", registry=registry)
        self._bytes = Counter("railwire_prefill_pushed_bytes", "Bytes of KV pushed to decoders.", registry=registry)
        self._hidden = Histogram(
            "railwire_prefill_hidden_ratio",
            "Share of a leg's bytes that had landed before its computing ended.",
            buckets=[0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0],
            registry=registry,
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "railwire_prefill_active": ("Legs that have not ended.", lambda: len(self._running)),
            "railwire_prefill_queued_tokens": ("Tokens still to be computed.", lambda: self.queue.queued_tokens),
            "railwire_prefill_computed_tokens": ("Prompt tokens computed.", lambda: self.queue.computed_tokens),
            "railwire_prefill_cached_tokens": ("Prompt tokens found in the cache.", lambda: self.queue.cached_tokens),
        }
        self.measure(registry, gauges, self.ranks.engines)

    # ---- the service -------------------------------------------------------------------------------------------------
    def routes(self) -> list[web.RouteDef]:
        return [web.post("/prefill", self.prefill)]

    def member(self, url: str) -> Member:
        return self.record(url, self.ranks.engines[0], self.ranks.descriptors, self.queue.queued_tokens)

    async def start(self) -> None:
        self.queue.start()

    def health(self) -> dict[str, Any]:
        return self.report(active=len(self._running), queued_tokens=self.queue.queued_tokens)

    async def drain(self, timeout: float) -> None:
        if self._running:
            await asyncio.wait(list(self._running), timeout=timeout)
        for job in list(self._running.values()):
            self._stop(job, "the prefiller is shutting down")
        if self._running:
            await asyncio.wait(list(self._running), timeout=3 * self.config.liveness)

    async def close(self) -> None:
        await asyncio.to_thread(self.queue.close)
        await asyncio.to_thread(self.ranks.close)

    # ---- a leg -------------------------------------------------------------------------------------------------------
    async def prefill(self, request: web.Request) -> web.Response:
        """Ends when everything has been pushed and the blocks are free again."""
        body: PrefillBody | None = None
        try:
            body = await read_body(request, PrefillBody)
            check(self.runner, self.id, self.draining, "prefiller", body, 0)
            if len(body.tokens) < 2:
                raise LegError("a prompt of one token has nothing to prefill", blame="request", status=400)
            job = self._accept(body)
        except LegError as error:
            if body is not None and error.status != 409:  # 409: another life of ours, or a request that is running
                # Whoever waits for it with a ticket learns it at once.
                self.ranks.refuse(body.request_id, str(error))
            self._requests.labels("refused").inc()
            return error.response()
        task = asyncio.create_task(self._run(job))
        self._running[task] = job
        task.add_done_callback(lambda done: self._running.pop(done, None))
        try:
            return web.json_response(await asyncio.shield(task))
        except asyncio.CancelledError:
            self._stop(job, "the router hung up")
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        except LegError as error:
            return error.response()

    def _accept(self, body: PrefillBody) -> Job:
        try:
            push = self.ranks.open(body.request_id, len(body.tokens) - 1)
        except (ValueError, RailwireError) as error:
            raise LegError(str(error), blame="prefiller", status=409) from error
        job = Job(body.request_id, body.tokens, push, time.monotonic() + body.timeout)
        if not self.queue.add(job):
            push.abort("the prefiller's queue is full")
            raise LegError("the prefiller's queue is full", blame="prefiller", busy=True, status=503)
        push.on_done(lambda: self.queue.stop(job, "the push has failed") if push.failed else None)
        return job

    def _stop(self, job: Job, why: str) -> None:
        self.queue.stop(job, why)
        job.push.abort(why)

    async def _run(self, job: Job) -> dict[str, Any]:
        try:
            failure: BaseException | None = None
            try:
                await asyncio.wrap_future(job.computed)
            except Exception as error:
                failure = error
                job.push.abort(str(error))
            # Not before the NICs have let go of the source pages.
            push_failure = await job.push.drained()
        finally:
            self.pool.free(job.blocks)
            self.queue.blocks_are_free()
        self._bytes.inc(job.push.nbytes)
        if push_failure is not None and not isinstance(push_failure, PushAborted):
            self._requests.labels("push_failed").inc()
            raise LegError(str(push_failure), blame="decoder")
        if failure is not None or push_failure is not None:
            self._requests.labels("stopped" if isinstance(failure, Stopped) else "failed").inc()
            raise LegError(f"prefill of {job.request_id}: {failure or push_failure}", blame="prefiller")
        timeline = job.push.timeline(job.ended)
        self._requests.labels("ok").inc()
        self._seconds.observe(job.ended - job.began)
        self._hidden.observe(timeline["hidden"])
        return {
            "request_id": job.request_id,
            "tokens": job.count,
            "cached_tokens": job.cached,
            "queued": job.queued,
            "began": job.began,
            "ended": job.ended,
            "pushed": time.monotonic(),
            "bytes": job.push.nbytes,
            **timeline,
            "clock": clock(),
        }


async def main(config: WorkerConfig) -> None:
    """Runs a prefill worker until SIGTERM."""
    registry = new_registry()
    membership = open_membership(config.membership, secret=config.secret)
    await serve(config, PrefillWorker(config, registry), membership, registry)
