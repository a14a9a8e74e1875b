"""Connections of the tcp NIC that are cut under load: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time

import numpy as np
import pytest

from railwire import Pages, TransferEngine

PAGE = 4096


def _cut(*engines: TransferEngine) -> bool:
    """Destroys all connections of these engines' NICs. False: the kernel cannot, or there were none."""
    ports = [nic.name.rpartition(":")[2] for engine in engines for nic in engine.nics]
    expression = "( " + " or ".join(f"sport = :{port}" for port in ports) + " )"
    made = subprocess.run(["ss", "-K", "-t", expression], capture_output=True, text=True, check=False)
    return len(made.stdout.splitlines()) > 1


@pytest.mark.parametrize("streams", ["1", "3"])
def test_cut_connections_cost_no_transfer(streams: str, rng: np.random.Generator) -> None:
    if not shutil.which("ss"):
        pytest.skip("needs ss of iproute2")
    options = {"streams": streams}
    with (
        TransferEngine(nics=["tcp://127.0.0.1"], options=options) as ours,
        TransferEngine(nics=["tcp://127.0.0.1"], options=options) as theirs,
    ):
        source = rng.integers(0, 255, 16 << 20, dtype=np.uint8)
        target = np.zeros_like(source)
        ours.connect(theirs.address)
        near, far = ours.register(source), theirs.register(target)
        count = len(source) // PAGE
        ended = threading.Event()
        cuts: list[bool] = []

        def cut() -> None:
            while not ended.wait(0.25):
                cuts.append(_cut(ours, theirs))

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                pages = Pages(rng.permutation(count), stride=PAGE)
                target[:] = 0
                arrived = theirs.counter(7).expect(count, timeout=30)
                transfer = ours.write_pages(near, pages, far.descriptor, pages, PAGE, imm=7)
                transfer.wait(30)
                arrived.wait(30)
                assert np.array_equal(source, target)
        finally:
            ended.set()
            cutter.join()
        if not any(cuts):
            pytest.skip("the kernel destroys no connections (CONFIG_INET_DIAG_DESTROY, CAP_NET_ADMIN)")
        time.sleep(0.2)
        assert theirs.counter(7).value == 0
        assert ours.stats()["peers"][0]["links_rebuilt"] > 0
