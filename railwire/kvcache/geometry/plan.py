"""Who writes what where: the plan between the ranks of a prefill instance and one decode rank.

Both sides compute it from the same two layouts at the handshake, prove it (:mod:`railwire.kvcache.geometry.cover`) and
compare the digests. A plan is cut at *units* of ``gcd`` of the two block sizes in tokens. It consists of steps: each
is one page list for ``engine.write_pages`` per range of tokens, and one unit of one step is one arrival at the
receiver's counter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from railwire.kvcache.geometry.blocktable import check_range, covering
from railwire.kvcache.geometry.cover import ProofError, elements, prove_layer
from railwire.kvcache.geometry.cut import Cut, box, cut, unit_steps
from railwire.kvcache.geometry.layout import InstanceLayout, LayerShape, LayoutError, RankLayout
from railwire.kvcache.geometry.pages import Addressing, Runs, Step
from railwire.kvcache.geometry.share import Budget, Share, Source, check_mappable, choose

VERSION = 1
MAX_INDEX = (1 << 32) - 1  # of a page list
# What one plan may take, in steps of about 50 ns: a second or two, some hundred times what real models need.
WORK_LIMIT = 1 << 25
MAX_ELEMENTS = 1 << 20  # heads x tokens of a unit, of one layer of a rank: bounds the memory of the proof


@dataclass(frozen=True)
class RankPlan:
    """What one source rank writes to one destination rank.

    Attributes:
        unit_tokens: token ranges begin at a multiple of it; a last unit that the range ends in is written whole.
        steps: by global layer, for the layers of which this source rank sends anything.
        shares: by global layer, the same in the model's terms: components and heads.
        digest: 16 bytes, equal where the plans are.
    """

    source_rank: int
    destination_rank: int
    unit_tokens: int
    src_block_tokens: int
    dst_block_tokens: int
    src_num_blocks: int
    dst_num_blocks: int
    steps: dict[int, tuple[Step, ...]]
    shares: dict[int, tuple[Share, ...]]
    digest: bytes
    num_steps: int
    bytes_per_unit: int

    def units(self, first_token: int, end_token: int) -> int:
        """Units of the tokens [first_token, end_token).

        Raises:
            ValueError: ``first_token`` is no multiple of ``unit_tokens``, or the range is none.
        """
        check_range(first_token, end_token, self.unit_tokens)
        return -(-end_token // self.unit_tokens) - first_token // self.unit_tokens

    def arrivals(self, first_token: int, end_token: int) -> int:
        """Pages that the receiver's counter sees of this rank for these tokens, all layers together. ValueError: as
        :meth:`units`."""
        return self.units(first_token, end_token) * self.num_steps

    def nbytes(self, first_token: int, end_token: int) -> int:
        """Bytes written for these tokens, all layers together. ValueError: as :meth:`units`."""
        return self.units(first_token, end_token) * self.bytes_per_unit

    def src_indices(
        self, step: Step, block_table: npt.ArrayLike, first_token: int, end_token: int, *, first_block: int = 0
    ) -> npt.NDArray[np.int64]:
        """Source page indices of a step for the tokens [first_token, end_token), for ``engine.write_pages``.

        Args:
            block_table: block ids by position; ``block_table[0]`` holds the tokens from ``first_block *
                block_tokens`` on.

        Raises:
            ValueError: as :meth:`units`.
            IndexError: the table does not reach so far, or names a block that does not exist.
        """
        return _indices(
            self, step.src, self.src_block_tokens, self.src_num_blocks, block_table, first_token, end_token, first_block
        )

    def dst_indices(
        self, step: Step, block_table: npt.ArrayLike, first_token: int, end_token: int, *, first_block: int = 0
    ) -> npt.NDArray[np.int64]:
        """As :meth:`src_indices`, of the destination."""
        return _indices(
            self, step.dst, self.dst_block_tokens, self.dst_num_blocks, block_table, first_token, end_token, first_block
        )


def _indices(
    rank_plan: RankPlan,
    side: Addressing,
    block_tokens: int,
    num_blocks: int,
    block_table: npt.ArrayLike,
    first_token: int,
    end_token: int,
    first_block: int,
) -> npt.NDArray[np.int64]:
    count = rank_plan.units(first_token, end_token)
    blocks = covering(
        block_table, first_token, end_token, block_tokens=block_tokens, num_blocks=num_blocks, first_block=first_block
    )
    if side.block_step != 1:
        blocks *= side.block_step
    per_block = block_tokens // rank_plan.unit_tokens
    if per_block == 1:
        return blocks
    inner = np.arange(per_block, dtype=np.int64) * side.sub_step
    skipped = first_token // rank_plan.unit_tokens % per_block
    return (blocks[:, None] + inner).reshape(-1)[skipped : skipped + count]


def plan(source: InstanceLayout, destination: RankLayout, destination_index: int) -> tuple[RankPlan | None, ...]:
    """Plans and proves what each rank of ``source`` writes to the decode rank ``destination``.

    Of what several source ranks hold alike (MLA; more tensor ranks than KV heads) each destination rank gets one
    copy, from the ``destination_index``-th of them, counted round: give ranks of one instance, and data-parallel
    instances of one rank, different numbers.

    Returns:
        One plan per source rank; None if it sends nothing.

    Raises:
        LayoutError: the layouts cannot be mapped onto each other; says why.
    """
    if type(destination_index) is not int or destination_index < 0:
        raise LayoutError(f"the index of a destination rank must be an int from 0, not {destination_index!r}")
    check_mappable(source.ranks[0], destination)
    return _Planner(source, destination, destination_index).run()


class _Pattern(NamedTuple):
    """A step but for where its layer lies: regions are indices into ``LayerShape.bases``, offsets count from there;
    ``reach`` is the distance from a side's offset to behind its last byte."""

    src_region: int
    src_offset: int
    src_reach: int
    src: tuple[int, Runs, int, int]
    dst_region: int
    dst_offset: int
    dst_reach: int
    dst: tuple[int, Runs, int, int]
    nbytes: int


class _Part(NamedTuple):
    """What one source rank sends of a layer."""

    rank: int
    patterns: tuple[_Pattern, ...]
    shares: tuple[Share, ...]


class _Planner:
    """Computes and proves each distinct geometry of a layer once; layers of the same one are copies at other
    offsets."""

    def __init__(self, source: InstanceLayout, destination: RankLayout, destination_index: int) -> None:
        self.source = source
        self.destination = destination
        self.index = destination_index
        self.src_block_tokens = source.ranks[0].block_tokens
        self.unit_tokens = gcd(self.src_block_tokens, destination.block_tokens)
        self.components = tuple(destination.components[i] for i in destination.by_name)
        self.budget = Budget(WORK_LIMIT)

    def run(self) -> tuple[RankPlan | None, ...]:
        holders: dict[int, list[tuple[int, LayerShape]]] = {layer: [] for layer in self.destination.shapes}
        for rank, layout in enumerate(self.source.ranks):
            for layer, shape in layout.shapes.items():
                if layer in holders:
                    holders[layer].append((rank, shape))
        geometries: dict[Any, tuple[_Part, ...]] = {}
        steps: list[dict[int, tuple[Step, ...]]] = [{} for _ in self.source.ranks]
        shares: list[dict[int, tuple[Share, ...]]] = [{} for _ in self.source.ranks]
        for layer, shape in self.destination.shapes.items():
            sources = holders[layer]
            key = (shape.held, tuple([(rank, held.held) for rank, held in sources]))
            parts = geometries.get(key)
            fresh = parts is None
            if parts is None:
                parts = geometries[key] = self._parts(layer, shape, sources)
            bases = dict(sources)
            for part in parts:
                self.budget.spend(32 * len(part.patterns))
                steps[part.rank][layer] = self._place(layer, part, bases[part.rank], shape)
                shares[part.rank][layer] = part.shares
            if fresh:
                made = [(part.rank, step) for part in parts for step in steps[part.rank][layer]]
                prove_layer(layer, self.unit_tokens, self.destination, self.source.ranks, made)
        return tuple(
            self._rank_plan(rank, layout, steps[rank], shares[rank]) if steps[rank] else None
            for rank, layout in enumerate(self.source.ranks)
        )

    def _parts(self, layer: int, shape: LayerShape, sources: list[tuple[int, LayerShape]]) -> tuple[_Part, ...]:
        size = elements(self.destination, layer, self.unit_tokens)
        if size > MAX_ELEMENTS:
            raise LayoutError(
                f"layer {layer}: {size} heads x tokens in a unit of {self.unit_tokens} tokens are too many"
            )
        self.budget.spend(16 * size)
        offers = [Source(rank, held.held) for rank, held in sources]
        chosen = choose(layer, self.components, shape.held, offers, self.index, self.budget)
        held = {rank: source.held for rank, source in sources}
        parts = []
        for rank, shares in sorted(chosen.items()):
            boxes = [
                box(
                    held[rank][share.component], shape.held[share.component], share.first_head, share.heads,
                    self.components[share.component].head_bytes,
                    self.unit_tokens, self.src_block_tokens, self.destination.block_tokens,
                )
                for share in shares
            ]  # fmt: skip
            patterns = tuple(self._pattern(layer, one, self.source.ranks[rank]) for one in cut(boxes))
            parts.append(_Part(rank, patterns, tuple(shares)))
        return tuple(parts)

    def _pattern(self, layer: int, step: Cut, source: RankLayout) -> _Pattern:
        self.budget.spend(64)
        src, src_reach = self._side(layer, step.src, step.src_runs, step.nbytes, source)
        dst, dst_reach = self._side(layer, step.dst, step.dst_runs, step.nbytes, self.destination)
        return _Pattern(
            step.src.region, step.src.offset, src_reach, src,
            step.dst.region, step.dst.offset, dst_reach, dst,
            step.nbytes,
        )  # fmt: skip

    def _side(
        self, layer: int, side: Any, runs: Runs, nbytes: int, layout: RankLayout
    ) -> tuple[tuple[int, Runs, int, int], int]:
        per_block = layout.block_tokens // self.unit_tokens
        stride, block_step, sub_step = unit_steps(side)
        last = (layout.num_blocks - 1) * block_step + (per_block - 1) * sub_step
        if last > MAX_INDEX:
            raise LayoutError(
                f"layer {layer}: {layout.num_blocks} blocks, {side.page_stride} bytes apart, and units, "
                f"{side.unit_stride} apart, have no common stride that counts to less than 2**32: align blocks to units"
            )
        reach = last * stride + (runs[0] - 1) * runs[1] + nbytes // runs[0]
        return (stride, runs, block_step, sub_step), reach

    def _place(self, layer: int, part: _Part, source: LayerShape, destination: LayerShape) -> tuple[Step, ...]:
        steps = []
        src_bytes = self.source.ranks[part.rank].region_bytes
        dst_bytes = self.destination.region_bytes
        for p in part.patterns:
            src_region, src_base = source.bases[p.src_region]
            dst_region, dst_base = destination.bases[p.dst_region]
            src_offset, dst_offset = src_base + p.src_offset, dst_base + p.dst_offset
            if not (
                0 <= src_offset <= src_bytes[src_region] - p.src_reach
                and 0 <= dst_offset <= dst_bytes[dst_region] - p.dst_reach
            ):
                raise ProofError(f"layer {layer}: a step of source rank {part.rank} leaves its region")
            src, dst = Addressing(src_offset, *p.src), Addressing(dst_offset, *p.dst)
            steps.append(Step(layer, src_region, dst_region, src, dst, p.nbytes))
        return tuple(steps)

    def _rank_plan(
        self,
        rank: int,
        layout: RankLayout,
        steps: dict[int, tuple[Step, ...]],
        shares: dict[int, tuple[Share, ...]],
    ) -> RankPlan:
        to = self.destination
        canonical = (
            VERSION, to.model, self.components, rank, self.index, self.unit_tokens,
            layout.block_tokens, layout.num_blocks, to.block_tokens, to.num_blocks,
            list(steps.items()), list(shares.items()),
        )  # fmt: skip
        return RankPlan(
            source_rank=rank,
            destination_rank=self.index,
            unit_tokens=self.unit_tokens,
            src_block_tokens=layout.block_tokens,
            dst_block_tokens=to.block_tokens,
            src_num_blocks=layout.num_blocks,
            dst_num_blocks=to.num_blocks,
            steps=steps,
            shares=shares,
            digest=hashlib.blake2b(msgspec.msgpack.encode(canonical), digest_size=16).digest(),
            num_steps=sum(map(len, steps.values())),
            bytes_per_unit=sum(step.unit_bytes for made in steps.values() for step in made),
        )


def prove(source: InstanceLayout, destination: RankLayout, plans: Sequence[RankPlan | None]) -> None:
    """Proves every layer of finished plans on its own. :func:`plan` has done so for one layer of each geometry.

    Raises:
        ProofError: says what is wrong.
    """
    unit_tokens = gcd(source.ranks[0].block_tokens, destination.block_tokens)
    for made in plans:
        if made is not None and not made.steps.keys() <= destination.shapes.keys():
            raise ProofError("steps of layers that the destination does not hold")
    for layer in destination.shapes:
        steps = [(p.source_rank, step) for p in plans if p is not None for step in p.steps.get(layer, ())]
        prove_layer(layer, unit_tokens, destination, source.ranks, steps)
