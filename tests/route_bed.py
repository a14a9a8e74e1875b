"""A router with workers that are only pretended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from railwire.kvcache.router import (
    DecodeEvent,
    DecodeLeg,
    InMemoryMembership,
    Member,
    PrefillLeg,
    RouteEvent,
    Router,
    RouteRequest,
)


def member(name: str, role: str, **more: Any) -> Member:
    settings: dict[str, Any] = {
        "url": f"http://{name}",
        "model": "m",
        "fingerprint": "f",
        "block_tokens": 4,
        "num_blocks": 64,
        "context": 1000,
        "vocab": 100,
        **more,
    }
    return Member(id=name, role=role, **settings)  # type: ignore[arg-type]


class FakeWorkers:
    """A transport. The KV of an attempt "arrives" when its prefiller has ended; a token is 1 + the sum of what is
    before it, modulo 97, so a wrong continuation shows."""

    def __init__(self) -> None:
        self.prefills: list[tuple[str, str]] = []
        self.decodes: list[tuple[str, str]] = []
        self.cancelled: list[tuple[str, str]] = []
        self.ended: list[tuple[str, str]] = []
        self.arrived: dict[str, asyncio.Event] = {}
        self.on_prefill: Callable[[Member, PrefillLeg], Awaitable[None]] | None = None
        self.on_token: Callable[[Member, DecodeLeg, int], Awaitable[None]] | None = None
        self.on_decode: Callable[[Member, DecodeLeg], Awaitable[None]] | None = None
        self.has_prefix = False

    def kv(self, request_id: str) -> asyncio.Event:
        return self.arrived.setdefault(request_id, asyncio.Event())

    async def prefill(self, where: Member, leg: PrefillLeg) -> dict[str, Any]:
        self.prefills.append((where.id, leg.request_id))
        try:
            if self.on_prefill is not None:
                await self.on_prefill(where, leg)
            self.kv(leg.request_id).set()
            self.ended.append((where.id, leg.request_id))
            return {"cached_tokens": 0}
        except asyncio.CancelledError:
            self.cancelled.append((where.id, leg.request_id))
            raise

    async def decode(self, where: Member, leg: DecodeLeg) -> AsyncGenerator[DecodeEvent, None]:
        self.decodes.append((where.id, leg.request_id))
        try:
            if self.on_decode is not None:
                await self.on_decode(where, leg)
            need = len(leg.tokens) > 1 and not self.has_prefix
            yield DecodeEvent("accepted", info={"need_prefill": need})
            if need:
                await self.kv(leg.request_id).wait()
                yield DecodeEvent("arrived")
            sequence = list(leg.tokens)
            for index in range(leg.max_tokens):
                if self.on_token is not None:
                    await self.on_token(where, leg, index)
                sequence.append((1 + sum(sequence)) % 97)
                yield DecodeEvent("token", sequence[-1])
            yield DecodeEvent("end", info={"reason": "length"})
            self.ended.append((where.id, leg.request_id))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append((where.id, leg.request_id))
            raise


def expected(tokens: tuple[int, ...], count: int) -> list[int]:
    sequence = list(tokens)
    for _ in range(count):
        sequence.append((1 + sum(sequence)) % 97)
    return sequence[len(tokens) :]


PROMPT = tuple(range(1, 11))


def request(name: str = "r", tokens: tuple[int, ...] = PROMPT, **more: Any) -> RouteRequest:
    return RouteRequest(**{"id": name, "model": "m", "tokens": tokens, "max_tokens": 5, "timeout": 10.0, **more})


class Setup:
    def __init__(self, workers: FakeWorkers, membership: InMemoryMembership, router: Router) -> None:
        self.workers, self.membership, self.router = workers, membership, router

    async def run(self, wanted: RouteRequest) -> tuple[list[int], list[RouteEvent]]:
        events = [event async for event in self.router.route(wanted)]
        return [event.token for event in events if event.kind == "token"], events


@contextlib.asynccontextmanager
async def setup(*members: Member, **settings: Any) -> AsyncGenerator[Setup, None]:
    membership = InMemoryMembership()
    before = asyncio.all_tasks()
    for one in members:
        await membership.join(one, 60.0)
    workers = FakeWorkers()
    router = Router(membership, workers, **{"member_timeout": 0.5, **settings})
    await router.start()
    for _ in range(3):
        await asyncio.sleep(0)
    try:
        yield Setup(workers, membership, router)
    finally:
        await router.close()
        assert router.active == 0
        left = asyncio.all_tasks() - before
        assert not left, left


TWO_AND_ONE = (member("p1", "prefill"), member("p2", "prefill"), member("d1", "decode"))


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30.0))  # type: ignore[arg-type]
