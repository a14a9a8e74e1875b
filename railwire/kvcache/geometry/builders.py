"""Layouts of the usual paged KV caches, by the names that serving engines use for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from railwire.kvcache.geometry.layout import Component, InstanceLayout, LayerStorage, LayoutError, RankLayout, Storage

Order = Literal["HND", "NHD"]
Arrangement = Literal["separate", "leading", "block", "last"]
Placement = Literal["tensors", "one", "cross_layer"]

_ALIGNMENT = 256  # of tensors that share a region


def head_range(heads: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """(first, count) of the heads that a tensor rank holds. With more ranks than heads, ``tp_size // heads``
    neighbouring ranks hold the same one.

    Raises:
        LayoutError: neither number divides the other.
    """
    if tp_size < 1 or not 0 <= tp_rank < tp_size:
        raise LayoutError(f"tensor rank {tp_rank} of {tp_size}")
    if heads % tp_size == 0:
        return tp_rank * (heads // tp_size), heads // tp_size
    if tp_size % heads == 0:
        return tp_rank // (tp_size // heads), 1
    raise LayoutError(f"{heads} KV heads cannot be split over {tp_size} tensor ranks")


def paged_layout(
    *,
    model: str,
    layers: Iterable[int],
    num_blocks: int,
    block_tokens: int,
    kv_heads: int,
    head_bytes: int,
    dtype: str = "bfloat16",
    order: Order = "HND",
    kv: Arrangement = "separate",
    placement: Placement = "tensors",
    tp_rank: int = 0,
    tp_size: int = 1,
    scale_bytes: int = 0,
    scale_dtype: str = "float32",
    indexer_bytes: int = 0,
    indexer_dtype: str = "uint8",
) -> RankLayout:
    """A rank of a model with K and V per head (MHA, GQA, MQA).

    Args:
        model: fingerprint, see :class:`RankLayout`.
        layers: global indices that this rank holds (its pipeline stage).
        head_bytes: head dimension times bytes of an element; K and V alike.
        order: "HND": a page is [heads, tokens, head_dim]; "NHD": [tokens, heads, head_dim].
        kv: "separate": K and V are tensors [blocks, page] of their own (regions in the order K, V); "leading": one
            tensor [2, blocks, page]; "block": one [blocks, 2, page]; "last": one [blocks, page] whose last axis is K|V.
        placement: "tensors": every tensor is a region, layer by layer; "one": they lie one after the other, 256-byte
            aligned, in a single region; "cross_layer": all layers of a block together, [blocks, layers, ...] in one
            region (needs kv="block" or "last").
        tp_rank, tp_size: KV heads are split by :func:`head_range`.
        scale_bytes: of one token of one head, where a quantised cache has scales: components "k_scale" and "v_scale" in
            tensors of their own, arranged as ``kv`` says. 0: none.
        indexer_bytes: per token, where the layers have an indexer key: component "indexer", replicated over the tensor
            ranks. 0: none.

    Raises:
        LayoutError: what cannot be laid out so.
    """
    if placement == "cross_layer" and kv not in ("block", "last"):
        raise LayoutError(f'placement="cross_layer" needs kv="block" or "last", not {kv!r}')
    first, count = head_range(kv_heads, tp_rank, tp_size)
    groups = [_Group((("k", head_bytes, dtype), ("v", head_bytes, dtype)), kv_heads, first, count, order, kv)]
    if scale_bytes:
        scales = (("k_scale", scale_bytes, scale_dtype), ("v_scale", scale_bytes, scale_dtype))
        groups.append(_Group(scales, kv_heads, first, count, order, kv))
    if indexer_bytes:
        groups.append(_Group((("indexer", indexer_bytes, indexer_dtype),), 1, 0, 1, order, "last"))
    return _lay_out(groups, model, tuple(layers), num_blocks, block_tokens, placement)


def mla_layout(
    *,
    model: str,
    layers: Iterable[int],
    num_blocks: int,
    block_tokens: int,
    latent_bytes: int,
    dtype: str = "bfloat16",
    placement: Placement = "tensors",
    indexer_bytes: int = 0,
    indexer_dtype: str = "uint8",
    tp_rank: int = 0,
    tp_size: int = 1,
) -> RankLayout:
    """A rank of a model with multi-head latent attention: one latent per token, the same on every tensor rank.

    Args:
        latent_bytes: of one token, rope part included (DeepSeek V3: 576 elements).
        indexer_bytes: of one token's indexer key where there is one (DeepSeek V3.2), in tensors of its own.
        others: as for :func:`paged_layout`.
    """
    head_range(1, tp_rank, tp_size)
    groups = [_Group((("latent", latent_bytes, dtype),), 1, 0, 1, "NHD", "last")]
    if indexer_bytes:
        groups.append(_Group((("indexer", indexer_bytes, indexer_dtype),), 1, 0, 1, "NHD", "last"))
    return _lay_out(groups, model, tuple(layers), num_blocks, block_tokens, placement)


def paged_instance(*, stages: Sequence[Iterable[int]], tp_size: int = 1, **options: Any) -> InstanceLayout:
    """All ranks of an instance: rank ``stage * tp_size + tp_rank`` holds the layers ``stages[stage]``. Options as for
    :func:`paged_layout`."""
    return _instance(paged_layout, stages, tp_size, options)


def mla_instance(*, stages: Sequence[Iterable[int]], tp_size: int = 1, **options: Any) -> InstanceLayout:
    """As :func:`paged_instance`, of :func:`mla_layout`."""
    return _instance(mla_layout, stages, tp_size, options)


def _instance(build: Any, stages: Sequence[Iterable[int]], tp_size: int, options: dict[str, Any]) -> InstanceLayout:
    return InstanceLayout(
        tuple(
            build(layers=tuple(stage), tp_rank=tp_rank, tp_size=tp_size, **options)
            for stage in stages
            for tp_rank in range(tp_size)
        )
    )


class _Group(NamedTuple):
    """Components (name, bytes, dtype) that share heads, and how they lie in their tensors."""

    parts: tuple[tuple[str, int, str], ...]
    heads: int
    first_head: int
    held: int
    order: Order
    kv: Arrangement


class _Place(NamedTuple):
    """A component within the tensors of its group: in tensor ``tensor``, page 0 at ``offset``."""

    tensor: int
    offset: int
    page_stride: int
    token_stride: int
    head_stride: int


def _arrange(group: _Group, num_blocks: int, block_tokens: int) -> tuple[list[_Place], list[int]]:
    """The components of one layer in its tensors, and the bytes of these tensors."""
    row = sum(nbytes for _, nbytes, _ in group.parts)
    places: list[_Place] = []
    sizes: list[int] = []
    before = 0  # bytes of a token of a head in the components before this one
    for _, nbytes, _ in group.parts:
        unit = row if group.kv == "last" else nbytes
        strides = (unit, block_tokens * unit) if group.order == "HND" else (group.held * unit, unit)
        elements = block_tokens * group.held
        if group.kv == "last":
            places.append(_Place(0, before, elements * row, *strides))
        elif group.kv == "block":
            places.append(_Place(0, before * elements, elements * row, *strides))
        elif group.kv == "leading":
            places.append(_Place(0, before * elements * num_blocks, elements * nbytes, *strides))
        elif group.kv == "separate":
            places.append(_Place(len(sizes), 0, elements * nbytes, *strides))
            sizes.append(num_blocks * elements * nbytes)
        else:
            raise LayoutError(f"kv is separate, leading, block or last, not {group.kv!r}")
        before += nbytes
    return places, sizes or [num_blocks * block_tokens * group.held * row]


def _lay_out(
    groups: list[_Group], model: str, layers: tuple[int, ...], num_blocks: int, block_tokens: int, placement: Placement
) -> RankLayout:
    for group in groups:
        if group.order not in ("HND", "NHD"):
            raise LayoutError(f"order is HND or NHD, not {group.order!r}")
    if placement not in ("tensors", "one", "cross_layer"):
        raise LayoutError(f"placement is tensors, one or cross_layer, not {placement!r}")
    if num_blocks < 1 or block_tokens < 1 or not layers:
        raise LayoutError(f"{len(layers)} layers of {num_blocks} blocks of {block_tokens} tokens")
    regions: list[int] = []
    storages: dict[int, list[Storage]] = {layer: [] for layer in layers}
    arranged = [(group, *_arrange(group, num_blocks, block_tokens)) for group in groups]
    for number, layer in enumerate(layers):
        for group_index, (group, places, sizes) in enumerate(arranged):
            starts = []
            if placement == "cross_layer":
                if number == 0:
                    regions.append(sizes[0] * len(layers))
                starts = [(group_index, number * (sizes[0] // num_blocks))]
            for size in sizes if placement != "cross_layer" else ():
                if placement == "tensors" or not regions:
                    regions.append(0)
                else:
                    regions[-1] += -regions[-1] % _ALIGNMENT
                starts.append((len(regions) - 1, regions[-1]))
                regions[-1] += size
            for place in places:
                region, start = starts[place.tensor]
                page_stride = place.page_stride * (len(layers) if placement == "cross_layer" else 1)
                storages[layer].append(
                    Storage(
                        region,
                        start + place.offset,
                        page_stride,
                        place.token_stride,
                        place.head_stride,
                        group.first_head,
                        group.held,
                    )
                )
    return RankLayout(
        model=model,
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        components=tuple(Component(name, g.heads, nbytes, dtype) for g in groups for name, nbytes, dtype in g.parts),
        layers=tuple(LayerStorage(layer, tuple(storages[layer])) for layer in layers),
        region_bytes=tuple(regions),
    )
