"""A registry of members in a torch.distributed.TCPStore. torch is imported when it is first used.

A TCPStore neither expires nor lists keys. So a member takes a slot (an atomic counter says which) and writes its
record there with a beat that grows at each renewal. Whoever reads judges by his own clock: a beat that has not moved
for the time to live means that the member is gone. No clocks are compared across hosts. A slot is never used twice;
left ones hold a mark.

A store that restarts has forgotten everything and counts slots from the beginning. So whoever finds no name of its life
in it gives it one, at random; what is known of slots is forgotten with the life that they were of.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import msgspec

from railwire.kvcache.router.membership import Member, MembershipError, MembershipLost, poll
from railwire.wire import UNREADABLE

T = TypeVar("T")

_LEFT = b"left"
_MAX_SLOTS = 1 << 20


class _Slot(msgspec.Struct, array_like=True):
    beat: int
    ttl: float
    record: bytes


class _Seen(msgspec.Struct):
    beat: int
    when: float


class _Ours(NamedTuple):
    """A member that has joined here."""

    life: bytes
    slot: int
    beat: int
    ttl: float


class TCPStoreMembership:
    """A :class:`~railwire.kvcache.router.membership.Membership`.

    Args:
        host, port: of the store.
        server: this process keeps the store (one must; say the router).
        prefix: of the keys, to share a store.
        timeout: seconds for each operation.
        interval: seconds between two looks of ``watch()``.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        server: bool = False,
        prefix: str = "railwire/kv",
        timeout: float = 5.0,
        interval: float = 0.25,
    ) -> None:
        self._where = (host, port, server)
        self._prefix = prefix
        self._timeout = timeout
        self._interval = interval
        self._server: Any = None
        self._client: Any = None
        # One thread: a TCPStore client takes one request at a time anyway.
        self._thread = ThreadPoolExecutor(1, "railwire-tcpstore")
        self._ours: dict[str, _Ours] = {}
        self._life = b""  # of the store, as last read; what follows is of this one
        self._seen: dict[int, _Seen] = {}
        self._gone: set[int] = set()

    async def join(self, member: Member, ttl: float) -> None:
        def do(store: Any) -> _Ours:
            life = self._life_of(store)
            slot = int(store.add(f"{self._prefix}/count", 1))
            store.set(self._key(slot), msgspec.json.encode(_Slot(0, ttl, member.encode())))
            return _Ours(life, slot, 0, ttl)

        await self.leave(member.id)
        self._ours[member.id] = await self._run(do)

    async def renew(self, member: Member) -> None:
        ours = self._ours.get(member.id)
        if ours is None:
            raise MembershipLost(f"member {member.id} has not joined through this registry client")
        renewed = ours._replace(beat=ours.beat + 1)

        def do(store: Any) -> None:
            # In another life of the store the slot is somebody else's; one that has been cleared must not come back.
            key = self._key(ours.slot)
            if self._life_of(store) != ours.life or not store.check([key]) or store.get(key) == _LEFT:
                raise MembershipLost(f"the TCPStore at {self._where[0]}:{self._where[1]} has lost member {member.id}")
            store.set(key, msgspec.json.encode(_Slot(renewed.beat, ours.ttl, member.encode())))

        try:
            await self._run(do)
        except MembershipLost:
            self._ours.pop(member.id, None)
            raise
        self._ours[member.id] = renewed

    async def leave(self, member_id: str) -> None:
        ours = self._ours.pop(member_id, None)
        if ours is None:
            return

        def do(store: Any) -> None:
            if self._life_of(store) == ours.life:
                store.set(self._key(ours.slot), _LEFT)

        await self._run(do)

    async def snapshot(self) -> dict[str, Member]:
        return await self._run(self._read)

    def watch(self) -> AsyncIterator[dict[str, Member]]:
        return poll(self.snapshot, self._interval)

    async def close(self) -> None:
        self._client = None
        self._server = None
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- on the store's thread ---------------------------------------------------------------------------------------
    def _life_of(self, store: Any) -> bytes:
        return bytes(store.compare_set(f"{self._prefix}/life", "", secrets.token_hex(8)))

    def _read(self, store: Any) -> dict[str, Member]:
        life = self._life_of(store)
        if life != self._life:
            self._life = life
            self._seen.clear()
            self._gone.clear()
        count = int(store.add(f"{self._prefix}/count", 0))
        if not 0 <= count <= _MAX_SLOTS:
            raise MembershipError(f"the TCPStore counts {count} members: is {self._prefix!r} used by something else?")
        slots = [slot for slot in range(1, count + 1) if slot not in self._gone]
        slots = [slot for slot in slots if store.check([self._key(slot)])]  # one that is being written is not there yet
        now = time.monotonic()
        members: dict[str, Member] = {}
        for slot, data in zip(
            slots, store.multi_get([self._key(slot) for slot in slots]) if slots else [], strict=True
        ):
            if data == _LEFT:
                self._gone.add(slot)
                self._seen.pop(slot, None)
                continue
            try:
                entry = msgspec.json.decode(data, type=_Slot)
                member = Member.decode(entry.record)
            except (MembershipError, *UNREADABLE):
                continue  # not ours to clear
            seen = self._seen.get(slot)
            if seen is None or seen.beat != entry.beat:
                self._seen[slot] = _Seen(entry.beat, now)
            elif now - seen.when > entry.ttl:
                continue  # it may be slow, and come back
            members[member.id] = member
        return members

    def _key(self, slot: int) -> str:
        return f"{self._prefix}/{slot}"

    def _connect(self) -> Any:
        try:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]
        except ImportError as error:
            raise MembershipError("a TCPStore needs torch: pip install 'railwire[kvcache]', or use etcd") from error
        host, port, server = self._where
        timeout = timedelta(seconds=self._timeout)
        if server and self._server is None:
            # No world size, and nobody is waited for: members come and go.
            self._server = TCPStore(host, port, None, True, timeout, wait_for_workers=False)
        # torch tries again and again until its time-out where nobody listens; this knows at once.
        socket.create_connection((host, port), self._timeout).close()
        return TCPStore(host, port, None, False, timeout, wait_for_workers=False)

    async def _run(self, do: Callable[[Any], T]) -> T:
        def work() -> T:
            try:
                if self._client is None:
                    self._client = self._connect()
                return do(self._client)
            except MembershipError:
                raise
            except Exception as error:  # torch raises RuntimeErrors of several names
                self._client = None
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise MembershipError(f"TCPStore at {self._where[0]}:{self._where[1]}: {text}") from error

        try:
            future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RuntimeError as error:
            raise MembershipError("this registry client is closed") from error
        try:
            return await asyncio.wait_for(asyncio.shield(future), 2 * self._timeout + 1)
        except asyncio.TimeoutError:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise MembershipError(f"TCPStore at {self._where[0]}:{self._where[1]} does not answer") from None
