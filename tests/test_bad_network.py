"""The tcp NIC over a network that delays, loses, reorders, and is cut: a transfer ends well, or its peer is lost within
the liveness time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import far_side
import numpy as np
import pytest
from bad_network import BadNetwork, NoNetwork
from processes import Child, Children

from railwire import Pages, PeerLostError, RailwireError, RemoteRegion

PAGE = 4096
NBYTES = 1 << 20
COUNT = NBYTES // PAGE
PATIENCE = 90.0  # a write over a slow network on a busy machine


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[BadNetwork]:
    try:
        network = BadNetwork(request.config.option.seed)
    except NoNetwork as error:
        pytest.skip(f"network namespaces with TUN devices cannot be made here: {error}")
    yield network
    network.close()


def push(state: far_side.State, imm: int, rounds: int) -> str:
    """Writes all pages in a random order, so many times; returns how that ended."""
    source, remote = state.regions[0], state.remote
    rng = np.random.default_rng(imm)
    try:
        for _ in range(rounds):
            pages = Pages(rng.permutation(COUNT), PAGE)
            state.engine.write_pages(source, pages, remote, pages, PAGE, imm=imm).wait(PATIENCE)
    except RailwireError as error:
        return type(error).__name__
    return "done"


def meet(state: far_side.State, address: bytes, descriptor: bytes) -> None:
    """Connects, and offers a source of random bytes."""
    state.peer = state.engine.connect(address)
    state.remote = RemoteRegion.from_bytes(descriptor)
    state.regions.append(state.engine.register(np.random.default_rng(5).integers(0, 256, NBYTES, dtype=np.uint8)))


def await_loss(state: far_side.State, timeout: float) -> float:
    """Seconds until the peer is lost."""
    begin = time.monotonic()
    state.peer.lost.wait(timeout)
    return time.monotonic() - begin


def is_alone(state: far_side.State, timeout: float) -> bool:
    end = time.monotonic() + timeout
    while state.engine.peers and time.monotonic() < end:
        time.sleep(0.01)
    return not state.engine.peers


def is_connected(state: far_side.State) -> bool:
    return bool(state.peer.state == "connected")


def links_rebuilt(state: far_side.State) -> int:
    return sum(peer["links_rebuilt"] for peer in state.engine.stats()["peers"])


def two_sides(network: BadNetwork, children: Children, liveness: float) -> tuple[Child, Child]:
    near = children.spawn("near", network.prefix(0))
    far = children.spawn("far", network.prefix(1))
    near.call(far_side.open_engine, [f"tcp://{network.ADDRESSES[0]}"], liveness=liveness)
    address = far.call(far_side.open_engine, [f"tcp://{network.ADDRESSES[1]}"], liveness=liveness)
    near.call(meet, address, far.call(far_side.offer, NBYTES))
    return near, far


def assert_landed(near: Child, far: Child, imm: int, arrivals: int) -> None:
    far.call(far_side.expect, imm, arrivals, timeout=PATIENCE)
    assert far.call(far_side.digest) == near.call(far_side.digest)
    time.sleep(0.2)
    assert far.call(far_side.counter_value, imm) == 0  # nothing twice


def test_delay_loss_and_reordering(network: BadNetwork, children: Children) -> None:
    near, far = two_sides(network, children, liveness=30)
    network.delay, network.loss, network.late = 0.05, 0.01, 0.05
    assert near.call(push, 1, 2, timeout=PATIENCE) == "done"
    assert_landed(near, far, 1, 2 * COUNT)
    assert network.lost + network.reordered, "the network was too good"
    assert near.call(is_connected)


@pytest.mark.parametrize("seconds", [0.8, pytest.param(7.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["cut", "interface"])
def test_a_cut_in_the_middle_that_mends(network: BadNetwork, children: Children, how: str, seconds: float) -> None:
    """The longer one is longer than the kernel's patience (`timeout_ms`): the connection breaks, and is made again."""
    near, far = two_sides(network, children, liveness=30)
    network.delay = 0.01
    near.begin(push, 1, 12)
    time.sleep(0.4)
    if how == "cut":
        network.cut = True
    else:
        network.down(1)
    time.sleep(seconds)
    if how == "cut":
        network.cut = False
    else:
        network.up(1)
    assert near.answer(PATIENCE) == "done"
    assert_landed(near, far, 1, 12 * COUNT)
    assert near.call(is_connected)
    if seconds > 4:
        assert near.call(links_rebuilt) + far.call(links_rebuilt) > 0


def test_a_cut_that_stays_loses_the_peer_in_time(network: BadNetwork, children: Children) -> None:
    liveness = 2.0
    near, far = two_sides(network, children, liveness)
    network.delay = 0.01
    near.begin(push, 1, 1000)
    time.sleep(0.4)
    begin = time.monotonic()
    network.cut = True
    assert near.answer(PATIENCE) == PeerLostError.__name__
    assert time.monotonic() - begin < 5 * liveness  # of a busy machine
    assert near.call(await_loss, 1.0) < 1.0
    assert far.call(is_alone, PATIENCE)
