"""Who takes part: the record of an instance, and the protocol of the registries that keep these records.

A member joins with a time to live and renews it; one that does neither any more disappears by itself. There is no
leader and no barrier: members come and go one by one while requests run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Literal, Protocol

import msgspec

from railwire.errors import RailwireError
from railwire.wire import UNREADABLE

log = logging.getLogger("railwire.kvcache.router")

Role = Literal["prefill", "decode"]
State = Literal["ready", "draining"]
Api = Literal["railwire", "openai"]

MAX_RECORD_BYTES = 1 << 20


class MembershipError(RailwireError):
    """The registry cannot be reached, or did not do what was asked; try again."""


class MembershipLost(MembershipError):
    """The registry knows this member no more (its time ran out, or the registry has restarted): join again."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One instance.

    Attributes:
        id: of this life of the instance; a restarted one has another.
        url: where its HTTP side is, such as ``http://10.0.0.7:8100``.
        api: how requests reach it: "railwire" (its own /prefill and /decode) or "openai" (/v1/completions of an engine
            with the Railwire connector).
        model: the name that clients use.
        fingerprint: of config and weights; only equal ones can exchange KV.
        ranks: one descriptor per rank; empty for a decoder.
        block_tokens, num_blocks: of its KV cache.
        context, vocab: of its model.
        incarnation: hex of its first engine's.
        load: tokens that were queued when it last renewed.
        dp_rank: which engine behind ``url`` it is, where one server has several (data parallelism); None: the only one.
    """

    id: str
    role: Role
    url: str
    model: str
    fingerprint: str
    block_tokens: int
    num_blocks: int
    context: int
    vocab: int
    ranks: tuple[bytes, ...] = ()
    incarnation: str = ""
    api: Api = "railwire"
    state: State = "ready"
    load: int = 0
    dp_rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)] | None = None

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Member:
        """Raises MembershipError if the bytes are no such record."""
        if len(data) > MAX_RECORD_BYTES:
            raise MembershipError(f"a member's record of {len(data)} bytes; at most {MAX_RECORD_BYTES} are taken")
        try:
            member = msgspec.json.decode(data, type=cls)
        except UNREADABLE as error:
            raise MembershipError(f"not a member's record: {error}") from error
        if not member.id or member.block_tokens < 1 or member.num_blocks < 1 or member.context < 1 or member.vocab < 1:
            raise MembershipError(f"the record of member {member.id!r} has sizes that cannot be")
        if not member.url.startswith(("http://", "https://")):
            raise MembershipError(f"the URL of member {member.id} is no HTTP URL: {member.url[:100]!r}")
        return member


Members = Mapping[str, Member]


class Membership(Protocol):
    """A registry of members. All methods end within the registry's time-out, and raise MembershipError."""

    async def join(self, member: Member, ttl: float) -> None:
        """Adds the member, or replaces its record; it disappears ``ttl`` seconds after the last renewal."""

    async def renew(self, member: Member) -> None:
        """Extends the time to live, and publishes what has changed (state, load).

        Raises:
            MembershipLost: it is not there any more: join() again.
        """

    async def leave(self, member_id: str) -> None:
        """Removes it at once; no error if it is gone already."""

    async def snapshot(self) -> dict[str, Member]:
        """All members by id, draining ones included."""

    def watch(self) -> AsyncIterator[dict[str, Member]]:
        """A snapshot now, and another after each change. Ends never; raises nothing: while the registry cannot be
        reached it keeps still, so that requests go on with the members known last."""

    async def close(self) -> None:
        """Lets go of connections. Members that did not leave stay until their time runs out."""


async def poll(
    snapshot: Callable[[], Awaitable[dict[str, Member]]], interval: float
) -> AsyncIterator[dict[str, Member]]:
    """``watch()`` for registries that can only be asked: every ``interval`` seconds."""
    last: dict[str, Member] | None = None
    failing = False
    while True:
        try:
            now = await snapshot()
        except MembershipError as error:
            if not failing:
                log.warning("railwire: the registry of members cannot be read, going on with those known: %s", error)
            failing = True
        else:
            failing = False
            if now != last:
                last = now
                yield dict(now)
        await asyncio.sleep(interval)


async def keep(membership: Membership, record: Callable[[], Member], ttl: float, changed: asyncio.Event) -> None:
    """Keeps a member joined until cancelled: renews three times per time to live, at once when ``changed`` is set,
    and joins again after the registry has lost it. ``record()`` gives the record of now."""
    joined = False
    while True:
        changed.clear()
        try:
            if joined:
                await membership.renew(record())
            else:
                await membership.join(record(), ttl)
                joined = True
            pause = ttl / 3
        except MembershipLost:
            joined, pause = False, 0.0
            log.warning("railwire: the registry has lost member %s; joining again", record().id)
        except MembershipError as error:
            pause = min(1.0, ttl / 6)
            log.warning("railwire: cannot renew member %s: %s", record().id, error)
        except Exception:  # of a registry from elsewhere: to give up would be to disappear
            pause = min(1.0, ttl / 6)
            log.exception("railwire: cannot renew member %s", record().id)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(changed.wait(), max(0.01, pause))
