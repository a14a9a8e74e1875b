"""Prometheus metrics: every figure of stats() arrives under the right name and labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest

from railwire import TransferEngine
from railwire.errors import ClosedError
from railwire.metrics import EngineCollector, register
from railwire.testing import SimulatedFabric


class FakeEngine:
    """Stats without an engine. Every number is different, so that a mix-up shows."""

    def __init__(self, name: str, first: int) -> None:
        self.name = name
        self.closed = False
        n = iter(range(first, first + 1000))
        nic_keys = ("bytes_written", "bytes_read", "work_requests", "completions", "errors", "immediates", "messages")
        peer_keys = ("bytes_written", "bytes_read", "work_requests", "errors", "messages_sent", "messages_received")
        self._stats: dict[str, Any] = {
            "nics": [{"name": nic, "kind": "tcp", **{key: next(n) for key in nic_keys}} for nic in ("t0", "t1")],
            "peers": [
                {"name": "p", "id": i, "state": state, **{key: next(n) for key in peer_keys}}
                for i, state in ((1, "connected"), (2, "closing"))
            ],
            "transfers": {key: next(n) for key in ("submitted", "done", "failed", "cancelled", "active")},
            "arrivals": next(n) + 0.5,
            "pending_expectations": next(n),
            "regions": next(n),
            "bad_frames": next(n),
            "callback_errors": next(n),
            "worker": {"loops": next(n), "sleeps": next(n), "post_latency_ns": [1, 2]},
        }

    def stats(self) -> dict[str, Any]:
        if self.closed:
            raise ClosedError("the engine is closed")
        return self._stats


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_every_number_of_stats_arrives(registry: CollectorRegistry) -> None:
    engine = FakeEngine("e", 100)
    register(engine, registry=registry)
    stats = engine.stats()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"railwire_{name}", {"engine": "e", **labels})

    for nic in stats["nics"]:
        for key in set(nic) - {"name", "kind"}:
            assert value(f"nic_{key}_total", nic=nic["name"], kind="tcp") == nic[key]
    for peer in stats["peers"]:
        for key in set(peer) - {"name", "id", "state"}:
            assert value(f"peer_{key}_total", peer="p", peer_id=str(peer["id"])) == peer[key]
    for outcome in ("done", "failed", "cancelled"):
        assert value("transfers_ended_total", outcome=outcome) == stats["transfers"][outcome]
    assert value("transfers_submitted_total") == stats["transfers"]["submitted"]
    assert value("transfers_active") == stats["transfers"]["active"]
    assert value("arrivals_total") == stats["arrivals"]
    for key in ("bad_frames", "callback_errors"):
        assert value(f"{key}_total") == stats[key]
    for key in ("regions", "pending_expectations"):
        assert value(key) == stats[key]
    for key in ("loops", "sleeps"):
        assert value(f"worker_{key}_total") == stats["worker"][key]
    assert value("peers", state="connected") == 1
    assert value("peers", state="closing") == 1


def test_families_are_named_once_for_several_engines(registry: CollectorRegistry) -> None:
    collector = register(FakeEngine("a", 100), registry=registry)
    collector.add(FakeEngine("b", 5000))
    text = generate_latest(registry).decode()
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    assert registry.get_sample_value("railwire_regions", {"engine": "a"}) != registry.get_sample_value(
        "railwire_regions", {"engine": "b"}
    )


def test_a_closed_engine_is_left_out(registry: CollectorRegistry) -> None:
    a, b = FakeEngine("a", 100), FakeEngine("b", 5000)
    register(a, b, registry=registry)
    a.closed = True
    assert registry.get_sample_value("railwire_regions", {"engine": "a"}) is None
    assert registry.get_sample_value("railwire_regions", {"engine": "b"}) is not None


def test_removed_engines_and_no_engine() -> None:
    engine = FakeEngine("a", 100)
    collector = EngineCollector([engine])
    collector.remove(engine)
    assert all(not family.samples for family in collector.collect())
    with pytest.raises(ValueError, match="not in list"):
        collector.remove(engine)


def test_a_real_engine(registry: CollectorRegistry) -> None:
    with (
        SimulatedFabric() as fabric,
        TransferEngine(nics=[fabric.nic("a")], name="sender") as a,
        TransferEngine(nics=[fabric.nic("b")], name="receiver") as b,
    ):
        register(a, b, registry=registry)
        source, target = a.register(np.ones(4096, np.uint8)), b.register(np.zeros(4096, np.uint8))
        a.connect(b.address)
        arrived = b.counter(1).expect(2, timeout=10)
        a.write(source[:1000], target.descriptor[:1000], imm=1).wait(10)
        a.write(source[:24], target.descriptor[2000:2024], imm=1).wait(10)
        arrived.wait()
        nic = {"engine": "sender", "nic": fabric.nic("a"), "kind": "sim"}
        assert registry.get_sample_value("railwire_nic_bytes_written_total", nic) == 1024
        assert registry.get_sample_value("railwire_transfers_ended_total", {"engine": "sender", "outcome": "done"}) == 2
        assert registry.get_sample_value("railwire_arrivals_total", {"engine": "receiver"}) == 2
        assert registry.get_sample_value("railwire_peers", {"engine": "receiver", "state": "connected"}) == 1


def test_an_engine_comes_once(registry: CollectorRegistry) -> None:
    one, two = FakeEngine("one", 100), FakeEngine("two", 1000)
    collector = register(one, registry=registry)
    with pytest.raises(ValueError, match="one is registered already"):
        register(two, one, registry=registry)
    with pytest.raises(ValueError, match="registered already"):
        collector.add(one)
    with pytest.raises(ValueError, match="another engine is registered as one"):
        register(FakeEngine("one", 5), registry=registry)
    register(two, registry=registry)  # the call that was refused has left nothing behind
    page = generate_latest(registry).decode()
    series = [line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series))

    registry.unregister(collector)
    register(one, registry=registry)
    two.closed = True
    register(FakeEngine("two", 9), registry=registry)  # the same name after a restart of the engine


def test_engines_without_a_name_have_series_of_their_own(registry: CollectorRegistry) -> None:
    with SimulatedFabric() as fabric:
        engines = [TransferEngine(nics=[fabric.nic(name)]) for name in "ab"]
        register(*engines, registry=registry)
        page = generate_latest(registry).decode()
        series = [line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")]
        assert len(series) == len(set(series))
        for engine in engines:
            engine.close()
