"""Prometheus metrics of engines; needs `prometheus-client` (the ``metrics`` extra).

::

    from prometheus_client import start_http_server
    from railwire.metrics import register

    register(engine)
    start_http_server(9400)

Everything comes from ``engine.stats()`` when Prometheus asks; nothing runs in between, and nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry

from railwire.errors import ClosedError


class Observed(Protocol):
    """What the collector needs of a ``TransferEngine``."""

    name: str

    def stats(self) -> dict[str, Any]: ...


# Key in stats() -> what it is.
_NIC_COUNTERS = {
    "bytes_written": "Bytes of payload written to peers.",
    "bytes_read": "Bytes of payload read from peers.",
    "work_requests": "Work requests posted.",
    "completions": "Completions taken from the completion queue.",
    "errors": "Work requests that ended with an error.",
    "immediates": "Immediates that arrived (one per arriving work request that carries one).",
    "messages": "Control messages that arrived.",
}
_PEER_COUNTERS = {
    "bytes_written": "Bytes of payload written to this peer.",
    "bytes_read": "Bytes of payload read from this peer.",
    "work_requests": "Work requests posted towards this peer.",
    "arrivals": "Arrivals from this peer.",
    "errors": "Work requests towards this peer that ended with an error.",
    "messages_sent": "Messages sent to this peer.",
    "messages_received": "Messages received from this peer.",
    "retransmissions": "Control records sent again because no acknowledgement came.",
}
_OUTCOMES = ("done", "failed", "cancelled")
_ENGINE_COUNTERS = {
    "arrivals": "Arrivals counted by the engine's immediate counters.",
    "bad_frames": "Frames from the network that were no valid frames.",
    "callback_errors": "Exceptions raised by user callbacks in this process.",
}
_ENGINE_GAUGES = {
    "regions": "Memory regions registered.",
    "pending_expectations": "Expectations that have not ended.",
}
_WORKER_COUNTERS = {
    "loops": "Turns of the engine's progress loop.",
    "sleeps": "Times that the engine's driver went to sleep.",
}


class EngineCollector(Collector):
    """Turns the stats of any number of engines into metrics named ``railwire_...``, labelled ``engine``.

    Closed engines are left out. Metrics of a peer end with the connection.
    """

    def __init__(self, engines: Iterable[Observed] = ()) -> None:
        self._engines: list[Observed] = []
        for engine in engines:
            self.add(engine)

    def add(self, engine: Observed) -> None:
        """From now on with this engine, too. ``ValueError`` if it is here already, or an open one of its name."""
        _check_new(engine, self._engines)
        self._engines.append(engine)

    def remove(self, engine: Observed) -> None:
        """No longer with this engine; ``ValueError`` if it was not here."""
        self._engines.remove(engine)

    def describe(self) -> Iterable[Metric]:
        """Nothing to check at registration: names do not depend on the engines."""
        return []

    def collect(self) -> Iterable[Metric]:
        """One pass over all engines; every metric family once."""
        all_stats: list[tuple[str, dict[str, Any]]] = []
        for engine in list(self._engines):
            try:
                all_stats.append((engine.name, engine.stats()))
            except ClosedError:
                continue
        yield from _families("nic", "nics", _NIC_COUNTERS, ("nic", "kind"), ("name", "kind"), all_stats)
        yield from _families("peer", "peers", _PEER_COUNTERS, ("peer", "peer_id"), ("name", "id"), all_stats)
        yield from _transfers(all_stats)
        for key, text in _ENGINE_COUNTERS.items():
            yield _counter(f"railwire_{key}", text, ["engine"], [([name], stats, key) for name, stats in all_stats])
        for key, text in _WORKER_COUNTERS.items():
            rows = [([name], stats["worker"], key) for name, stats in all_stats]
            yield _counter(f"railwire_worker_{key}", text, ["engine"], rows)
        for key, text in _ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(f"railwire_{key}", text, labels=["engine"])
            for name, stats in all_stats:
                if key in stats:
                    gauge.add_metric([name], stats[key])
            yield gauge
        connected = GaugeMetricFamily("railwire_peers", "Peers by state.", labels=["engine", "state"])
        for name, stats in all_stats:
            states = [peer["state"] for peer in stats["peers"]]
            for state in sorted({"connected", *states}):
                connected.add_metric([name, state], states.count(state))
        yield connected


def _counter(
    name: str, text: str, labels: list[str], rows: Iterable[tuple[list[str], Mapping[str, Any], str]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, counts, key in rows:
        if key in counts:
            family.add_metric(values, counts[key])
    return family


def _families(
    prefix: str,
    section: str,
    counters: Mapping[str, str],
    labels: tuple[str, ...],
    fields: tuple[str, ...],
    all_stats: list[tuple[str, dict[str, Any]]],
) -> Iterable[Metric]:
    for key, text in counters.items():
        rows = [
            ([engine, *(str(counts[field]) for field in fields)], counts, key)
            for engine, stats in all_stats
            for counts in stats[section]
        ]
        yield _counter(f"railwire_{prefix}_{key}", text, ["engine", *labels], rows)


def _transfers(all_stats: list[tuple[str, dict[str, Any]]]) -> Iterable[Metric]:
    submitted = CounterMetricFamily("railwire_transfers_submitted", "Transfers submitted.", labels=["engine"])
    ended = CounterMetricFamily(
        "railwire_transfers_ended", "Transfers by how they ended.", labels=["engine", "outcome"]
    )
    active = GaugeMetricFamily("railwire_transfers_active", "Transfers that have not ended.", labels=["engine"])
    for name, stats in all_stats:
        transfers = stats["transfers"]
        submitted.add_metric([name], transfers["submitted"])
        active.add_metric([name], transfers["active"])
        for outcome in _OUTCOMES:
            ended.add_metric([name, outcome], transfers[outcome])
    yield from (submitted, ended, active)


def register(*engines: Observed, registry: CollectorRegistry = REGISTRY) -> EngineCollector:
    """Adds the engines' metrics to a registry (Prometheus's default one) and returns their collector.

    Raises:
        ValueError: the registry has an engine already, or an open one of its name: each series would come twice, and
            Prometheus would refuse the whole page.
    """
    collector = EngineCollector(engines)
    # The registry does not say which collectors it has; what was taken out again may come back.
    for other in list(getattr(registry, "_collector_to_names", ())):
        if isinstance(other, EngineCollector):
            for engine in engines:
                _check_new(engine, other._engines)
    registry.register(collector)
    return collector


def _check_new(engine: Observed, known: Iterable[Observed]) -> None:
    for other in known:
        if other is engine:
            raise ValueError(f"engine {engine.name} is registered already")
        if other.name == engine.name and not getattr(other, "closed", False):
            raise ValueError(f"another engine is registered as {engine.name}: give one of them a name=")
