"""What others say, wrong or in an evil hour, costs nothing: no memory, no seconds, no slot, no connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import msgspec
import pytest
from kv_bed import Decoder, Prefiller, sim_nics

from railwire.errors import RailwireError
from railwire.kvcache import (
    Component,
    InstanceLayout,
    Link,
    RankDescriptor,
    RankLayout,
    Sender,
    paged_instance,
)
from railwire.kvcache.protocol import messages
from railwire.testing import SimulatedFabric

Pair = tuple[Prefiller, Decoder]


def shape() -> InstanceLayout:
    return paged_instance(
        stages=[range(2)], tp_size=1, model="m", kv_heads=4, head_bytes=32, num_blocks=12, block_tokens=4
    )


@pytest.fixture
def pair(seed: int) -> Iterator[Pair]:
    with SimulatedFabric(seed=seed, reorder=True, max_delay_us=100) as fabric:
        prefiller = Prefiller(shape(), sim_nics(fabric, "p", 1), ticket_timeout=1.0)
        decoder = Decoder(shape(), sim_nics(fabric, "d", 1))
        yield prefiller, decoder
        decoder.close()
        prefiller.close()


@pytest.mark.parametrize("first_block", [1 << 27, 1 << 60])
def test_a_ticket_for_more_than_the_prefiller_can_hold_is_refused(pair: Pair, first_block: int) -> None:
    """It made a table of as many blocks, a gigabyte of it, or raised what nobody caught."""
    prefiller, decoder = pair
    receiver = decoder.receivers[0]
    link = receiver.connect(prefiller.descriptors)
    heard = []
    take, receiver.channel.receiver = receiver.channel.receiver, lambda _, message: heard.append(message)
    tokens = 4 * first_block + 1
    request = messages.Request(
        1, link.instance, "r", 3 << 20, tokens - 1, tokens, first_block, 1, b"\0\0\0\0", 1, b"", False
    )
    receiver.channel.send(link.sources[0].peer, request)
    end = time.monotonic() + 10
    while not heard and time.monotonic() < end:
        time.sleep(0.01)
    receiver.channel.receiver = take
    assert isinstance(heard[0], messages.Ended) and "room for the KV of 48" in heard[0].reason
    assert prefiller.senders[0].refused_tickets == 1 and prefiller.senders[0].open_tickets == 0


def test_a_layout_of_many_strides_is_refused_at_once() -> None:
    """Each of them was a level of recursion: eleven seconds under the sender's lock, and a RecursionError."""
    strides = 1000
    period = 1 << 40
    layers = [[n, [[0, n, period - 2 * n, 0, 0, 0, 1]]] for n in range(strides)]
    data = msgspec.msgpack.encode(["m", 1, 2, [["kv", 1, 1, "u1"]], layers, [1 << 42]])
    began = time.thread_time()  # what else runs on the machine does not count
    with pytest.raises(msgspec.ValidationError, match="overlap"):
        msgspec.msgpack.decode(data, type=RankLayout)
    assert time.thread_time() - began < 1.0


def test_interleaved_layers_of_one_stride_are_still_told_apart() -> None:
    layers = [[n, [[0, 16 * n, 16 * 100, 8, 0, 0, 1]]] for n in range(100)]
    data = msgspec.msgpack.encode(["m", 2, 7, [["kv", 1, 8, "u1"]], layers, [1600 * 7]])
    layout = msgspec.msgpack.decode(data, type=RankLayout)
    assert len(layout.layers) == 100 and layout.components == (Component("kv", 1, 8, "u1"),)


def test_a_name_that_is_too_long_takes_no_slot(pair: Pair) -> None:
    prefiller, decoder = pair
    receiver = decoder.receivers[0]
    link = receiver.connect(prefiller.descriptors)
    free = receiver.slots.free
    for name in ("n" * (messages.MAX_NAME + 1), "n" * 100_000):
        with pytest.raises(ValueError, match="1000 characters"):
            receiver.prepare(link, name, [1, 2], 8)
    assert receiver.slots.free == free and receiver.open_tickets == 0


def test_a_ticket_that_cannot_be_sent_fails_and_gives_its_slot_back(pair: Pair) -> None:
    """Whatever the reason: it stayed open for ever."""
    prefiller, decoder = pair
    receiver = decoder.receivers[0]
    link = receiver.connect(prefiller.descriptors)
    free = receiver.slots.free
    with pytest.raises(RailwireError):
        receiver.prepare(link, "\ud800", [1, 2], 8).wait(10)  # no character: it has no encoding
    end = time.monotonic() + 10
    while receiver.slots.free < free and time.monotonic() < end:
        time.sleep(0.01)
    assert receiver.slots.free == free and receiver.open_tickets == 0


def test_another_sender_on_the_same_engine_is_another_instance(pair: Pair) -> None:
    prefiller, decoder = pair
    receiver = decoder.receivers[0]
    old = receiver.connect(prefiller.descriptors)
    prefiller.senders[0].close(1.0)
    sender = Sender(prefiller.engines[0], prefiller.layout, 0, prefiller.regions[0], instance_id="second")
    prefiller.senders[0] = sender
    link = receiver.connect([sender.descriptor])
    assert link is not old and link.instance == "second"
    push = sender.open("r", 8)
    push.append_blocks([0, 1])
    prefiller.compute([push], 8)
    receiver.prepare(link, "r", [3, 4], 8).wait(10)


def test_who_waits_for_a_handshake_that_fails_makes_his_own_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of an instance was forgotten while others waited for it: two handshakes took each other's answers."""
    prefiller, decoder = pair
    receiver = decoder.receivers[0]
    real = receiver._handshake
    running, most, calls = 0, 0, 0

    def handshake(ranks: Sequence[RankDescriptor], timeout: float) -> Link:
        nonlocal running, most, calls
        calls += 1
        running += 1
        most = max(most, running)
        try:
            time.sleep(0.2)
            if calls == 1:
                raise RailwireError("the first one fails")
            return real(ranks, timeout)
        finally:
            running -= 1

    monkeypatch.setattr(receiver, "_handshake", handshake)
    results: dict[str, object] = {}

    def go(name: str) -> None:
        try:
            results[name] = receiver.connect(prefiller.descriptors, 5.0)
        except RailwireError as error:
            results[name] = error

    threads = []
    for name in ("fails", "waits", "comes later"):
        threads.append(threading.Thread(target=go, args=(name,)))
        threads[-1].start()
        time.sleep(0.12)  # the third comes when the first has failed and the second shakes hands
    for thread in threads:
        thread.join()
    assert isinstance(results["fails"], RailwireError)
    assert isinstance(results["waits"], Link) and results["comes later"] is results["waits"]
    assert most == 1 and not receiver._connecting


def heard(pair: Pair, *requests: messages.Message, count: int) -> list[messages.Message]:
    """What the prefiller answers a decoder that says these, until so many answers have come."""
    prefiller, decoder = pair
    receiver = decoder.receivers[0]
    link = receiver.connect(prefiller.descriptors)
    answers: list[messages.Message] = []
    take, receiver.channel.receiver = receiver.channel.receiver, lambda _, message: answers.append(message)
    for request in requests:
        receiver.channel.send(link.sources[0].peer, request)
    end = time.monotonic() + 20
    while len(answers) < count and time.monotonic() < end:
        time.sleep(0.005)
    receiver.channel.receiver = take
    return answers


def ticket(number: int, instance: str, blocks: int = 3, named: bytes | None = None) -> messages.Request:
    data = b"".join(index.to_bytes(4, "little") for index in range(blocks)) if named is None else named
    return messages.Request(number, instance, f"r{number}", 3 << 20, 0, 4 * blocks, 0, blocks, data, 1, b"", False)


def test_a_ticket_whose_blocks_do_not_come_has_an_end(pair: Pair) -> None:
    """It stayed for as long as the connection, and every empty message more made it larger."""
    prefiller, _ = pair
    sender = prefiller.senders[0]
    part = ticket(1, sender.instance_id, 3, b"\1\0\0\0")
    empty = [messages.Blocks(1, b"")] * 500
    answers = heard(pair, part, *empty, count=1)
    assert [type(answer) for answer in answers] == [messages.Ended]
    assert "list of blocks" in answers[0].reason  # type: ignore[union-attr]
    assert sender.open_tickets == 0


def test_empty_lists_of_blocks_are_not_kept(pair: Pair) -> None:
    prefiller, decoder = pair
    sender = prefiller.senders[0]
    link = decoder.receivers[0].connect(prefiller.descriptors)
    peer = link.sources[0].peer
    decoder.receivers[0].channel.send(peer, ticket(1, sender.instance_id, 3, b"\1\0\0\0"))
    for _ in range(200):
        decoder.receivers[0].channel.send(peer, messages.Blocks(1, b""))
    end = time.monotonic() + 10
    while not sender.open_tickets and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(0.1)
    (delivery,) = sender._deliveries.values()
    assert len(delivery._received) == 1


def test_a_decoder_has_no_more_tickets_open_than_it_can_have(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prefiller, _ = pair
    sender = prefiller.senders[0]
    monkeypatch.setattr("railwire.kvcache.sender._MAX_TICKETS", 5)
    for name in range(40):
        sender.expect(f"r{name}")
    few = [ticket(number, sender.instance_id, 1) for number in range(1, 9)]
    answers = heard(pair, *few, count=8)
    ended = [answer for answer in answers if isinstance(answer, messages.Ended)]
    assert len(ended) == 3 and all("more than this decoder can have" in answer.reason for answer in ended)
    assert sender.open_tickets == 5
    # One that ends makes room for another.
    assert isinstance(heard(pair, messages.Cancel(1), count=1)[0], messages.Ended)
    assert isinstance(heard(pair, ticket(9, sender.instance_id, 1), count=1)[0], messages.Accepted)
    monkeypatch.setattr("railwire.kvcache.sender._MAX_TICKETS", 1000)
    many = [ticket(number, sender.instance_id, 12) for number in range(10, 20)]  # it has 12 blocks, and names 120
    answers = heard(pair, *many, count=10)
    accepted = sum(isinstance(answer, messages.Accepted) for answer in answers)
    assert accepted == 2 and len(answers) == 10


def test_a_rank_that_declines_is_not_waited_for(seed: int) -> None:
    """The other's pages had come, and the push waited for the ticket of the one until its time-out, and failed."""
    two = paged_instance(
        stages=[range(2)], tp_size=2, model="m", kv_heads=4, head_bytes=32, num_blocks=12, block_tokens=4
    )
    for order in ("before", "after", "before-open"):
        with SimulatedFabric(seed=seed, reorder=True, max_delay_us=100) as fabric:
            prefiller = Prefiller(shape(), sim_nics(fabric, "p", 1), ticket_timeout=60.0)
            decoder = Decoder(two, sim_nics(fabric, "d", 2))
            try:
                links = [receiver.connect(prefiller.descriptors) for receiver in decoder.receivers]
                sender = prefiller.senders[0]
                if order == "before-open":
                    decoder.receivers[1].decline(links[1], "r")
                    end = time.monotonic() + 10
                    while not sender._declined and time.monotonic() < end:
                        time.sleep(0.005)
                push = None if order == "before-open" else prefiller.open("r", 8, [0, 1])[0]
                if order == "before":
                    for receiver, link in zip(decoder.receivers, links, strict=True):
                        receiver.announce(link, "r")
                    end = time.monotonic() + 10
                    while sender.announced < 2 and time.monotonic() < end:
                        time.sleep(0.005)
                    decoder.receivers[1].decline(links[1], "r")
                came = decoder.receivers[0].prepare(links[0], "r", [3, 4], 8)
                if push is None:
                    end = time.monotonic() + 10
                    while not sender.open_tickets and time.monotonic() < end:
                        time.sleep(0.005)
                    push = prefiller.open("r", 8, [0, 1])[0]
                prefiller.compute([push], 8)
                came.wait(10)
                if order == "after":
                    assert not push.done.done()
                    decoder.receivers[1].decline(links[1], "r")
                push.done.wait(10)
                assert sender.open_pushes == 0
            finally:
                decoder.close()
                prefiller.close()
