"""The router's way to the workers: HTTP. Hanging up is how a leg is cancelled."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp

from railwire.kvcache.router.membership import Member
from railwire.kvcache.router.transport import Blame, DecodeEvent, DecodeLeg, LegFailed, PrefillLeg
from railwire.serve.client import BROKEN, MAX_LINE, LegSession, lost
from railwire.wire import UNREADABLE

_BLAMES: dict[str, Blame] = {"prefiller": "prefiller", "decoder": "decoder", "pair": "pair", "request": "request"}


class HttpTransport:
    """A :class:`~railwire.kvcache.router.transport.Transport`.

    Args:
        connect_timeout: seconds until a worker takes the connection.
        silence: seconds without a byte from a decoder, which sends something every 2.
    """

    def __init__(self, *, connect_timeout: float = 3.0, silence: float = 15.0) -> None:
        self._session = LegSession(connect_timeout)
        self._silence = silence

    async def close(self) -> None:
        await self._session.close()

    async def prefill(self, member: Member, leg: PrefillLeg) -> dict[str, Any]:
        body = {
            "request_id": leg.request_id,
            "instance": member.id,
            "tokens": list(leg.tokens),
            "timeout": leg.timeout,
        }
        timeout = self._session.timeout(leg.timeout)
        try:
            async with self._session.open().post(f"{member.url}/prefill", json=body, timeout=timeout) as response:
                if response.status != 200:
                    raise await _failure(response, member, "prefiller")
                answer = await response.json()
        except BROKEN as error:
            raise lost(error, member, "prefiller") from error
        if not isinstance(answer, dict):
            raise LegFailed(f"prefiller {member.id} answers no JSON object", blame="prefiller")
        return answer

    async def decode(self, member: Member, leg: DecodeLeg) -> AsyncGenerator[DecodeEvent, None]:
        prefiller = None
        if leg.prefiller is not None:
            ranks = [base64.b64encode(rank).decode() for rank in leg.prefiller.ranks]
            prefiller = {"instance": leg.prefiller.id, "ranks": ranks}
        body = {
            "request_id": leg.request_id,
            "instance": member.id,
            "tokens": list(leg.tokens),
            "max_tokens": leg.max_tokens,
            "timeout": leg.timeout,
            "prefiller": prefiller,
            "stop_tokens": list(leg.stop_tokens),
            "temperature": leg.sampling.temperature,
            "top_p": leg.sampling.top_p,
            "seed": leg.sampling.seed,
        }
        timeout = self._session.timeout(leg.timeout, self._silence)
        try:
            async with self._session.open().post(
                f"{member.url}/decode", json=body, timeout=timeout, read_bufsize=MAX_LINE
            ) as response:
                if response.status != 200:
                    raise await _failure(response, member, "decoder")
                async for line in response.content:
                    event = _event(line, member)
                    if event.kind == "failed":
                        raise _refusal(event.info, member, "decoder")
                    yield event
                    if event.kind == "end":
                        return
            raise LegFailed(f"decoder {member.id} hung up in the middle", blame="decoder")
        except BROKEN as error:
            raise lost(error, member, "decoder") from error


def _event(line: bytes, member: Member) -> DecodeEvent:
    if not line.endswith(b"\n"):
        raise LegFailed(f"decoder {member.id} broke off in the middle of a line", blame="decoder")
    try:
        data = json.loads(line)
        kind = data["event"]
        token = int(data.get("token", -1))
        when = float(data.get("t", 0.0))
    except (KeyError, TypeError, AttributeError, *UNREADABLE) as error:
        raise LegFailed(f"decoder {member.id} sends no event: {line[:100]!r}", blame="decoder") from error
    if (kind == "token" and not 0 <= token < member.vocab) or not math.isfinite(when):
        raise LegFailed(f"decoder {member.id} sends token {token} of {member.vocab}", blame="decoder")
    info = {key: value for key, value in data.items() if key not in ("event", "token", "t")}
    if when:
        info[f"{kind}_t"] = when
    return DecodeEvent(str(kind), token, info)


async def _failure(response: aiohttp.ClientResponse, member: Member, who: Blame) -> LegFailed:
    try:
        body = json.loads(await response.content.read(65536))
        return _refusal(body["error"], member, who)
    except (KeyError, TypeError, aiohttp.ClientError, *UNREADABLE):
        return LegFailed(f"{who} {member.id} at {member.url} answers {response.status}", blame=who)


def _refusal(body: dict[str, Any], member: Member, who: Blame) -> LegFailed:
    blame = _BLAMES.get(str(body.get("blame")), who)
    text = str(body.get("message", "failed"))[:1000]
    return LegFailed(f"{who} {member.id}: {text}", blame=blame, busy=bool(body.get("busy", False)))
