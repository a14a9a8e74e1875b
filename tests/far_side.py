"""What the other process of a two-process test does: functions for ``child.call``; ``state`` keeps its engine."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
from beds import far_nics, patient
from processes import State

from railwire import Pages, RailwireError, RemoteRegion, TransferEngine


def open_engine(state: State, nics: list[str], **options: Any) -> bytes:
    """Opens the engine; returns its address."""
    options.setdefault("liveness", patient(1.0))
    options.setdefault("name", "far")
    state.engine = TransferEngine(nics=far_nics(nics), **options)
    state.regions = []
    state.pending = {}
    return bytes(state.engine.address)


def offer(state: State, nbytes: int, fill: int = 0) -> bytes:
    """Registers memory; returns its descriptor."""
    region = state.engine.register(np.full(nbytes, fill, np.uint8))
    state.regions.append(region)
    return bytes(region.descriptor)


def digest(state: State, index: int = 0, begin: int = 0, end: int | None = None) -> str:
    return hashlib.sha256(state.regions[index].array[begin:end].tobytes()).hexdigest()


def bytes_of(state: State, index: int = 0, begin: int = 0, end: int | None = None) -> bytes:
    return state.regions[index].array[begin:end].tobytes()


def fill(state: State, seed: int, index: int = 0) -> str:
    """Random contents; returns their digest."""
    array = state.regions[index].array
    array[:] = np.random.default_rng(seed).integers(0, 256, len(array), dtype=np.uint8)
    return digest(state, index)


def expect(state: State, imm: int, count: int, timeout: float = 20.0) -> None:
    """Waits for arrivals; raises as the expectation does."""
    state.engine.counter(imm).expect(count, timeout=timeout).wait()


def begin_expect(state: State, imm: int, count: int, timeout: float = 20.0) -> None:
    state.pending[imm] = state.engine.counter(imm).expect(count, timeout=timeout)


def outcome_of_expect(state: State, imm: int, timeout: float = 20.0) -> tuple[str, float]:
    """How begin_expect() ended: the exception's name, or ``done``; and the seconds that took from now."""
    begin = time.monotonic()
    try:
        state.pending.pop(imm).wait(timeout)
        return "done", time.monotonic() - begin
    except RailwireError as error:
        return type(error).__name__, time.monotonic() - begin


def counter_value(state: State, imm: int) -> float:
    return state.engine.counter(imm).value


def peers(state: State, timeout: float = 5.0) -> list[str]:
    """Names of the connected peers, once there is one."""
    end = time.monotonic() + timeout
    while not state.engine.peers and time.monotonic() < end:
        time.sleep(0.005)
    return [peer.name for peer in state.engine.peers]


def send_back(state: State, count: int) -> int:
    """Returns ``count`` messages to whoever sent them, with a prefix."""
    for _ in range(count):
        peer, message = state.engine.receive(10)
        state.engine.send(peer, b"re:" + message).wait(10)
    return count


def revoke(state: State, index: int = 0) -> tuple[str, float]:
    """Fences a region, and poisons its pages at once, as somebody would who uses them for something else."""
    begin = time.monotonic()
    region = state.regions[index]
    try:
        region.revoke()
    except RailwireError as error:
        return type(error).__name__, time.monotonic() - begin
    region.array[:] = 0xEE
    return "fenced", time.monotonic() - begin


def close_peers(state: State) -> tuple[str, float]:
    """As revoke(), by closing the connection."""
    begin = time.monotonic()
    try:
        for peer in state.engine.peers:
            peer.close()
    except RailwireError as error:
        return type(error).__name__, time.monotonic() - begin
    for region in state.regions:
        region.array[:] = 0xEE
    return "fenced", time.monotonic() - begin


def untouched(state: State, value: int, index: int = 0) -> bool:
    return bool((state.regions[index].array == value).all())


def write_for_ever(state: State, descriptor: bytes, address: bytes, page_bytes: int) -> None:
    """Keeps a few large page writes in flight until told otherwise by the process' end."""
    engine = state.engine
    engine.connect(address)
    remote = RemoteRegion.from_bytes(descriptor)
    region = engine.register(np.full(remote.nbytes, 0x11, np.uint8))
    state.regions.append(region)
    pages = Pages(np.arange(remote.nbytes // page_bytes), page_bytes)
    state.flood = [engine.write_pages(region, pages, remote, pages, page_bytes) for _ in range(400)]


def outcome_of_flood(state: State, timeout: float) -> list[str]:
    """How the writes of write_for_ever() ended."""
    found = []
    for transfer in state.flood:
        try:
            transfer.wait(timeout)
            found.append("done")
        except RailwireError as error:
            found.append(type(error).__name__ + ("+may_still_land" if transfer.may_still_land else ""))
    return found


def close(state: State) -> float:
    """Closes the engine; returns the seconds that took."""
    begin = time.monotonic()
    state.engine.close()
    return time.monotonic() - begin


def stats(state: State) -> dict[str, Any]:
    found = state.engine.stats()
    found["worker"].pop("post_latency_ns")
    return found
