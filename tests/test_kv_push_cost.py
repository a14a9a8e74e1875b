"""What a layer costs the thread that computes: one call, whatever becomes of the pages."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
from kv_bed import Decoder, Prefiller, sim_nics

from railwire.kvcache import paged_instance
from railwire.testing import SimulatedFabric

PAGES, LAYERS, BLOCK_TOKENS = 1000, 40, 16


def test_a_layer_of_a_thousand_pages_is_pushed_in_a_tenth_of_a_millisecond(capsys: pytest.CaptureFixture[str]) -> None:
    """Processor time of the caller: how long somebody else had the core is not what is measured."""
    layout = paged_instance(
        model="m", stages=[range(LAYERS)], num_blocks=2 * PAGES, block_tokens=BLOCK_TOKENS, kv_heads=1, head_bytes=16,
        kv="last", placement="one",
    )  # fmt: skip
    tokens = PAGES * BLOCK_TOKENS
    taken = []
    with SimulatedFabric(discard=True) as fabric:
        prefiller, decoder = Prefiller(layout, sim_nics(fabric, "p", 1)), Decoder(layout, sim_nics(fabric, "d", 1))
        for number in range(3):
            rng = np.random.default_rng(number)
            source, target = (rng.permutation(2 * PAGES)[:PAGES].tolist() for _ in range(2))
            (ticket,) = decoder.prepare(prefiller, f"r{number}", target, tokens)
            (push,) = prefiller.open(f"r{number}", tokens, source)
            end = time.monotonic() + 10
            while not push.deliveries:  # the ticket has come: what is ready now is posted in the call
                assert time.monotonic() < end
                time.sleep(0.001)
            for layer in range(LAYERS):
                began = time.thread_time()
                push.layer_ready(layer, tokens)
                taken.append(time.thread_time() - began)
            push.done.wait(10)
            ticket.cancel()  # nothing arrives on a NIC that drops everything
            ticket.reusable.wait(10)
        prefiller.close()
        decoder.close()
    median = statistics.median(taken)
    with capsys.disabled():
        print(f"\n{PAGES:,} pages of a layer pushed in {median * 1e6:.0f} us")
    assert median < 100e-6
