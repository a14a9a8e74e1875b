"""The registry over torch's TCPStore: restarts, slots, addresses."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest
from registries import eventually, free_port, member, run

from railwire.kvcache.router.membership import (
    Member,
    MembershipError,
    MembershipLost,
)
from railwire.kvcache.router.tcpstore import TCPStoreMembership


def test_a_tcpstore_that_is_not_there_is_said_plainly() -> None:
    pytest.importorskip("torch", reason="a TCPStore needs torch")

    async def main() -> None:
        port = free_port()
        store = TCPStoreMembership("127.0.0.1", port, timeout=1.0)
        with pytest.raises(MembershipError, match=str(port)):
            await store.snapshot()
        await store.close()
        with pytest.raises(MembershipError, match="closed"):
            await store.snapshot()

    run(main())


def test_a_watch_survives_the_loss_of_the_registry() -> None:
    """Members known last stay known; when the registry is there again, its word counts."""
    pytest.importorskip("torch", reason="a TCPStore needs torch")

    async def main() -> None:
        port = free_port()
        server = TCPStoreMembership("127.0.0.1", port, server=True, timeout=2.0, interval=0.02)
        await server.join(member("a"), 30.0)
        reader = TCPStoreMembership("127.0.0.1", port, timeout=1.0, interval=0.02)
        seen: list[set[str]] = []

        async def follow() -> None:
            async for members in reader.watch():
                seen.append(set(members))

        async def is_last(wanted: set[str]) -> bool:
            return bool(seen) and seen[-1] == wanted

        task = asyncio.create_task(follow())
        await eventually(lambda: is_last({"a"}))
        await server.close()
        await asyncio.sleep(0.5)
        assert seen[-1] == {"a"} and not task.done()
        again = TCPStoreMembership("127.0.0.1", port, server=True, timeout=2.0, interval=0.02)
        await again.join(member("b"), 30.0)
        await eventually(lambda: is_last({"b"}))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await reader.close()
        await again.close()

    run(main())


async def read_again(client: TCPStoreMembership) -> dict[str, Member]:
    """What a client reads that may still be connected to a store that is no more: its first word then fails."""
    with contextlib.suppress(MembershipError):
        return await client.snapshot()
    return await client.snapshot()


def test_who_joins_a_restarted_store_is_seen_by_those_who_knew_the_old_one() -> None:
    """Slots are counted anew: a router that had seen slot 1 left skipped whoever had it afterwards, for good, unless
    it happened to look while there were fewer slots than before."""
    pytest.importorskip("torch", reason="a TCPStore needs torch")

    async def main() -> None:
        port = free_port()
        server = TCPStoreMembership("127.0.0.1", port, server=True, timeout=2.0)
        reader = TCPStoreMembership("127.0.0.1", port, timeout=2.0)
        await server.join(member("old"), 30.0)
        await server.join(member("b"), 30.0)
        await server.leave("old")
        assert set(await reader.snapshot()) == {"b"}
        await server.close()
        again = TCPStoreMembership("127.0.0.1", port, server=True, timeout=2.0)
        for name in ("a", "b", "c"):
            await again.join(member(name), 30.0)
        assert set(await read_again(reader)) == {"a", "b", "c"}
        await reader.close()
        await again.close()

    run(main())


def test_members_of_a_store_that_restarts_take_no_slots_of_each_other() -> None:
    """Who came first after the restart got slot 1; whoever had had it before renewed his record into it, or marked it
    as left."""
    pytest.importorskip("torch", reason="a TCPStore needs torch")

    async def main() -> None:
        port = free_port()
        server = TCPStoreMembership("127.0.0.1", port, server=True, timeout=2.0)
        await server.snapshot()
        one, two, three = (TCPStoreMembership("127.0.0.1", port, timeout=2.0) for _ in range(3))
        await one.join(member("a"), 30.0)
        await two.join(member("b"), 30.0)
        await server.close()
        again = TCPStoreMembership("127.0.0.1", port, server=True, timeout=2.0)
        await again.join(member("c"), 30.0)
        await again.join(member("d"), 30.0)
        await read_again(one)
        await read_again(two)
        with pytest.raises(MembershipLost):
            await one.renew(member("a"))
        await two.leave("b")
        assert set(await read_again(three)) == {"c", "d"}
        for client in (one, two, three, again):
            await client.close()

    run(main())


def test_a_tcpstore_listens_on_its_own_address_alone() -> None:
    pytest.importorskip("torch", reason="a TCPStore needs torch")

    async def main() -> None:
        port = free_port()
        store = TCPStoreMembership("127.0.0.1", port, server=True)
        await store.snapshot()
        try:
            with pytest.raises(OSError):  # all of 127/8 is this machine
                socket.create_connection(("127.0.0.2", port), 1.0).close()
            assert listening(port) == {"127.0.0.1"}
        finally:
            await store.close()

    run(main())


def listening(port: int) -> set[str]:
    """Addresses at which somebody on this machine listens on the port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]) if table == "tcp" else address)
    return found


def test_a_signed_record_is_worth_nothing_at_another_place() -> None:
    pytest.importorskip("torch", reason="a TCPStore needs torch")

    async def main() -> None:
        port = free_port()
        reader = TCPStoreMembership("127.0.0.1", port, server=True, secret="s")
        await reader.join(member("a"), 0.2)
        assert set(await reader.snapshot()) == {"a"}
        store = reader._client
        copy = bytes(store.get("railwire/kv/1"))
        await asyncio.sleep(0.4)
        assert await reader.snapshot() == {}  # a's time is over
        slot = store.add("railwire/kv/count", 1)
        store.set(f"railwire/kv/{slot}", copy)
        assert await reader.snapshot() == {}
        await reader.close()

    run(main())


def test_members_that_crashed_are_cleared_and_not_looked_at_again() -> None:
    pytest.importorskip("torch", reason="a TCPStore needs torch")

    async def main() -> None:
        port = free_port()
        router = TCPStoreMembership("127.0.0.1", port, server=True)
        crashed = TCPStoreMembership("127.0.0.1", port)
        alive = TCPStoreMembership("127.0.0.1", port)
        for index in range(50):
            await router.join(member(f"m{index}"), 0.3) if index == 0 else await crashed.join(member(f"m{index}"), 0.3)
        await alive.join(member("alive"), 30.0)
        assert len(await router.snapshot()) == 51
        await asyncio.sleep(0.5)
        assert set(await router.snapshot()) == {"alive"}
        assert len(router._seen) == 1  # slots that the next look asks the store about
        late = TCPStoreMembership("127.0.0.1", port)  # a reader that comes later sees nobody of them for a moment
        assert set(await late.snapshot()) == {"alive"}
        # One that was only slow learns that it is lost, and comes again.
        with pytest.raises(MembershipLost):
            await crashed.renew(member("m7"))
        await crashed.join(member("m7"), 30.0)
        assert set(await router.snapshot()) == {"alive", "m7"}
        for one in (late, alive, crashed, router):
            await one.close()

    run(main())


def test_a_slot_that_nobody_ever_writes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="a TCPStore needs torch")
    monkeypatch.setattr("railwire.kvcache.router.tcpstore._TAKING_SECONDS", 0.2)

    async def main() -> None:
        store = TCPStoreMembership("127.0.0.1", free_port(), server=True)
        await store.join(member("a"), 30.0)
        store._client.add("railwire/kv/count", 1)  # whoever took it died in the middle
        store._client.add("railwire/kv/count", 1)
        store._client.set("railwire/kv/3", b"no member")
        assert set(await store.snapshot()) == {"a"} and len(store._seen) == 3
        await asyncio.sleep(0.3)
        assert set(await store.snapshot()) == {"a"} and len(store._seen) == 1
        await store.close()

    run(main())
