"""The client: sends prompts to the router as anybody would, and keeps the tokens with the times at which they came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp

from railwire.demo.record import Request, attempt_from

_MAX_LINE = 1 << 22  # the timing of a request: all layers of all attempts in one line


class Client:
    """Streams completions from ``/v1/completions``.

    Args:
        concurrency: requests that are under way at a time.
        timeout: seconds for one request.
        tell: called when something new can be shown.
    """

    def __init__(
        self, url: str, model: str, *, max_tokens: int, concurrency: int, timeout: float, tell: Callable[[], None]
    ) -> None:
        self._url = f"{url}/v1/completions"
        self._model = model
        self._max_tokens = max_tokens
        self._places = asyncio.Semaphore(concurrency)
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=5.0)
        self._tell = tell
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(timeout=self._timeout, read_bufsize=_MAX_LINE)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def send_all(self, requests: Iterable[Request]) -> None:
        """Ends when all have ended; failures are in ``request.error``."""
        await asyncio.gather(*(self.send(request) for request in requests))

    async def send(self, request: Request) -> None:
        """One prompt, once there is a place for it."""
        async with self._places:
            request.sent = time.monotonic()
            self._tell()
            try:
                await self._stream(request)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
                request.error = str(error) or type(error).__name__
            if not request.error and len(request.answer) != self._max_tokens:
                request.error = f"{len(request.answer)} tokens came instead of {self._max_tokens}"
            request.ended = time.monotonic()
            self._tell()

    async def _stream(self, request: Request) -> None:
        assert self._session is not None
        body = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "ignore_eos": True,
            "railwire_timing": True,
        }
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                text = (await response.text())[:500]
                raise ValueError(f"HTTP {response.status}: {text}")
            async for line in response.content:
                data = line.strip()
                if data == b"data: [DONE]":
                    return
                if data.startswith(b"data: "):
                    self._take(request, json.loads(data[len(b"data: ") :]))
        raise ValueError("the stream broke off")

    def _take(self, request: Request, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            raise ValueError(str(chunk["error"].get("message", chunk["error"])))
        for choice in chunk["choices"]:
            tokens = choice.get("token_ids") or []
            if tokens and not request.first_token:
                request.first_token = time.monotonic()
            request.answer += [int(token) for token in tokens]
            request.text += choice.get("text") or ""
        if chunk.get("usage"):
            request.prompt_tokens = int(chunk["usage"]["prompt_tokens"])
        for timing in chunk.get("railwire") or ():
            request.attempts = [attempt_from(entry) for entry in timing["attempts"]]
        self._tell()
