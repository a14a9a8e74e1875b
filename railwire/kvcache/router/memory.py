"""A registry of members within one process, for tests and for instances that share an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from railwire.kvcache.router.membership import Member, MembershipLost


class InMemoryMembership:
    """A :class:`~railwire.kvcache.router.membership.Membership`. Use it from one event loop."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[Member, float, float]] = {}  # record, ttl, end of life
        self._changed = asyncio.Condition()

    async def join(self, member: Member, ttl: float) -> None:
        self._members[member.id] = (member, ttl, time.monotonic() + ttl)
        await self._tell()

    async def renew(self, member: Member) -> None:
        self._expire()
        known = self._members.get(member.id)
        if known is None:
            raise MembershipLost(f"member {member.id} is unknown here, or its time ran out: join() again")
        self._members[member.id] = (member, known[1], time.monotonic() + known[1])
        if known[0] != member:
            await self._tell()

    async def leave(self, member_id: str) -> None:
        if self._members.pop(member_id, None) is not None:
            await self._tell()

    async def snapshot(self) -> dict[str, Member]:
        self._expire()
        return {member_id: member for member_id, (member, _, _) in self._members.items()}

    async def watch(self) -> AsyncIterator[dict[str, Member]]:
        last: dict[str, Member] | None = None
        while True:
            now = await self.snapshot()
            if now != last:
                last = now
                yield dict(now)
                continue
            ends = [end for _, _, end in self._members.values()]
            pause = max(0.001, min(ends) - time.monotonic()) if ends else None
            async with self._changed:
                try:
                    if await self.snapshot() == last:
                        await asyncio.wait_for(self._changed.wait(), pause)
                except asyncio.TimeoutError:
                    pass

    async def close(self) -> None:
        self._members.clear()

    def _expire(self) -> None:
        now = time.monotonic()
        self._members = {key: entry for key, entry in self._members.items() if entry[2] > now}

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
