"""The registries of members: in memory, over torch's TCPStore, over etcd. One set of promises, kept by all three."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registries import eventually, free_port, member, run

from railwire.kvcache.router.etcd import EtcdMembership
from railwire.kvcache.router.membership import (
    Member,
    Membership,
    MembershipError,
    MembershipLost,
    keep,
)
from railwire.kvcache.router.memory import InMemoryMembership
from railwire.kvcache.router.registry import etcd_credentials, open_membership, without_password
from railwire.kvcache.router.tcpstore import TCPStoreMembership


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


@pytest.mark.parametrize("kind", ["tcpstore", "etcd"])
def test_with_a_secret_only_what_is_signed_with_it_counts(
    kind: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "tcpstore":
        pytest.importorskip("torch", reason="a TCPStore needs torch")
        port, first = free_port(), [True]

        def client(secret: str | None) -> Membership:
            server, first[0] = first[0], False
            return TCPStoreMembership("127.0.0.1", port, server=server, secret=secret)
    else:
        url = request.getfixturevalue("etcd_url")

        def client(secret: str | None) -> Membership:
            return EtcdMembership([url], secret=secret)

    async def main() -> None:
        reader, friend, stranger, other = client("right"), client("right"), client(None), client("wrong")
        await reader.snapshot()
        await friend.join(member("friend"), 30.0)
        await stranger.join(member("stranger"), 30.0)
        await other.join(member("other"), 30.0)
        for _ in range(3):
            assert set(await reader.snapshot()) == {"friend"}
        await friend.renew(member("friend", load=7))
        assert (await reader.snapshot())["friend"].load == 7
        assert len([r for r in caplog.records if "--secret" in r.message]) == 1  # once, not each time
        for one in (friend, stranger, other, reader):
            await one.close()

    run(main())


def etcd_post(url: str, path: str, **body: object) -> None:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10.0) as response:
        response.read()


def test_etcd_with_credentials(etcd_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    etcd_post(etcd_url, "/v3/auth/user/add", name="root", password="hard to guess: @/")
    etcd_post(etcd_url, "/v3/auth/user/grant", user="root", role="root")
    etcd_post(etcd_url, "/v3/auth/enable")
    where = etcd_url.removeprefix("http://")

    async def main() -> None:
        with pytest.raises(MembershipError):
            await open_membership(f"etcd://{where}").snapshot()
        with pytest.raises(MembershipError, match="auth"):
            await open_membership(f"etcd://root:wrong@{where}").snapshot()
        registry = open_membership(f"etcd://root:hard%20to%20guess%3A%20%40%2F@{where}")
        await registry.join(member("a"), 30.0)
        assert set(await registry.snapshot()) == {"a"}
        registry._token = "forgotten.1"  # type: ignore[attr-defined]  # as after a restart of etcd
        await registry.renew(member("a", load=3))
        assert (await registry.snapshot())["a"].load == 3
        await registry.leave("a")
        # On a worker's command line stands no password.
        monkeypatch.setenv("RAILWIRE_ETCD_PASSWORD", "hard to guess: @/")
        assert await open_membership(f"etcd://root@{where}").snapshot() == {}

    run(main())


def test_what_goes_to_another_process_of_an_etcd_url() -> None:
    url = "etcd://me:p%40ss@10.0.0.1:2379,10.0.0.2:2379/prefix"
    assert without_password(url) == "etcd://10.0.0.1:2379,10.0.0.2:2379/prefix"
    assert etcd_credentials(url) == {"RAILWIRE_ETCD_USER": "me", "RAILWIRE_ETCD_PASSWORD": "p@ss"}
    assert without_password("tcpstore://h:1/p") == "tcpstore://h:1/p" and etcd_credentials("tcpstore://h:1") == {}


def test_a_registry_that_others_can_reach_without_a_secret_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    open_membership("etcd://127.0.0.1:2379")
    open_membership("tcpstore://localhost:29600")
    open_membership("etcd://10.0.0.1:2379", secret="s")
    assert not caplog.records
    open_membership("etcd://me:password@10.0.0.1:2379")
    assert "10.0.0.1:2379" in caplog.text and "RAILWIRE_SECRET" in caplog.text and "password" not in caplog.text
