"""Connections of the tcp NIC that break, cut under load or by refusals: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time

import msgspec
import numpy as np
import pytest

from railwire import Pages, RemoteAccessError, RemoteRegion, TransferEngine

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


@pytest.mark.parametrize(("writer", "seconds"), [("initiator", 4.0), ("acceptor", 1.0)])
def test_many_refused_writes_are_no_lost_peer(writer: str, seconds: float) -> None:
    """Each breaks the connection, which is hardly ever up meanwhile: once longer than the liveness time, and more
    often than a connection that never works is made anew."""
    liveness = 3.0
    with (
        TransferEngine(nics=["tcp://127.0.0.1"], liveness=liveness) as ours,
        TransferEngine(nics=["tcp://127.0.0.1"], liveness=liveness) as theirs,
    ):
        if writer == "initiator":
            ours.connect(theirs.address)
        else:
            theirs.connect(ours.address)
        began = time.monotonic()
        while not ours.peers and time.monotonic() - began < 20:
            time.sleep(0.001)  # the acceptor hears of it a little later
        source, target = ours.register(np.ones(64, np.uint8)), theirs.allocate(64)
        counted = theirs.counter(5)
        message = target.descriptor._message
        keys = tuple(blob[:8] + bytes([blob[8] ^ 1]) + blob[9:] for blob in message.keys)  # of the rkey
        unknown = RemoteRegion(msgspec.structs.replace(message, keys=keys))
        refused, healthy = [], []
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            refused += [ours.write(source, unknown, imm=6) for _ in range(5)]
            healthy.append(ours.write(source, target.descriptor, imm=5))
            refused += [ours.write(source, unknown) for _ in range(5)]
            with pytest.raises(RemoteAccessError):
                refused[-5].wait(20)
        for transfer in refused:
            with pytest.raises(RemoteAccessError):
                transfer.wait(20)
        for transfer in healthy:
            transfer.wait(20)
        for engine in (ours, theirs):
            assert [peer.state for peer in engine.peers] == ["connected"]
        counted.expect(len(healthy), timeout=20).wait()
        assert counted.value == 0 and theirs.counter(6).value == 0
        assert target.array.all()
