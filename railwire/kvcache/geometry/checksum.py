"""Checksums of KV pages that do not depend on where a page lies, how it is laid out, or which ranks it came through.

The sum of a unit of tokens is ::

    sum over (layer, component, head, token) of mix(key(layer, component, head, token) + sum_j word_j * weight_j)

mod 2**64, over the 64-bit words of one head of one token (zero-padded), with odd weights, ``mix`` the finaliser of
SplitMix64 (Steele et al., 2014; a bijection) and ``token`` counted from the begin of the sequence. Therefore

* a change within one word of one head of one token always changes the sum; any other change, swapped tokens, heads,
  layers or pages included, goes unnoticed with a probability of about 2**-63. This finds accidents, not forgeries;
* sums of disjoint shares add up: what several source ranks sent is compared with what the destination holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from railwire.kvcache.geometry.blocktable import check_range, covering
from railwire.kvcache.geometry.layout import LayoutError, RankLayout, Storage
from railwire.kvcache.geometry.plan import RankPlan
from railwire.kvcache.geometry.share import Share
from railwire.splitmix import GOLDEN, Words, mix

_CHUNK_BYTES = 256 << 10  # gathered at a time: stays in the cache of a core


def held_shares(layout: RankLayout) -> dict[int, tuple[Share, ...]]:
    """Everything that a rank holds, as :attr:`RankPlan.shares` says it."""
    return {
        layer: tuple(Share(index, held.first_head, held.heads) for index, held in enumerate(shape.held) if held.heads)
        for layer, shape in layout.shapes.items()
    }


def source_sums(
    regions: Sequence[Any],
    layout: RankLayout,
    rank_plan: RankPlan,
    block_table: npt.ArrayLike,
    first_token: int,
    end_token: int,
    *,
    first_block: int = 0,
    layers: Iterable[int] | None = None,
) -> Words:
    """Sums of what a source rank sends by a plan; the rest as for :func:`page_sums`."""
    return page_sums(
        regions, layout, rank_plan.unit_tokens, rank_plan.shares, block_table, first_token, end_token,
        first_block=first_block, layers=layers,
    )  # fmt: skip


def destination_sums(
    regions: Sequence[Any],
    layout: RankLayout,
    unit_tokens: int,
    block_table: npt.ArrayLike,
    first_token: int,
    end_token: int,
    *,
    first_block: int = 0,
    layers: Iterable[int] | None = None,
) -> Words:
    """Sums of all that a rank holds; equal to the sum of the :func:`source_sums` of all source ranks if all is well."""
    return page_sums(
        regions, layout, unit_tokens, held_shares(layout), block_table, first_token, end_token,
        first_block=first_block, layers=layers,
    )  # fmt: skip


def page_sums(
    regions: Sequence[Any],
    layout: RankLayout,
    unit_tokens: int,
    shares: Mapping[int, Sequence[Share]],
    block_table: npt.ArrayLike,
    first_token: int,
    end_token: int,
    *,
    first_block: int = 0,
    layers: Iterable[int] | None = None,
) -> Words:
    """Sums of the tokens [first_token, end_token), one uint64 per unit of ``unit_tokens``.

    Bytes of the last unit that lie behind ``end_token`` do not count.

    Args:
        regions: the memory of the rank, by index: anything that numpy takes without a copy (arrays, the buffer
            protocol, CPU tensors of a dtype that numpy knows).
        layout: of the rank.
        shares: what counts, by layer.
        block_table: block ids by position, from position ``first_block`` on.
        layers: only these; all of ``shares`` if None. Sums of disjoint layers add up.

    Raises:
        ValueError: ``first_token`` is no multiple of ``unit_tokens``.
        IndexError: the block table does not reach so far, or names a block that does not exist.
        LayoutError: memory that is smaller than the layout says, or shares that the rank does not hold.
    """
    check_range(first_token, end_token, unit_tokens)
    memory = _memory(layout, regions)
    blocks = covering(
        block_table, first_token, end_token,
        block_tokens=layout.block_tokens, num_blocks=layout.num_blocks, first_block=first_block,
    )  # fmt: skip
    begin = first_token // layout.block_tokens * layout.block_tokens
    tokens = np.zeros(len(blocks) * layout.block_tokens, dtype=np.uint64)
    token_keys = _keys("token", begin, len(tokens))
    for layer in shares if layers is None else layers:
        storages = layout.storages(layer)
        for share in shares[layer]:
            component = layout.components[layout.by_name[share.component]]
            storage = storages[share.component]
            if not (
                storage.first_head <= share.first_head
                and share.first_head + share.heads <= storage.first_head + storage.heads
            ):
                raise LayoutError(f"component {component.name!r} of layer {layer}: heads that the rank does not hold")
            _add(
                tokens, token_keys, memory[storage.region], layout, storage, share, component.head_bytes, blocks,
                _key(f"layer {layer} {component.name}"),
            )  # fmt: skip
    counted = tokens[first_token - begin : end_token - begin] if len(blocks) else tokens
    units = -(-len(counted) // unit_tokens)
    padded = np.zeros(units * unit_tokens, dtype=np.uint64)
    padded[: len(counted)] = counted
    sums: Words = padded.reshape(units, unit_tokens).sum(axis=1, dtype=np.uint64)
    return sums


def _memory(layout: RankLayout, regions: Sequence[Any]) -> list[npt.NDArray[np.uint8]]:
    if len(regions) != len(layout.region_bytes):
        raise LayoutError(f"{len(regions)} regions, the layout has {len(layout.region_bytes)}")
    memory = []
    for index, (region, nbytes) in enumerate(zip(regions, layout.region_bytes, strict=True)):
        array = np.asarray(region)
        if not array.flags.c_contiguous or array.nbytes < nbytes:
            raise LayoutError(f"region {index} is no contiguous memory of {nbytes} bytes")
        memory.append(array.reshape(-1).view(np.uint8))
    return memory


def _add(
    tokens: Words,
    token_keys: Words,
    memory: npt.NDArray[np.uint8],
    layout: RankLayout,
    storage: Storage,
    share: Share,
    head_bytes: int,
    blocks: npt.NDArray[np.int64],
    key: int,
) -> None:
    """Adds the sums of one share of one layer to those of the tokens."""
    words = -(-head_bytes // 8)
    whole = head_bytes % 8 == 0
    item = 8 if whole else 1
    pages = np.ndarray(
        (layout.num_blocks, layout.block_tokens, share.heads, head_bytes // item),
        dtype="<u8" if whole else "u1",
        buffer=memory.data,
        offset=storage.offset + (share.first_head - storage.first_head) * storage.head_stride,
        strides=(storage.page_stride, storage.token_stride, storage.head_stride, item),
    )
    head_keys = _keys("head", share.first_head, share.heads) + np.uint64(key)
    weights = _weights(words)
    at_once = max(1, _CHUNK_BYTES // (layout.block_tokens * share.heads * words * 8))
    for start in range(0, len(blocks), at_once):
        gathered = pages[blocks[start : start + at_once]]
        if not whole:
            padded = np.zeros((*gathered.shape[:3], words * 8), dtype=np.uint8)
            padded[..., :head_bytes] = gathered
            gathered = padded.view("<u8")
        hashes = np.einsum("bthw,w->bth", gathered, weights).reshape(-1, share.heads)
        where = slice(start * layout.block_tokens, start * layout.block_tokens + len(hashes))
        hashes += token_keys[where, None]
        hashes += head_keys
        tokens[where] += mix(hashes).sum(axis=1, dtype=np.uint64)


@lru_cache(maxsize=4096)
def _key(what: str) -> int:
    return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "little")


def _keys(what: str, first: int, count: int) -> Words:
    """Independent keys of ``count`` things from number ``first`` on."""
    numbers = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    return mix(numbers * np.uint64(GOLDEN) + np.uint64(_key(what)))


@lru_cache(maxsize=64)
def _weights(words: int) -> Words:
    weights: Words = _keys("word", 0, words) | np.uint64(1)
    return weights
