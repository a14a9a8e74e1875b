"""Where the KV cache of a rank lies: the description that prefiller and decoder exchange at the handshake.

The bytes of one token, head and component of a layer lie at ::

    offset + block * page_stride + (token % block_tokens) * token_stride + (head - first_head) * head_stride

of its region, which covers every usual shape: heads outside tokens (HND) or inside (NHD), K and V in separate
tensors, in one tensor with a leading 2, per block, or K|V in the last axis; all layers of a block together; MLA
latents; scales in regions of their own. ``railwire.kvcache.geometry.builders`` makes layouts of these shapes.

Layouts come from the network too: a :class:`RankLayout` or :class:`InstanceLayout` that exists is valid. Its sizes are
within the limits below, every byte lies inside its region, and no two (layer, component, block, token, head) share one.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import msgspec

from railwire.errors import RailwireError
from railwire.kvcache.geometry.disjoint import Box, OverlapError, check_disjoint, nested

# Far above any real model; what keeps a hostile layout from costing memory or time.
MAX_RANKS = 1024
MAX_LAYERS = 1024
MAX_COMPONENTS = 16
MAX_HEADS = 1 << 14
MAX_HEAD_BYTES = 1 << 20
MAX_BLOCK_TOKENS = 1 << 16
MAX_BLOCKS = 1 << 31
MAX_REGIONS = 1 << 14
MAX_BYTES = 1 << 48
MAX_LAYOUT_NAME = 256


class LayoutError(RailwireError, ValueError):
    """A layout that cannot be, or two that cannot be mapped onto each other; the message says what differs."""


class Component(msgspec.Struct, frozen=True, array_like=True):
    """What every token of a layer has: "k", "v", "latent", "k_scale", ...

    Attributes:
        name: equal on both sides.
        heads: of the whole model, however they are split; 1 for an MLA latent.
        head_bytes: of one token of one head.
        dtype: only compared, never interpreted.
    """

    name: str
    heads: int
    head_bytes: int
    dtype: str


class Storage(msgspec.Struct, frozen=True, array_like=True):
    """Where one component of one layer lies in a rank's memory. All strides and offsets in bytes.

    Attributes:
        region: index into the rank's list of registered regions.
        offset: from the region's begin to block 0, token 0, first held head.
        page_stride: from one block to the next; at least 1.
        token_stride: from one token of a block to the next.
        head_stride: from one held head to the next.
        first_head: the rank holds the global heads [first_head, first_head + heads).
        heads: how many; 0 if the rank holds nothing of this component.
    """

    region: int
    offset: int
    page_stride: int
    token_stride: int
    head_stride: int
    first_head: int
    heads: int


class LayerStorage(msgspec.Struct, frozen=True, array_like=True):
    """One layer: its global index, and its storages in the order of the rank's components."""

    layer: int
    storages: tuple[Storage, ...]


class Held(NamedTuple):
    """A storage relative to its layer: ``offset`` counts from the begin of the layer's first storage in that region,
    and ``region`` is an index into the regions of this layer. Layers of equal ``Held`` are alike but for where they
    lie."""

    region: int
    offset: int
    page_stride: int
    token_stride: int
    head_stride: int
    first_head: int
    heads: int


class LayerShape(NamedTuple):
    """A layer cut in two: ``held`` (by component name; equal for layers of the same shape) and where that shape lies:
    (region, offset) of each of its regions."""

    held: tuple[Held, ...]
    bases: tuple[tuple[int, int], ...]


class RankLayout(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """The KV cache of one rank.

    Attributes:
        model: fingerprint of weights and configuration; both sides must have the same. Put into it what changes the
            meaning of the bytes but not their place (scales per tensor, rope settings).
        block_tokens: tokens of a block (page).
        num_blocks: block ids are 0..num_blocks-1.
        layers: those that this rank holds, by ascending index.
        region_bytes: sizes of the registered regions.

    Raises:
        LayoutError: numbers out of range, storages that leave their region or overlap.
    """

    model: str
    block_tokens: int
    num_blocks: int
    components: tuple[Component, ...]
    layers: tuple[LayerStorage, ...]
    region_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_name("model fingerprint", self.model)
        _check("block_tokens", self.block_tokens, 1, MAX_BLOCK_TOKENS)
        _check("num_blocks", self.num_blocks, 1, MAX_BLOCKS)
        _check("number of components", len(self.components), 1, MAX_COMPONENTS)
        _check("number of layers", len(self.layers), 1, MAX_LAYERS)
        _check("number of regions", len(self.region_bytes), 1, MAX_REGIONS)
        for nbytes in self.region_bytes:
            _check("size of a region", nbytes, 1, MAX_BYTES)
        for component in self.components:
            _check_name("component name", component.name)
            _check_name("dtype", component.dtype)
            _check(f"heads of component {component.name!r}", component.heads, 1, MAX_HEADS)
            _check(f"head_bytes of component {component.name!r}", component.head_bytes, 1, MAX_HEAD_BYTES)
        if len({component.name for component in self.components}) != len(self.components):
            raise LayoutError("two components have the same name")
        self._check_storages()

    def _check_storages(self) -> None:
        boxes: dict[int, list[Box]] = {}
        shapes: dict[tuple[int, ...], tuple[tuple[tuple[int, int], ...], int]] = {}
        last = -1
        for layer in self.layers:
            _check("layer index", layer.layer, 0, MAX_LAYERS * 16)
            if layer.layer <= last:
                raise LayoutError(f"layer {layer.layer} follows layer {last}: layers go by ascending index, each once")
            last = layer.layer
            if len(layer.storages) != len(self.components):
                raise LayoutError(
                    f"layer {last} has {len(layer.storages)} storages for {len(self.components)} components"
                )
            for index, storage in enumerate(layer.storages):
                region, offset, *shape = msgspec.structs.astuple(storage)
                _check(f"region of layer {last}", region, 0, len(self.region_bytes) - 1)
                _check(f"offset of layer {last}", offset, 0, MAX_BYTES)
                if storage.heads == 0:
                    continue
                key = (index, *shape)
                if key not in shapes:
                    shapes[key] = self._extent(storage, self.components[index], last)
                dims, extent = shapes[key]
                if offset + extent > self.region_bytes[region]:
                    raise LayoutError(
                        f"component {self.components[index].name!r} of layer {last} ends at byte {offset + extent} of "
                        f"region {region}, which has {self.region_bytes[region]}"
                    )
                boxes.setdefault(region, []).append(
                    Box(offset, extent, dims, self.components[index].head_bytes, last, index)
                )
        for region, inside in boxes.items():
            try:
                check_disjoint(inside)
            except OverlapError as error:
                one, other = (f"component {self.components[c].name!r} of layer {layer}" for layer, c in error.pair)
                raise LayoutError(
                    f"{one} and {other} overlap in region {region}, or interleave in no regular way"
                ) from None

    def _extent(self, storage: Storage, component: Component, layer: int) -> tuple[tuple[tuple[int, int], ...], int]:
        what = f"of component {component.name!r} of layer {layer}"
        _check(f"first_head {what}", storage.first_head, 0, component.heads - 1)
        _check(f"heads {what}", storage.heads, 0, component.heads - storage.first_head)
        _check(f"page_stride {what}", storage.page_stride, 1, MAX_BYTES)
        _check(f"token_stride {what}", storage.token_stride, 0, MAX_BYTES)
        _check(f"head_stride {what}", storage.head_stride, 0, MAX_BYTES)
        pairs = (
            (self.num_blocks, storage.page_stride),
            (self.block_tokens, storage.token_stride),
            (storage.heads, storage.head_stride),
        )
        shape = nested(pairs, component.head_bytes)
        if shape is None:
            raise LayoutError(
                f"blocks, tokens or heads {what} overlap: {self.num_blocks} blocks {storage.page_stride} bytes apart, "
                f"{self.block_tokens} tokens {storage.token_stride} apart, {storage.heads} heads "
                f"{storage.head_stride} apart, of {component.head_bytes} bytes each"
            )
        return shape

    @cached_property
    def by_name(self) -> tuple[int, ...]:
        """Indices of the components, by ascending name: the order in which both sides treat them."""
        return tuple(sorted(range(len(self.components)), key=lambda index: self.components[index].name))

    @cached_property
    def shapes(self) -> dict[int, LayerShape]:
        """Of each layer, by its global index. Components in the order of :attr:`by_name`."""
        shapes = {}
        for layer in self.layers:
            bases: list[tuple[int, int]] = []
            known: dict[int, int] = {}
            held = []
            for index in self.by_name:
                region, offset, *rest = msgspec.structs.astuple(layer.storages[index])
                number = known.setdefault(region, len(bases))
                if number == len(bases):
                    bases.append((region, offset))
                held.append(Held(number, offset - bases[number][1], *rest))
            shapes[layer.layer] = LayerShape(tuple(held), tuple(bases))
        return shapes

    def storages(self, layer: int) -> tuple[Storage, ...]:
        """Of a layer, in the order of :attr:`by_name`. KeyError: the rank does not hold it."""
        held, bases = self.shapes[layer]
        return tuple(Storage(bases[h.region][0], bases[h.region][1] + h.offset, *h[2:]) for h in held)


class InstanceLayout(msgspec.Struct, frozen=True, array_like=True):
    """The KV cache of all ranks of one model replica, by rank.

    Raises:
        LayoutError: ranks that differ in model, components or block_tokens.
    """

    ranks: tuple[RankLayout, ...]

    def __post_init__(self) -> None:
        _check("number of ranks", len(self.ranks), 1, MAX_RANKS)
        first = self.ranks[0]
        for index, rank in enumerate(self.ranks):
            for what in ("model", "components", "block_tokens"):
                if getattr(rank, what) != getattr(first, what):
                    raise LayoutError(f"rank {index} of the instance has another {what} than rank 0")


def _check(what: str, value: int, low: int, high: int) -> None:
    if type(value) is not int:
        raise LayoutError(f"{what} must be an int, not {value!r}")
    if not low <= value <= high:
        raise LayoutError(f"{what} must be {low}..{high}, not {value}")


def _check_name(what: str, value: str) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_LAYOUT_NAME:
        raise LayoutError(f"{what} must have 1..{MAX_LAYOUT_NAME} characters")
