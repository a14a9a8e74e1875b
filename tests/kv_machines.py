"""A plain model of KV caches for the tests: every byte a known function of what it is, and a literal executor of
plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from railwire.kvcache.geometry.builders import paged_layout
from railwire.kvcache.geometry.layout import RankLayout
from railwire.kvcache.geometry.pages import Step
from railwire.kvcache.geometry.plan import RankPlan

Memory = list[npt.NDArray[np.uint8]]

CANARY = 0xEE


def small_rank(**changes: Any) -> RankLayout:
    return paged_layout(**{"model": "m", "layers": range(3), "num_blocks": 4, "block_tokens": 4, "kv_heads": 4,
                           "head_bytes": 8, **changes})  # fmt: skip


def senders(plans: tuple[RankPlan | None, ...]) -> list[int]:
    """The positions in a plan that send at all."""
    return [rank for rank, made in enumerate(plans) if made is not None]


def truth(layer: int, component: str, token: int, head: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The bytes of one head of one token, as if computed by the model."""
    seed = hash((layer, token, head, sum(component.encode()))) & 0x7FFFFFFF
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, nbytes, dtype=np.uint8)


def blank(layout: RankLayout) -> Memory:
    return [np.full(nbytes, CANARY, dtype=np.uint8) for nbytes in layout.region_bytes]


def fill(layout: RankLayout, memory: Memory, table: list[int], first: int, end: int) -> None:
    """Writes the truth of the tokens [first, end), byte address by byte address, as the docstring of ``layout``
    says."""
    for layer in layout.layers:
        for component, s in zip(layout.components, layer.storages, strict=True):
            for token in range(first, end):
                for head in range(s.first_head, s.first_head + s.heads):
                    at = (
                        s.offset
                        + table[token // layout.block_tokens] * s.page_stride
                        + token % layout.block_tokens * s.token_stride
                        + (head - s.first_head) * s.head_stride
                    )
                    memory[s.region][at : at + component.head_bytes] = truth(
                        layer.layer, component.name, token, head, component.head_bytes
                    )


def expected(layout: RankLayout, table: list[int], first: int, end: int) -> Memory:
    memory = blank(layout)
    fill(layout, memory, table, first, end)
    return memory


def unit_addresses(plan_side: object, step: Step, index: int) -> npt.NDArray[np.int64]:
    """Addresses of all bytes of a unit, in the order in which the engine takes them."""
    side = plan_side
    count, stride = side.runs  # type: ignore[attr-defined]
    run = step.unit_bytes // count
    begin = side.offset + index * side.unit_stride  # type: ignore[attr-defined]
    return (begin + np.arange(count)[:, None] * stride + np.arange(run)).reshape(-1)


def execute(
    plan: RankPlan, src: Memory, dst: Memory, src_table: list[int], dst_table: list[int], first: int, end: int
) -> tuple[int, int]:
    """Carries a plan out, byte by byte. Returns (arrivals, bytes) as the receiver would count them."""
    arrivals = nbytes = 0
    for layer, steps in plan.steps.items():
        for step in steps:
            assert step.layer == layer
            src_indices = plan.src_indices(step, np.array(src_table), first, end)
            dst_indices = plan.dst_indices(step, np.array(dst_table), first, end)
            assert len(src_indices) == len(dst_indices)
            for i, j in zip(src_indices.tolist(), dst_indices.tolist(), strict=True):
                assert 0 <= i < 1 << 32 and 0 <= j < 1 << 32
                source = unit_addresses(step.src, step, i)
                target = unit_addresses(step.dst, step, j)
                dst[step.dst_region][target] = src[step.src_region][source]
                arrivals += 1
                nbytes += step.unit_bytes
    return arrivals, nbytes
