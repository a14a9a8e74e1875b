"""The class that vLLM loads: hands each of its hooks to the scheduler's half or the worker's half."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from railwire.integrations.vllm.announce import Announcer
from railwire.integrations.vllm.layout import check
from railwire.integrations.vllm.options import parse_options
from railwire.integrations.vllm.scheduler import ConnectorScheduler
from railwire.integrations.vllm.stats import RailwirePromMetrics, TransferStats
from railwire.integrations.vllm.steps import Handshake, Step
from railwire.integrations.vllm.worker import ConnectorWorker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class RailwireConnector(KVConnectorBase_V1):
    """Pushes KV layer by layer while the prefill computes. Options: ``kv_connector_extra_config``, see
    :class:`~railwire.integrations.vllm.options.Options`; per request: ``kv_transfer_params``, see
    :class:`~railwire.integrations.vllm.options.PrefillParams` and ``DecodeParams``.

    Raises:
        ConfigurationError: unknown options, models with several KV cache groups, caches that cannot be described, and
            what vLLM can do besides that would move wrong KV (see :func:`~railwire.integrations.vllm.layout.check`).

    ``SupportsHMA`` is not claimed, since one KV cache group is moved: vLLM then keeps one group by itself.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check(vllm_config)
        options = parse_options(self._kv_transfer_config.kv_connector_extra_config or {})
        self._scheduler: ConnectorScheduler | None = None
        self._worker: ConnectorWorker | None = None
        self._announcer: Announcer | None = None
        self._step_seconds = 0.0
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = ConnectorScheduler(vllm_config, kv_cache_config, options)
            if options.membership:
                self._announcer = Announcer(vllm_config, options, self._scheduler)
        else:
            self._worker = ConnectorWorker(vllm_config, kv_cache_config, options)

    # ---- class methods -----------------------------------------------------------------------------------------------
    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Heads outside tokens: then the heads of a tensor rank are one piece of a page. MLA has no heads to split."""
        if vllm_config.model_config is None or vllm_config.model_config.use_mla:
            return None
        return "LBHNC"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Python must run between the layers, to say that one is done."""
        return True

    @classmethod
    def supports_sleep_mode(cls, extra_config: dict[str, Any] | None = None) -> bool:
        """No (asked by vLLM 0.33): an instance that sleeps gives away memory that NICs know and peers may write."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return TransferStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return RailwirePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- the scheduler's side ----------------------------------------------------------------------------------------
    def _for_scheduler(self) -> ConnectorScheduler:
        assert self._scheduler is not None, "a hook of the scheduler was called in a worker"
        return self._scheduler

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return tuple(self._kv_cache_config.transfer_group_ids)

    def on_new_request(self, request: Request) -> None:
        self._for_scheduler().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._for_scheduler().num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._for_scheduler().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._for_scheduler().build_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._for_scheduler().update_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._for_scheduler().request_finished(request)

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.pending

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        handshakes = {place: item for place, item in metadata.items() if isinstance(item, Handshake)}
        self._for_scheduler().set_handshakes(handshakes)
        if self._announcer is not None and handshakes:
            self._announcer.start()

    # ---- the worker's side -------------------------------------------------------------------------------------------
    def _for_worker(self) -> ConnectorWorker:
        assert self._worker is not None, "a hook of the workers was called in the scheduler"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._for_worker().register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._for_worker().handshake

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, Step)
        self._for_worker().handle_preemptions(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Step)
        # Here and not in start_load_kv(), which comes after the forward pass when nothing is loaded in it.
        began = time.perf_counter()
        self._for_worker().begin(connector_metadata)
        self._step_seconds = time.perf_counter() - began

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing is left to do: see bind_connector_metadata()."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is not scheduled before all of its KV is here."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        self._for_worker().layer_saved(layer_name)

    def wait_for_save(self) -> None:
        """Waits for nothing: the blocks of a request stay until its push has ended."""
        self._for_worker().end()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        worker = self._for_worker()
        began = time.perf_counter()
        sent, received, failed = worker.results(finished_req_ids)
        step = self._connector_metadata
        if sent or received or (isinstance(step, Step) and step.busy):
            worker.stats.step(self._step_seconds + time.perf_counter() - began)
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._worker.stats.take() if self._worker is not None else None

    # ---- both --------------------------------------------------------------------------------------------------------
    def shutdown(self) -> None:
        if self._announcer is not None:
            self._announcer.close()
        if self._worker is not None:
            self._worker.close()
