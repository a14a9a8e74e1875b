"""From vLLM's KV cache tensors to Railwire's layouts.

vLLM 0.32 gives each attention layer a view [blocks, heads, tokens, content] (content: K and V of one token and head,
one after the other) or, for MLA, [blocks, tokens, content]; in whatever order the bytes lie in memory, the strides say
it. A block of the scheduler may be several of the kernel's: then the tensor has the kernel's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from railwire.errors import ConfigurationError
from railwire.kvcache import Component, InstanceLayout, LayerStorage, RankLayout, Storage
from railwire.kvcache.geometry.builders import head_range

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Kinds of cache in which each block of a prompt stays what it was: those of others may become the null block as tokens
# leave a window, be used again, or hold something besides the prompt. Not their subclasses, of which nothing is known.
_WHOLE = (FullAttentionSpec, MLAAttentionSpec)

_NO_MEANING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "quantization_config")


class Caches(NamedTuple):
    """The KV cache of this worker."""

    layout: RankLayout
    regions: list[torch.Tensor]
    """One flat uint8 tensor per storage, in the order in which the layout counts them."""
    layers: dict[str, int]
    """vLLM's layer name to global layer index, in the order of the indices."""
    kernel_blocks: int
    """Blocks of the tensors per block of the scheduler."""


def fingerprint(vllm_config: VllmConfig, extra: str) -> str:
    """Equal on two instances that can use each other's KV: architecture, numbers of the model's configuration, dtypes.
    Weights are not looked at: ``extra`` can name them."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config = {k: v for k, v in model.hf_text_config.to_dict().items() if k not in _NO_MEANING}
    meaning = {
        "config": config,
        "architectures": list(model.architectures),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "extra": extra,
    }
    return hashlib.sha256(json.dumps(meaning, sort_keys=True, default=str).encode()).hexdigest()[:32]


def check(vllm_config: VllmConfig) -> None:
    """Raises ConfigurationError for what would move wrong KV, or write where something else is by then."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refused = {
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        # A layer is saved once for each part of the batch, and the first time most of it is missing.
        "--enable-dbo": bool(parallel.use_ubatching),
        "--enable-sleep-mode": bool(model.enable_sleep_mode),
    }
    reasons = {
        "--decode-context-parallel-size": "each rank then has other tokens of a block",
        "--prefill-context-parallel-size": "each rank then computes other tokens",
        "--enable-dbo": "a step then saves each layer in parts",
        "--enable-sleep-mode": "the cache's memory goes away while NICs know it and other instances may write it",
    }
    for flag, asked in refused.items():
        if asked:
            raise ConfigurationError(f"the RailwireConnector does not work with {flag}: {reasons[flag]}")


def data_parallel_rank(vllm_config: VllmConfig) -> int | None:
    """What the header X-data-parallel-rank must say for a request to reach this engine through its server; None: the
    server has this engine alone."""
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_external_lb:
        return None
    if parallel.data_parallel_hybrid_lb:
        local: int | None = parallel.data_parallel_rank_local
        return local
    # Not data_parallel_rank, which is 0 in all engines of a dense model; nor is their data_parallel_size known there.
    return int(parallel.data_parallel_index)


def only_group(kv_cache_config: KVCacheConfig) -> int:
    """The one KV cache group whose blocks are transferred.

    Raises:
        ConfigurationError: there are several; the message says what to do.
    """
    groups = kv_cache_config.transfer_group_ids
    if len(groups) != 1:
        raise ConfigurationError(
            f"the model has {len(groups)} KV cache groups; the RailwireConnector moves one: start vLLM with "
            "--disable-hybrid-kv-cache-manager (models with recurrent state cannot be served this way)"
        )
    return int(groups[0])


def describe(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor], model: str
) -> Caches:
    """Raises ConfigurationError for caches that cannot be described."""
    from vllm.distributed import get_tp_group

    group = kv_cache_config.kv_cache_groups[only_group(kv_cache_config)]
    layers = {name: extract_layer_index(name) for name in group.layer_names if name in kv_caches}
    layers = dict(sorted(layers.items(), key=lambda item: item[1]))
    if not layers or len(set(layers.values())) != len(layers):
        raise ConfigurationError(f"attention layers cannot be told apart by their names: {sorted(group.layer_names)}")
    heads = 1 if vllm_config.model_config.use_mla else vllm_config.model_config.get_total_num_kv_heads()
    tp = get_tp_group()
    first, held = head_range(heads, tp.rank_in_group, tp.world_size)
    regions: dict[int, torch.Tensor] = {}
    places: dict[int, int] = {}
    storages = []
    shapes = set()
    for name, index in layers.items():
        spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
        if type(spec) not in _WHOLE:
            raise ConfigurationError(
                f"layer {name} has a KV cache of kind {type(spec).__name__}, which is not moved: it may not keep each "
                "block of a prompt. With --disable-hybrid-kv-cache-manager vLLM keeps them for models that mix full "
                "attention with sliding windows; others must be served without the RailwireConnector"
            )
        cache = kv_caches[name]
        view = cache.unsqueeze(1) if cache.dim() == 3 else cache
        if view.dim() != 4 or view.stride(-1) != 1 or view.shape[1] != held:
            raise ConfigurationError(
                f"the KV cache of layer {name} has shape {tuple(cache.shape)} and strides {cache.stride()}; expected "
                f"[blocks, {held} heads, tokens, content], with the content in one piece"
            )
        memory = cache.untyped_storage()
        begin = memory.data_ptr()
        if begin not in places:
            places[begin] = len(places)
            flat = torch.empty(0, dtype=torch.uint8, device=cache.device)
            regions[begin] = flat.set_(memory)
        size = cache.element_size()
        page, head, token = (view.stride(axis) * size for axis in (0, 1, 2))
        storage = Storage(places[begin], cache.data_ptr() - begin, page, token, head, first, held)
        storages.append(LayerStorage(index, (storage,)))
        shapes.add((view.shape[0], view.shape[2], view.shape[3] * size, str(cache.dtype)))
    if len(shapes) != 1:
        raise ConfigurationError(f"the layers' KV caches differ in shape: {sorted(shapes)}")
    num_blocks, block_tokens, content, dtype = shapes.pop()
    kernel_blocks, rest = divmod(group.kv_cache_spec.block_size, block_tokens)
    if rest or kernel_blocks < 1:
        raise ConfigurationError(
            f"blocks of {group.kv_cache_spec.block_size} tokens are no multiple of the tensors' {block_tokens}"
        )
    if num_blocks != kv_cache_config.num_blocks * kernel_blocks:
        raise ConfigurationError(
            f"the KV caches have {num_blocks} blocks of {block_tokens} tokens, the scheduler "
            f"{kv_cache_config.num_blocks} of {group.kv_cache_spec.block_size}: its block ids are not theirs"
        )
    layout = RankLayout(
        model=model,
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        components=(Component("latent" if vllm_config.model_config.use_mla else "kv", heads, content, dtype),),
        layers=tuple(storages),
        region_bytes=tuple(region.nbytes for region in regions.values()),
    )
    return Caches(layout, list(regions.values()), layers, kernel_blocks)


class _Card(msgspec.Struct, array_like=True):
    """What each rank tells the others."""

    layout: RankLayout
    instance: str


def gather(layout: RankLayout, instance: str) -> tuple[InstanceLayout, int, str]:
    """The layouts of all ranks of this instance, which of them is ours, and the id of the instance (rank 0's). Ranks
    are counted as pipeline stage * tensor ranks + tensor rank."""
    from vllm.distributed import get_pp_group, get_tp_group

    cards = [msgspec.msgpack.encode(_Card(layout, instance))]
    for group in (get_tp_group(), get_pp_group()):
        cards = _all_gather(cards, group)
    decoded = [msgspec.msgpack.decode(card, type=_Card) for card in cards]
    rank = get_pp_group().rank_in_group * get_tp_group().world_size + get_tp_group().rank_in_group
    return InstanceLayout(tuple(card.layout for card in decoded)), rank, decoded[0].instance


def _all_gather(mine: list[bytes], group: Any) -> list[bytes]:
    if group.world_size == 1:
        return mine
    packed = torch.frombuffer(bytearray(msgspec.msgpack.encode(mine)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.world_size)]
    torch.distributed.all_gather(sizes, torch.tensor([packed.numel()]), group=group.cpu_group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: packed.numel()] = packed
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(group.world_size)]
    torch.distributed.all_gather(rows, padded, group=group.cpu_group)
    return [
        item
        for row, size in zip(rows, sizes, strict=True)
        for item in msgspec.msgpack.decode(row[: int(size)].numpy().tobytes(), type=list[bytes])
    ]
