"""What both ways from the router to a server share: one HTTP session, and how its failures are told."""

from __future__ import annotations

import asyncio

import aiohttp

from railwire.kvcache.router.membership import Member
from railwire.kvcache.router.transport import Blame, LegFailed
from railwire.wire import UNREADABLE

MAX_LINE = 1 << 20
# The second: what cannot be read as HTTP, such as a line without end.
BROKEN = (
    aiohttp.ClientError,
    aiohttp.http_exceptions.HttpProcessingError,
    asyncio.TimeoutError,
    OSError,
    *UNREADABLE,
)
"""All that a server, or the way to it, can do to a request; :func:`lost` makes a LegFailed of it."""


class LegSession:
    """The owner of a session, which begins with the first request.

    Args:
        connect_timeout: seconds until a server takes the connection.
    """

    def __init__(self, connect_timeout: float) -> None:
        self._connect_timeout = connect_timeout
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Every leg has a connection of its own: closing it must cancel this leg, and a stale one costs an attempt.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    def timeout(self, seconds: float, silence: float | None = None) -> aiohttp.ClientTimeout:
        """For a leg that ends by itself after ``seconds``; ``silence``: seconds without a byte."""
        return aiohttp.ClientTimeout(total=seconds + 5.0, sock_connect=self._connect_timeout, sock_read=silence)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def lost(error: Exception, member: Member, who: Blame) -> LegFailed:
    text = str(error) or type(error).__name__
    return LegFailed(f"{who} {member.id} at {member.url}: {text}", blame=who)
