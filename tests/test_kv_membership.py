"""The registries of members: in memory, over torch's TCPStore, over etcd. One set of promises, kept by all three."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from railwire.kvcache.router.etcd import EtcdMembership
from railwire.kvcache.router.membership import (
    Member,
    Membership,
    MembershipError,
    MembershipLost,
    keep,
)
from railwire.kvcache.router.memory import InMemoryMembership
from railwire.kvcache.router.tcpstore import TCPStoreMembership


def member(name: str, **more: Any) -> Member:
    settings: dict[str, Any] = {
        "role": "prefill",
        "url": f"http://{name}:1",
        "model": "m",
        "fingerprint": "f",
        "block_tokens": 16,
        "num_blocks": 64,
        "context": 1000,
        "vocab": 100,
        "ranks": (bytes(range(256)), b""),
        **more,
    }
    return Member(id=name, **settings)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def etcd_url(tmp_path: Path) -> Iterator[str]:
    beside = Path(sys.executable).parent / "etcd"  # where scripts/etcd.sh puts it
    binary = shutil.which("etcd") or (str(beside) if beside.exists() else None)
    if binary is None:
        pytest.skip("there is no etcd here: scripts/etcd.sh gets one")
    client, peer = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    folder = tmp_path
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary, "--data-dir", str(folder / "data"),
                "--listen-client-urls", client, "--advertise-client-urls", client,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", f"default={peer}", "--unsafe-no-fsync",
                # A lease lasts at least an election: with the default of one second, 2 s instead of 1.
                "--heartbeat-interval", "50", "--election-timeout", "300",
            ],
            stdout=log,
            stderr=log,
        )  # fmt: skip
        try:
            _wait_until_healthy(client, process, folder / "log")
            yield client
        finally:
            process.kill()
            process.wait(10.0)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 20.0
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1.0) as response:
            if b"true" in response.read():
                return
        time.sleep(0.05)
    raise AssertionError(f"etcd does not come up:\n{log.read_text(errors='replace')[-2000:]}")


Open = Callable[[], Membership]
"""Another client of the same registry."""


@pytest.fixture(params=["memory", "tcpstore", "etcd"])
def registry(request: pytest.FixtureRequest) -> Callable[[], Open]:
    """Makes, inside the event loop, a function that opens clients of one new registry."""
    if request.param == "memory":

        def memory() -> Open:
            only = InMemoryMembership()
            return lambda: only

        return memory
    if request.param == "tcpstore":
        pytest.importorskip("torch", reason="a TCPStore needs torch")

        def tcpstore() -> Open:
            port, first = free_port(), [True]

            def open_one() -> Membership:
                server, first[0] = first[0], False
                return TCPStoreMembership("127.0.0.1", port, server=server, timeout=5.0, interval=0.02)

            return open_one

        return tcpstore
    url = request.getfixturevalue("etcd_url")

    def etcd() -> Open:
        prefix = f"/test/{time.monotonic_ns()}"
        return lambda: EtcdMembership([url], prefix=prefix, interval=0.02)

    return etcd


def run(main: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60.0))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def opened(registry: Callable[[], Open], count: int) -> AsyncGenerator[list[Membership], None]:
    open_one = registry()
    clients = []
    for _ in range(count):
        client = open_one()
        await client.snapshot()  # the first one keeps the TCPStore
        clients.append(client)
    try:
        yield clients
    finally:
        for client in reversed(clients):
            await client.close()


async def eventually(check: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not await check():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.02)


def test_join_renew_leave(registry: Callable[[], Open]) -> None:
    async def main() -> None:
        async with opened(registry, 3) as (reader, one, two):
            assert await reader.snapshot() == {}
            await one.join(member("a"), 30.0)
            await two.join(member("b", role="decode"), 30.0)
            assert await reader.snapshot() == {"a": member("a"), "b": member("b", role="decode")}
            await one.renew(member("a", state="draining", load=7))
            assert (await reader.snapshot())["a"] == member("a", state="draining", load=7)
            await one.leave("a")
            await one.leave("a")  # again is no error
            assert await reader.snapshot() == {"b": member("b", role="decode")}
            with pytest.raises(MembershipLost):
                await one.renew(member("a"))

    run(main())


def test_who_stops_renewing_disappears_and_others_stay(registry: Callable[[], Open]) -> None:
    async def main() -> None:
        async with opened(registry, 3) as (reader, dead, alive):
            await dead.join(member("dead"), 1.0)
            await alive.join(member("alive"), 1.0)
            assert set(await reader.snapshot()) == {"dead", "alive"}
            began = time.monotonic()

            async def only_one() -> bool:
                await alive.renew(member("alive"))
                return set(await reader.snapshot()) == {"alive"}

            await eventually(only_one)
            assert time.monotonic() - began > 0.8  # not before its time
            await dead.join(member("dead"), 1.0)  # and it may come back
            assert set(await reader.snapshot()) == {"dead", "alive"}

    run(main())


def test_watch_tells_changes_and_only_changes(registry: Callable[[], Open]) -> None:
    async def main() -> None:
        async with opened(registry, 2) as (reader, one):
            seen: list[dict[str, str]] = []

            async def follow() -> None:
                async for members in reader.watch():
                    seen.append({key: value.state for key, value in members.items()})

            async def is_last(wanted: dict[str, str]) -> bool:
                return bool(seen) and seen[-1] == wanted

            task = asyncio.create_task(follow())
            await eventually(lambda: is_last({}))
            await one.join(member("a"), 30.0)
            await eventually(lambda: is_last({"a": "ready"}))
            await one.renew(member("a"))
            await asyncio.sleep(0.2)
            await one.renew(member("a", state="draining"))
            await eventually(lambda: is_last({"a": "draining"}))
            await one.leave("a")
            await eventually(lambda: is_last({}))
            assert seen == [{}, {"a": "ready"}, {"a": "draining"}, {}]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(main())


def test_keep_renews_and_publishes_changes_at_once(registry: Callable[[], Open]) -> None:
    async def main() -> None:
        async with opened(registry, 2) as (reader, one):
            now = [member("a")]
            changed = asyncio.Event()
            task = asyncio.create_task(keep(one, lambda: now[0], 1.0, changed))

            async def there() -> bool:
                return (await reader.snapshot()).get("a") == now[0]

            await eventually(there)
            for _ in range(25):  # two and a half times its time to live
                await asyncio.sleep(0.1)
                assert await there()
            now[0] = member("a", state="draining")
            changed.set()
            await eventually(there, 0.3)
            await one.leave("a")  # as if the registry had lost it: it joins again
            await eventually(there, 3.0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(main())


def test_many_join_at_once(registry: Callable[[], Open]) -> None:
    async def main() -> None:
        async with opened(registry, 2) as (reader, one):
            await asyncio.gather(*(one.join(member(f"m{i}"), 30.0) for i in range(40)))
            assert set(await reader.snapshot()) == {f"m{i}" for i in range(40)}
            await asyncio.gather(*(one.leave(f"m{i}") for i in range(0, 40, 2)))
            assert set(await reader.snapshot()) == {f"m{i}" for i in range(1, 40, 2)}

    run(main())


def test_a_registry_that_is_not_there_is_said_plainly() -> None:
    async def main() -> None:
        etcd = EtcdMembership([f"http://127.0.0.1:{free_port()}"], timeout=1.0)
        with pytest.raises(MembershipError, match=r"127\.0\.0\.1"):
            await etcd.join(member("a"), 5.0)

    run(main())
    with pytest.raises(ValueError):
        EtcdMembership(["10.0.0.1:2379"])


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


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"\xff", b"[1]", b'{"id":"a"}', member("a").encode()[:-1], b" " * (1 << 21)],
    ids=["empty", "object", "binary", "list", "parts", "cut", "long"],
)
def test_a_record_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(MembershipError):
        Member.decode(data)


@pytest.mark.parametrize("wrong", [{"url": "file:///etc/passwd"}, {"block_tokens": 0}, {"role": "boss"}, {"vocab": -1}])
def test_a_record_with_values_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MembershipError):
        Member.decode(member("a", **wrong).encode())
