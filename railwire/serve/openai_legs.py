"""The router's way to engines that speak OpenAI's API and carry the Railwire connector, such as ``vllm serve``.

Both legs are completions of the same prompt. The prefill leg asks for one token, which nobody reads; the decode leg
names the prefiller, and streams token ids. Hanging up is how a leg is cancelled.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp

from railwire.kvcache.router.membership import Member
from railwire.kvcache.router.transport import Blame, DecodeEvent, DecodeLeg, LegFailed, PrefillLeg
from railwire.serve.client import BROKEN, MAX_LINE, LegSession, lost
from railwire.wire import UNREADABLE

_PROBE_SECONDS = 2.0
_PROBES = 3  # in a row without an answer


class OpenAiTransport:
    """A :class:`~railwire.kvcache.router.transport.Transport` for members whose ``api`` is "openai".

    Such an engine says nothing while it waits for pages, so it is asked for its health every 2 s instead.

    Args:
        connect_timeout: seconds until a server takes the connection.
    """

    def __init__(self, *, connect_timeout: float = 3.0) -> None:
        self._session = LegSession(connect_timeout)

    async def close(self) -> None:
        await self._session.close()

    async def prefill(self, member: Member, leg: PrefillLeg) -> dict[str, Any]:
        body = {
            "model": member.model,
            "prompt": list(leg.tokens),
            "max_tokens": 1,
            "temperature": 0.0,
            "ignore_eos": True,
            "kv_transfer_params": {"do_remote_decode": True, "transfer_id": leg.request_id},
        }
        timeout = self._session.timeout(leg.timeout)
        try:
            async with self._session.open().post(
                f"{member.url}/v1/completions", json=body, headers=_headers(member), timeout=timeout
            ) as response:
                if response.status != 200:
                    raise await _failure(response, member, "prefiller")
                answer = await response.json()
        except BROKEN as error:
            raise lost(error, member, "prefiller") from error
        return {"cached_tokens": _cached(answer)}

    async def decode(self, member: Member, leg: DecodeLeg) -> AsyncGenerator[DecodeEvent, None]:
        body: dict[str, Any] = {
            "model": member.model,
            "prompt": list(leg.tokens),
            "max_tokens": leg.max_tokens,
            "temperature": leg.sampling.temperature,
            "top_p": leg.sampling.top_p,
            "stream": True,
            "return_token_ids": True,
            # The router says what ends an answer; the engine's own idea of it does not count.
            "ignore_eos": True,
            "stop_token_ids": list(leg.stop_tokens),
        }
        if leg.sampling.temperature > 0:
            body["seed"] = leg.sampling.seed
        if leg.prefiller is not None:
            ranks = [base64.b64encode(rank).decode() for rank in leg.prefiller.ranks]
            body["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "transfer_id": leg.request_id,
                "prefiller": {"instance": leg.prefiller.id, "ranks": ranks},
            }
        timeout = self._session.timeout(leg.timeout)
        given = 0
        try:
            post = self._session.open().post(
                f"{member.url}/v1/completions",
                json=body,
                headers=_headers(member),
                timeout=timeout,
                read_bufsize=MAX_LINE,
            )
            # Already its first answer may take as long as the pages do.
            pending: asyncio.Future[Any] = asyncio.ensure_future(_begin(post))
            try:
                async for _ in self._alive(pending, member):
                    yield DecodeEvent("alive")
                response: aiohttp.ClientResponse = pending.result()
            except BaseException:
                pending.add_done_callback(_hang_up)
                pending.cancel()
                raise
            try:
                if response.status != 200:
                    raise await self._not_decoded(await _failure(response, member, "decoder"), member, leg, given)
                while True:
                    line_read = asyncio.ensure_future(response.content.readline())
                    try:
                        async for _ in self._alive(line_read, member):
                            yield DecodeEvent("alive")
                    finally:
                        line_read.cancel()
                    line = line_read.result()
                    if not line:
                        raise LegFailed(f"decoder {member.id} hung up in the middle", blame="decoder")
                    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                        continue
                    chunk = _chunk(line, member)
                    if "error" in chunk:
                        failure = LegFailed(f"decoder {member.id}: {_text(chunk['error'])}", blame="decoder")
                        raise await self._not_decoded(failure, member, leg, given)
                    for token, reason in _tokens(chunk, member, leg):
                        if reason == "error":
                            failure = LegFailed(f"decoder {member.id}: the request failed there", blame="decoder")
                            raise await self._not_decoded(failure, member, leg, given)
                        if token is not None:
                            if given == 0:
                                yield DecodeEvent("arrived")
                            given += 1
                            yield DecodeEvent("token", token)
                        if reason is not None:
                            yield DecodeEvent("end", info={"reason": reason})
                            return
            finally:
                response.close()
        except BROKEN as error:
            raise lost(error, member, "decoder") from error

    async def _alive(self, pending: asyncio.Future[Any], member: Member) -> AsyncGenerator[None, None]:
        """Yields every 2 s until ``pending`` is done, as long as the server is well; raises LegFailed if it is not."""
        misses = 0
        while True:
            await asyncio.wait([pending], timeout=_PROBE_SECONDS)
            if pending.done():
                return
            misses = 0 if await self._healthy(member) else misses + 1
            if pending.done():
                return
            if misses >= _PROBES:
                raise LegFailed(f"decoder {member.id} at {member.url} does not answer", blame="decoder")
            if misses == 0:
                yield

    async def _healthy(self, member: Member) -> bool:
        timeout = aiohttp.ClientTimeout(total=_PROBE_SECONDS)
        try:
            async with self._session.open().get(f"{member.url}/health", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return False

    async def _not_decoded(self, failure: LegFailed, member: Member, leg: DecodeLeg, given: int) -> LegFailed:
        """A decoder that is well and has not begun has not got its pages: that is the prefiller's failure."""
        if failure.blame == "decoder" and leg.prefiller is not None and given == 0 and await self._healthy(member):
            return LegFailed(f"{failure} (waiting for prefiller {leg.prefiller.id})", blame="prefiller")
        return failure


def _headers(member: Member) -> dict[str, str]:
    """vLLM's way to name one of the engines behind a server: the two legs of a request must meet those that the router
    has chosen, since each has KV and a transfer engine of its own."""
    return {} if member.dp_rank is None else {"X-data-parallel-rank": str(member.dp_rank)}


async def _begin(post: Any) -> aiohttp.ClientResponse:
    response: aiohttp.ClientResponse = await post
    return response


def _hang_up(pending: asyncio.Future[Any]) -> None:
    if not pending.cancelled() and pending.exception() is None:
        pending.result().close()


def _chunk(line: bytes, member: Member) -> dict[str, Any]:
    try:
        chunk = json.loads(line[5:])
    except UNREADABLE as error:
        raise LegFailed(f"decoder {member.id} sends no JSON: {line[:100]!r}", blame="decoder") from error
    if not isinstance(chunk, dict):
        raise LegFailed(f"decoder {member.id} sends no JSON object: {line[:100]!r}", blame="decoder")
    return chunk


def _tokens(chunk: dict[str, Any], member: Member, leg: DecodeLeg) -> list[tuple[int | None, str | None]]:
    """(token or None, reason of the end or None) of one chunk. A stop token is no part of the answer."""
    try:
        choices = chunk.get("choices") or []
        if not choices:
            return []
        ids = [int(token) for token in choices[0].get("token_ids") or []]
        reason = choices[0].get("finish_reason")
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise LegFailed(f"decoder {member.id} sends a chunk that cannot be read: {error}", blame="decoder") from error
    if any(not 0 <= token < member.vocab for token in ids):
        raise LegFailed(f"decoder {member.id} sends tokens outside its vocabulary of {member.vocab}", blame="decoder")
    if reason == "stop" and ids and ids[-1] in leg.stop_tokens:
        ids.pop()
    events: list[tuple[int | None, str | None]] = [(token, None) for token in ids]
    if reason == "abort":
        raise LegFailed(f"decoder {member.id} has aborted the request", blame="decoder", busy=True)
    if reason is not None:
        events.append((None, str(reason)))
    return events


def _cached(answer: Any) -> int:
    try:
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    except (KeyError, TypeError, ValueError):
        return 0


def _text(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:1000]


async def _failure(response: aiohttp.ClientResponse, member: Member, who: Blame) -> LegFailed:
    try:
        data = json.loads(await response.content.read(65536))
        text = _text(data.get("error", data))
    except (AttributeError, aiohttp.ClientError, *UNREADABLE):
        text = f"HTTP {response.status}"
    blame: Blame = "request" if response.status in (400, 413, 422) else who
    return LegFailed(f"{who} {member.id} at {member.url}: {text}", blame=blame, busy=response.status in (429, 503))
