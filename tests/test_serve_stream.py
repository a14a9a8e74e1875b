"""What a streaming client of the router sees when something breaks: never an answer that looks whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="the servers need aiohttp")
pytest.importorskip("prometheus_client", reason="the servers need prometheus-client")
pytest.importorskip("torch", reason="the reference runner needs torch")

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry

from railwire.kvcache.router import Attempt, InMemoryMembership, Member, RouteFailed
from railwire.kvcache.router.router import RouteEvent
from railwire.serve.config import RouterConfig
from railwire.serve.process import application
from railwire.serve.router import RouterService

SIZES: dict[str, Any] = {"fingerprint": "f", "block_tokens": 16, "num_blocks": 9, "context": 99, "vocab": 256}
DECODER = Member(id="d", role="decode", url="http://127.0.0.1:1", model="tiny", **SIZES)


def ask(error: Exception, tokens: int) -> tuple[int, str]:
    """Status and body of a streamed answer that breaks off with ``error`` after so many tokens."""

    async def broken(_: Any) -> AsyncGenerator[RouteEvent, None]:
        attempt = Attempt("r.1", DECODER, None, 3)
        yield RouteEvent("started", attempt)
        for token in range(tokens):
            yield RouteEvent("token", attempt, token=65 + token)
        raise error

    async def main() -> tuple[int, str]:
        membership = InMemoryMembership()
        await membership.join(DECODER, 60.0)
        registry = CollectorRegistry()
        service = RouterService(RouterConfig(membership="", model="tiny"), membership, registry)
        service.router.route = broken  # type: ignore[method-assign,assignment]
        runner = web.AppRunner(application(service, registry, 1 << 20))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await service.start()
        try:
            while not service.router.members:
                await asyncio.sleep(0.01)
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions"
            body = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "stream": True}
            async with aiohttp.ClientSession() as http, http.post(url, json=body) as response:
                return response.status, await response.text()
        finally:
            await runner.cleanup()
            await service.close()

    return asyncio.run(asyncio.wait_for(main(), 20.0))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), RouteFailed("nobody is left")], ids=["bug", "failure"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_stream_that_breaks_says_so(error: Exception, tokens: int) -> None:
    status, text = ask(error, tokens)
    assert "[DONE]" not in text
    if tokens == 0:
        assert status in (500, 502)
        assert str(error) in json.loads(text)["error"]["message"]
    else:
        assert status == 200
        lines = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        assert "".join(line["choices"][0]["text"] for line in lines[:-1]) == "ABC"
        assert str(error) in lines[-1]["error"]["message"]
