"""Several real NICs: network namespaces joined by veth pairs of limited speed. Striping has to add the links up."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator

import far_side
import numpy as np
import pytest
from processes import Children

from railwire import Pages, RemoteRegion

LINKS = 4
MBIT = 200
NBYTES = 24 << 20


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def sides() -> Iterator[tuple[str, str]]:
    """Two namespaces with four shaped links between them: 10.77.k.1 and 10.77.k.2."""
    names = f"rw{os.getpid()}a", f"rw{os.getpid()}b"
    try:
        for name in names:
            ip("netns", "add", name)
        for link in range(LINKS):
            ip("link", "add", f"v{link}", "netns", names[0], "type", "veth", "peer", f"v{link}", "netns", names[1])
            for side, name in enumerate(names):
                ip("-n", name, "addr", "add", f"10.77.{link}.{side + 1}/24", "dev", f"v{link}")
                ip("-n", name, "link", "set", f"v{link}", "up")
                shape = f"qdisc add dev v{link} root tbf rate {MBIT}mbit burst 128kb latency 50ms"
                subprocess.run(["tc", "-n", name, *shape.split()], check=True, capture_output=True, timeout=20)
        for name in names:
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        _remove(names)
        why = getattr(error, "stderr", b"") or str(error).encode()
        pytest.skip(f"network namespaces with shaped links cannot be made here: {why.decode().strip()}")
    yield names
    _remove(names)


def _remove(names: tuple[str, str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)


def push(state: far_side.State, address: bytes, descriptor: bytes, imm: int, page_bytes: int) -> float:
    """Writes everything and returns the seconds until it has landed."""
    engine = state.engine
    engine.connect(address)
    remote = RemoteRegion.from_bytes(descriptor)
    if not state.regions:
        state.regions.append(engine.register(np.random.default_rng(5).integers(0, 256, remote.nbytes, dtype=np.uint8)))
    (source,) = state.regions
    begin = time.monotonic()
    if page_bytes:
        pages = np.random.default_rng(6).permutation(remote.nbytes // page_bytes)
        engine.write_pages(
            source, Pages(pages, page_bytes), remote, Pages(pages, page_bytes), page_bytes, imm=imm
        ).wait()
    else:
        engine.write(source, remote, imm=imm).wait()
    return time.monotonic() - begin


@pytest.mark.parametrize("page_bytes", [0, 16384], ids=["one write", "pages"])
def test_four_nics_move_four_times_as_much(sides: tuple[str, str], children: Children, page_bytes: int) -> None:
    seconds = {}
    for count in (1, LINKS):
        nbytes = NBYTES // LINKS * count
        near = children.spawn(f"near{count}", ["ip", "netns", "exec", sides[0]])
        far = children.spawn(f"far{count}", ["ip", "netns", "exec", sides[1]])
        near.call(far_side.open_engine, [f"tcp://10.77.{link}.1" for link in range(count)], liveness=5.0)
        address = far.call(far_side.open_engine, [f"tcp://10.77.{link}.2" for link in range(count)], liveness=5.0)
        descriptor = far.call(far_side.offer, nbytes)
        arrivals = nbytes // page_bytes if page_bytes else 1
        near.call(push, address, descriptor, 1, page_bytes)  # connections and windows grow
        far.call(far_side.expect, 1, arrivals)
        seconds[count] = min(near.call(push, address, descriptor, 2, page_bytes) for _ in range(2))
        far.call(far_side.expect, 2, 2 * arrivals)
        assert far.call(far_side.digest) == near.call(far_side.digest)
    rate = {count: NBYTES // LINKS * count / seconds[count] for count in seconds}
    assert rate[LINKS] >= 3.6 * rate[1], {count: f"{value / 1e6:.1f} MB/s" for count, value in rate.items()}
