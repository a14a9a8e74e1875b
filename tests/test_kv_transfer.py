"""Tickets and pushes: whose pages arrive, on every shape; and what is refused at the call. On the simulated NIC."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from kv_bed import LAYERS, UNTOUCHED, Decoder, Make, Prefiller, same, settle, shape, sim_nics

from railwire import TransferEngine
from railwire.kvcache import (
    LayerWatcher,
    LayoutError,
    Receiver,
    Sender,
    TicketFailed,
)
from railwire.kvcache.protocol import messages as kv_messages
from railwire.testing import SimulatedFabric

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
def test_pages_arrive(make_pair: Make, source: dict[str, Any], destination: dict[str, Any], links: int) -> None:
    # Not about liveness: up to ten engines share a loaded machine.
    prefiller, decoder = make_pair(shape(**source), shape(**destination), links, liveness=5.0)
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


def test_a_ticket_may_come_after_its_request(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
    pushes = prefiller.open("r", 10, [0, 1, 2])
    prefiller.compute(pushes, 10)
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6, 7], 10)
    ticket.wait(5)
    assert same(prefiller, decoder, [0, 1, 2], [5, 6, 7], range(10))


def test_a_prefix_that_is_there_is_not_sent(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6, 7], 12, first_token=4)
    prefiller.compute(prefiller.open("r", 12, [0, 1, 2]), 12)
    ticket.wait(5)
    assert same(prefiller, decoder, [0, 1, 2], [5, 6, 7], range(4, 12))
    storage = decoder.layout.ranks[0].layers[0].storages[0]
    page = decoder.regions[0][storage.region].array[5 * storage.page_stride :][: storage.page_stride]
    assert (page == UNTOUCHED).all()


def test_everything_may_be_there_already(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
    (ticket,) = decoder.prepare(prefiller, "r", [5, 6], 8, first_token=8)
    prefiller.compute(prefiller.open("r", 8, [0, 1]), 8)
    assert ticket.wait(5).nbytes == 0


def test_tail_data_is_one_more_arrival(make_pair: Make) -> None:
    prefiller, decoder = make_pair(shape(pp=2), shape())
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


def test_a_flipped_byte_is_noticed(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
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
def test_layers_counted_by_a_kernel(make_pair: Make, stride: int) -> None:
    """Two chunks of two requests; the word moves by one, by several, or by all at once."""
    prefiller, decoder = make_pair()
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
def test_what_cannot_be_mapped_is_refused(make_pair: Make, change: dict[str, Any], reason: str) -> None:
    prefiller, decoder = make_pair(shape(**change), shape())
    with pytest.raises(LayoutError, match=reason):
        decoder.prepare(prefiller, "r", [1], 4)
    assert decoder.idle()


def test_bad_calls_change_nothing(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
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


def test_a_ticket_presented_twice_or_to_the_wrong_worker(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
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


def test_garbage_is_dropped(make_pair: Make) -> None:
    prefiller, decoder = make_pair()
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
    # Not about liveness: both engines and 30,000 page writes share a loaded machine.
    prefiller = Prefiller(layout, sim_nics(fabric, "p", 1), liveness=5)
    decoder = Decoder(layout, sim_nics(fabric, "d", 1), liveness=5)
    try:
        src, dst = np.random.default_rng(0).permutation(30_000), np.random.default_rng(1).permutation(30_000)
        (ticket,) = decoder.prepare(prefiller, "r", dst, 30_000)
        prefiller.compute(prefiller.open("r", 30_000, src), 30_000)
        ticket.wait(20)
        assert same(prefiller, decoder, src, dst, range(0, 30_000, 997))
    finally:
        decoder.close()
        prefiller.close()
