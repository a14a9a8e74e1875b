"""64 ranks in one process, connected all to all: time, memory, and whole generations, bit for bit."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from moe_bed import Load, Ranks, expected_output, run_experts, same

from railwire.moe import ExpertGroup, MoeConfig
from railwire.testing import SimulatedFabric

RANKS = 64


def resident() -> int:
    """Bytes of memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["simulated", "tcp"])
def test_64_ranks(kind: str, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]) -> None:
    config = MoeConfig(ranks=RANKS, experts=128, hidden=64, max_tokens=8, top_k=4)
    with SimulatedFabric(seed=3, reorder=True, max_delay_us=20) as fabric:

        def nics(rank: int) -> list[str]:
            return [fabric.nic(f"r{rank}")] if kind == "simulated" else ["tcp://127.0.0.1"]

        before, began = resident(), time.monotonic()
        with Ranks(config, nics, liveness=60.0, timeout=120.0) as ranks:
            took = time.monotonic() - began
            pairs = RANKS * (RANKS - 1) // 2
            per_pair = (resident() - before) / pairs
            loads = [Load(config, rng, "random") for _ in range(3)]

            def work(rank: int, group: ExpertGroup) -> None:
                for load in loads:
                    got = group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
                    out = group.combine(run_experts(config, rank, got))
                    assert same(out, expected_output(config, load, rank))

            began = time.monotonic()
            ranks.each(work)
            rounds = (time.monotonic() - began) / len(loads)
            with capsys.disabled():
                print(f"\n{kind}: {RANKS} ranks connected in {took:.1f} s, {per_pair / 1e6:.2f} MB a pair, "
                      f"{rounds:.2f} s a generation")  # fmt: skip
            assert per_pair < 2e6
