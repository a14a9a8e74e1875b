"""A peer's life is told in order, whoever is up first; and neither strangers nor many honest peers stop connecting."""

from __future__ import annotations

import random
import secrets
import threading
import time

import pytest
from beds import patient

from railwire import ConnectTimeout, Peer, TransferEngine, wire
from railwire.testing import SimulatedFabric


def eventually(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + patient(seconds)
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@pytest.mark.parametrize("kind", ["sim", "tcp://127.0.0.1"])
def test_the_acceptors_first_message_arrives(kind: str) -> None:
    with SimulatedFabric() as fabric:

        def engine(name: str) -> TransferEngine:
            return TransferEngine(nics=[fabric.nic(name) if kind == "sim" else kind], name=name)

        with engine("server") as server:
            sent = []
            server.on_peer(lambda peer: sent.append(server.send(peer, b"hello")))
            for i in range(20):
                with engine(f"c{i}") as client:
                    client.connect(server.address)
                    peer, message = client.receive(patient(5))
                    assert (peer.name, message) == ("server", b"hello")


def test_news_of_a_peer_come_in_order() -> None:
    """Up, its messages, lost: for each of many peers that go as soon as they have spoken."""
    with SimulatedFabric() as fabric, TransferEngine(nics=[fabric.nic("s")], name="server") as server:
        told: dict[str, list[str]] = {}
        everything = threading.Lock()

        def tell(peer: Peer, what: str) -> None:
            with everything:
                told.setdefault(peer.name, []).append(what)

        def on_peer(peer: Peer) -> None:
            tell(peer, "up")
            peer.lost.add_done_callback(lambda _: tell(peer, "lost"))

        server.on_peer(on_peer)
        server.on_message(lambda peer, message: tell(peer, message.decode()))
        for i in range(30):
            with TransferEngine(nics=[fabric.nic(f"c{i}")], name=f"c{i}") as client:
                peer = client.connect(server.address)
                for k in range(3):
                    client.send(peer, str(k).encode()).wait(patient(5))
        assert eventually(lambda: len(told) == 30 and all(news[-1] == "lost" for news in told.values()))
        assert all(news == ["up", "0", "1", "2", "lost"] for news in told.values()), told


def test_connect_to_a_peer_that_is_lost_at_once_returns_it_lost() -> None:
    """No KeyError, and its loss is told."""
    with SimulatedFabric() as fabric, TransferEngine(nics=[fabric.nic("s")], name="server") as server:
        server.on_peer(lambda peer: peer.close_async())
        for i in range(50):
            with TransferEngine(nics=[fabric.nic(f"c{i}")], name=f"c{i}") as client:
                peer = client.connect(server.address)
                assert "closed" in peer.lost.wait(patient(5))
                assert peer not in client.peers


def test_a_connect_that_times_out_leaves_nothing_on_either_side() -> None:
    """Whatever the moment: afterwards both are connected, or neither is."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    choice = random.Random(seed)
    outcomes = set()
    with (
        SimulatedFabric(max_delay_us=1000, seed=seed) as fabric,
        TransferEngine(nics=[fabric.nic("s")], name="server", liveness=0.5) as server,
    ):
        for i in range(40):
            with TransferEngine(nics=[fabric.nic(f"c{i}")], name=f"c{i}", liveness=0.5) as client:
                try:
                    client.connect(server.address, timeout=choice.uniform(0, 0.02))
                except ConnectTimeout:
                    outcomes.add(False)
                    assert eventually(lambda: not server.peers and not client.peers), i
                    assert eventually(lambda client=client: not client._native.stats()["peers"]), i
                else:
                    outcomes.add(True)
                    assert len(client.peers) == 1
                    assert eventually(lambda: len(server.peers) == 1)
            assert eventually(lambda: not server.peers)
    assert outcomes == {False, True}  # else the times above say nothing


def test_strangers_who_only_say_hello_are_forgotten_and_stop_nobody() -> None:
    """2,000 HELLOs with return addresses that lead nowhere."""
    with (
        SimulatedFabric() as fabric,
        TransferEngine(nics=[fabric.nic("s")], name="server", secret="s3cret") as server,
        TransferEngine(nics=[fabric.nic("good")], name="good", secret="s3cret") as good,
        TransferEngine(nics=[fabric.nic("bad")], name="bad") as bad,
    ):
        address, control = bad._address, server._native.nic_addresses()[0]
        for i in range(2000):
            nowhere = wire.NicAddress("sim", "n", f"nowhere{i}".encode())
            source = wire.Address(address.version, secrets.token_bytes(16), "x", address.host, 0, 0, (nowhere,))
            hello = wire.Hello(wire.VERSION, secrets.randbits(63), server.incarnation, source, secrets.token_bytes(16))
            bad._native.send_handshake(0, control, wire.encode(hello))
        start = time.monotonic()
        good.connect(server.address, timeout=patient(8))
        assert time.monotonic() - start < patient(5)
        assert server._native.stats()["control_addresses"] <= 258
        assert not server._connector._answers or len(server._connector._answers) == 1


def test_a_thousand_honest_peers_connect_within_half_a_minute() -> None:
    """Not so few a second that the connections of the last half minute were too many (1,024 once)."""
    with (
        SimulatedFabric() as fabric,
        TransferEngine(nics=[fabric.nic("s")], name="server") as server,
        TransferEngine(nics=[fabric.nic("c")], name="client") as client,
    ):
        for _ in range(1100):
            client.connect(server.address, timeout=patient(5)).close()


def test_a_late_answer_to_a_challenge_is_challenged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A REQUEST that comes when its challenge has run out does not end the connect."""
    with (
        SimulatedFabric() as fabric,
        TransferEngine(nics=[fabric.nic("s")], name="server") as server,
        TransferEngine(nics=[fabric.nic("c")], name="client") as client,
    ):
        stale = iter([b"0" * 16])
        fresh = server._connector._cookie
        monkeypatch.setattr(server._connector, "_cookie", lambda hello, ago=0: next(stale, None) or fresh(hello, ago))
        assert client.connect(server.address, timeout=patient(5)).state == "connected"
