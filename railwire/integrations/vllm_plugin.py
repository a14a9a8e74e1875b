"""What vLLM calls at start (entry point ``vllm.general_plugins``): registers the weight-transfer backend."""

from __future__ import annotations


def register() -> None:
    """Registers backend ``railwire``. With RAILWIRE_VLLM_WEIGHTS=1 it also keeps vLLM on a CPU from packing weights for
    oneDNN and the SGL kernels: packed weights cannot be written."""
    import os

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    module = "railwire.integrations.vllm_weights"
    if "railwire" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("railwire", module, "RailwireWeightTransferEngine")
    if "railwire" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("railwire", module, "RailwireTrainerEngine")
    if os.environ.get("RAILWIRE_VLLM_WEIGHTS") == "1":
        from vllm import _custom_ops
        from vllm.model_executor.layers import utils
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _custom_ops._supports_onednn = False
            utils.check_cpu_sgl_kernel = lambda *args: False
