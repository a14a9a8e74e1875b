"""The connector's half in a vLLM worker: the transfer engine of this rank, its sender and its receiver."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from railwire.engine import TransferEngine
from railwire.errors import ConfigurationError, RailwireError
from railwire.integrations.vllm.layers import CpuClock, CudaClock, LayerClock
from railwire.integrations.vllm.layout import describe, fingerprint, gather
from railwire.integrations.vllm.options import Options
from railwire.integrations.vllm.receiving import Receiving
from railwire.integrations.vllm.sending import Sending
from railwire.integrations.vllm.stats import RailwireStats
from railwire.integrations.vllm.steps import Handshake, Step
from railwire.kvcache import Receiver, Sender
from railwire.kvcache.slots import MAX_SLOTS
from railwire.memory import MemoryRegion

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = init_logger("vllm.railwire")


class ConnectorWorker:
    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, options: Options) -> None:
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        self.vllm_config = vllm_config
        self.kv_cache_config = kv_cache_config
        self.options = options
        self.sends = bool(transfer.is_kv_producer)
        self.receives = bool(transfer.is_kv_consumer)
        self.stats = RailwireStats()
        self.engine: TransferEngine | None = None
        self.sending: Sending | None = None
        self.receiving: Receiving | None = None
        self.handshake: Handshake | None = None
        self._layers: dict[str, int] = {}
        self._regions: list[MemoryRegion] = []

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Opens the engine and registers the caches with its NICs.

        Raises:
            ConfigurationError, LayoutError: caches that cannot be described, NICs that cannot reach them.
        """
        options = self.options
        if self.engine is not None:
            raise ConfigurationError("the KV caches have been registered already")
        model = fingerprint(self.vllm_config, options.fingerprint)
        caches = describe(self.vllm_config, self.kv_cache_config, kv_caches, model)
        instance, rank, instance_id = gather(caches.layout, secrets.token_hex(8))
        device = caches.regions[0].device
        with unbound(options.cpus):
            self.engine = TransferEngine(
                "cpu" if device.type == "cpu" else str(device),
                list(options.nics) or "auto",
                secret=options.secret or None,
                liveness=options.liveness,
                name=f"vllm:{self.vllm_config.kv_transfer_config.kv_role}:{rank}",
            )
        regions = [self.engine.register(region) for region in caches.regions]
        self._regions = regions
        self._layers = caches.layers
        descriptor = b""
        if self.sends:
            sender = Sender(
                self.engine,
                instance,
                rank,
                regions,
                instance_id=instance_id,
                ticket_timeout=options.ticket_timeout,
                queue_timeout=options.queue_timeout,
            )
            descriptor = sender.descriptor
            with unbound(options.cpus):
                clock = self._clock(sender, device)
            self.sending = Sending(
                sender,
                clock,
                caches.kernel_blocks,
                self.stats,
                options.liveness,
                options.trace,
            )
        if self.receives:
            # vLLM bounds the requests that wait for their KV by their blocks only.
            receiver = Receiver(self.engine, instance, rank, regions, max_tickets=MAX_SLOTS)
            self.receiving = Receiving(
                receiver,
                caches.kernel_blocks,
                self.stats,
                options.checksum,
                options.ticket_timeout,
                options.transfer_timeout,
            )
        layout = caches.layout
        self.handshake = Handshake(
            descriptor, instance_id, model, self.engine.incarnation.hex(), layout.block_tokens, layout.num_blocks
        )
        log.info(
            "railwire: rank %d of %d, %d layers in %d regions, over %s",
            rank,
            len(instance.ranks),
            len(layout.layers),
            len(regions),
            ", ".join(nic["name"] for nic in self.engine.stats()["nics"]),
        )

    def _clock(self, sender: Sender, device: torch.device) -> LayerClock:
        if device.type == "cpu":
            return CpuClock(self.stats)
        if device.type == "cuda":
            return CudaClock(sender, list(self._layers.values()), self.stats)
        raise ConfigurationError(f"KV caches on {device.type} are not pushed: cpu and cuda are")

    # ---- each step, in vLLM's order ----------------------------------------------------------------------------------
    def handle_preemptions(self, step: Step) -> None:
        if self.sending is not None and step.preempted:
            self.sending.preempt(step.preempted)

    def begin(self, step: Step) -> None:
        if self.sending is not None:
            self.sending.begin(step)
        if self.receiving is not None:
            self.receiving.begin(step)

    def layer_saved(self, layer_name: str) -> None:
        layer = self._layers.get(layer_name)
        if self.sending is not None and layer is not None:
            self.sending.layer_saved(layer)

    def end(self) -> None:
        if self.sending is not None:
            self.sending.end()

    def results(self, ended_requests: set[str]) -> tuple[set[str], set[str], set[str]]:
        """(sent, received, of these: failed)."""
        sent = self.sending.finished(ended_requests) if self.sending is not None else set()
        received, failed = self.receiving.finished() if self.receiving is not None else (set(), set())
        self.stats.gauges(self._gauges())
        return sent, received, failed

    def _gauges(self) -> dict[str, int]:
        gauges = {"regions": len(self._regions)}
        if self.sending is not None:
            gauges["open_pushes"] = self.sending.open_requests
        if self.receiving is not None:
            receiver = self.receiving.receiver
            gauges["open_receives"] = self.receiving.open_requests
            gauges["open_tickets"] = receiver.open_tickets
            gauges["used_immediates"] = receiver.slots.count - receiver.slots.free
        return gauges

    def close(self) -> None:
        for part in (self.receiving, self.sending, self.engine):
            if part is not None:
                with contextlib.suppress(RailwireError, TimeoutError):
                    part.close()


@contextlib.contextmanager
def unbound(cpus: tuple[int, ...]) -> Iterator[None]:
    """Threads that begin inside may run on these cores (none named: all), although vLLM has bound the calling thread to
    those that compute: a transfer must not wait for the computation that it is to hide behind."""
    try:
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus or range(os.cpu_count() or 1))
    except (OSError, ValueError) as error:
        if cpus:
            raise ConfigurationError(f"cpus {list(cpus)} cannot be used: {error}") from error
        yield
        return
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
