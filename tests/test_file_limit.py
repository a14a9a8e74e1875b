"""The limit of open files: whoever meets it is told, what stands goes on, and it works again when there is room."""

from __future__ import annotations

import os
import resource

import numpy as np
from processes import Children, State

from railwire import ConnectError, RemoteRegion, TransferEngine

NIC = "tcp://127.0.0.1"


def open_with_few_files(state: State, spare: int) -> tuple[bytes, bytes]:
    """An engine whose process may open so many more files than it needs itself."""
    state.engine = TransferEngine(nics=[NIC], name="full", liveness=3.0)
    state.region = state.engine.register(np.zeros(4096, np.uint8))
    state.old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare, state.old[1]))
    return bytes(state.engine.address), bytes(state.region.descriptor)


def raise_the_limit(state: State) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, state.old)


def connect_out(state: State, address: bytes) -> str:
    try:
        state.engine.connect(address)
    except ConnectError as error:
        return str(error)
    return "connected"


def test_a_full_process_says_so_to_its_peers_and_to_its_user(children: Children) -> None:
    full = children.spawn("full")
    address, descriptor = full.call(open_with_few_files, 34)
    remote = RemoteRegion.from_bytes(descriptor)
    engines = [TransferEngine(nics=[NIC], liveness=3.0) for _ in range(8)]
    refused = ""
    connected = []
    for engine in engines:
        try:
            engine.connect(address)
            connected.append(engine)
        except ConnectError as error:
            refused = str(error)
            break
    assert "full is at the limit of open files" in refused and "ulimit -n" in refused
    assert "limit of open files" in full.call(connect_out, bytes(engines[-1].address))
    for engine in connected:  # those that stand go on
        engine.write(engine.register(np.ones(4096, np.uint8)), remote).wait(10)
    full.call(raise_the_limit)
    engine.connect(address)
    engine.write(engine.register(np.ones(4096, np.uint8)), remote).wait(10)
    assert full.call(connect_out, bytes(engines[-1].address)) == "connected"
    for engine in engines:
        engine.close()
