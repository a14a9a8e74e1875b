"""Prepared scatters: what a table says happens, by a call and by a word that moves; a wrong table harms nobody."""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from railwire import (
    ClosedError,
    MemoryRegion,
    Peer,
    Prepared,
    ScatterTarget,
    Transfer,
    TransferEngine,
    TransferError,
    WriterFailed,
)
from railwire.prepared import DESTINATION, IMMEDIATE, LENGTH, NO_IMMEDIATE, SOURCE
from railwire.testing import SimulatedFabric

BYTES = 4096
IMM = 77


class Bench:
    """A hub and some spokes, each with memory that the hub writes to."""

    def __init__(self, spokes: int, links: int = 1, **settings: int) -> None:
        self.fabric = SimulatedFabric(**settings)
        self.links = links
        open_ = lambda name: TransferEngine(  # noqa: E731
            nics=[self.fabric.nic(f"{name}{k}") for k in range(links)], name=name, liveness=2.0
        )
        self.hub = open_("hub")
        self.spokes = [open_(f"spoke{i}x") for i in range(spokes)]
        self.peers = [self.hub.connect(spoke.address) for spoke in self.spokes]
        self.group = self.hub.peer_group(self.peers)
        self.data = np.random.default_rng(1).integers(1, 255, BYTES, np.uint8)
        self.source = self.hub.register(self.data)
        self.targets: list[MemoryRegion] = [spoke.register(np.zeros(BYTES, np.uint8)) for spoke in self.spokes]

    def prepare(self, imm: int | None = IMM, depth: int = 1) -> Prepared:
        targets = [ScatterTarget(0, target.descriptor) for target in self.targets]
        return self.group.prepare_scatter(self.source, targets, imm, depth=depth)

    def close(self) -> None:
        for engine in (self.hub, *self.spokes):
            engine.close(0.5)


@pytest.fixture(params=[1, 3], ids=["one link", "three links"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(3, request.param, max_delay_us=50)
    yield made
    made.close()


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


# ---- by a call -------------------------------------------------------------------------------------------------------
def test_a_table_begins_with_what_scatter_would_do(bench: Bench) -> None:
    bench.prepare().post().wait(5)
    for spoke, target in zip(bench.spokes, bench.targets, strict=True):
        spoke.counter(IMM).expect(1).wait(5)
        assert (target.array == bench.data).all()


def test_exactly_the_named_bytes_and_arrivals(bench: Bench) -> None:
    prepared = bench.prepare(None)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    expected = [np.zeros(BYTES, np.uint8) for _ in bench.spokes]
    arrivals: list[dict[int, int]] = [{} for _ in bench.spokes]
    for _ in range(60):
        lengths = rng.integers(0, 2, 3) * rng.integers(0, 900, 3)
        starts, places = rng.integers(0, BYTES - 900, 3), rng.integers(0, BYTES - 900, 3)
        imms = np.where(rng.integers(0, 2, 3) == 1, rng.integers(0, 4, 3), -1).astype(np.int64)
        table_imms = imms.astype(np.uint64)  # -1 is none
        prepared(lengths, starts, places, table_imms).wait(5)
        for i in range(3):
            n, a, b = int(lengths[i]), int(starts[i]), int(places[i])
            expected[i][b : b + n] = bench.data[a : a + n]
            if imms[i] >= 0:
                arrivals[i][int(imms[i])] = arrivals[i].get(int(imms[i]), 0) + 1
    for i, spoke in enumerate(bench.spokes):
        assert (bench.targets[i].array == expected[i]).all()
        for imm in range(4):
            spoke.counter(imm).expect(arrivals[i].get(imm, 0)).wait(5)
            assert spoke.counter(imm).value == 0


def test_several_targets_of_one_peer_and_targets_without_memory(bench: Bench) -> None:
    first = bench.targets[0].descriptor
    targets: list[ScatterTarget | Peer] = [
        ScatterTarget(0, first[0:100]),
        ScatterTarget(200, first[1000:1100]),
        bench.peers[0],
        bench.peers[1],
    ]
    prepared = bench.group.prepare_scatter(bench.source, targets, 5)
    prepared.table[0, 1, IMMEDIATE] = 6
    prepared.post().wait(5)
    bench.spokes[0].counter(5).expect(2).wait(5)
    bench.spokes[0].counter(6).expect(1).wait(5)
    bench.spokes[1].counter(5).expect(1).wait(5)
    into = bench.targets[0].array
    assert (into[:100] == bench.data[:100]).all() and (into[1000:1100] == bench.data[200:300]).all()
    assert int((into != 0).sum()) == 200


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (SOURCE, BYTES + 1),
        (SOURCE, 1),
        (SOURCE, 2**64 - 1),
        (DESTINATION, 1),
        (DESTINATION, 2**64 - 8),
        (LENGTH, BYTES + 1),
        (LENGTH, 2**64 - 1),
        (IMMEDIATE, 1 << 22),
        (IMMEDIATE, 2**64 - 2),
    ],
)
def test_a_wrong_row_is_an_error_at_the_call_and_moves_nothing(bench: Bench, column: int, value: int) -> None:
    prepared = bench.prepare()
    prepared.table[0, 2, column] = value
    with pytest.raises(IndexError, match="row 2 of slot 0"):
        prepared.post()
    assert not any(target.array.any() for target in bench.targets)
    assert all(spoke.counter(IMM).value == 0 for spoke in bench.spokes)
    assert bench.hub.stats()["transfers"]["submitted"] == 0


def test_wrong_arguments(bench: Bench) -> None:
    with pytest.raises(IndexError, match="slot 1"):
        bench.prepare().post(1)
    foreign = bench.spokes[0].register(np.zeros(8, np.uint8)).descriptor
    others = bench.hub.peer_group(bench.peers[1:])
    with pytest.raises(ValueError, match="no peer of the group"):
        others.prepare_scatter(bench.source, [ScatterTarget(0, foreign)])
    with pytest.raises(ValueError):
        bench.group.prepare_scatter(bench.source, [], depth=0)
    with pytest.raises(ValueError):
        bench.group.prepare_scatter(bench.source, [], 1 << 22)
    with pytest.raises(ValueError, match="is registered with"):
        bench.group.prepare_scatter(bench.targets[0], [])
    bench.group.prepare_scatter(bench.source, []).post().wait(5)  # to nobody


def test_memory_that_ends(bench: Bench) -> None:
    prepared = bench.prepare()
    bench.targets[1].revoke()
    with pytest.raises(TransferError):
        prepared.post().wait(5)
    bench.spokes[0].counter(IMM).expect(1).wait(5)  # the others still get theirs
    with pytest.raises(WriterFailed):
        bench.spokes[1].counter(IMM).expect(1).wait(5)
    bench.source.close()
    with pytest.raises(ClosedError):
        prepared.post()
    with pytest.raises(ClosedError):
        bench.prepare()
    bench.hub.close(0.5)
    with pytest.raises(ClosedError):
        prepared.post()


def test_the_table_outlives_its_scatter(bench: Bench) -> None:
    table = bench.prepare().table
    gc.collect()
    table[:] = 1
    assert int(table.sum()) == 12


# ---- by a word -------------------------------------------------------------------------------------------------------
def test_a_word_posts(bench: Bench) -> None:
    prepared = bench.prepare()
    ends: list[tuple[int, Transfer]] = []
    trigger = prepared.on_word(lambda number, transfer: ends.append((number, transfer)))
    for n in range(1, 51):
        prepared.table[0, :, DESTINATION] = 16 * n
        prepared.table[0, :, SOURCE] = 8 * n
        prepared.table[0, :, LENGTH] = 16
        prepared.table[0, :, IMMEDIATE] = IMM
        trigger.word[0] = n
        until(lambda n=n: trigger.posted == n)  # type: ignore[misc]
        prepared.table[0] = 2**40  # it has been read
    until(lambda: trigger.ended == 50 and len(ends) == 50)
    assert [number for number, _ in ends] == list(range(1, 51))
    assert [transfer.exception() for _, transfer in ends] == [None] * 50
    assert all(transfer.done() for _, transfer in ends)
    assert trigger.failed == 0
    expected = np.zeros(BYTES, np.uint8)
    for n in range(1, 51):
        expected[16 * n : 16 * n + 16] = bench.data[8 * n : 8 * n + 16]
    for spoke, target in zip(bench.spokes, bench.targets, strict=True):
        spoke.counter(IMM).expect(50).wait(5)
        assert (target.array == expected).all()


def test_each_step_of_the_word_is_an_operation_from_its_own_slot(bench: Bench) -> None:
    prepared = bench.prepare(depth=8)
    for slot in range(8):
        prepared.table[slot, :, LENGTH] = 1
        prepared.table[slot, :, SOURCE] = prepared.table[slot, :, DESTINATION] = 10 * slot
        prepared.table[slot, :, IMMEDIATE] = slot
    trigger = prepared.on_word()
    trigger.word[0] = 8  # eight at once
    until(lambda: trigger.ended == 8)
    trigger.word[0] = 20
    until(lambda: trigger.ended == 20)
    assert trigger.posted == 20 and trigger.failed == 0
    for spoke, target in zip(bench.spokes, bench.targets, strict=True):
        for slot in range(8):
            spoke.counter(slot).expect(3 if slot < 4 else 2).wait(5)
        assert sorted(np.flatnonzero(target.array)) == list(range(0, 80, 10))


def test_a_wrong_row_fails_the_operation_and_whoever_counts_on_it(bench: Bench) -> None:
    prepared = bench.prepare()
    ends: list[tuple[int, Transfer]] = []
    trigger = prepared.on_word(lambda number, transfer: ends.append((number, transfer)))
    prepared.table[0, 1, SOURCE] = 2**63
    prepared.table[0, 2, IMMEDIATE] = 2**63
    trigger.word[0] = 1
    until(lambda: ends)
    number, transfer = ends[0]
    error = transfer.exception()
    assert number == 1 and isinstance(error, TransferError) and error.reason == "rejected"
    assert "row 1 of slot 0" in str(error)
    assert (trigger.posted, trigger.ended, trigger.failed) == (1, 1, 1)
    for spoke in bench.spokes[:2]:
        with pytest.raises(WriterFailed, match="row 1"):
            spoke.counter(IMM).expect(1).wait(5)
    assert not any(target.array.any() for target in bench.targets)
    for spoke in bench.spokes[:2]:
        spoke.counter(IMM).reset()
    prepared.table[0, :, SOURCE], prepared.table[0, :, IMMEDIATE] = 0, IMM
    trigger.word[0] = 2  # and it goes on
    for spoke in bench.spokes:
        spoke.counter(IMM).expect(1).wait(5)


@pytest.mark.parametrize("word", [1 << 40, 2**64 - 1])
def test_a_word_that_does_not_count_is_reported_and_posts_nothing(bench: Bench, word: int) -> None:
    prepared = bench.prepare()
    ends: list[tuple[int, Transfer]] = []
    trigger = prepared.on_word(lambda number, transfer: ends.append((number, transfer)))
    trigger.word[0] = word
    until(lambda: ends)
    assert "grows by one" in str(ends[0][1].exception())
    assert all(spoke.counter(IMM).value == 0 for spoke in bench.spokes)
    trigger.word[0] = (word + 1) % 2**64  # from there on it counts
    for spoke in bench.spokes:
        spoke.counter(IMM).expect(1).wait(5)


def test_after_close_nothing_is_posted(bench: Bench) -> None:
    prepared = bench.prepare()
    trigger = prepared.on_word()
    trigger.word[0] = 1
    until(lambda: trigger.ended == 1)
    trigger.close()
    trigger.close()
    trigger.word[0] = 2
    time.sleep(0.05)
    assert trigger.posted == 1
    assert all(spoke.counter(IMM).value == 1 for spoke in bench.spokes)


def test_a_closed_source_fails_its_operations(bench: Bench) -> None:
    prepared = bench.prepare()
    ends: list[Transfer] = []
    trigger = prepared.on_word(lambda _, transfer: ends.append(transfer))
    bench.source.close()
    trigger.word[0] = 1
    until(lambda: ends)
    assert isinstance(ends[0].exception(), ClosedError)
    with pytest.raises(WriterFailed):
        bench.spokes[0].counter(IMM).expect(1).wait(5)


def test_the_end_of_the_engine_ends_what_is_under_way(bench: Bench) -> None:
    prepared = bench.prepare()
    ends: list[Transfer] = []
    trigger = prepared.on_word(lambda _, transfer: ends.append(transfer))
    for i in range(len(bench.spokes)):
        for k in range(bench.links):
            bench.fabric.freeze(f"spoke{i}x{k}")
    trigger.word[0] = 1
    until(lambda: trigger.posted == 1)
    bench.hub.close(0.2)
    until(lambda: trigger.ended == 1)
    trigger.word[0] = 2
    trigger.close()
    with pytest.raises(ClosedError):
        prepared.on_word()


def test_a_lost_peer_fails_operations_and_the_others_get_theirs(bench: Bench) -> None:
    prepared = bench.prepare()
    trigger = prepared.on_word()
    bench.peers[0].close()
    trigger.word[0] = 1
    until(lambda: trigger.ended == 1)
    assert trigger.failed == 1
    for spoke in bench.spokes[1:]:
        spoke.counter(IMM).expect(1).wait(5)


def test_a_word_that_another_thread_moves_while_the_python_of_the_process_stands_still() -> None:
    """No Python between: the word moves while this thread keeps the GIL."""
    bench = Bench(2)
    try:
        prepared = bench.prepare()
        trigger = prepared.on_word()
        libc = ctypes.PyDLL(None)  # keeps the GIL
        trigger.word[0] = 1
        libc.usleep(300_000)
        posted = trigger.posted
        assert posted == 1
    finally:
        bench.close()


def test_many_words_at_once() -> None:
    bench = Bench(4)
    try:
        triggers = [bench.prepare().on_word() for _ in range(20)]
        rounds = 50

        def move(trigger: object) -> None:
            for _ in range(rounds):
                trigger.word[0] += 1  # type: ignore[attr-defined]

        threads = [threading.Thread(target=move, args=(trigger,)) for trigger in triggers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for spoke in bench.spokes:
            spoke.counter(IMM).expect(20 * rounds).wait(10)
        until(lambda: all(trigger.ended == rounds for trigger in triggers))
        assert bench.hub.stats()["transfers"]["failed"] == 0
    finally:
        bench.close()


def test_none_is_all_bits() -> None:
    assert NO_IMMEDIATE == 2**64 - 1


# ---- words that follow arrivals --------------------------------------------------------------------------------------
def test_words_follow_arrivals(bench: Bench) -> None:
    spoke = bench.spokes[0]
    hub = next(peer for peer in spoke.peers if peer.name == "hub")
    spoke.counter(200).reset()
    words = spoke.arrival_words(200, [hub, hub])
    with pytest.raises(ValueError, match="followed already"):
        spoke.arrival_words(201, [hub])
    with pytest.raises(ValueError, match="at least one writer"):
        spoke.arrival_words(300, [])
    assert words.address % 4096 == 0 and words.words.tolist() == [0, 0]
    target = bench.targets[0].descriptor
    for n in range(1, 6):
        bench.hub.write(bench.source, target, 201).wait(5)
        until(lambda n=n: words.words.tolist() == [0, n])  # type: ignore[misc]
    spoke.counter(201).expect(2).wait(5)
    assert words.words.tolist() == [0, 3]  # what an expectation takes is gone
    spoke.counter(201).reset()
    assert words.words.tolist() == [0, 0]
    words.close()
    bench.hub.write(bench.source, target, 200).wait(5)
    spoke.counter(200).expect(1).wait(5)
    assert words.words.tolist() == [0, 0]
    again = spoke.arrival_words(200, [hub, hub])  # what has come before counts
    bench.hub.write(bench.source, target, 200).wait(5)
    until(lambda: again.words.tolist() == [1, 0])
    again.close()
    again.close()


def test_words_say_that_a_writer_is_lost(bench: Bench) -> None:
    spoke = bench.spokes[0]
    hub = next(peer for peer in spoke.peers if peer.name == "hub")
    words = spoke.arrival_words(200, [hub] * 3)
    bench.hub.write(bench.source, bench.targets[0].descriptor, 200).wait(5)
    until(lambda: words.words[0] == 1)
    bench.hub.close(0.5)
    until(lambda: all(word < 0 for word in words.words.tolist()))
    assert words.words[0] & 0xFFFF == 1  # how many had come is still there


def test_words_say_that_a_writer_has_failed(bench: Bench) -> None:
    spoke = bench.spokes[0]
    hub = next(peer for peer in spoke.peers if peer.name == "hub")
    words = spoke.arrival_words(IMM, [hub])
    prepared = bench.prepare()
    trigger = prepared.on_word(lambda number, transfer: None)
    prepared.table[0, 0, LENGTH] = 2**40
    trigger.word[0] = 1
    until(lambda: words.words[0] < 0)
    spoke.counter(IMM).reset()
    assert words.words[0] == 0
