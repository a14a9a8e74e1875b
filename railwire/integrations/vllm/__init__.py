"""The vLLM connector: KV caches pushed layer by layer, while the prefill computes.

vllm serve MODEL --kv-transfer-config '{"kv_connector": "RailwireConnector",
    "kv_connector_module_path": "railwire.integrations.vllm", "kv_role": "kv_producer"}'

How to run a pair of them: docs/vllm.md. Needs vLLM 0.32.
"""

from railwire.integrations.vllm.connector import RailwireConnector

__all__ = ["RailwireConnector"]
