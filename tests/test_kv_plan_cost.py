"""What a plan, and the page lists of a layer, cost."""

from __future__ import annotations

import statistics
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from kv_machines import senders

from railwire.kvcache.geometry.builders import paged_instance
from railwire.kvcache.geometry.layout import InstanceLayout, RankLayout
from railwire.kvcache.geometry.pages import Step
from railwire.kvcache.geometry.plan import RankPlan, plan

LLAMA70B: dict[str, Any] = {
    "model": "llama", "num_blocks": 2000, "block_tokens": 16, "kv_heads": 8, "head_bytes": 256, "stages": [range(80)]
}  # fmt: skip


def steps_of(made: RankPlan | None, layer: int = 0) -> tuple[Step, ...]:
    assert made is not None
    return made.steps[layer]


# Processor time: how long somebody else had the core is not what is measured.
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_a_handshake_is_planned_in_ten_milliseconds(order: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = msgspec.msgpack.encode(paged_instance(**LLAMA70B, tp_size=8, order=order))
    destination = msgspec.msgpack.encode(paged_instance(**LLAMA70B, tp_size=4, order=order).ranks[1])
    taken = []
    for _ in range(9):
        # Fresh objects: nothing that an earlier plan left in them may help.
        layouts = (
            msgspec.msgpack.decode(source, type=InstanceLayout),
            msgspec.msgpack.decode(destination, type=RankLayout),
        )
        began = time.thread_time()
        plans = plan(*layouts, 1)
        taken.append(time.thread_time() - began)
        assert senders(plans) == [2, 3]
    median = statistics.median(taken)
    with capsys.disabled():
        print(f"\n80 layers, TP 8 to TP 4, {order}: planned and proved in {median * 1e3:.2f} ms")
    assert median < 0.01


@pytest.mark.parametrize(("p", "d"), [(16, 16), (128, 16), (16, 128)])
def test_indices_of_a_thousand_blocks(p: int, d: int, capsys: pytest.CaptureFixture[str]) -> None:
    source = paged_instance(**{**LLAMA70B, "block_tokens": p}, tp_size=8)
    destination = paged_instance(**{**LLAMA70B, "block_tokens": d}, tp_size=8)
    made = plan(source, destination.ranks[0], 0)[0]
    step = steps_of(made)[0]
    assert made is not None
    table = np.random.default_rng(0).permutation(2000)[:1000]
    taken = []
    for _ in range(50):
        began = time.thread_time()
        indices = made.src_indices(step, table, 0, 16_000)
        taken.append(time.thread_time() - began)
    assert len(indices) == 1000
    median = statistics.median(taken)
    with capsys.disabled():
        print(f"\n1,000 units from blocks of {p}: indices in {median * 1e6:.1f} us")
    assert median < 100e-6
