"""Every kind of end of a ticket and a push, on the simulated NIC."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from kv_bed import UNTOUCHED, Decoder, Make, Prefiller, same, settle, shape, sim_nics

from railwire import ConnectError, PeerLostError
from railwire.kvcache import (
    PushAborted,
    PushCancelled,
    PushError,
    TicketCancelled,
    TicketFailed,
)
from railwire.testing import SimulatedFabric


def test_the_receiver_cancels(make_pair: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make_pair(shape(tp=2), shape())
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6, 7], 12)
    pushes = prefiller.open("r", 12, [0, 1, 2])
    prefiller.compute(pushes, 5)
    ticket.cancel("the client went away")
    with pytest.raises(TicketCancelled, match="the client went away"):
        ticket.wait(5)
    assert ticket.reusable.done()
    decoder.regions[0][0].array[:] = UNTOUCHED
    prefiller.compute(pushes, 12)  # nothing of this goes out
    for push in pushes:
        with pytest.raises(PushCancelled):
            push.done.wait(5)
    time.sleep(0.05)
    assert (decoder.regions[0][0].array == UNTOUCHED).all()
    assert decoder.idle()


def test_held_writes_hold_the_cancel(make_pair: Make, fabric: SimulatedFabric) -> None:
    """No page comes back while a write may still land: delivery is held, and so is the ticket."""
    prefiller, decoder = make_pair(drain_timeout=30.0)
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6, 7], 12)
    push = prefiller.open("r", 12, [0, 1, 2])[0]
    assert settle(lambda: bool(push.deliveries))
    fabric.hold()
    prefiller.compute([push], 12)
    ticket.cancel()
    time.sleep(0.1)
    assert not ticket.done() and not ticket.reusable.done()
    fabric.release()
    try:
        ticket.wait(5)
    except TicketCancelled:
        pass
    assert ticket.reusable.done()
    before = decoder.regions[0][0].array.copy()
    time.sleep(0.05)
    assert (decoder.regions[0][0].array == before).all()


def test_the_prefiller_aborts(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6, 7], 12)
    push = prefiller.open("r", 12, [0, 1, 2])[0]
    push.layer_ready(0, 12)
    push.abort("out of memory")
    with pytest.raises(TicketFailed, match="out of memory"):
        ticket.wait(5)
    with pytest.raises(PushAborted):
        push.done.wait(5)
    assert ticket.reusable.done() and decoder.idle()


def test_a_refused_request_fails_its_ticket_before_and_after(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
    (early,) = decoder.prepare(prefiller, "a", [1], 4)
    assert settle(lambda: prefiller.senders[0].open_tickets == 1)
    prefiller.senders[0].refuse("a", "queue full")
    prefiller.senders[0].refuse("b", "queue full")
    (late,) = decoder.prepare(prefiller, "b", [2], 4)
    for ticket in (early, late):
        with pytest.raises(TicketFailed, match="queue full"):
            ticket.wait(5)


def test_a_failed_write_fails_the_ticket_not_the_others(make_pair: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make_pair()
    fabric.set(reorder=False, max_delay_us=0)
    (bad,) = decoder.prepare(prefiller, "bad", [1, 2], 8)
    push = prefiller.open("bad", 8, [0, 1])[0]
    assert settle(lambda: bool(push.deliveries))
    fabric.fail_next("p00.0", 1, "remote_access")
    prefiller.compute([push], 8)
    with pytest.raises(TicketFailed):
        bad.wait(5)
    with pytest.raises(PushError):
        push.done.wait(5)
    (good,) = decoder.prepare(prefiller, "good", [1, 2], 8)
    prefiller.compute(prefiller.open("good", 8, [0, 1]), 8)
    good.wait(5)
    assert same(prefiller, decoder, [0, 1], [1, 2], range(8))


def test_a_prefiller_that_dies_fails_its_tickets_in_time(make_pair: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make_pair()
    other, _ = make_pair()
    tickets = [decoder.prepare(prefiller, f"r{i}", [i], 4)[0] for i in range(3)]
    survivor = decoder.prepare(other, "s", [10], 4)[0]
    fabric.kill("p00.0")
    begin = time.monotonic()
    for ticket in tickets:
        with pytest.raises(TicketFailed):
            ticket.wait(10)
        assert ticket.reusable.done()
    assert time.monotonic() - begin < 3
    with pytest.raises((PeerLostError, ConnectError)):
        decoder.prepare(prefiller, "again", [1], 4)
    other.compute(other.open("s", 4, [0]), 4)
    survivor.wait(5)
    assert decoder.idle()


def test_an_instance_that_does_not_answer_holds_up_nobody(make_pair: Make, fabric: SimulatedFabric) -> None:
    dead, decoder = make_pair()
    alive = Prefiller(shape(), sim_nics(fabric, "alive", 1), fill=2)
    fabric.freeze("p00.0")
    errors: list[Exception] = []

    def connect() -> None:
        try:
            decoder.receivers[0].connect(dead.descriptors, timeout=3.0)
        except ConnectError as error:
            errors.append(error)

    waiting = [threading.Thread(target=connect) for _ in range(3)]
    try:
        for thread in waiting:
            thread.start()
        time.sleep(0.1)
        begin = time.monotonic()
        decoder.receivers[0].connect(alive.descriptors)
        assert time.monotonic() - begin < 1.0
        for thread in waiting:
            thread.join(10)
        assert len(errors) == 3
    finally:
        alive.close()


def test_a_decoder_that_vanishes_gives_the_source_pages_back(make_pair: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make_pair()
    decoder.prepare(prefiller, "r", [1, 2], 8)
    push = prefiller.open("r", 8, [0, 1])[0]
    push.layer_ready(0, 8)
    assert settle(lambda: bool(push.deliveries))
    fabric.kill("d00.0")
    with pytest.raises(PushError, match=r"lost|gone|link"):
        push.done.wait(10)
    assert settle(lambda: prefiller.senders[0].open_tickets == 0)


def test_nobody_asks(fabric: SimulatedFabric) -> None:
    prefiller = Prefiller(shape(), sim_nics(fabric, "p", 1), ticket_timeout=0.1)
    try:
        with pytest.raises(PushError, match="no decoder has asked"):
            prefiller.open("r", 4, [0])[0].done.wait(5)
    finally:
        prefiller.close()


def test_nobody_computes(fabric: SimulatedFabric) -> None:
    prefiller = Prefiller(shape(), sim_nics(fabric, "p", 1), ticket_timeout=0.1)
    decoder = Decoder(shape(), sim_nics(fabric, "d", 1))
    try:
        (ticket,) = decoder.prepare(prefiller, "r", [1], 4)
        with pytest.raises(TicketFailed, match="got no request r within"):
            ticket.wait(5)
        assert decoder.idle()
    finally:
        decoder.close()
        prefiller.close()


def test_a_time_out_drains_before_it_ends(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
    (ticket,) = decoder.prepare(prefiller, "r", [1], 4, timeout=0.1)
    push = prefiller.open("r", 4, [0])[0]
    with pytest.raises(TicketFailed):
        ticket.wait(5)
    assert ticket.reusable.done()
    with pytest.raises(PushCancelled):
        push.done.wait(5)


def test_await(make_pair: Make) -> None:
    prefiller, decoder = make_pair()

    async def job() -> None:
        link = await decoder.receivers[0].connect_async(prefiller.descriptors)
        ticket = decoder.receivers[0].prepare(link, "r", [1], 4)
        push = prefiller.open("r", 4, [0])[0]
        prefiller.compute([push], 4)
        await ticket
        await push.done
        waiting = asyncio.ensure_future(_wait(decoder.receivers[0].prepare(link, "q", [1], 4)))
        await asyncio.sleep(0.01)
        waiting.cancel()  # cancels the task, not the ticket
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert decoder.receivers[0].open_tickets == 1

    asyncio.run(job())


async def _wait(ticket: Any) -> Any:
    return await ticket
