"""One transport for members of every kind."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from railwire.kvcache.router.membership import Member
from railwire.kvcache.router.transport import DecodeEvent, DecodeLeg, PrefillLeg
from railwire.serve.openai_legs import OpenAiTransport
from railwire.serve.transport import HttpTransport


class ApiTransport:
    """A :class:`~railwire.kvcache.router.transport.Transport` that asks each member in the way its record says.

    Args:
        silence: seconds without a byte from one of our own decoders, which send something every 2.
    """

    def __init__(self, *, silence: float = 15.0) -> None:
        self._own = HttpTransport(silence=silence)
        self._openai = OpenAiTransport()

    def _of(self, member: Member) -> HttpTransport | OpenAiTransport:
        return self._openai if member.api == "openai" else self._own

    async def prefill(self, member: Member, leg: PrefillLeg) -> dict[str, Any]:
        return await self._of(member).prefill(member, leg)

    async def decode(self, member: Member, leg: DecodeLeg) -> AsyncGenerator[DecodeEvent, None]:
        async with contextlib.aclosing(self._of(member).decode(member, leg)) as events:
            async for event in events:
                yield event

    async def close(self) -> None:
        await self._own.close()
        await self._openai.close()
