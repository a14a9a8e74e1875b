"""Requests that stand in a queue on either side: what has been announced is waited for as long as both sides live, what
has not for ``ticket_timeout``, and nothing of an announcement is left afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from kv_bed import Decoder, Prefiller, announce, decline, expect, link, nothing_is_left, same, settle, sim_nics

from railwire.errors import DescriptorError
from railwire.kvcache import (
    InstanceLayout,
    Push,
    PushAborted,
    PushCancelled,
    PushError,
    Ticket,
    TicketCancelled,
    TicketFailed,
    paged_instance,
)
from railwire.kvcache.protocol import announced, messages
from railwire.testing import SimulatedFabric

SHORT = 0.4  # the ticket_timeout of most prefillers here: what must be quicker is sent over a connection that is there
LONG = 4 * SHORT
SRC, DST = [0, 1, 2], [7, 5, 3]

Pair = tuple[Prefiller, Decoder]
Make = Callable[..., Pair]


def shape(tp: int = 1) -> InstanceLayout:
    return paged_instance(
        stages=[range(2)], tp_size=tp, model="m", kv_heads=4, head_bytes=32, num_blocks=12, block_tokens=4
    )


@pytest.fixture
def make(fabric: SimulatedFabric) -> Iterator[Make]:
    made: list[Prefiller | Decoder] = []

    def build(
        ticket_timeout: float = SHORT, tp: tuple[int, int] = (1, 1), linked: bool = True, **options: float
    ) -> Pair:
        name = f"{len(made)}-"
        nics = sim_nics(fabric, f"p{name}", tp[0])
        prefiller = Prefiller(shape(tp[0]), nics, ticket_timeout=ticket_timeout, **options)  # type: ignore[arg-type]
        decoder = Decoder(shape(tp[1]), sim_nics(fabric, f"d{name}", tp[1]))
        made.extend([decoder, prefiller])
        if linked:
            link(prefiller, decoder)
        return prefiller, decoder

    yield build
    for instance in made:
        instance.close()


def finish(prefiller: Prefiller, decoder: Decoder, tickets: list[Ticket], pushes: list[Push]) -> None:
    """The request ends as any other does."""
    prefiller.compute(pushes, 12)
    for ticket in tickets:
        ticket.wait(5)
    for push in pushes:
        push.done.wait(5)
    assert same(prefiller, decoder, SRC, DST, range(12))
    assert nothing_is_left(prefiller, decoder)


# ---- a request in the prefiller's queue ------------------------------------------------------------------------------
@pytest.mark.parametrize("tp", [(1, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("early", [True, False], ids=["expected-first", "ticket-first"])
def test_a_ticket_waits_for_a_request_that_is_expected(make: Make, early: bool, tp: tuple[int, int]) -> None:
    """Longer than both sides would wait for what they do not know."""
    prefiller, decoder = make(tp=tp)
    if early:
        expect(prefiller, "r")
    tickets = decoder.prepare(prefiller, "r", DST, 12, timeout=math.inf, answer_timeout=2 * SHORT)
    if not early:
        assert settle(lambda: all(sender.open_tickets for sender in prefiller.senders))
        expect(prefiller, "r")
    time.sleep(LONG)
    assert not any(ticket.done() for ticket in tickets)
    pushes = prefiller.open("r", 12, SRC)
    time.sleep(2 * SHORT)  # an open request is waited for, too
    finish(prefiller, decoder, tickets, pushes)


def test_a_ticket_of_an_unknown_request_ends_as_it_did(make: Make) -> None:
    prefiller, decoder = make()
    expect(prefiller, "another")
    (ticket,) = decoder.prepare(prefiller, "r", DST, 12, timeout=math.inf)
    with pytest.raises(TicketFailed, match="got no request r within"):
        ticket.wait(LONG + 1)
    assert decoder.idle()
    prefiller.senders[0].refuse("another", "the end")
    assert nothing_is_left(prefiller)


@pytest.mark.parametrize("early", [True, False], ids=["refused-first", "ticket-first"])
def test_an_expected_request_that_is_refused_ends_its_ticket_at_once(make: Make, early: bool) -> None:
    prefiller, decoder = make(ticket_timeout=60.0)
    expect(prefiller, "r")
    if early:
        prefiller.senders[0].refuse("r", "aborted in the queue")
    (ticket,) = decoder.prepare(prefiller, "r", DST, 12)
    if not early:
        assert settle(lambda: prefiller.senders[0].open_tickets == 1)
        prefiller.senders[0].refuse("r", "aborted in the queue")
    with pytest.raises(TicketFailed, match="aborted in the queue"):
        ticket.wait(2)
    assert nothing_is_left(prefiller, decoder)


def test_a_request_that_is_expected_again_lives_again(make: Make) -> None:
    prefiller, decoder = make()
    prefiller.senders[0].refuse("r", "the first life")
    expect(prefiller, "r")
    tickets = decoder.prepare(prefiller, "r", DST, 12)
    time.sleep(LONG)
    finish(prefiller, decoder, tickets, prefiller.open("r", 12, SRC))


def test_a_request_that_is_open_is_not_expected(make: Make) -> None:
    """Two requests with one name in an engine's queue: the second's place in it must not outlive the first."""
    prefiller, decoder = make()
    tickets = decoder.prepare(prefiller, "r", DST, 12)
    pushes = prefiller.open("r", 12, SRC)
    expect(prefiller, "r")
    finish(prefiller, decoder, tickets, pushes)


def test_an_expected_ticket_can_be_cancelled(make: Make) -> None:
    prefiller, decoder = make()
    expect(prefiller, "r")
    (ticket,) = decoder.prepare(prefiller, "r", DST, 12, timeout=math.inf)
    time.sleep(LONG)
    ticket.cancel()
    with pytest.raises(TicketCancelled):
        ticket.wait(2)
    prefiller.senders[0].refuse("r", "the end")
    assert nothing_is_left(prefiller, decoder)


@pytest.mark.parametrize("who", ["prefiller", "decoder"])
def test_whoever_dies_ends_the_wait_for_an_expected_request(make: Make, fabric: SimulatedFabric, who: str) -> None:
    prefiller, decoder = make(ticket_timeout=60.0)
    expect(prefiller, "r")
    (ticket,) = decoder.prepare(prefiller, "r", DST, 12, timeout=math.inf, answer_timeout=60.0)
    assert settle(lambda: prefiller.senders[0].open_tickets == 1)
    fabric.kill("p0-0.0" if who == "prefiller" else "d0-0.0")
    if who == "prefiller":
        with pytest.raises(TicketFailed):
            ticket.wait(5)  # the liveness time is 0.5 s
        assert decoder.idle()
    else:
        assert settle(lambda: prefiller.senders[0].open_tickets == 0)
        prefiller.senders[0].refuse("r", "the end")
        assert nothing_is_left(prefiller)


def test_closing_ends_what_is_expected(make: Make) -> None:
    prefiller, decoder = make(ticket_timeout=60.0)
    expect(prefiller, "r")
    (ticket,) = decoder.prepare(prefiller, "r", DST, 12, timeout=math.inf)
    assert settle(lambda: prefiller.senders[0].open_tickets == 1)
    prefiller.senders[0].close(2.0)
    with pytest.raises(TicketFailed, match="closing"):
        ticket.wait(2)
    prefiller.senders[0].expect("another")
    assert prefiller.senders[0].announced == 0


def test_a_prefiller_that_says_nothing_is_not_waited_for(make: Make) -> None:
    """It lives, has taken the ticket, and neither queues nor refuses: that is not the decoder's to wait out."""
    prefiller, decoder = make(ticket_timeout=60.0)
    (ticket,) = decoder.prepare(prefiller, "r", DST, 12, timeout=math.inf, answer_timeout=SHORT)
    with pytest.raises(TicketFailed, match="did not say within"):
        ticket.wait(2)
    assert nothing_is_left(prefiller, decoder)


def test_one_rank_that_says_nothing_is_enough(make: Make) -> None:
    prefiller, decoder = make(ticket_timeout=60.0, tp=(2, 1))
    prefiller.senders[0].expect("r")
    (ticket,) = decoder.prepare(prefiller, "r", DST, 12, timeout=math.inf, answer_timeout=SHORT)
    with pytest.raises(TicketFailed, match="did not say within"):
        ticket.wait(2)
    prefiller.senders[0].refuse("r", "the end")
    assert nothing_is_left(prefiller, decoder)


def test_tickets_that_stay_away_although_others_came_are_not_waited_for(make: Make) -> None:
    """Of two decode ranks one comes; the push had a deadline of its own before, which must not be the last."""
    prefiller, decoder = make(tp=(1, 2))
    pushes = prefiller.open("r", 12, SRC)
    receiver = decoder.receivers[0]
    ticket = receiver.prepare(receiver.connect(prefiller.descriptors), "r", DST, 12)
    with pytest.raises(PushAborted, match="2 tickets were announced, 1 came"):
        pushes[0].done.wait(LONG + 1)
    with pytest.raises(TicketFailed):
        ticket.wait(2)
    assert nothing_is_left(prefiller, decoder)


# ---- a request in the decoder's queue --------------------------------------------------------------------------------
@pytest.mark.parametrize("tp", [(1, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("early", [True, False], ids=["announced-first", "opened-first"])
def test_a_push_waits_for_a_decoder_that_is_coming(make: Make, early: bool, tp: tuple[int, int]) -> None:
    prefiller, decoder = make(tp=tp)
    pushes = [] if early else prefiller.open("r", 12, SRC)
    announce(prefiller, decoder, "r")
    announce(prefiller, decoder, "r")  # twice is once
    pushes = pushes or prefiller.open("r", 12, SRC)
    prefiller.compute(pushes, 12)
    time.sleep(LONG)
    assert not any(push.done.done() for push in pushes)
    finish(prefiller, decoder, decoder.prepare(prefiller, "r", DST, 12), pushes)


@pytest.mark.parametrize("early", [True, False], ids=["announced-first", "opened-first"])
def test_a_decoder_whose_queue_does_not_end_is_not_waited_for(make: Make, early: bool) -> None:
    """Saying so again and again does not make it longer."""
    prefiller, decoder = make(ticket_timeout=60.0 if early else SHORT, queue_timeout=LONG)
    push = None if early else prefiller.open("r", 12, SRC)[0]
    announce(prefiller, decoder, "r")
    push = push or prefiller.open("r", 12, SRC)[0]
    began = time.monotonic()
    while not push.done.done() and time.monotonic() - began < 5.0:
        announce(prefiller, decoder, "r")
    assert LONG / 2 < time.monotonic() - began < LONG + 1
    with pytest.raises(PushAborted, match="no decoder has asked"):
        push.done.wait(0)
    assert nothing_is_left(prefiller)


def test_both_may_stand_in_a_queue(make: Make) -> None:
    prefiller, decoder = make()
    expect(prefiller, "r")
    announce(prefiller, decoder, "r")
    time.sleep(LONG)
    pushes = prefiller.open("r", 12, SRC)
    time.sleep(LONG)
    assert not pushes[0].done.done()
    finish(prefiller, decoder, decoder.prepare(prefiller, "r", DST, 12), pushes)


@pytest.mark.parametrize("tp", [(1, 1), (1, 2)], ids=str)
def test_a_decoder_that_was_coming_and_declines(make: Make, tp: tuple[int, int]) -> None:
    prefiller, decoder = make(ticket_timeout=60.0, tp=tp)
    pushes = prefiller.open("r", 12, SRC)
    announce(prefiller, decoder, "r")
    decline(prefiller, decoder, "r")
    with pytest.raises(PushCancelled, match="not needed"):
        pushes[0].done.wait(2)
    announce(prefiller, decoder, "r")  # late, and of no consequence
    assert nothing_is_left(prefiller)


def test_a_decline_before_the_request_and_an_announcement_after_it(make: Make) -> None:
    prefiller, decoder = make(ticket_timeout=60.0)
    decline(prefiller, decoder, "r")
    announce(prefiller, decoder, "r")
    with pytest.raises(PushCancelled, match="not needed"):
        prefiller.open("r", 12, SRC)[0].done.wait(2)
    assert nothing_is_left(prefiller)


def test_one_decoder_declines_while_another_is_coming(make: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make()
    other = Decoder(shape(), sim_nics(fabric, "other", 1))
    try:
        link(prefiller, other)
        pushes = prefiller.open("r", 12, SRC)
        announce(prefiller, decoder, "r")
        announce(prefiller, other, "r")
        decline(prefiller, decoder, "r")
        time.sleep(LONG)
        finish(prefiller, other, other.prepare(prefiller, "r", DST, 12), pushes)
    finally:
        other.close()


def test_a_decoder_that_was_coming_and_dies_gives_the_blocks_back(make: Make, fabric: SimulatedFabric) -> None:
    prefiller, decoder = make(ticket_timeout=60.0)
    announce(prefiller, decoder, "r")
    announce(prefiller, decoder, "of which the prefiller never hears")
    pushes = prefiller.open("r", 12, SRC)
    prefiller.compute(pushes, 12)
    fabric.kill("d0-0.0")
    with pytest.raises(PushCancelled, match="was coming for it, is lost"):
        pushes[0].done.wait(5)  # the liveness time is 0.5 s
    assert nothing_is_left(prefiller)


def test_a_decoder_that_dies_before_the_request_begins_leaves_the_plain_time_out(
    make: Make, fabric: SimulatedFabric
) -> None:
    """The request may still be fetched by another; nobody else has said so, though."""
    prefiller, decoder = make()
    announce(prefiller, decoder, "r")
    fabric.kill("d0-0.0")
    assert settle(lambda: prefiller.senders[0].announced == 0)
    with pytest.raises(PushAborted, match="no decoder has asked"):
        prefiller.open("r", 12, SRC)[0].done.wait(LONG + 1)


@pytest.mark.parametrize("begun", [True, False])
def test_an_announcement_after_the_ticket(make: Make, begun: bool) -> None:
    prefiller, decoder = make(ticket_timeout=60.0)
    pushes = prefiller.open("r", 12, SRC) if begun else []
    tickets = decoder.prepare(prefiller, "r", DST, 12)
    announce(prefiller, decoder, "r")
    assert prefiller.senders[0].announced == 0
    finish(prefiller, decoder, tickets, pushes or prefiller.open("r", 12, SRC))


def test_an_announcement_of_what_was_aborted(make: Make) -> None:
    prefiller, decoder = make(ticket_timeout=60.0)
    announce(prefiller, decoder, "r")
    push = prefiller.open("r", 12, SRC)[0]
    push.abort("out of memory")
    assert nothing_is_left(prefiller)
    announce(prefiller, decoder, "r")
    prefiller.senders[0].refuse("s", "queue full")
    announce(prefiller, decoder, "s")
    assert prefiller.senders[0].announced == 0


def test_a_ticket_that_cannot_be_ends_its_announcement(make: Make) -> None:
    """The decoder does come, and is turned away: the push must not wait for it to come again."""
    prefiller, decoder = make()
    announce(prefiller, decoder, "r")
    push = prefiller.open("r", 12, SRC)[0]
    (ticket,) = decoder.prepare(prefiller, "r", DST, 8)  # as many tokens as the request does not have
    with pytest.raises(TicketFailed, match="the ticket is for 8 tokens"):
        ticket.wait(2)
    with pytest.raises(PushError, match="no decoder has asked"):
        push.done.wait(LONG + 1)
    assert nothing_is_left(prefiller, decoder)


def test_announcements_are_bounded_and_end_with_the_connection(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prefiller, decoder = make()
    monkeypatch.setattr(announced, "MAX_COMING", 5)
    for number in range(20):
        announce(prefiller, decoder, f"r{number}")
    assert prefiller.senders[0].announced == 5
    with pytest.raises(PushAborted, match="no decoder has asked"):
        prefiller.open("r19", 12, SRC)[0].done.wait(LONG + 1)  # one too many: the plain time-out
    decoder.engines[0].close(0.5)
    assert nothing_is_left(prefiller)


# ---- what is no announcement -----------------------------------------------------------------------------------------
def test_names_that_are_too_long(make: Make) -> None:
    prefiller, decoder = make()
    link = decoder.receivers[0].connect(prefiller.descriptors)
    with pytest.raises(ValueError, match="1000 characters"):
        decoder.receivers[0].announce(link, "x" * 1001)
    with pytest.raises(DescriptorError):
        messages.decode(messages.encode(messages.Coming("x" * 1001)))
    decoder.receivers[0].announce(link, "x" * 1000)
    assert settle(lambda: prefiller.senders[0].announced == 1)


def test_a_stranger_cannot_announce(make: Make) -> None:
    """Before the handshake there is no connection whose end would end it."""
    prefiller, decoder = make(linked=False)
    peer = decoder.engines[0].connect(prefiller.engines[0].address)
    decoder.receivers[0].channel.send(peer, messages.Coming("r"))
    assert settle(lambda: prefiller.senders[0].channel.bad_messages == 1)
    assert prefiller.senders[0].announced == 0


def test_an_answer_for_nobody_is_no_answer(make: Make) -> None:
    """From a peer that the ticket does not concern, and for tickets that never were."""
    prefiller, decoder = make(ticket_timeout=60.0)
    stranger, _ = make()
    (ticket,) = decoder.prepare(prefiller, "r", DST, 12, timeout=math.inf, answer_timeout=LONG)
    peer = stranger.engines[0].connect(decoder.engines[0].address)
    for number in (ticket.id, 0, -1, 1 << 60):
        stranger.senders[0].channel.send(peer, messages.Accepted(number))
    with pytest.raises(TicketFailed, match="did not say within"):
        ticket.wait(LONG + 1)
    assert decoder.idle()


def test_garbage_like_announcements_and_answers(make: Make, rng: np.random.Generator) -> None:
    """Flipped and cut in both directions: nothing is raised, nothing stays, and the next request is served."""
    prefiller, decoder = make(ticket_timeout=60.0)
    link = decoder.receivers[0].connect(prefiller.descriptors)
    back = next(iter(prefiller.senders[0]._destinations.values())).peer
    coming, accepted = messages.encode(messages.Coming("request")), messages.encode(messages.Accepted(77))
    last = None
    for _ in range(300):
        for engine, peer, good in (
            (decoder.engines[0], link.sources[0].peer, coming),
            (prefiller.engines[0], back, accepted),
        ):
            data = bytearray(good)
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(4, len(data))] = rng.integers(0, 256)
            last = engine.send(peer, bytes(data[: rng.integers(4, len(data) + 1)]))
    assert last is not None
    last.wait(5)
    tickets, pushes = decoder.prepare(prefiller, "fresh", DST, 12), prefiller.open("fresh", 12, SRC)
    prefiller.compute(pushes, 12)
    tickets[0].wait(5)
    assert same(prefiller, decoder, SRC, DST, range(12))
    assert decoder.idle()
    decoder.engines[0].close(0.5)  # names that were garbled are forgotten with it
    assert nothing_is_left(prefiller)


def test_waits_must_be_waits(make: Make) -> None:
    prefiller, decoder = make()
    for options in ({"answer_timeout": 0}, {"answer_timeout": math.nan}, {"timeout": math.nan}):
        with pytest.raises(ValueError, match="timeout must be positive"):
            decoder.prepare(prefiller, "r", DST, 12, **options)
    assert decoder.idle()
