"""A registry of members in a torch.distributed.TCPStore. torch is imported when it is first used.

A TCPStore neither expires nor lists keys. So a member takes a slot (an atomic counter says which) and writes its
record there with a beat that grows at each renewal. Whoever reads judges by his own clock: a beat that has not grown
for the time to live means that the member is gone; the reader then clears its slot, unless the member renews in the
same moment. One that was only slow learns that it is lost, and takes another slot. No clocks are compared across hosts.
A slot is never used twice; left and cleared ones hold a mark, and are not read again.

A TCPStore believes everybody, and by itself listens on every address. Here it listens on the one that is named, and
with a secret only signed records count.

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
from railwire.kvcache.router.seal import Seal
from railwire.wire import UNREADABLE

T = TypeVar("T")

_LEFT = b"left"
_MAX_SLOTS = 1 << 20
_TAKING_SECONDS = 60.0  # from a slot's number to its first record; a member's client gives up long before


class _Slot(msgspec.Struct, array_like=True):
    beat: int
    ttl: float
    record: bytes


class _Seen(msgspec.Struct):
    """A slot that is in use, or being taken (beat -1)."""

    beat: int
    when: float
    """When it grew last, by our clock."""


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
            With ``server``, the store listens on this address alone.
        server: this process keeps the store (one must; say the router).
        secret: shared by all members and routers; records that are not signed with it do not count. None: all do.
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
        secret: str | None = None,
        prefix: str = "railwire/kv",
        timeout: float = 5.0,
        interval: float = 0.25,
    ) -> None:
        self._where = (host, port, server)
        self._prefix = prefix
        self._timeout = timeout
        self._interval = interval
        self._seal = Seal(secret)
        self._server: Any = None
        self._client: Any = None
        # One thread: a TCPStore client takes one request at a time anyway.
        self._thread = ThreadPoolExecutor(1, "railwire-tcpstore")
        self._ours: dict[str, _Ours] = {}
        self._life = b""  # of the store, as last read; what follows is of this one
        self._seen: dict[int, _Seen] = {}
        self._count = 0  # of slots that we have looked at

    async def join(self, member: Member, ttl: float) -> None:
        def do(store: Any) -> _Ours:
            life = self._life_of(store)
            slot = int(store.add(f"{self._prefix}/count", 1))
            store.set(self._key(slot), self._encode(life, slot, _Slot(0, ttl, member.encode())))
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
            store.set(key, self._encode(ours.life, ours.slot, _Slot(renewed.beat, ours.ttl, member.encode())))

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
            self._count = 0
        count = int(store.add(f"{self._prefix}/count", 0))
        if not 0 <= count <= _MAX_SLOTS:
            raise MembershipError(f"the TCPStore counts {count} members: is {self._prefix!r} used by something else?")
        now = time.monotonic()
        for slot in range(self._count + 1, count + 1):
            self._seen[slot] = _Seen(-1, now)
        self._count = count
        keys = {slot: self._key(slot) for slot in self._seen}
        if keys and store.check(list(keys.values())):
            written = list(keys)
        else:
            written = [slot for slot, key in keys.items() if store.check([key])]  # some are being taken
        now = time.monotonic()
        members: dict[str, Member] = {}
        ignored = 0
        unreadable = set(keys)
        for slot, data in zip(
            written, store.multi_get([keys[slot] for slot in written]) if written else [], strict=True
        ):
            seen = self._seen[slot]
            if data == _LEFT:
                del self._seen[slot]
                continue
            try:
                entry = msgspec.json.decode(self._seal.open(data, self._prefix, _text(life), str(slot)), type=_Slot)
                member = Member.decode(entry.record)
            except (MembershipError, *UNREADABLE):
                ignored += 1  # not ours to clear
                continue
            unreadable.discard(slot)
            if entry.beat > seen.beat:
                seen.beat, seen.when = entry.beat, now
            elif now - seen.when > entry.ttl:
                if store.compare_set(keys[slot], data, _LEFT) == _LEFT:  # not if it has been renewed just now
                    del self._seen[slot]
                continue
            members[member.id] = member
        for slot in unreadable & self._seen.keys():
            if now - self._seen[slot].when > _TAKING_SECONDS:
                del self._seen[slot]  # its member died before it wrote, or what stands there is no member's
        self._seal.ignored(ignored, f"{self._where[0]}:{self._where[1]}")
        return members

    def _encode(self, life: bytes, slot: int, entry: _Slot) -> bytes:
        return self._seal.close(msgspec.json.encode(entry), self._prefix, _text(life), str(slot))

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
            # Left to itself it listens on every address. No world size, and nobody is waited for: members come and go.
            listener = _listen(host, port)
            self._server = TCPStore(
                host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
            )
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


def _text(life: bytes) -> str:
    return life.decode(errors="replace")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket at this address alone. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener
