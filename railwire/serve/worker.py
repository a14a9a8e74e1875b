"""What a prefill and a decode worker have in common: a model, its KV blocks, and what they tell of themselves."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from railwire import metrics as engine_metrics
from railwire.engine import TransferEngine
from railwire.kvcache.router.membership import Member, Role
from railwire.runner import BlockPool
from railwire.serve.config import WorkerConfig, create_runner


class Worker:
    """Most of a :class:`~railwire.serve.process.Service`."""

    role: Role

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.draining = False
        self.changed = asyncio.Event()
        self.id = secrets.token_hex(8)
        self.runner = create_runner(config.runner, config.model, config.options)
        self.pool = BlockPool(self.runner.num_blocks, self.runner.block_tokens, salt=self.runner.fingerprint.encode())

    def measure(
        self,
        registry: CollectorRegistry,
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
        engines: Sequence[TransferEngine],
    ) -> None:
        """Shows gauges, (text, value) by name, and what all workers show: their blocks, and their engines."""
        blocks: dict[str, tuple[str, Callable[[], float]]] = {
            "railwire_kv_blocks_free": ("KV blocks that nobody holds.", lambda: self.pool.num_free),
            "railwire_kv_blocks_cached": ("KV blocks with a known prefix.", lambda: self.pool.num_cached),
        }
        for name, (text, value) in {**gauges, **blocks}.items():
            Gauge(name, text, registry=registry).set_function(value)
        engine_metrics.register(*engines, registry=registry)

    def record(self, url: str, engine: TransferEngine, ranks: tuple[bytes, ...] = (), load: int = 0) -> Member:
        """Its record as a member."""
        return Member(
            id=self.id,
            role=self.role,
            url=url,
            model=self.config.model_name or self.config.model,
            fingerprint=self.runner.fingerprint,
            block_tokens=self.runner.block_tokens,
            num_blocks=self.runner.num_blocks,
            context=self.runner.context,
            vocab=self.runner.vocab,
            ranks=ranks,
            incarnation=engine.incarnation.hex(),
            state="draining" if self.draining else "ready",
            load=load,
        )

    def report(self, **more: Any) -> dict[str, Any]:
        """What ``/health`` says."""
        return {
            "instance": self.id,
            "model": self.config.model_name or self.config.model,
            **more,
            "free_blocks": self.pool.num_free,
            "blocks": self.pool.num_blocks,
        }
