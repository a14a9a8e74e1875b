"""Legs on engines that speak OpenAI's API: what such a server may do to the router, played by a small one."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="the servers need aiohttp")

from aiohttp import web

from railwire.kvcache.router import Member
from railwire.kvcache.router.transport import DecodeEvent, DecodeLeg, LegFailed, PrefillLeg, Sampling
from railwire.serve import openai_legs
from railwire.serve.by_api import ApiTransport
from railwire.serve.openai_legs import OpenAiTransport

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def member(port: int, role: Any = "decode", **more: Any) -> Member:
    defaults: dict[str, Any] = {"fingerprint": "f", "block_tokens": 16, "num_blocks": 9, "context": 99, "vocab": 100}
    url = f"http://127.0.0.1:{port}"
    return Member(id=f"{role}-{port}", role=role, url=url, model="m", api="openai", **{**defaults, **more})


def leg(prefiller: Member | None = None, stop: tuple[int, ...] = (7,), max_tokens: int = 4) -> DecodeLeg:
    return DecodeLeg("r.1", (1, 2, 3), max_tokens, prefiller, stop, Sampling(), 30.0)


class Server:
    """Answers /v1/completions as it is told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.handler: Handler | None = None
        self.healthy = True
        self.bodies: list[dict[str, Any]] = []
        self.ranks: list[str | None] = []
        self.hung_up = asyncio.Event()
        self.port = 0

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", self._completions), web.get("/health", self._health)])
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        return runner

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.ranks.append(request.headers.get("X-data-parallel-rank"))
        assert self.handler is not None
        try:
            return await self.handler(request)
        except asyncio.CancelledError:
            self.hung_up.set()
            raise


def streaming(*pieces: Any, then: float = 0.0) -> Handler:
    """Sends chunks (dicts as SSE data, bytes as they are, numbers as pauses), then ends."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            if isinstance(piece, (int, float)):
                await asyncio.sleep(piece)
            else:
                data = piece if isinstance(piece, bytes) else b"data: " + json.dumps(piece).encode() + b"\n\n"
                await response.write(data)
        await asyncio.sleep(then)
        return response

    return handler


def answering(status: int, body: Any) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    return handler


def chunk(ids: list[int], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "x", "token_ids": ids, "finish_reason": reason}]}


def play(handler: Handler, scenario: Callable[[Server, Any], Awaitable[Any]], transport: Any = OpenAiTransport) -> Any:
    """Runs ``scenario(server, transport)`` within 20 s."""

    async def main() -> Any:
        server = Server()
        server.handler = handler
        runner, made = await server.start(), transport()
        try:
            return await asyncio.wait_for(scenario(server, made), 20.0)
        finally:
            await made.close()
            await runner.cleanup()

    return asyncio.run(main())


def decoded(handler: Handler, wanted: DecodeLeg | None = None, **more: Any) -> tuple[list[DecodeEvent], Server]:
    async def scenario(server: Server, transport: Any) -> tuple[list[DecodeEvent], Server]:
        return [event async for event in transport.decode(member(server.port, **more), wanted or leg())], server

    result: tuple[list[DecodeEvent], Server] = play(handler, scenario)
    return result


def failure(handler: Handler, wanted: DecodeLeg | None = None) -> LegFailed:
    with pytest.raises(LegFailed) as caught:
        decoded(handler, wanted)
    return caught.value


def test_tokens_come_as_they_are_made() -> None:
    prefiller = member(1, "prefill", ranks=(b"a", b"b"))
    handler = streaming(chunk([4]), chunk([5, 6]), {"choices": []}, chunk([7], "stop"), b"data: [DONE]\n\n")
    events, server = decoded(handler, leg(prefiller))
    assert [(event.kind, event.token) for event in events] == [
        ("arrived", -1), ("token", 4), ("token", 5), ("token", 6), ("end", -1)
    ]  # fmt: skip
    assert events[-1].info == {"reason": "stop"}  # and the stop token is no part of the answer
    (body,) = server.bodies
    assert body["prompt"] == [1, 2, 3] and body["max_tokens"] == 4 and body["stop_token_ids"] == [7]
    params = body["kv_transfer_params"]
    assert params["do_remote_prefill"] is True and params["transfer_id"] == "r.1"
    assert [base64.b64decode(rank) for rank in params["prefiller"]["ranks"]] == [b"a", b"b"]


def test_without_a_prefiller_nothing_is_said_of_transfers() -> None:
    events, server = decoded(streaming(chunk([4], "length"), b"data: [DONE]\n\n"))
    assert events[-1].info == {"reason": "length"} and "kv_transfer_params" not in server.bodies[0]


def test_a_server_that_is_well_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_legs, "_PROBE_SECONDS", 0.1)

    async def late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.35)
        return await streaming(0.35, chunk([4], "length"))(request)

    events, _ = decoded(late)
    assert [event.kind for event in events].count("alive") >= 4
    assert [event.kind for event in events if event.kind != "alive"] == ["arrived", "token", "end"]


def test_a_server_that_is_not_well_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_legs, "_PROBE_SECONDS", 0.05)

    async def scenario(server: Server, transport: Any) -> None:
        server.healthy = False
        with pytest.raises(LegFailed, match="does not answer") as caught:
            async for _ in transport.decode(member(server.port), leg()):
                pass
        assert caught.value.blame == "decoder"
        await asyncio.wait_for(server.hung_up.wait(), 5.0)

    play(streaming(30.0), scenario)


def test_pages_that_do_not_come_are_the_prefillers_fault() -> None:
    prefiller = member(1, "prefill")
    for handler in (
        answering(500, {"error": {"message": "internal"}}),
        streaming({"error": {"message": "internal", "code": 500}}),
        streaming(chunk([], "error")),
    ):
        caught = failure(handler, leg(prefiller))
        assert caught.blame == "prefiller" and "prefill-1" in str(caught)
        assert failure(handler).blame == "decoder"  # where no prefiller was needed
    broken = streaming(chunk([4]), {"error": {"message": "later"}})
    assert failure(broken, leg(prefiller)).blame == "decoder"  # it had begun


@pytest.mark.parametrize(
    ("handler", "blame", "text"),
    [
        (answering(400, {"error": {"message": "too long"}}), "request", "too long"),
        (answering(503, {"message": "full"}), "decoder", "full"),
        (answering(404, "what"), "decoder", "404"),
        (streaming(chunk([4])), "decoder", "hung up"),
        (streaming(b"data: {\n\n"), "decoder", "no JSON"),
        (streaming(b"data: 3\n\n"), "decoder", "no JSON object"),
        (streaming({"choices": 3}), "decoder", "cannot be read"),
        (streaming({"choices": [{"token_ids": ["x"]}]}), "decoder", "cannot be read"),
        (streaming(chunk([100])), "decoder", "vocabulary"),
        (streaming(chunk([-1])), "decoder", "vocabulary"),
        (streaming(chunk([], "abort")), "decoder", "aborted"),
        (streaming(b"data: " + b"x" * (3 << 20)), "decoder", ""),
    ],
)
def test_answers_that_cannot_be(handler: Handler, blame: str, text: str) -> None:
    caught = failure(handler)
    assert caught.blame == blame and text in str(caught)


def test_hanging_up_reaches_the_server() -> None:
    async def scenario(server: Server, transport: Any) -> None:
        events = transport.decode(member(server.port), leg())
        assert (await events.__anext__()).kind == "arrived"
        await events.aclose()
        await asyncio.wait_for(server.hung_up.wait(), 5.0)

    play(streaming(chunk([4]), then=30.0), scenario)

    async def before_the_answer(server: Server, transport: Any) -> None:
        task = asyncio.create_task(transport.decode(member(server.port), leg()).__anext__())
        while not server.bodies:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.wait_for(server.hung_up.wait(), 5.0)

    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(30.0)
        return web.Response()

    play(never, before_the_answer)


def test_a_prefill_leg_asks_for_one_token() -> None:
    async def scenario(server: Server, transport: Any) -> dict[str, Any]:
        info: dict[str, Any] = await transport.prefill(member(server.port, "prefill"), PrefillLeg("r.1", (1, 2), 9.0))
        params = {"do_remote_decode": True, "transfer_id": "r.1"}
        assert server.bodies[0]["max_tokens"] == 1 and server.bodies[0]["kv_transfer_params"] == params
        return info

    answer = {"usage": {"prompt_tokens_details": {"cached_tokens": 16}}}
    assert play(answering(200, answer), scenario, ApiTransport) == {"cached_tokens": 16}
    assert play(answering(200, {}), scenario) == {"cached_tokens": 0}
    for status, blame in ((400, "request"), (500, "prefiller"), (503, "prefiller")):
        with pytest.raises(LegFailed) as caught:
            play(answering(status, {"error": {"message": "no"}}), scenario)
        assert caught.value.blame == blame and caught.value.busy == (status == 503)


def test_both_legs_name_the_engine_that_the_router_has_chosen() -> None:
    """Behind a server with data parallelism each engine has KV of its own: without the header the server chooses."""

    async def scenario(server: Server, transport: Any) -> list[str | None]:
        for rank in (None, 0, 3):
            await transport.prefill(member(server.port, "prefill", dp_rank=rank), PrefillLeg("r.1", (1, 2), 9.0))
            with pytest.raises(LegFailed):
                async for _ in transport.decode(member(server.port, dp_rank=rank), leg()):
                    pass
        return server.ranks

    assert play(answering(200, {}), scenario) == [None, None, "0", "0", "3", "3"]


def test_nobody_listens() -> None:
    async def scenario(server: Server, transport: Any) -> None:
        gone = member(1)
        with pytest.raises(LegFailed) as caught:
            await transport.prefill(gone, PrefillLeg("r.1", (1, 2), 9.0))
        assert caught.value.blame == "prefiller"
        with pytest.raises(LegFailed) as caught:
            async for _ in transport.decode(gone, leg(member(2, "prefill"))):
                pass
        assert caught.value.blame == "decoder"

    play(answering(200, {}), scenario, ApiTransport)
