"""vLLM as a receiver of weights: a real instance takes over a trainer's weights between two requests, in place or from
a copy; after a failed update it serves what it served. The trainer is driven through vLLM's own factory and client
protocol.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from instances import smollm2

from railwire.weights import UpdateError, tcp_store

SECRET = "between us"


class Client:
    """vLLM's VLLMWeightSyncClient over an LLM of this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)


class Trained(torch.nn.Module):
    """The checkpoint's parameters, to be changed."""

    def __init__(self, folder: Any) -> None:
        super().__init__()
        from safetensors.torch import load_file

        self.tensors = load_file(folder / "model.safetensors")
        for name, tensor in self.tensors.items():
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(tensor.clone(), requires_grad=False))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.replace("/", "."), parameter


def generate(llm: Any) -> list[int]:
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": list(range(3, 40))}
    return list(llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_vllm_takes_over_a_trainers_weights(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAILWIRE_VLLM_WEIGHTS", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")
    from vllm import LLM
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from railwire.integrations.vllm_plugin import register
    from railwire.integrations.vllm_weights import RailwireTrainerInitInfo

    register()
    folder = smollm2()
    store = tcp_store("127.0.0.1", 0, server=True)
    options: dict[str, Any] = {
        "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 256, "enable_prefix_caching": False,
    }  # fmt: skip
    llm = LLM(str(folder), weight_transfer_config=WeightTransferConfig(backend="railwire"), **options)
    before = generate(llm)
    module = Trained(folder)
    for name, parameter in module.named_parameters():
        if "layers.20." in name and parameter.ndim == 2:
            parameter.neg_()  # a step that changes every answer
    trainer = WeightTransferTrainerFactory.trainer_init(
        RailwireTrainerInitInfo(
            "127.0.0.1", store.port, 1, secret=SECRET, nics=["tcp://127.0.0.1"], mode=mode, rank=0, timeout=30.0
        ),
        client=Client(llm),
        source=ModuleSource(module),
    )
    trainer.send_weights()
    after = generate(llm)
    assert after != before
    for name, parameter in module.named_parameters():
        parameter.copy_(module.tensors[name])
    if mode == "staged":
        # A version that fails: the old one goes on being served, and the next update succeeds.
        writer = trainer._trainer._writer
        run = writer.run
        writer.run = lambda *args, **options: half_of_it(run, args, options)
        with pytest.raises(UpdateError):
            trainer.send_weights()
        writer.run = run
        assert generate(llm) == after
    trainer.send_weights()
    assert generate(llm) == before  # bit by bit what was loaded from the file at first
    trainer.shutdown()
    llm.llm_engine.collective_rpc("shutdown_weight_transfer_engine")


def half_of_it(run: Any, args: Any, options: Any) -> Any:
    """Half of the bytes, then an error."""
    from railwire.weights.writing import Outcome

    works, imms = args
    half = tuple(work._replace(direct=work.direct[: len(work.direct) // 2]) for work in works)
    outcome = run(half, imms, **options)
    return Outcome({"": "the trainer broke"}, (), outcome.nbytes, outcome.spans)
