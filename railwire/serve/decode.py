"""The decode worker: fetches the KV of prompts from prefill workers, and generates."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram

from railwire.errors import ClosedError, RailwireError
from railwire.kvcache.errors import TicketError
from railwire.kvcache.geometry.layout import LayoutError
from railwire.kvcache.link import Link
from railwire.kvcache.router.membership import Member, Role
from railwire.kvcache.router.registry import open_membership
from railwire.kvcache.router.transport import Sampling
from railwire.kvcache.slots import SlotsExhausted
from railwire.runner import OutOfBlocks
from railwire.serve.batching import BrokenKV, DecodeLoop, Sequence
from railwire.serve.config import WorkerConfig
from railwire.serve.legs import DecodeBody, LegError, Prefiller, check, clock, read_body
from railwire.serve.process import new_registry, serve
from railwire.serve.ranks import RankTickets, ReceiverRanks, partial_tickets
from railwire.serve.worker import Worker

_ALIVE_SECONDS = 2.0
_AT_ONCE_SECONDS = 0.1  # whoever waits longer for blocks stands in a queue
_LOOK_SECONDS = 1.0  # between looks whether whom a queued request was announced to is still connected
_WRITE_SECONDS = 30.0

Event = dict[str, Any]


class Job:
    """One leg."""

    def __init__(self, body: DecodeBody) -> None:
        self.body = body
        self.count = len(body.tokens) - 1
        """Tokens whose KV must be here before the first step: all but the last."""
        self.began = time.monotonic()
        self.deadline = self.began + body.timeout
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.blocks: list[int] = []
        self.cached = 0
        self.links: list[Link] | None = None
        """To the prefiller, while it has been told that a ticket follows."""
        self.tickets: RankTickets | None = None
        self.sequence: Sequence | None = None
        self.first_token = 0.0

    def tell(self, event: str, **info: Any) -> None:
        self.events.put_nowait({"event": event, "t": time.monotonic(), **info})


class DecodeWorker(Worker):
    """A :class:`~railwire.serve.process.Service`."""

    role: Role = "decode"

    def __init__(self, config: WorkerConfig, registry: CollectorRegistry) -> None:
        super().__init__(config)
        self.ranks = ReceiverRanks(config, self.runner)
        self.loop = DecodeLoop(self.runner, max_batch=config.max_batch)
        self._running: dict[asyncio.Task[None], Job] = {}
        self._releasing: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._measure(registry)

    def _measure(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "railwire_decode_requests", "Decode legs by how they ended.", ["outcome"], registry=registry
        )
        self._bytes = Counter("railwire_decode_received_bytes", "Bytes of KV that have arrived.", registry=registry)
        self._cached = Counter("railwire_decode_cached_tokens", "Prompt tokens whose KV was here.", registry=registry)
        buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
        self._ticket_seconds = Histogram(
            "railwire_decode_ticket_seconds", "From a ticket to its last page.", buckets=buckets, registry=registry
        )
        self._ttft = Histogram(
            "railwire_decode_first_token_seconds", "From a leg to its first token.", buckets=buckets, registry=registry
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "railwire_decode_active": ("Legs that have not ended.", lambda: len(self._running)),
            "railwire_decode_batch": ("Sequences in the batch.", lambda: self.loop.active),
            "railwire_decode_waiting": ("Sequences that wait for a place in the batch.", lambda: self.loop.waiting),
            "railwire_decode_tickets": ("Tickets whose pages may be written.", lambda: self.ranks.open_tickets),
            "railwire_decode_tokens": ("Tokens generated.", lambda: self.loop.tokens),
            "railwire_decode_steps": ("Steps of the batch.", lambda: self.loop.steps),
        }
        self.measure(registry, gauges, self.ranks.engines)

    # ---- the service -------------------------------------------------------------------------------------------------
    def routes(self) -> list[web.RouteDef]:
        return [web.post("/decode", self.decode)]

    def member(self, url: str) -> Member:
        return self.record(url, self.ranks.engines[0])

    async def start(self) -> None:
        self.loop.start()

    def health(self) -> dict[str, Any]:
        return self.report(active=len(self._running), open_tickets=self.ranks.open_tickets)

    async def drain(self, timeout: float) -> None:
        if self._running:
            await asyncio.wait(list(self._running), timeout=timeout)
        for task, job in list(self._running.items()):
            job.tell("failed", message="the decoder is shutting down", blame="decoder", busy=True)
            task.cancel()
        left = [*self._running, *self._releasing]
        if left:
            await asyncio.wait(left, timeout=3 * self.config.liveness)

    async def close(self) -> None:
        await asyncio.to_thread(self.loop.close)
        if self._releasing:
            await asyncio.wait(list(self._releasing), timeout=self.config.liveness)
        await asyncio.to_thread(self.ranks.close)

    # ---- a leg -------------------------------------------------------------------------------------------------------
    async def decode(self, request: web.Request) -> web.StreamResponse:
        """Streams events, one JSON object per line; the last is "end" or "failed"."""
        try:
            body = await read_body(request, DecodeBody)
            check(self.runner, self.id, self.draining, "decoder", body, max(0, body.max_tokens - 1))
            if body.max_tokens < 1:
                raise LegError("max_tokens is at least 1", blame="request", status=400)
            if len(self._running) >= self.config.max_batch + self.config.max_waiting:
                raise LegError("too many requests wait here", blame="decoder", busy=True, status=503)
        except LegError as error:
            self._requests.labels("refused").inc()
            return error.response()
        job = Job(body)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        task = asyncio.create_task(self._run(job))
        self._running[task] = job
        task.add_done_callback(lambda done: self._ended(done, job))
        try:
            await response.prepare(request)
            while True:
                try:
                    event = await asyncio.wait_for(job.events.get(), _ALIVE_SECONDS)
                except asyncio.TimeoutError:
                    event = {"event": "alive"}
                if event is None:
                    break
                line = msgspec.json.encode(event) + b"\n"
                await asyncio.wait_for(response.write(line), _WRITE_SECONDS)
            await response.write_eof()
        except (ConnectionError, asyncio.TimeoutError):
            pass  # nobody reads any more
        finally:
            task.cancel()  # nothing, if it has ended
        return response

    def _ended(self, task: asyncio.Task[None], job: Job) -> None:
        self._running.pop(task, None)
        job.events.put_nowait(None)
        release = asyncio.create_task(self._release(job))
        self._releasing.add(release)
        release.add_done_callback(self._releasing.discard)

    async def _run(self, job: Job) -> None:
        outcome = "failed"
        try:
            await self._queue(job)
            need = job.cached < job.count
            self._cached.inc(job.cached)
            job.tell("accepted", cached_tokens=job.cached, need_prefill=need, clock=clock())
            if need:
                await self._fetch(job)
                self.pool.commit(job.body.tokens[: job.count], job.blocks)
            else:
                self._let_go(job)
            reason = await self._generate(job)
            job.tell("end", reason=reason)
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except LegError as error:
            job.tell("failed", **error.body)
        finally:
            self._requests.labels(outcome).inc()

    async def _queue(self, job: Job) -> None:
        """Waits for blocks for the prompt and the whole answer: once it runs, a sequence never waits for memory. A
        prefiller whose work would wait here for long is told so: it then keeps the pages."""
        taking = asyncio.create_task(self._take_in_turn(job))
        try:
            await asyncio.wait([taking], timeout=_AT_ONCE_SECONDS)
            while not taking.done() and (left := job.deadline - time.monotonic()) > 0:
                # An announcement is worth as much as the connection that it went over.
                if job.links is None or not all(link.connected for link in job.links):
                    await self._announce(job)
                await asyncio.wait([taking], timeout=min(left, _LOOK_SECONDS))
            if not taking.done():
                raise LegError("its time was over before there were free KV blocks", blame="decoder", busy=True)
            taking.result()
        finally:
            if not taking.done():
                taking.cancel()
                await asyncio.gather(taking, return_exceptions=True)

    async def _announce(self, job: Job) -> None:
        if job.body.prefiller is None:
            return
        with contextlib.suppress(RailwireError):  # its ticket will say so, too
            job.links = await self.ranks.connect(job.body.prefiller.ranks, 2 * self.config.liveness)
            self.ranks.announce(job.links, job.body.request_id)

    async def _take_in_turn(self, job: Job) -> None:
        async with self._turn:  # first come, first served: a large one is not passed by small ones for ever
            while True:
                self._freed.clear()
                hit = self.pool.lookup(job.body.tokens, limit=job.count)
                try:
                    needed = self.pool.blocks_for(job.count + job.body.max_tokens)
                    fresh = self.pool.allocate(needed - len(hit.blocks))
                except OutOfBlocks:
                    self.pool.free(hit.blocks)
                    await self._freed.wait()
                    continue
                job.blocks, job.cached = hit.blocks + fresh, hit.tokens
                return

    async def _fetch(self, job: Job) -> None:
        prefiller = job.body.prefiller
        if prefiller is None:
            raise LegError("there is something to prefill, but no prefiller is named", blame="request")
        try:
            await self._await_pages(job, prefiller)
        except TicketError as error:
            raise LegError(str(error), blame="prefiller") from error
        except LayoutError as error:
            raise LegError(f"prefiller {prefiller.instance}: {error}", blame="pair") from error
        except SlotsExhausted as error:
            raise LegError(str(error), blame="decoder", busy=True) from error
        except ClosedError as error:
            raise LegError(str(error), blame="decoder") from error
        except RailwireError as error:
            job.tickets = job.tickets or partial_tickets(error)
            raise LegError(f"prefiller {prefiller.instance}: {error}", blame="prefiller") from error

    async def _await_pages(self, job: Job, prefiller: Prefiller) -> None:
        links = await self.ranks.connect(prefiller.ranks, 2 * self.config.liveness)
        left = max(0.001, job.deadline - time.monotonic())
        body = job.body
        job.tickets = self.ranks.prepare(links, body.request_id, job.blocks, job.cached, job.count, left)
        job.links = None
        job.tell("ticket", first_token=job.cached, tokens=job.count)
        seconds, nbytes = await job.tickets.arrived()
        self._bytes.inc(nbytes)
        self._ticket_seconds.observe(seconds)
        job.tell("arrived", seconds=seconds, bytes=nbytes)

    async def _generate(self, job: Job) -> str:
        loop = asyncio.get_running_loop()
        body = job.body

        def told(token: int, when: float) -> None:
            if not job.first_token:
                job.first_token = when
                self._ttft.observe(when - job.began)
            job.events.put_nowait({"event": "token", "t": when, "token": token})

        def emit(token: int, when: float) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(told, token, when)

        job.sequence = Sequence(
            body.tokens[-1],
            job.count,
            job.blocks,
            body.max_tokens,
            frozenset(body.stop_tokens),
            Sampling(body.temperature, body.top_p, body.seed),
            emit,
        )
        self.loop.add(job.sequence)
        left = max(0.001, job.deadline - time.monotonic())
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(job.sequence.finished)), left)
        except asyncio.TimeoutError:
            raise LegError("its time is over", blame="decoder") from None
        except BrokenKV as error:
            # Whoever finds these pages by their prefix would get the same.
            self.pool.forget(job.blocks)
            raise LegError(f"request {body.request_id}: {error}", blame="prefiller") from error
        except Exception as error:
            raise LegError(f"request {body.request_id}: {type(error).__name__}: {error}", blame="decoder") from error

    def _let_go(self, job: Job) -> None:
        """Of the prefiller that has been told that a ticket follows: none does."""
        if job.links is not None:
            self.ranks.decline(job.links, job.body.request_id, "the decoder does not need it")
            job.links = None

    async def _release(self, job: Job) -> None:
        """Gives the blocks back when neither our own thread nor a NIC can touch them any more."""
        if job.sequence is not None:
            self.loop.stop(job.sequence)
            await asyncio.gather(asyncio.wrap_future(job.sequence.finished), return_exceptions=True)
        self._let_go(job)
        if job.tickets is not None:
            job.tickets.cancel("the request has ended")
            await job.tickets.reusable()
        self.pool.free(job.blocks)
        self._freed.set()


async def main(config: WorkerConfig) -> None:
    """Runs a decode worker until SIGTERM."""
    registry = new_registry()
    membership = open_membership(config.membership, secret=config.secret)
    await serve(config, DecodeWorker(config, registry), membership, registry)
