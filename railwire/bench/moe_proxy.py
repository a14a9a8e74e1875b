"""How long the host proxy of an MoE layer takes: from the store to a watched word until the last write of a dispatch is
with its NIC, a simulated one that completes at once and moves nothing. No Python runs between the two: the engine's
thread sees the word, reads offsets and lengths for all ranks from a table, and posts one write with an immediate to
each. Python stores the word and polls the one that the engine sets after the last post, so its own steps (some tenths
of a microsecond) are in the figure.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from railwire.engine import TransferEngine
from railwire.memory import ScatterTarget
from railwire.moe.config import MoeConfig
from railwire.moe.geometry import Geometry
from railwire.prepared import DESTINATION, IMMEDIATE, LENGTH, SOURCE
from railwire.testing import SimulatedFabric

WARM_UP = 200
_DEPTH = 4


@dataclass(frozen=True)
class ProxyTimes:
    """Microseconds of one dispatch, by percentile.

    Attributes:
        ranks: of the group; a dispatch is one write to each other one.
        least, p50, p99: from the store to the word until the last write is posted.
        ended: p50 until all writes have also completed.
    """

    ranks: int
    least: float
    p50: float
    p99: float
    ended: float


def measure(ranks: int, operations: int = 2000, seed: int = 1) -> ProxyTimes:
    """One rank of ``ranks``, T = 128, H = 7168, top-8 of 256 experts, fp8, uniform routing."""
    config = MoeConfig(ranks=ranks, experts=max(256, ranks), hidden=7168, max_tokens=128, top_k=8, fp8=True)
    g = Geometry(config)
    rng = np.random.default_rng(seed)
    with SimulatedFabric(discard=True) as fabric:
        engine = TransferEngine(nics=[fabric.nic("r0")], progress="spin", liveness=60)
        others = [TransferEngine(nics=[fabric.nic(f"r{rank}")], liveness=60) for rank in range(1, ranks)]
        try:
            source = engine.allocate(g.dispatch_send_region)
            regions = [other.allocate(g.header + g.first_slot_rows * g.row) for other in others]
            group = engine.peer_group([engine.connect(bytes(other.address)) for other in others])
            targets = [ScatterTarget(0, region.descriptor) for region in regions]
            prepared = group.prepare_scatter(source, targets, 0, depth=_DEPTH)
            trigger = prepared.on_word()
            for slot in range(_DEPTH):
                sent = rng.multinomial(config.max_rows, np.full(ranks, 1 / ranks))
                segments = np.cumsum(sent) - sent
                table = prepared.table[slot]
                table[:, SOURCE] = [g.sent_segment(rank, int(segments[rank])) for rank in range(1, ranks)]
                table[:, DESTINATION] = 0
                table[:, LENGTH] = g.header + np.minimum(sent[1:], g.first_slot_rows) * g.row
                table[:, IMMEDIATE] = np.arange(1, ranks)
            took = _time(trigger.word, trigger.progress, operations + WARM_UP)[WARM_UP:]
            if trigger.failed:
                raise RuntimeError(f"{trigger.failed} operations have failed")
        finally:
            engine.close()
            for other in others:
                other.close()
    p50, p99 = np.percentile(took[:, 0], [50, 99])
    return ProxyTimes(ranks, float(took[:, 0].min()), float(p50), float(p99), float(np.median(took[:, 1])))


def _time(
    word_array: npt.NDArray[np.uint64], progress_array: npt.NDArray[np.uint64], operations: int
) -> npt.NDArray[np.float64]:
    """Microseconds until (posted, ended), ``[operations, 2]``."""
    word, progress = word_array.data, progress_array.data  # memoryviews: numpy's own access takes longer
    took = []
    clock = time.perf_counter_ns
    for number in range(1, operations + 1):
        begin = clock()
        word[0] = number
        while progress[0] < number:
            pass
        posted = clock()
        while progress[8] < number:
            pass
        took.append((posted - begin, clock() - begin))
    return np.array(took) / 1e3
