"""Tickets and pushes, from the first handshake to every kind of end, on the simulated NIC."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from kv_bed import UNTOUCHED, Decoder, Prefiller, same, settle, sim_nics

from railwire import ConnectError, PeerLostError, TransferEngine
from railwire.kvcache import (
    InstanceLayout,
    LayerWatcher,
    LayoutError,
    PushAborted,
    PushCancelled,
    PushError,
    Receiver,
    Sender,
    TicketCancelled,
    TicketFailed,
    paged_instance,
)
from railwire.kvcache.protocol import messages as kv_messages
from railwire.testing import SimulatedFabric

LAYERS = 4


def shape(tp: int = 1, pp: int = 1, block_tokens: int = 4, num_blocks: int = 24, **options: Any) -> InstanceLayout:
    stages = np.array_split(np.arange(LAYERS), pp)
    defaults: dict[str, Any] = {"model": "m", "kv_heads": 4, "head_bytes": 32}
    return paged_instance(
        stages=[[int(layer) for layer in stage] for stage in stages],
        tp_size=tp,
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        **{**defaults, **options},
    )


Make = Callable[..., tuple[Prefiller, Decoder]]


@pytest.fixture
def fabric() -> Iterator[SimulatedFabric]:
    with SimulatedFabric(reorder=True, max_delay_us=100) as fabric:
        yield fabric


@pytest.fixture
def make(fabric: SimulatedFabric) -> Iterator[Make]:
    made: list[Prefiller | Decoder] = []

    def build(
        source: InstanceLayout | None = None, destination: InstanceLayout | None = None, links: int = 1, **options: Any
    ) -> tuple[Prefiller, Decoder]:
        source, destination = source or shape(), destination or shape()
        prefiller = Prefiller(source, sim_nics(fabric, f"p{len(made)}", len(source.ranks), links))
        decoder = Decoder(destination, sim_nics(fabric, f"d{len(made)}", len(destination.ranks), links), **options)
        made.extend([decoder, prefiller])
        return prefiller, decoder

    yield build
    for instance in made:
        instance.close()


SHAPES = [
    pytest.param({}, {}, id="same"),
    pytest.param({"tp": 4}, {"tp": 2}, id="tp4-tp2"),
    pytest.param({"tp": 2}, {"tp": 4, "order": "NHD"}, id="tp2-tp4-NHD"),
    pytest.param({"tp": 8}, {"tp": 1}, id="tp8-replicas-tp1"),
    pytest.param({"tp": 1}, {"tp": 8}, id="tp1-tp8-replicas"),
    pytest.param({"pp": 2}, {"pp": 3, "tp": 2}, id="pp2-pp3tp2"),
    pytest.param({"block_tokens": 8, "num_blocks": 12}, {"block_tokens": 2, "num_blocks": 48}, id="blocks8-2"),
    pytest.param({"block_tokens": 2, "num_blocks": 48}, {"block_tokens": 8, "num_blocks": 12}, id="blocks2-8"),
    pytest.param({"scale_bytes": 4, "kv": "last"}, {"scale_bytes": 4, "tp": 2}, id="scales"),
]


@pytest.mark.parametrize(("source", "destination"), SHAPES)
@pytest.mark.parametrize("links", [1, 2])
def test_pages_arrive(make: Make, source: dict[str, Any], destination: dict[str, Any], links: int) -> None:
    prefiller, decoder = make(shape(**source), shape(**destination), links)
    rng = np.random.default_rng(0)
    tokens = 21
    src = rng.permutation(prefiller.layout.ranks[0].num_blocks)[: -(-tokens // prefiller.layout.ranks[0].block_tokens)]
    dst = rng.permutation(decoder.layout.ranks[0].num_blocks)[: -(-tokens // decoder.layout.ranks[0].block_tokens)]
    tickets = decoder.prepare(prefiller, "r", dst, tokens, checksum=True)
    pushes = prefiller.open("r", tokens, src)
    for end in (3, 8, 13, tokens):  # chunked prefill, not at the blocks' borders
        prefiller.compute(pushes, end)
    for ticket in tickets:
        assert ticket.wait(10).nbytes > 0
        assert ticket.reusable.done()
    for push in pushes:
        push.done.wait(10)
    assert same(prefiller, decoder, src, dst, range(tokens))
    assert decoder.idle()
    assert all(sender.open_pushes == sender.open_tickets == 0 for sender in prefiller.senders)


def test_a_ticket_may_come_after_its_request(make: Make) -> None:
    prefiller, decoder = make()
    pushes = prefiller.open("r", 10, [0, 1, 2])
    prefiller.compute(pushes, 10)
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6, 7], 10)
    ticket.wait(5)
    assert same(prefiller, decoder, [0, 1, 2], [5, 6, 7], range(10))


def test_a_prefix_that_is_there_is_not_sent(make: Make) -> None:
    prefiller, decoder = make()
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6, 7], 12, first_token=4)
    prefiller.compute(prefiller.open("r", 12, [0, 1, 2]), 12)
    ticket.wait(5)
    assert same(prefiller, decoder, [0, 1, 2], [5, 6, 7], range(4, 12))
    storage = decoder.layout.ranks[0].layers[0].storages[0]
    page = decoder.regions[0][storage.region].array[5 * storage.page_stride :][: storage.page_stride]
    assert (page == UNTOUCHED).all()


def test_everything_may_be_there_already(make: Make) -> None:
    prefiller, decoder = make()
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6], 8, first_token=8)
    prefiller.compute(prefiller.open("r", 8, [0, 1]), 8)
    assert ticket.wait(5).nbytes == 0


def test_tail_data_is_one_more_arrival(make: Make) -> None:
    prefiller, decoder = make(shape(pp=2), shape())
    room = decoder.engines[0].register(np.zeros(256, np.uint8))
    payload = prefiller.engines[1].register(np.arange(256, dtype=np.uint8))
    (ticket,) = decoder.prepare(prefiller, "r", [3], 4, tail=room[:200])
    pushes = prefiller.open("r", 4, [0])
    prefiller.compute(pushes, 4)
    time.sleep(0.05)
    assert not ticket.done()
    for push in pushes:
        push.tail(payload[:200])
    ticket.wait(5)
    assert (room.array[:200] == payload.array[:200]).all()
    assert not room.array[200:].any()


def test_a_flipped_byte_is_noticed(make: Make) -> None:
    prefiller, decoder = make()
    (ticket,) = decoder.prepare(prefiller, "r", [3, 4], 8, checksum=True)
    pushes = prefiller.open("r", 8, [0, 1])
    for layer in range(LAYERS - 1):
        pushes[0].layer_ready(layer, 8)
    times = pushes[0].timeline.layers
    assert settle(lambda: all(layer in times and times[layer].landed for layer in range(LAYERS - 1)))
    decoder.regions[0][0].array[3 * 4 * 4 * 32 + 7] ^= 1  # layer 0, K, page 3
    pushes[0].layer_ready(LAYERS - 1, 8)
    with pytest.raises(TicketFailed, match="1 of 2 pages differ"):
        ticket.wait(5)
    assert decoder.idle()


@pytest.mark.parametrize("stride", [1, 3, LAYERS, 100])
def test_layers_counted_by_a_kernel(make: Make, stride: int) -> None:
    """Two chunks of two requests; the word moves by one, by several, or by all at once."""
    prefiller, decoder = make()
    tickets = [decoder.prepare(prefiller, name, blocks, 10)[0] for name, blocks in (("a", [1, 2, 3]), ("b", [4, 5, 6]))]
    pushes = [prefiller.open("a", 10, [0, 1, 2])[0], prefiller.open("b", 10, [7, 8, 9])[0]]
    watcher = LayerWatcher(prefiller.senders[0])
    try:
        with pytest.raises(ValueError):
            watcher.begin_step([(pushes[0], 11)])
        for end in (6, 10):
            watcher.begin_step([(push, end) for push in pushes])
        for count in range(0, 2 * LAYERS, stride):
            watcher.watcher.word[0] = min(count + stride, 2 * LAYERS)
            time.sleep(0.005)
        for ticket in tickets:
            ticket.wait(5)
        assert same(prefiller, decoder, [0, 1, 2], [1, 2, 3], range(10))
        assert same(prefiller, decoder, [7, 8, 9], [4, 5, 6], range(10))
        assert watcher.pending_steps == watcher.lost_counts == 0
        watcher.watcher.word[0] += np.uint64(2)  # nobody has announced these
        assert settle(lambda: watcher.lost_counts == 2)
    finally:
        watcher.close()


# ---- ends ------------------------------------------------------------------------------------------------------------
def test_the_receiver_cancels(make: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make(shape(tp=2), shape())
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


def test_held_writes_hold_the_cancel(make: Make, fabric: SimulatedFabric) -> None:
    """No page comes back while a write may still land: delivery is held, and so is the ticket."""
    prefiller, decoder = make(drain_timeout=30.0)
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


def test_the_prefiller_aborts(make: Make) -> None:
    prefiller, decoder = make()
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6, 7], 12)
    push = prefiller.open("r", 12, [0, 1, 2])[0]
    push.layer_ready(0, 12)
    push.abort("out of memory")
    with pytest.raises(TicketFailed, match="out of memory"):
        ticket.wait(5)
    with pytest.raises(PushAborted):
        push.done.wait(5)
    assert ticket.reusable.done() and decoder.idle()


def test_a_refused_request_fails_its_ticket_before_and_after(make: Make) -> None:
    prefiller, decoder = make()
    (early,) = decoder.prepare(prefiller, "a", [1], 4)
    assert settle(lambda: prefiller.senders[0].open_tickets == 1)
    prefiller.senders[0].refuse("a", "queue full")
    prefiller.senders[0].refuse("b", "queue full")
    (late,) = decoder.prepare(prefiller, "b", [2], 4)
    for ticket in (early, late):
        with pytest.raises(TicketFailed, match="queue full"):
            ticket.wait(5)


def test_a_failed_write_fails_the_ticket_not_the_others(make: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make()
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


def test_a_prefiller_that_dies_fails_its_tickets_in_time(make: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make()
    other, _ = make()
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


def test_an_instance_that_does_not_answer_holds_up_nobody(make: Make, fabric: SimulatedFabric) -> None:
    dead, decoder = make()
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


def test_a_decoder_that_vanishes_gives_the_source_pages_back(make: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make()
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


def test_a_time_out_drains_before_it_ends(make: Make) -> None:
    prefiller, decoder = make()
    (ticket,) = decoder.prepare(prefiller, "r", [1], 4, timeout=0.1)
    push = prefiller.open("r", 4, [0])[0]
    with pytest.raises(TicketFailed):
        ticket.wait(5)
    assert ticket.reusable.done()
    with pytest.raises(PushCancelled):
        push.done.wait(5)


def test_await(make: Make) -> None:
    prefiller, decoder = make()

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


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "other"}, "model"),
        ({"dtype": "float16"}, "float16"),
        ({"kv_heads": 8}, "head"),
        ({"head_bytes": 64}, "64"),
        ({"scale_bytes": 4}, "scale"),
    ],
)
def test_what_cannot_be_mapped_is_refused(make: Make, change: dict[str, Any], reason: str) -> None:
    prefiller, decoder = make(shape(**change), shape())
    with pytest.raises(LayoutError, match=reason):
        decoder.prepare(prefiller, "r", [1], 4)
    assert decoder.idle()


def test_bad_calls_change_nothing(make: Make) -> None:
    prefiller, decoder = make()
    receiver = decoder.receivers[0]
    link = receiver.connect(prefiller.descriptors)
    for blocks, tokens, options in [
        ([1], 5, {}),
        ([1, 1], 8, {}),
        ([99, 1], 8, {}),
        ([-1, 1], 8, {}),
        ([1.5], 4, {}),
        ([1, 2], 8, {"first_token": 2}),
        ([1, 2], 0, {}),
        ([1, 2], 4, {"first_token": 8}),
        ([1], 4, {"timeout": 0}),
    ]:
        with pytest.raises((ValueError, TypeError)):
            receiver.prepare(link, "r", blocks, tokens, **options)  # type: ignore[arg-type]
    assert decoder.idle()
    push = prefiller.open("r", 8, [0])[0]
    for layer, end in [(LAYERS, 4), (0, 5), (0, 9), (-1, 4)]:
        with pytest.raises(ValueError):
            push.layer_ready(layer, end)
    with pytest.raises(ValueError):
        push.append_blocks([24])
    with pytest.raises(ValueError):
        prefiller.senders[0].open("r", 8)
    push.abort("enough")


def test_a_ticket_presented_twice_or_to_the_wrong_worker(make: Make) -> None:
    prefiller, decoder = make()
    (ticket,) = decoder.prepare(prefiller, "r", [1], 4)
    assert settle(lambda: prefiller.senders[0].open_tickets == 1)
    peer = ticket.link.sources[0].peer
    request = next(iter(prefiller.senders[0]._deliveries.values())).request
    decoder.receivers[0].channel.send(peer, request)
    assert settle(lambda: prefiller.senders[0].refused_tickets == 1)
    foreign = kv_messages.Request(
        **{**{f: getattr(request, f) for f in request.__struct_fields__}, "ticket": 50, "instance": "somebody"}
    )
    decoder.receivers[0].channel.send(peer, foreign)
    assert settle(lambda: prefiller.senders[0].refused_tickets == 2)
    prefiller.compute(prefiller.open("r", 4, [0]), 4)
    ticket.wait(5)  # unharmed


def test_garbage_is_dropped(make: Make) -> None:
    prefiller, decoder = make()
    link = decoder.receivers[0].connect(prefiller.descriptors)
    engine, peer = decoder.engines[0], link.sources[0].peer
    rng = np.random.default_rng(3)
    decoder.prepare(prefiller, "r", [1], 4)
    assert settle(lambda: prefiller.senders[0].open_tickets == 1)
    good = kv_messages.encode(next(iter(prefiller.senders[0]._deliveries.values())).request)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(4, len(data))] = rng.integers(0, 256)
        engine.send(peer, bytes(data[: rng.integers(4, len(data) + 1)])).wait(5)
    engine.send(peer, b"RWKV").wait(5)
    fresh = decoder.prepare(prefiller, "fresh", [2], 4)[0]
    prefiller.compute(prefiller.open("fresh", 4, [0]), 4)
    # The garbage may have used up ticket numbers of this connection; then the ticket is refused, in time and in words.
    try:
        fresh.wait(8)
    except TicketFailed as error:
        assert str(error)


def test_memory_smaller_than_the_layout_says(fabric: SimulatedFabric) -> None:
    engine = TransferEngine(nics=[fabric.nic("x")])
    try:
        layout = shape()
        regions = [engine.register(np.zeros(8, np.uint8)) for _ in layout.ranks[0].region_bytes]
        for kind in (Sender, Receiver):
            with pytest.raises(LayoutError, match="bytes"):
                kind(engine, layout, 0, regions)
            with pytest.raises(LayoutError, match="regions"):
                kind(engine, layout, 0, regions[1:])
    finally:
        engine.close()


def test_more_blocks_than_fit_into_a_message(fabric: SimulatedFabric) -> None:
    layout = shape(num_blocks=30_000, block_tokens=1, head_bytes=2, kv_heads=1)
    prefiller = Prefiller(layout, sim_nics(fabric, "p", 1))
    decoder = Decoder(layout, sim_nics(fabric, "d", 1))
    try:
        src, dst = np.random.default_rng(0).permutation(30_000), np.random.default_rng(1).permutation(30_000)
        (ticket,) = decoder.prepare(prefiller, "r", dst, 30_000)
        prefiller.compute(prefiller.open("r", 30_000, src), 30_000)
        ticket.wait(20)
        assert same(prefiller, decoder, src, dst, range(0, 30_000, 997))
    finally:
        decoder.close()
        prefiller.close()
