"""The soak test itself: it runs, it counts, and it finds what it is for. `make soak` runs it for long."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from railwire import Pages, RailwireError, TransferEngine
from railwire.testing import SimulatedFabric

SOAK = Path(__file__).parent / "soak"


def soak(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SOAK), *options], capture_output=True, text=True, timeout=110)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sim", "tcp"])
def test_it_runs_and_finds_nothing(kind: str, seed: int) -> None:
    done = soak("--nic", kind, "--seconds", "5", "--seed", str(seed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arrived: " in done.stdout and f"--seed {seed}" in done.stdout


@pytest.mark.slow
def test_it_finds_bytes_that_are_not_there(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that expects other contents than are written reports them."""
    monkeypatch.setenv("RAILWIRE_SOAK_WRONG", "1")
    done = soak("--nic", "tcp", "--seconds", "5", "--seed", str(seed))
    assert done.returncode == 1
    assert "FOUND: VIOLATION" in done.stdout and "bytes (" in done.stdout


def test_pages_over_links_that_fail_land_before_they_are_counted() -> None:
    """Found by the soak test: on the simulated wire, WRs behind one that had failed landed, so that the count at the
    receiver stood for others than the sender thought."""
    rng = random.Random(1)
    with SimulatedFabric(
        seed=1, resumable=True, max_delay_us=500, write_failure_rate=0.01, link_depth=4, message_loss_rate=0.0
    ) as fabric:
        near = TransferEngine(nics=[fabric.nic("n0"), fabric.nic("n1")], liveness=2.0)
        far = TransferEngine(nics=[fabric.nic("f")], liveness=2.0)
        near.connect(far.address)
        landed = 0
        for imm in range(1, 41):
            memory = np.zeros(48 * 4096, np.uint8)
            region = far.register(memory)
            pages = rng.sample(range(48), rng.randrange(1, 48))
            source = near.register(np.full(len(pages) * 4096, 7, np.uint8))
            try:
                near.write_pages(
                    source, Pages(range(len(pages)), 4096), region.descriptor, Pages(pages, 4096), 4096, imm=imm
                )
                far.counter(imm).expect(len(pages), timeout=20).wait()
            except RailwireError:
                continue
            assert (memory.reshape(48, 4096)[pages] == 7).all(), f"immediate {imm}"
            landed += 1
        assert landed > 10
        near.close()
        far.close()
