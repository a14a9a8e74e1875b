"""A decoder that gave a prefiller up, took its pages back and came again: what the prefiller still has in hand from
before must not reach those pages over the new connection."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from kv_bed import UNTOUCHED, Decoder, Prefiller, sim_nics

from railwire import PeerLostError, ScatterTarget, TransferEngine
from railwire.kvcache import TicketFailed, paged_instance
from railwire.testing import SimulatedFabric

LAYOUT = paged_instance(
    stages=[range(2)], model="m", num_blocks=8, block_tokens=4, kv_heads=1, head_bytes=16, kv="last", placement="one"
)


@pytest.fixture
def fabric() -> Iterator[SimulatedFabric]:
    with SimulatedFabric(seed=1) as made:
        yield made


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("with_tail", [False, True])
def test_a_delivery_never_changes_its_connection(fabric: SimulatedFabric, with_tail: bool) -> None:
    prefiller = Prefiller(LAYOUT, sim_nics(fabric, "p", 1), liveness=60.0, ticket_timeout=60.0)
    decoder = Decoder(LAYOUT, sim_nics(fabric, "d", 1), drain_timeout=0.25, liveness=0.25)
    receiver, sender = decoder.receivers[0], prefiller.senders[0]
    tail = decoder.engines[0].allocate(64)
    tail.array[:] = UNTOUCHED
    payload = prefiller.engines[0].allocate(64)
    try:
        first = receiver.prepare(
            receiver.connect(prefiller.descriptors), "r1", [1, 2], 8, tail=tail[0:64] if with_tail else None
        )
        push = prefiller.open("r1", 8, [1, 2])[0]
        until(lambda: len(push.deliveries) == 1)

        fabric.freeze("p0.0")
        with pytest.raises(TicketFailed):
            first.wait(5)
        first.reusable.wait(5)  # fenced: blocks 1 and 2 are the decoder's own again
        time.sleep(0.3)  # the decoder forgets the connection: it would answer now that it is gone
        fabric.thaw("p0.0")
        # The prefiller has noticed nothing, and agrees to a second connection.
        link = receiver.connect(prefiller.descriptors)
        receiver.prepare(link, "r2", [3], 4)
        assert push.deliveries[0].state == "open"

        for layer in range(2):
            push.layer_ready(layer, 8)
        if with_tail:
            push.tail(payload)
        until(lambda: push.done.done() or sender.open_pushes == 0)
        time.sleep(0.2)
        memory = decoder.regions[0][0].array
        assert (memory == UNTOUCHED).all(), "pages that had been given back were written"
        assert (tail.array == UNTOUCHED).all(), "a tail that had been given back was written"
    finally:
        prefiller.close()
        decoder.close()


def test_a_region_over_one_connection(fabric: SimulatedFabric) -> None:
    with (
        TransferEngine(nics=[fabric.nic("a")]) as ours,
        TransferEngine(nics=[fabric.nic("b")]) as theirs,
    ):
        region, src = theirs.allocate(64), ours.allocate(64)
        src.array[:] = 7
        before = ours.connect(theirs.address)
        bound = region.descriptor.over(before)
        assert bound == region.descriptor and bytes(bound) == bytes(region.descriptor)
        ours.write(src[0:8], bound[0:8]).wait(5)
        assert (region.array[:8] == 7).all()
        before.close()
        ours.connect(theirs.address)
        with pytest.raises(PeerLostError):
            ours.write(src[8:16], bound[8:16])
        ours.write(src[16:24], region.descriptor[16:24]).wait(5)  # what is bound to none takes the newest
        assert not region.array[8:16].any() and (region.array[16:24] == 7).all()

        again = ours.connect(theirs.address)
        with pytest.raises(ValueError, match="another engine"):
            src.descriptor.over(again)
        with pytest.raises(ValueError, match="bound to"):
            theirs.write(region[0:8], region.descriptor.over(again)[0:8])
        group = ours.peer_group([again])
        with pytest.raises(ValueError, match="no peer of the group"):
            ours.scatter(group, src, [ScatterTarget(0, bound[0:8])])
        ours.scatter(group, src, [ScatterTarget(0, region.descriptor.over(again)[0:8])]).wait(5)
