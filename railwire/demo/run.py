"""The play: two prefillers answer, one of them is killed while it computes, a third joins and takes its share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from railwire.demo import oracle
from railwire.demo.client import Client
from railwire.demo.cluster import Cluster, Failed
from railwire.demo.record import Record, Request, Worker

_LOOK_SECONDS = 0.02
_INTO_SECONDS = 0.15
_KILL_PATIENCE = 20.0


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        runner, model, options: of all processes.
        nics: of the workers' engines; empty: automatic.
        max_tokens: of each answer.
        concurrency: requests under way at a time.
        request_timeout: seconds.
        busy_tokens: prompt tokens that a prefiller must still have to compute for it to be killed.
    """

    prompts: Sequence[str]
    runner: str = "reference"
    model: str = "smollm2"
    options: dict[str, Any] = field(default_factory=dict)
    nics: Sequence[str] = ()
    max_tokens: int = 24
    concurrency: int = 6
    request_timeout: float = 60.0
    busy_tokens: int = 200


def read_prompts(text: str) -> list[str]:
    """Prompts are separated by lines of three dashes."""
    pieces = [piece.strip("\n") for piece in f"\n{text}\n".split("\n---\n")]
    return [piece for piece in pieces if piece.strip()]


class Demo:
    """One run.

    Args:
        tell: called with a headline whenever something new can be shown.
    """

    def __init__(self, plan: Plan, tell: Callable[[str], None]) -> None:
        if len(plan.prompts) < 6:
            raise Failed(f"the demo needs at least six prompts, not {len(plan.prompts)}")
        self.plan = plan
        self.record = Record(plan.model, requests=[Request(i, prompt) for i, prompt in enumerate(plan.prompts)])
        self.warnings: list[str] = []
        self._headline = ""
        self._show = tell

    async def run(self) -> Record:
        """Runs everything; failures of single requests are in the record.

        Raises:
            Failed: the processes could not be run.
        """
        plan = self.plan
        cluster = Cluster(runner=plan.runner, model=plan.model, options=plan.options, nics=plan.nics)
        self.record.workers = cluster.workers
        async with cluster:
            # Together: the single process computes on one core while the others start on the other one.
            self._say("Starting a router, two prefillers and a decoder; computing the answers of a single process")
            expected = asyncio.create_task(self._expected(cluster))
            try:
                first = await self._start(cluster)
                await expected
            finally:
                expected.cancel()
                await asyncio.gather(expected, return_exceptions=True)
            client = Client(
                cluster.router_url,
                plan.model,
                max_tokens=plan.max_tokens,
                concurrency=plan.concurrency,
                timeout=plan.request_timeout,
                tell=self._tell,
            )
            async with client, _watched(cluster):
                self.record.began = time.monotonic()
                await self._acts(cluster, client, first)
                self.record.ended = time.monotonic()
            self._say("Done; the processes stop")
        return self.record

    async def _expected(self, cluster: Cluster) -> None:
        plan = self.plan
        job = oracle.Job(plan.runner, plan.model, plan.options, list(plan.prompts), plan.max_tokens)
        async for answer in oracle.answers(job, cluster.process("single process")):
            self.record.requests[answer.index].expected = answer.tokens
            self._tell()

    async def _start(self, cluster: Cluster) -> list[Worker]:
        await cluster.start("router", "router")
        names = [("decode", "decode"), ("prefill", "prefill-1"), ("prefill", "prefill-2")]
        workers = await asyncio.gather(*(cluster.start(role, name) for role, name in names))
        await cluster.joined(workers)
        return [worker for worker in workers if worker.role == "prefill"]

    async def _acts(self, cluster: Cluster, client: Client, prefillers: list[Worker]) -> None:
        requests = self.record.requests
        third = len(requests) // 3
        self._say("Two prefillers answer")
        # Requests of the last third wait for the newcomer, so that there is something left for it to do.
        sending = [asyncio.create_task(client.send_all(requests[: 2 * third]))]
        try:
            victim = await self._busy(cluster, prefillers, sending[0], third // 2)
            await cluster.kill(victim)
            self._say(f"{victim.name} has been killed in the middle of its work; prefill-3 is starting")
            joiner = await cluster.start("prefill", "prefill-3")
            await cluster.joined([joiner])
            self._say("prefill-3 has joined")
            sending.append(asyncio.create_task(client.send_all(requests[2 * third :])))
            await asyncio.gather(*sending)
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    async def _busy(
        self, cluster: Cluster, prefillers: list[Worker], sending: asyncio.Task[None], answered: int
    ) -> Worker:
        """The first prefiller that is seen in the middle of enough work, once so many requests have been answered."""
        while not sending.done() and sum(bool(request.ended) for request in self.record.requests) < answered:
            await asyncio.sleep(_LOOK_SECONDS)
        end = time.monotonic() + _KILL_PATIENCE
        while not sending.done() and time.monotonic() < end:
            for worker in prefillers:
                if await self._has_work(cluster, worker):
                    await asyncio.sleep(_INTO_SECONDS)  # until it is computing
                    if await self._has_work(cluster, worker):
                        return worker
            await asyncio.sleep(_LOOK_SECONDS)
        self.warnings.append("no prefiller was seen at work for long enough: the one that was killed was idle")
        return prefillers[0]

    async def _has_work(self, cluster: Cluster, worker: Worker) -> bool:
        return int((await cluster.health(worker)).get("queued_tokens", 0)) >= self.plan.busy_tokens

    def _say(self, headline: str) -> None:
        self._headline = headline
        self._tell()

    def _tell(self) -> None:
        self._show(self._headline)


@asynccontextmanager
async def _watched(cluster: Cluster) -> AsyncGenerator[None, None]:
    """Interrupts its body with Failed when a process ends that should not."""
    body = asyncio.current_task()
    assert body is not None
    failure: list[Failed] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.2)
            try:
                cluster.check()
            except Failed as error:
                failure.append(error)
                body.cancel()
                return

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if failure:
            raise failure[0] from None
        raise
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
