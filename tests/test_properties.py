"""The engine on a network that misbehaves: any layout, any number of NICs, any order, any failure.

Every example compares the destination, byte by byte, with a model in plain numpy, and the counter with what one would
count by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from railwire import (
    Pages,
    PeerLostError,
    RailwireError,
    ScatterTarget,
    StaleAddressError,
    TransferEngine,
    WriterFailed,
)
from railwire.testing import SimulatedFabric

NBYTES = 1 << 17
EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

wires = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "reorder": st.booleans(),
        "max_delay_us": st.sampled_from([0.0, 20.0, 300.0]),
        "completion_proves_landing": st.booleans(),
        "closing_fences": st.booleans(),
        "max_write_bytes": st.sampled_from([1 << 40, 5000]),
        "link_depth": st.sampled_from([2, 16, 256]),
    }
)
nic_counts = st.tuples(st.integers(1, 4), st.integers(1, 4))


class Pair:
    """Two engines on one fabric, with a region each; the far one starts as zeros."""

    def __init__(self, wire: dict[str, Any], counts: tuple[int, int] = (1, 1), nbytes: int = NBYTES) -> None:
        self.fabric = SimulatedFabric(**wire)
        self.near = TransferEngine(nics=[self.fabric.nic(f"n{i}") for i in range(counts[0])], liveness=0.5, name="near")
        self.far = TransferEngine(nics=[self.fabric.nic(f"f{i}") for i in range(counts[1])], liveness=0.5, name="far")
        self.peer = self.near.connect(self.far.address)
        self.source = self.near.register(np.random.default_rng(wire["seed"]).integers(1, 256, nbytes, dtype=np.uint8))
        self.target = self.far.register(np.zeros(nbytes, np.uint8))
        self.remote = self.target.descriptor

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.near.close(0.5)
        self.far.close(0.5)
        self.fabric.close()


# ---- writes and counts -----------------------------------------------------------------------------------------------
lengths = st.one_of(st.sampled_from([0, 1, 3, 4096, 16385, 65536]), st.integers(0, NBYTES // 2))


@EXAMPLES
@given(wires, nic_counts, st.lists(st.tuples(lengths, st.booleans()), min_size=1, max_size=12))
def test_writes(wire: dict[str, Any], counts: tuple[int, int], writes: list[tuple[int, bool]]) -> None:
    with Pair(wire, counts, sum(length for length, _ in writes) + 1) as pair:
        expected = np.zeros(pair.target.nbytes, np.uint8)
        transfers, at, arrivals = [], 0, 0
        for length, counted in writes:
            transfers.append(
                pair.near.write(
                    pair.source[at : at + length], pair.remote[at : at + length], imm=4 if counted else None
                )
            )
            expected[at : at + length] = pair.source.array[at : at + length]
            at += length
            arrivals += counted
        pair.far.counter(4).expect(arrivals, timeout=20).wait()
        for transfer in transfers:
            transfer.wait(20)
        assert np.array_equal(pair.target.array, expected)
        assert pair.far.counter(4).value == 0


@dataclass(frozen=True)
class Layout:
    """One side of a page list."""

    stride: int
    offset: int
    runs: tuple[int, int] | None

    def pages(self, indices: np.ndarray) -> Pages:
        return Pages(indices, self.stride, self.offset, self.runs)

    def addresses(self, index: int, page_bytes: int) -> np.ndarray:
        """Byte addresses of a page, in order: the model."""
        count, run_stride = self.runs or (1, 0)
        run = page_bytes // count
        begin = self.offset + index * self.stride
        return np.concatenate([np.arange(run) + begin + r * run_stride for r in range(count)]).astype(np.int64)

    def span(self, page_bytes: int) -> int:
        count, run_stride = self.runs or (1, 0)
        return (count - 1) * run_stride + page_bytes // count


@st.composite
def page_lists(draw: st.DrawFn) -> tuple[int, Layout, Layout, list[int], list[int]]:
    """Page bytes, the two layouts, and the two index lists; pages of one side never overlap."""
    runs = draw(st.sampled_from([1, 1, 2, 4, 24]))
    page_bytes = runs * draw(st.sampled_from([1, 8, 100, 512]))

    def layout() -> Layout:
        count = draw(st.sampled_from([1, runs]))
        gap = draw(st.sampled_from([0, 0, 5]))
        run_stride = page_bytes // count + gap
        whole = count * run_stride
        return Layout(
            whole + draw(st.sampled_from([0, 0, 3])),
            draw(st.integers(0, 50)),
            (count, run_stride) if count > 1 else None,
        )

    near, far = layout(), layout()
    most = min((NBYTES - side.offset - side.span(page_bytes)) // side.stride for side in (near, far))
    count = draw(st.integers(0, min(most, 60)))
    if draw(st.booleans()):
        start = draw(st.integers(0, most - count))
        return page_bytes, near, far, list(range(start, start + count)), list(range(start, start + count))
    take = draw(st.lists(st.integers(0, most - 1), min_size=count, max_size=count))
    put = draw(st.lists(st.integers(0, most - 1), min_size=count, max_size=count, unique=True))
    return page_bytes, near, far, take, put


@EXAMPLES
@given(wires, nic_counts, page_lists())
def test_page_lists(
    wire: dict[str, Any], counts: tuple[int, int], lists: tuple[int, Layout, Layout, list[int], list[int]]
) -> None:
    page_bytes, near, far, take, put = lists
    with Pair(wire, counts) as pair:
        expected = np.zeros(NBYTES, np.uint8)
        for a, b in zip(take, put, strict=True):
            expected[far.addresses(b, page_bytes)] = pair.source.array[near.addresses(a, page_bytes)]
        arrived = pair.far.counter(9).expect(len(take), timeout=20)
        pair.near.write_pages(
            pair.source,
            near.pages(np.array(take, np.int64)),
            pair.remote,
            far.pages(np.array(put, np.int64)),
            page_bytes,
            imm=9,
        ).wait(20)
        arrived.wait(20)
        assert np.array_equal(pair.target.array, expected)
        assert pair.far.counter(9).value == 0


@EXAMPLES
@given(wires, nic_counts, st.lists(st.integers(0, 3000), max_size=20))
def test_scatter_and_reads(wire: dict[str, Any], counts: tuple[int, int], sizes: list[int]) -> None:
    with Pair(wire, counts) as pair:
        group = pair.near.peer_group([pair.peer])
        targets, expected, at = [], np.zeros(NBYTES, np.uint8), 0
        for size in sizes:
            targets.append(ScatterTarget(2 * at, pair.remote[at : at + size]))
            expected[at : at + size] = pair.source.array[2 * at : 2 * at + size]
            at += size
        pair.near.scatter(group, pair.source, targets, imm=3).wait(20)
        pair.near.barrier(group, imm=3).wait(20)
        pair.far.counter(3).expect(len(sizes) + 1, timeout=20).wait()
        assert np.array_equal(pair.target.array, expected)
        back = pair.near.register(np.zeros(NBYTES, np.uint8))
        pair.near.read(pair.remote, back).wait(20)
        assert np.array_equal(back.array, expected)


# ---- failures --------------------------------------------------------------------------------------------------------
failures = st.sampled_from(["failed work requests", "broken links", "a NIC dies", "the peer freezes", "lost messages"])


@EXAMPLES
@given(wires, nic_counts, failures, st.integers(1, 30))
def test_failures_end_everything_and_never_lie(
    wire: dict[str, Any], counts: tuple[int, int], failure: str, rounds: int
) -> None:
    """Whatever breaks: all ends within the liveness time; what says `done` is there; a count that is reached means
    that all its bytes are there."""
    page_bytes, pages = 512, 64
    indices = Pages(np.arange(pages), page_bytes)
    with Pair(wire, counts, rounds * pages * page_bytes) as pair:
        if failure == "failed work requests":
            pair.fabric.set(write_failure_rate=0.01)
        if failure == "broken links":
            pair.fabric.set(link_break_rate=0.003)
        if failure == "lost messages":
            pair.fabric.set(message_loss_rate=0.3)
        transfers, expectations = [], []
        for i in range(rounds):
            begin, end = i * pages * page_bytes, (i + 1) * pages * page_bytes
            try:
                transfer = pair.near.write_pages(
                    pair.source[begin:end], indices, pair.remote[begin:end], indices, page_bytes, imm=100 + i
                )
            except PeerLostError:
                break
            except StaleAddressError:  # the same, once the engine has told of it
                assert pair.peer.state != "connected"
                break
            transfers.append(transfer)
            expectations.append(pair.far.counter(100 + i).expect(pages, timeout=30))
            if i == rounds // 2:
                if failure == "a NIC dies":
                    pair.fabric.kill("n0")
                if failure == "the peer freezes":
                    for number in range(counts[1]):
                        pair.fabric.freeze(f"f{number}")
        outcomes = []
        for i, transfer in enumerate(transfers):
            try:
                transfer.wait(20)
                outcomes.append("done")
                begin, end = i * pages * page_bytes, (i + 1) * pages * page_bytes
                assert np.array_equal(pair.target.array[begin:end], pair.source.array[begin:end])
            except RailwireError as error:
                assert not isinstance(error, TimeoutError), error
                outcomes.append(type(error).__name__)
        for number in range(counts[1]):
            pair.fabric.thaw(f"f{number}")
        for i, (expectation, outcome) in enumerate(zip(expectations, outcomes, strict=True)):
            begin, end = i * pages * page_bytes, (i + 1) * pages * page_bytes
            try:
                expectation.wait(20)
                assert np.array_equal(pair.target.array[begin:end], pair.source.array[begin:end])
            except (WriterFailed, PeerLostError):
                assert outcome != "done" or pair.peer.state != "connected" or failure == "the peer freezes"
        if failure == "lost messages":
            assert set(outcomes) <= {"done"} or pair.peer.state != "connected"


@EXAMPLES
@given(wires, st.integers(1, 5), st.sampled_from(["revoke", "close"]))
def test_nothing_lands_after_a_fence(wire: dict[str, Any], writes: int, fence: str) -> None:
    """The receiver fences in the middle of writes, and uses the memory for something else at once."""
    with Pair(wire, (2, 2)) as pair:
        transfers = [pair.near.write(pair.source, pair.remote, imm=1) for _ in range(writes)]
        try:
            if fence == "revoke":
                pair.target.revoke()
            else:
                for peer in pair.far.peers:
                    peer.close()
        except RailwireError as error:
            pytest.fail(f"a peer that lives has to confirm: {error}")
        pair.target.array[:] = 0
        for transfer in transfers:
            try:
                transfer.wait(20)
            except RailwireError:
                pass
        assert not pair.target.array.any()


@EXAMPLES
@given(wires, st.integers(0, 20))
def test_cancelled_transfers_are_quiet(wire: dict[str, Any], after: int) -> None:
    """After cancel() has ended, the source may be used again: what lands later would be seen."""
    with Pair(wire, (2, 1)) as pair:
        pages = Pages(np.arange(NBYTES // 256), 256)
        transfer = pair.near.write_pages(pair.source, pages, pair.remote, pages, 256, imm=1)
        for _ in range(after):
            transfer.done()
        transfer.cancel()
        try:
            transfer.wait(20)
        except RailwireError as error:
            assert type(error).__name__ == "TransferCancelled"
            assert not transfer.may_still_land
        before = pair.target.array.copy()
        original = pair.source.array.copy()
        pair.source.array[:] = 0
        pair.near.barrier(pair.near.peer_group([pair.peer]), imm=2).wait(20)
        assert np.array_equal(pair.target.array, before)
        landed = before != 0
        assert np.array_equal(before[landed], original[landed])


@EXAMPLES
@given(wires, st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=10))
def test_expectations_consume_in_order(wire: dict[str, Any], counts: list[tuple[int, bool]]) -> None:
    """Arrivals before and after expect() count alike, and each expectation takes its own."""
    with Pair(wire, (2, 3)) as pair:
        counter = pair.far.counter(8)
        waiting = []
        for count, first in counts:
            if first:
                waiting.append(counter.expect(count, timeout=20))
            for _ in range(count):
                pair.near.write(pair.source[:40000], pair.remote[:40000], imm=8)
            if not first:
                waiting.append(counter.expect(count, timeout=20))
        for expectation in waiting:
            expectation.wait(20)
        assert counter.value == 0


@pytest.mark.parametrize("pages", [1, 100_000])
def test_one_and_a_hundred_thousand_pages(pages: int, rng: np.random.Generator) -> None:
    with Pair({"seed": 1}, (2, 3), pages * 16) as pair:
        take, put = rng.permutation(pages), rng.permutation(pages)
        pair.near.write_pages(pair.source, Pages(take, 16), pair.remote, Pages(put, 16), 16, imm=1).wait(30)
        pair.far.counter(1).expect(pages).wait(30)
        expected = np.zeros((pages, 16), np.uint8)
        expected[put] = pair.source.array.reshape(pages, 16)[take]
        assert np.array_equal(pair.target.array.reshape(pages, 16), expected)
