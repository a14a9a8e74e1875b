"""What the connector counts, through vLLM's own hooks: its log line, and its Prometheus endpoint.

The payload is a flat dict of numbers and lists of numbers, since vLLM carries it from worker to front end.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.v1.metrics.utils import create_metric_per_engine

_LISTS = {
    "receive_seconds": "Seconds from a request's blocks to its last page.",
    "receive_bytes": "Bytes of KV per received request.",
    "push_bytes": "Bytes of KV per pushed request.",
    "push_hidden": "Share of a request's bytes that had landed before its prefill ended.",
    "layer_seconds": "Seconds that pushing a layer took from the engine, per step and layer.",
    "step_seconds": "Seconds that the connector took from the engine besides, per step.",
}
_COUNTS = {
    "failed_receives": "Requests whose KV did not come.",
    "cancelled_receives": "Requests that ended while they waited for their KV.",
    "failed_pushes": "Requests whose KV could not be pushed.",
    "cancelled_pushes": "Requests whose KV the decoder wanted no more.",
    "preempted_pushes": "Pushes whose blocks vLLM took away before they were done.",
}
_GAUGES = {
    "open_pushes": "Requests whose blocks are held for decoders.",
    "open_receives": "Requests that wait for their KV.",
    "open_tickets": "Tickets whose pages may be written.",
    "used_immediates": "Immediates that tickets hold.",
    "regions": "Memory regions registered with the transfer engine.",
}
_BUCKETS = {
    "receive_seconds": [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30],
    "receive_bytes": [float(2**exponent) for exponent in range(14, 36, 2)],
    "push_bytes": [float(2**exponent) for exponent in range(14, 36, 2)],
    "push_hidden": [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0],
    "step_seconds": [1e-5, 2.5e-5, 5e-5, 1e-4, 1.5e-4, 2.5e-4, 5e-4, 1e-3, 5e-3],
    "layer_seconds": [1e-5, 2.5e-5, 5e-5, 1e-4, 1.5e-4, 2.5e-4, 5e-4, 1e-3, 5e-3],
}


class TransferStats(KVConnectorStats):
    """The container that vLLM hands around; see ``_LISTS``, ``_COUNTS`` and ``_GAUGES`` for its keys.
    A gauge is there when it has changed."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {**{name: [] for name in _LISTS}, **dict.fromkeys(_COUNTS, 0)}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name in _LISTS:
            self.data[name] = [*self.data[name], *other.data.get(name, [])]
        for name in _COUNTS:
            self.data[name] += other.data.get(name, 0)
        self.data.update({name: other.data[name] for name in _GAUGES if name in other.data})
        return self

    def reduce(self) -> dict[str, int | float]:
        data = self.data
        summary: dict[str, int | float] = {
            "Received": len(data["receive_bytes"]),
            "Received MB": round(sum(data["receive_bytes"]) / 1e6, 3),
            "Pushed": len(data["push_bytes"]),
            "Pushed MB": round(sum(data["push_bytes"]) / 1e6, 3),
        }
        if data["receive_seconds"]:
            summary["P90 receive (ms)"] = round(1e3 * float(np.percentile(data["receive_seconds"], 90)), 3)
        if data["push_hidden"]:
            summary["Avg hidden"] = round(float(np.mean(data["push_hidden"])), 3)
        if data["layer_seconds"]:
            summary["P90 layer (us)"] = round(1e6 * float(np.percentile(data["layer_seconds"], 90)), 1)
        for name in _COUNTS:
            if data[name]:
                summary[name.replace("_", " ").capitalize()] = data[name]
        return summary

    def is_empty(self) -> bool:
        return not any(self.data[name] for name in (*_LISTS, *_COUNTS)) and not self.data.keys() & _GAUGES.keys()


class RailwireStats:
    """Filled by several threads; emptied once per step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = TransferStats()
        self._gauges: dict[str, int] = {}

    def count(self, name: str) -> None:
        with self._lock:
            self._now.data[name] += 1

    def received(self, nbytes: int, seconds: float) -> None:
        with self._lock:
            self._now.data["receive_bytes"].append(nbytes)
            self._now.data["receive_seconds"].append(seconds)

    def pushed(self, nbytes: int, hidden: float) -> None:
        with self._lock:
            self._now.data["push_bytes"].append(nbytes)
            self._now.data["push_hidden"].append(hidden)

    def layer(self, seconds: float) -> None:
        with self._lock:
            self._now.data["layer_seconds"].append(seconds)

    def step(self, seconds: float) -> None:
        with self._lock:
            self._now.data["step_seconds"].append(seconds)

    def gauges(self, values: dict[str, int]) -> None:
        """Of now; what has not changed is not told again."""
        with self._lock:
            changed = {name: value for name, value in values.items() if self._gauges.get(name) != value}
            self._now.data.update(changed)
            self._gauges.update(changed)

    def take(self) -> TransferStats | None:
        with self._lock:
            if self._now.is_empty():
                return None
            taken, self._now = self._now, TransferStats()
            return taken


class RailwirePromMetrics(KVConnectorPromMetrics):
    """``vllm:railwire_*`` on vLLM's own /metrics."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, Any] = {}
        for name, text in _LISTS.items():
            histogram = self._histogram_cls(
                name=f"vllm:railwire_{name}", documentation=text, buckets=_BUCKETS[name], labelnames=labelnames
            )
            self._metrics[name] = create_metric_per_engine(histogram, per_engine_labelvalues)
        for name, text in _COUNTS.items():
            counter = self._counter_cls(name=f"vllm:railwire_{name}", documentation=text, labelnames=labelnames)
            self._metrics[name] = create_metric_per_engine(counter, per_engine_labelvalues)
        for name, text in _GAUGES.items():
            gauge = self._gauge_cls(
                name=f"vllm:railwire_{name}", documentation=text, labelnames=labelnames, multiprocess_mode="mostrecent"
            )
            self._metrics[name] = create_metric_per_engine(gauge, per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name in _LISTS:
            for value in transfer_stats_data.get(name, ()):
                self._metrics[name][engine_idx].observe(value)
        for name in _COUNTS:
            if transfer_stats_data.get(name):
                self._metrics[name][engine_idx].inc(transfer_stats_data[name])
        for name in _GAUGES:
            if name in transfer_stats_data:
                self._metrics[name][engine_idx].set(transfer_stats_data[name])
