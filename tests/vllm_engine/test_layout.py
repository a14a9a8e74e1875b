"""vLLM's tensors as Railwire's layouts: what each rank of an instance describes, moved between instances of different
tensor parallelism, block size and order in memory. No vLLM engine runs here; the tensors have its shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import vllm.distributed
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    HiddenStateCacheSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from railwire import TransferEngine
from railwire.errors import ConfigurationError
from railwire.integrations.vllm.layout import (
    Caches,
    check,
    data_parallel_rank,
    describe,
    fingerprint,
    gather,
    only_group,
)
from railwire.integrations.vllm.options import Options
from railwire.integrations.vllm.sending import expand
from railwire.integrations.vllm.worker import ConnectorWorker
from railwire.kvcache import InstanceLayout, Receiver, Sender
from railwire.kvcache.slots import MAX_SLOTS
from railwire.testing import SimulatedFabric

LAYERS, HEADS, HEAD_DIM, BLOCKS = 3, 4, 8, 10
TOKENS = 70


class Rank(NamedTuple):
    caches: Caches
    tensors: dict[str, torch.Tensor]
    heads: range


def name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"


def rank_of(
    monkeypatch: pytest.MonkeyPatch, rank: int, size: int, block: int, kernel: int, order: str, mla: bool = False
) -> Rank:
    """A worker of a model with four KV heads; ``order`` is how its cache lies in memory."""
    heads = 1 if mla else max(1, HEADS // size)
    first = 0 if mla else rank * HEADS // size
    shape = {"L": LAYERS, "B": BLOCKS * (block // kernel), "H": heads, "N": kernel, "C": 2 * HEAD_DIM}
    storage = torch.full([shape[axis] for axis in order], -1.0)
    whole = storage.permute([order.index(axis) for axis in "LBHNC"])
    tensors = {name(layer): whole[layer].squeeze(1) if mla else whole[layer] for layer in range(LAYERS)}
    spec = FullAttentionSpec(block_size=block, num_kv_heads=heads, head_size=HEAD_DIM, dtype=torch.float32)
    group = SimpleNamespace(layer_names=list(tensors), kv_cache_spec=spec)
    config = SimpleNamespace(kv_cache_groups=[group], transfer_group_ids=(0,), num_blocks=BLOCKS)
    model = SimpleNamespace(use_mla=mla, get_total_num_kv_heads=lambda: HEADS)
    monkeypatch.setattr(vllm.distributed, "get_tp_group", lambda: SimpleNamespace(rank_in_group=rank, world_size=size))
    caches = describe(SimpleNamespace(model_config=model), config, tensors, "m")  # type: ignore[arg-type]
    return Rank(caches, tensors, range(first, first + heads))


def place(rank: Rank, layer: int, head: int, blocks: list[int], token: int, kernel_blocks: int) -> torch.Tensor:
    """K|V of one token and global head, by the model's own indices."""
    tensor = rank.tensors[name(layer)]
    tensor = tensor.unsqueeze(1) if tensor.dim() == 3 else tensor
    kernel = tensor.shape[2]
    table = expand(blocks, kernel_blocks)
    return tensor[int(table[token // kernel]), head - rank.heads.start, token % kernel]


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        pytest.param((1, 16, 16, "LBHNC"), (1, 16, 16, "LBHNC"), id="same"),
        pytest.param((2, 16, 16, "LBHNC"), (1, 16, 16, "LBHNC"), id="tp2-tp1"),
        pytest.param((1, 16, 16, "LBHNC"), (2, 16, 16, "LBHNC"), id="tp1-tp2"),
        pytest.param((4, 16, 16, "LBHNC"), (2, 32, 16, "LBHNC"), id="tp4-tp2-kernel-blocks"),
        pytest.param((1, 16, 16, "LBHNC"), (8, 16, 16, "LBHNC"), id="tp1-tp8-replicas"),
        pytest.param((2, 8, 8, "LBNHC"), (1, 32, 32, "LBHNC"), id="block-sizes-and-orders"),
        pytest.param((1, 16, 16, "BLHNC"), (2, 16, 8, "LHBNC"), id="blocks-outermost-heads-outermost"),
    ],
)
@pytest.mark.parametrize("mla", [False, True], ids=["heads", "mla"])
def test_every_element_lands_in_its_place(
    monkeypatch: pytest.MonkeyPatch, source: Any, destination: Any, mla: bool
) -> None:
    fabric = SimulatedFabric(reorder=True, max_delay_us=50)
    sides = [
        [rank_of(monkeypatch, r, size, *rest, mla=mla) for r in range(size)] for size, *rest in (source, destination)
    ]
    engines: list[TransferEngine] = []
    parts: list[list[Any]] = [[], []]
    heads = 1 if mla else HEADS
    for side, ranks in enumerate(sides):
        instance = InstanceLayout(tuple(rank.caches.layout for rank in ranks))
        for index, rank in enumerate(ranks):
            engines.append(TransferEngine(nics=[fabric.nic(f"{side}-{index}")]))
            regions = [engines[-1].register(region) for region in rank.caches.regions]
            if side == 0:
                parts[0].append(Sender(engines[-1], instance, index, regions, instance_id="i"))
            else:
                parts[1].append(Receiver(engines[-1], instance, index, regions))
    src = [7, 2, 9, 4, 1, 0, 8, 3, 5, 6][: -(-TOKENS // source[1])]
    dst = [3, 8, 0, 6, 5, 1, 9, 2, 4, 7][: -(-TOKENS // destination[1])]
    for rank in sides[0]:
        for layer in range(LAYERS):
            for head in rank.heads:
                for token in range(TOKENS):
                    value = layer * 100_000 + head * 10_000 + token
                    place(rank, layer, head, src, token, rank.caches.kernel_blocks)[:] = value
    tickets = [
        receiver.prepare(
            receiver.connect([sender.descriptor for sender in parts[0]]),
            "r",
            expand(dst, rank.caches.kernel_blocks),
            TOKENS,
        )
        for receiver, rank in zip(parts[1], sides[1], strict=True)
    ]
    for sender, rank in zip(parts[0], sides[0], strict=True):
        push = sender.open("r", TOKENS)
        push.append_blocks(expand(src, rank.caches.kernel_blocks))
        for layer in rank.caches.layers.values():
            push.layer_ready(layer, TOKENS)
    for ticket in tickets:
        ticket.wait(20)
    for rank in sides[1]:
        for layer in range(LAYERS):
            for head in rank.heads:
                for token in range(TOKENS):
                    value = layer * 100_000 + head * 10_000 + token
                    assert (place(rank, layer, head, dst, token, rank.caches.kernel_blocks) == value).all()
    assert {head for rank in sides[1] for head in rank.heads} == set(range(heads))
    for part in (*parts[1], *parts[0], *engines):
        part.close()
    fabric.close()


def test_ranks_learn_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over real process groups, of one process each here: what is gathered is what was described."""
    rank = rank_of(monkeypatch, 0, 1, 16, 16, "LBHNC")
    one = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(vllm.distributed, "get_tp_group", lambda: one)
    monkeypatch.setattr(vllm.distributed, "get_pp_group", lambda: one)
    instance, index, name = gather(rank.caches.layout, "life")
    assert instance.ranks == (rank.caches.layout,) and index == 0 and name == "life"


def test_what_cannot_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="disable-hybrid-kv-cache-manager"):
        only_group(SimpleNamespace(transfer_group_ids=(0, 1)))  # type: ignore[arg-type]
    rank = rank_of(monkeypatch, 0, 1, 16, 16, "LBHNC")
    spec = FullAttentionSpec(block_size=16, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32)
    model = SimpleNamespace(use_mla=False, get_total_num_kv_heads=lambda: HEADS)

    def attempt(tensors: dict[str, torch.Tensor], spec: Any = spec) -> None:
        group = SimpleNamespace(layer_names=list(tensors), kv_cache_spec=spec)
        config = SimpleNamespace(kv_cache_groups=[group], transfer_group_ids=(0,), num_blocks=BLOCKS)
        describe(SimpleNamespace(model_config=model), config, tensors, "m")  # type: ignore[arg-type]

    good = rank.tensors[name(0)]
    for bad, text in (
        ({name(0): good[:, :2]}, "shape"),
        ({name(0): good.transpose(2, 3)}, "strides"),
        ({name(0): good, name(1): good[:5]}, "differ"),
        ({}, "told apart"),
        ({name(0): good[: BLOCKS - 1]}, "the scheduler"),  # a block that the scheduler gives out would lie outside
        ({name(0): torch.cat([good, good])}, "the scheduler"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            attempt(bad)
    with pytest.raises(ConfigurationError, match="no multiple"):
        attempt({name(0): good}, FullAttentionSpec(block_size=24, num_kv_heads=4, head_size=8, dtype=torch.float32))
    with pytest.raises(ConfigurationError, match="not moved"):
        attempt({name(0): good}, SimpleNamespace(block_size=16))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (SlidingWindowSpec, {"sliding_window": 64}),
        (ChunkedLocalAttentionSpec, {"attention_chunk_size": 64}),
        (RSWASpec, {"rswa_window": 64}),
        (SinkFullAttentionSpec, {"sink_len": 16}),
        (HiddenStateCacheSpec, {}),
        (FullAttentionSpec, {}),
        (FullAttentionSpec, {"sliding_window": 64}),
        (FullAttentionSpec, {"attention_chunk_size": 64}),
        (MLAAttentionSpec, {}),
    ],
    ids=["window", "chunks", "reference-window", "sink", "hidden", "full", "full-window", "full-chunks", "mla"],
)
@pytest.mark.parametrize("uniform", [False, True], ids=["one-spec", "spec-per-layer"])
def test_only_caches_that_keep_each_block_of_a_prompt_are_moved(
    monkeypatch: pytest.MonkeyPatch, kind: type[AttentionSpec], more: dict[str, int], uniform: bool
) -> None:
    """A model with sliding windows only was accepted, and then each prompt longer than the window failed: what has left
    it is the null block. With the hybrid manager disabled a mixed model's windows are kept whole (FullAttentionSpec
    with a window)."""
    rank = rank_of(monkeypatch, 0, 1, 16, 16, "LBHNC")
    spec: Any = kind(block_size=16, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32, **more)
    if uniform:
        spec = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=dict.fromkeys(rank.tensors, spec))
    group = SimpleNamespace(layer_names=list(rank.tensors), kv_cache_spec=spec)
    config: Any = SimpleNamespace(kv_cache_groups=[group], transfer_group_ids=(0,), num_blocks=BLOCKS)
    model: Any = SimpleNamespace(model_config=SimpleNamespace(use_mla=False, get_total_num_kv_heads=lambda: HEADS))
    if kind in (FullAttentionSpec, MLAAttentionSpec):
        assert list(describe(model, config, rank.tensors, "m").layers) == list(rank.tensors)
        return
    with pytest.raises(ConfigurationError) as caught:
        describe(model, config, rank.tensors, "m")
    for text in (name(0), kind.__name__, "--disable-hybrid-kv-cache-manager"):
        assert text in str(caught.value)


def parallel(**changes: Any) -> Any:
    settings = {
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
        "data_parallel_external_lb": False,
        "data_parallel_hybrid_lb": False,
        "data_parallel_rank_local": None,
        "data_parallel_index": 0,
        **changes,
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**settings), model_config=SimpleNamespace(enable_sleep_mode=False)
    )


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"use_ubatching": True}, "--enable-dbo"),
    ],
)
def test_what_would_move_wrong_kv_is_refused_at_the_start(change: dict[str, Any], flag: str) -> None:
    check(parallel())
    with pytest.raises(ConfigurationError, match=flag):
        check(parallel(**change))
    sleeper = parallel()
    sleeper.model_config.enable_sleep_mode = True
    with pytest.raises(ConfigurationError, match="--enable-sleep-mode"):
        check(sleeper)


def test_the_configuration_that_vllm_itself_makes_is_understood() -> None:
    """Names of its fields, which the tests above only pretend."""
    from vllm.config import ParallelConfig

    config: Any = SimpleNamespace(
        parallel_config=ParallelConfig(), model_config=SimpleNamespace(enable_sleep_mode=False)
    )
    check(config)
    assert data_parallel_rank(config) == 0


def test_the_engine_behind_a_server_is_named() -> None:
    assert data_parallel_rank(parallel(data_parallel_index=3)) == 3
    assert data_parallel_rank(parallel(data_parallel_index=3, data_parallel_external_lb=True)) is None
    local = {"data_parallel_hybrid_lb": True, "data_parallel_rank_local": 1}
    assert data_parallel_rank(parallel(data_parallel_index=3, **local)) == 1


def test_the_connector_claims_only_what_it_does() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import supports_hma

    from railwire.integrations.vllm import RailwireConnector

    assert not supports_hma(RailwireConnector)
    assert RailwireConnector.supports_sleep_mode() is False


def model_config(**changes: Any) -> Any:
    hf = {"hidden_size": 8, "rope_theta": 1e4, "_name_or_path": "a", **changes}
    return SimpleNamespace(
        hf_text_config=SimpleNamespace(to_dict=lambda: hf),
        architectures=["L"],
        dtype=torch.float32,
        quantization=None,
        use_mla=False,
        get_total_num_kv_heads=lambda: HEADS,
    )


def test_a_decoder_waits_for_as_many_requests_as_there_are_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM bounds those that wait by their blocks only; the 1,025th failed although there was room for it."""
    tensors = rank_of(monkeypatch, 0, 1, 16, 16, "LBHNC").tensors
    one = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(vllm.distributed, "get_tp_group", lambda: one)
    monkeypatch.setattr(vllm.distributed, "get_pp_group", lambda: one)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32)
    group = SimpleNamespace(layer_names=list(tensors), kv_cache_spec=spec)
    caches: Any = SimpleNamespace(kv_cache_groups=[group], transfer_group_ids=(0,), num_blocks=BLOCKS)
    role = SimpleNamespace(is_kv_producer=False, is_kv_consumer=True, kv_role="kv_consumer")
    config: Any = SimpleNamespace(
        model_config=model_config(), cache_config=SimpleNamespace(cache_dtype="auto"), kv_transfer_config=role
    )
    with SimulatedFabric() as fabric:
        worker = ConnectorWorker(config, caches, Options(nics=(fabric.nic("a"),)))
        worker.register(tensors)
        assert worker.receiving is not None
        slots = worker.receiving.receiver.slots
        assert slots.count == slots.free == MAX_SLOTS
        worker.close()


def test_fingerprints() -> None:
    def config(**changes: Any) -> Any:
        return SimpleNamespace(model_config=model_config(**changes), cache_config=SimpleNamespace(cache_dtype="auto"))

    same = fingerprint(config(), "")
    assert fingerprint(config(_name_or_path="elsewhere"), "") == same
    assert len({same, fingerprint(config(rope_theta=1e5), ""), fingerprint(config(), "revision 2")}) == 3


def test_expand() -> None:
    assert np.array_equal(expand([5, 0], 1), [5, 0])
    assert np.array_equal(expand([5, 0], 3), [15, 16, 17, 0, 1, 2])
