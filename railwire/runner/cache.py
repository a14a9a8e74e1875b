"""The paged KV cache of one instance, cut into the memory of its ranks.

Rank ``pp * tp_size + tp`` holds the layers of pipeline stage ``pp`` and the KV heads of tensor rank ``tp``, in one
tensor:

* "HND": [layers, 2, blocks, heads, block_tokens, head_dim], heads outside tokens;
* "NHD": [layers, 2, blocks, block_tokens, heads, head_dim], tokens outside heads;

the 2 being K and V. With more tensor ranks than KV heads a head has replicas, as in the serving engines. All ranks
live in this process: what is computed does not depend on the cut, only where it is kept, which is what a transfer has
to get right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from railwire.runner.config import ModelConfig

if TYPE_CHECKING:
    from railwire.kvcache.geometry.layout import InstanceLayout

KV_LAYOUTS = ("HND", "NHD")


class Shard(NamedTuple):
    """What one rank holds: global layers [first_layer, end_layer), global KV heads [first_head, end_head); and which
    query heads attend to them there."""

    first_layer: int
    end_layer: int
    first_head: int
    end_head: int
    first_query: int
    end_query: int


class PageIndex(NamedTuple):
    """The rows of a layer's flattened pages that hold the first ``tokens`` tokens of some sequences, rank by rank."""

    rows: tuple[torch.Tensor, ...]
    tokens: tuple[int, ...]  # of each sequence
    pages: tuple[int, ...]  # of each sequence


def cut(config: ModelConfig, tp_size: int, pp_size: int) -> list[Shard]:
    """What each rank of an instance holds. Layers that do not divide go to the first stages.

    Raises:
        ValueError: the heads cannot be cut so.
    """
    if tp_size < 1 or not 1 <= pp_size <= config.layers:
        raise ValueError(f"tp_size {tp_size}, pp_size {pp_size}: tp from 1, pp from 1 to the {config.layers} layers")
    if config.q_heads % tp_size or (config.kv_heads % tp_size and tp_size % config.kv_heads):
        raise ValueError(f"tp_size {tp_size} cuts neither {config.q_heads} query nor {config.kv_heads} KV heads evenly")
    shards = []
    base, extra = divmod(config.layers, pp_size)
    first_layer = 0
    for stage in range(pp_size):
        end_layer = first_layer + base + (stage < extra)
        for rank in range(tp_size):
            first_head = rank * config.kv_heads // tp_size
            heads = max(1, config.kv_heads // tp_size)
            queries = config.q_heads // tp_size
            first_query = rank * queries
            shards.append(
                Shard(first_layer, end_layer, first_head, first_head + heads, first_query, first_query + queries)
            )
        first_layer = end_layer
    return shards


class PagedCache:
    """K and V of every layer in pages. ``regions[rank]`` is the tensor to register."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_tokens: int,
        *,
        dtype: torch.dtype,
        kv_layout: str = "HND",
        tp_size: int = 1,
        pp_size: int = 1,
    ) -> None:
        if kv_layout not in KV_LAYOUTS:
            raise ValueError(f"kv_layout is one of {', '.join(KV_LAYOUTS)}, not {kv_layout!r}")
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"a cache of {num_blocks} blocks of {block_tokens} tokens cannot be")
        self.config = config
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.kv_layout = kv_layout
        self.tp_size = tp_size
        self.shards = cut(config, tp_size, pp_size)
        self.regions = [torch.zeros(self._shape(shard), dtype=dtype) for shard in self.shards]
        stages = {layer: i for i, shard in enumerate(self.shards) if i % tp_size == 0 for layer in self._layers(shard)}
        self._first_rank = [stages[layer] for layer in range(config.layers)]

    def ranks(self, layer: int) -> range:
        """The ranks that hold this layer."""
        return range(self._first_rank[layer], self._first_rank[layer] + self.tp_size)

    def write(self, layer: int, blocks: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores K and V [n, kv_heads, head_dim] of n tokens: token i at ``offsets[i]`` of block ``blocks[i]``."""
        for rank in self.ranks(layer):
            shard = self.shards[rank]
            pages = self.regions[rank][layer - shard.first_layer]
            for values, part in zip((k, v), pages, strict=True):
                held = values[:, shard.first_head : shard.end_head].to(self.dtype)
                if self.kv_layout == "HND":
                    part[blocks, :, offsets] = held
                else:
                    part[blocks, offsets] = held

    def index(
        self, tables: Sequence[Sequence[int]], tokens: Sequence[int], pad: Sequence[int] | None = None
    ) -> PageIndex:
        """Prepares :meth:`read` of the first ``tokens[i]`` tokens of sequence i; the same for every layer.

        Args:
            pad: read at least so many tokens of sequence i; what lies beyond ``tokens[i]`` reads as zero.
        """
        lengths = tuple(tokens) if pad is None else tuple(max(pair) for pair in zip(tokens, pad, strict=True))
        pages: list[int] = []
        counts = []
        for table, length in zip(tables, lengths, strict=True):
            count = -(-length // self.block_tokens)
            # A table that is shorter than the padding: any page will do, its tokens are zeroed.
            pages += [*table[:count], *([table[0]] * (count - len(table)))]
            counts.append(count)
        blocks = torch.tensor(pages, dtype=torch.int64)
        rows = []
        for rank in range(self.tp_size):
            heads = self.shards[rank].end_head - self.shards[rank].first_head
            if self.kv_layout == "HND":
                kv_heads = torch.arange(2).view(2, 1, 1) * (self.num_blocks * heads) + torch.arange(heads).view(
                    1, heads, 1
                )
                rows.append((kv_heads + blocks * heads).flatten())
            else:
                rows.append((torch.arange(2).view(2, 1) * self.num_blocks + blocks).flatten())
        return PageIndex(tuple(rows), lengths, tuple(counts))

    def read(self, layer: int, tensor_rank: int, index: PageIndex, valid: Sequence[int]) -> list[torch.Tensor]:
        """K and V of each sequence of ``index`` as one tensor [2, heads, tokens, head_dim] in the cache's dtype.

        Args:
            valid: tokens of each sequence that hold something; the others are zeroed, for a page that was never written
                may hold NaN, which no mask takes away.
        """
        rank = self.ranks(layer)[tensor_rank]
        shard = self.shards[rank]
        heads, dim = shard.end_head - shard.first_head, self.config.head_dim
        pages = self.regions[rank][layer - shard.first_layer]
        total = sum(index.pages) * self.block_tokens
        if self.kv_layout == "HND":
            flat = pages.view(-1, self.block_tokens * dim).index_select(0, index.rows[tensor_rank])
            gathered = flat.view(2, heads, total, dim)
        else:
            flat = pages.view(-1, self.block_tokens * heads * dim).index_select(0, index.rows[tensor_rank])
            gathered = flat.view(2, total, heads, dim).transpose(1, 2)
        sequences, begin = [], 0
        for tokens, count, held in zip(index.tokens, index.pages, valid, strict=True):
            sequence = gathered[:, :, begin : begin + tokens]
            if held < tokens:
                sequence[:, :, held:] = 0
            sequences.append(sequence)
            begin += count * self.block_tokens
        return sequences

    def layout(self, fingerprint: str) -> InstanceLayout:
        """Where every byte lies, for the KV-cache library."""
        from railwire.kvcache.geometry.layout import Component, InstanceLayout, LayerStorage, RankLayout, Storage

        item = self.dtype.itemsize
        dim = self.config.head_dim * item
        name = str(self.dtype).removeprefix("torch.")
        components = tuple(Component(part, self.config.kv_heads, dim, name) for part in ("k", "v"))
        ranks = []
        for shard, region in zip(self.shards, self.regions, strict=True):
            strides = [stride * item for stride in region.stride()]
            token, head = (4, 3) if self.kv_layout == "HND" else (3, 4)
            layers = tuple(
                LayerStorage(
                    layer=layer,
                    storages=tuple(
                        Storage(
                            region=0,
                            offset=(layer - shard.first_layer) * strides[0] + part * strides[1],
                            page_stride=strides[2],
                            token_stride=strides[token],
                            head_stride=strides[head],
                            first_head=shard.first_head,
                            heads=shard.end_head - shard.first_head,
                        )
                        for part in range(2)
                    ),
                )
                for layer in self._layers(shard)
            )
            ranks.append(
                RankLayout(
                    model=fingerprint,
                    block_tokens=self.block_tokens,
                    num_blocks=self.num_blocks,
                    components=components,
                    layers=layers,
                    region_bytes=(region.numel() * item,),
                )
            )
        return InstanceLayout(ranks=tuple(ranks))

    def _shape(self, shard: Shard) -> tuple[int, ...]:
        layers, heads, dim = (
            shard.end_layer - shard.first_layer,
            shard.end_head - shard.first_head,
            self.config.head_dim,
        )
        inner = (heads, self.block_tokens) if self.kv_layout == "HND" else (self.block_tokens, heads)
        return (layers, 2, self.num_blocks, *inner, dim)

    @staticmethod
    def _layers(shard: Shard) -> range:
        return range(shard.first_layer, shard.end_layer)
