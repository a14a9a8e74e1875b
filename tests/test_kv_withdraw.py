"""Source blocks that are taken away while a push goes on (preemption), and decoders that want nothing of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from kv_bed import UNTOUCHED, Decoder, Prefiller, same, sim_nics

from railwire.kvcache import InstanceLayout, LayerWatcher, PushAborted, PushCancelled, TicketFailed, paged_instance
from railwire.testing import SimulatedFabric

LAYERS = 3
TOKENS = 24
SRC, AGAIN, DST = [0, 1, 2, 3, 4, 5], [11, 10, 9, 8, 7, 6], [3, 9, 1, 7, 5, 11]


def shape(**options: object) -> InstanceLayout:
    defaults = {"model": "m", "kv_heads": 2, "head_bytes": 32, "num_blocks": 12, "block_tokens": 4}
    return paged_instance(stages=[range(LAYERS)], **{**defaults, **options})


@pytest.fixture
def fabric() -> Iterator[SimulatedFabric]:
    with SimulatedFabric(reorder=True, max_delay_us=100) as fabric:
        yield fabric


@pytest.fixture
def pair(fabric: SimulatedFabric) -> Iterator[tuple[Prefiller, Decoder]]:
    prefiller = Prefiller(shape(), sim_nics(fabric, "p", 1))
    decoder = Decoder(shape(), sim_nics(fabric, "d", 1))
    yield prefiller, decoder
    decoder.close()
    prefiller.close()


def move(prefiller: Prefiller, src: list[int], dst: list[int]) -> None:
    """What an engine does that computes the same tokens again, in other blocks; the old ones get other content."""
    for stored in prefiller.layout.ranks[0].layers:
        for storage in stored.storages:
            array = prefiller.regions[0][storage.region].array[storage.offset :]
            pages = [array[block * storage.page_stride :][: storage.page_stride] for block in range(12)]
            copies = [pages[block].copy() for block in src]
            for block in src:
                pages[block][:] = 0xAB
            for copy, block in zip(copies, dst, strict=True):
                pages[block][:] = copy


@pytest.mark.parametrize("first", [0, 9, 16, TOKENS])
@pytest.mark.parametrize("late", [False, True], ids=["ticket-first", "ticket-last"])
def test_a_preempted_request_goes_on_from_other_blocks(pair: tuple[Prefiller, Decoder], first: int, late: bool) -> None:
    prefiller, decoder = pair
    want = Prefiller(shape(), sim_nics(SimulatedFabric(), "w", 1))  # the same bytes, that stay
    tickets = [] if late else decoder.prepare(prefiller, "r", DST, TOKENS)
    (push,) = prefiller.open("r", TOKENS, SRC)
    if first < TOKENS:
        prefiller.compute([push], first)
    else:
        push.layer_ready(0, TOKENS)  # preempted between two layers
    assert push.withdraw_blocks(5.0)
    move(prefiller, SRC, AGAIN)
    push.append_blocks(AGAIN[:3])
    prefiller.compute([push], 12)
    tickets = tickets or decoder.prepare(prefiller, "r", DST, TOKENS)
    push.append_blocks(AGAIN[3:])
    prefiller.compute([push], TOKENS)
    tickets[0].wait(5)
    push.done.wait(5)
    assert same(want, decoder, SRC, DST, range(TOKENS))
    assert decoder.idle()
    want.close()


def test_blocks_are_not_given_up_while_a_nic_reads_them(
    pair: tuple[Prefiller, Decoder], fabric: SimulatedFabric
) -> None:
    prefiller, decoder = pair
    (ticket,) = decoder.prepare(prefiller, "r", DST, TOKENS)
    (push,) = prefiller.open("r", TOKENS, SRC)
    time.sleep(0.05)
    fabric.hold()
    prefiller.compute([push], 12)
    done = threading.Event()
    results: list[bool] = []

    def withdraw() -> None:
        results.append(push.withdraw_blocks(5.0))
        done.set()

    thread = threading.Thread(target=withdraw)
    thread.start()
    assert not done.wait(0.2)  # the writes are in the NIC's hands
    fabric.release()
    assert done.wait(5)
    thread.join()
    assert results == [True]
    move(prefiller, SRC, AGAIN)
    push.append_blocks(AGAIN)
    prefiller.compute([push], TOKENS)
    ticket.wait(5)


def test_a_decoder_that_takes_too_long_loses_the_push(pair: tuple[Prefiller, Decoder], fabric: SimulatedFabric) -> None:
    prefiller, decoder = pair
    (ticket,) = decoder.prepare(prefiller, "r", DST, TOKENS)
    (push,) = prefiller.open("r", TOKENS, SRC)
    time.sleep(0.05)
    fabric.hold()
    prefiller.compute([push], TOKENS)
    assert not push.withdraw_blocks(0.1)
    for stored in prefiller.layout.ranks[0].layers:
        for storage in stored.storages:
            prefiller.regions[0][storage.region].array[:] = 0xAB  # what the next request would do
    fabric.release()
    with pytest.raises(PushAborted):
        push.done.wait(5)
    with pytest.raises(TicketFailed):
        ticket.wait(5)
    for region in decoder.regions[0]:
        assert not (region.array.reshape(-1, 32) == 0xAB).all(axis=1).any()
    assert decoder.idle()


def test_layers_counted_after_a_preemption_are_not_taken_for_the_new_ones(pair: tuple[Prefiller, Decoder]) -> None:
    """A device that is one step behind counts layers of blocks that the request no longer has."""
    prefiller, decoder = pair
    want = Prefiller(shape(), sim_nics(SimulatedFabric(), "w", 1))  # the same bytes, that stay
    tickets = [decoder.prepare(prefiller, name, DST[i : i + 3], 12)[0] for name, i in (("r", 0), ("other", 3))]
    pushes = [prefiller.open(name, 12, SRC[i : i + 3])[0] for name, i in (("r", 0), ("other", 3))]
    watcher = LayerWatcher(prefiller.senders[0])
    word = watcher.watcher.word
    watcher.begin_step([(push, 12) for push in pushes])
    word[0] = 1
    end = time.monotonic() + 5
    while not all(push.nbytes for push in pushes) and time.monotonic() < end:
        time.sleep(0.005)
    watcher.withdraw(pushes[0])
    assert pushes[0].withdraw_blocks(5.0)
    pushes[0].append_blocks(AGAIN[:3])
    watcher.begin_step([(pushes[0], 12)])
    word[0] = LAYERS
    tickets[1].wait(5)
    assert not tickets[0].done()
    move(prefiller, SRC[:3], AGAIN[:3])  # only now has the new step computed them
    word[0] = 2 * LAYERS
    tickets[0].wait(5)
    assert same(want, decoder, SRC, DST, range(12))
    assert same(want, decoder, SRC[3:], DST[3:], range(12))
    assert watcher.pending_steps == watcher.lost_counts == 0
    watcher.close()
    want.close()


def test_a_push_that_cannot_go_on_does_not_hold_up_the_others_of_its_step(pair: tuple[Prefiller, Decoder]) -> None:
    prefiller, decoder = pair
    tickets = [decoder.prepare(prefiller, name, DST[i : i + 3], 12)[0] for name, i in (("r", 0), ("other", 3))]
    pushes = [prefiller.open(name, 12, SRC[i : i + 3])[0] for name, i in (("r", 0), ("other", 3))]
    watcher = LayerWatcher(prefiller.senders[0])
    watcher.begin_step([(push, 12) for push in pushes])
    assert pushes[0].withdraw_blocks(5.0)  # and the watcher has not been told
    watcher.watcher.word[0] = LAYERS
    tickets[1].wait(5)
    with pytest.raises(TicketFailed, match="layer 0 cannot be pushed"):
        tickets[0].wait(5)
    watcher.close()


def test_checksums_do_not_survive_a_preemption(pair: tuple[Prefiller, Decoder]) -> None:
    prefiller, decoder = pair
    (ticket,) = decoder.prepare(prefiller, "r", DST, TOKENS, checksum=True)
    (push,) = prefiller.open("r", TOKENS, SRC)
    time.sleep(0.05)
    prefiller.compute([push], 12)
    assert not push.withdraw_blocks(5.0)
    with pytest.raises(TicketFailed, match="blocks were needed"):
        ticket.wait(5)


@pytest.mark.parametrize("early", [True, False])
def test_a_declined_request_lets_go_of_its_pages_at_once(pair: tuple[Prefiller, Decoder], early: bool) -> None:
    prefiller, decoder = pair
    link = decoder.receivers[0].connect(prefiller.descriptors)
    if early:
        decoder.receivers[0].decline(link, "r", "all of it is cached")
        time.sleep(0.1)
    (push,) = prefiller.open("r", TOKENS, SRC)
    if not early:
        prefiller.compute([push], TOKENS)
        decoder.receivers[0].decline(link, "r", "all of it is cached")
    with pytest.raises(PushCancelled, match="all of it is cached"):
        push.done.wait(1)  # its ticket_timeout is 5 s
    assert prefiller.senders[0].open_pushes == 0
    assert (decoder.regions[0][0].array == UNTOUCHED).all()


def test_a_request_with_a_ticket_cannot_be_declined(pair: tuple[Prefiller, Decoder]) -> None:
    prefiller, decoder = pair
    (ticket,) = decoder.prepare(prefiller, "r", DST, TOKENS)
    (push,) = prefiller.open("r", TOKENS, SRC)
    decoder.receivers[0].decline(ticket.link, "r")
    time.sleep(0.1)
    prefiller.compute([push], TOKENS)
    ticket.wait(5)
    push.done.wait(5)
