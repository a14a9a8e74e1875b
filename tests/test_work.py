"""How requests are cut into work requests, against a plain model: merging, striping, fragments, and the bytes.

The simulated NIC counts what is posted on it. The model says how many work requests that must be; a numpy copy says
which bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from railwire import MemoryRegion, Pages, RemoteRegion, TransferEngine
from railwire.testing import SimulatedFabric

MERGE_PAGES = 64  # an immediate's weight counts at most 64 arrivals
PARTS = 16  # ... and an arrival has 16 units
STRIPE = 32 * 1024  # a write is not striped into less
MERGE_BYTES = 1 << 20
LENGTH = 1 << 21
EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


class Bed:
    """Two engines with ``links`` NICs each, that post nothing but what they are told."""

    def __init__(self, links: int, max_write_bytes: int = 1 << 40) -> None:
        self.fabric = SimulatedFabric(max_write_bytes=max_write_bytes)
        self.near = TransferEngine(nics=[self.fabric.nic(f"n{i}") for i in range(links)], name="near")
        self.far = TransferEngine(nics=[self.fabric.nic(f"f{i}") for i in range(links)], name="far")
        self.near.connect(self.far.address)
        self.source: MemoryRegion = self.near.register(np.random.default_rng(1).integers(1, 256, LENGTH, np.uint8))
        self.target: MemoryRegion = self.far.register(np.zeros(LENGTH, np.uint8))
        self.remote: RemoteRegion = self.target.descriptor

    def posted(self) -> int:
        return self.fabric.audit()["posted"]

    def close(self) -> None:
        self.near.close(0.5)
        self.far.close(0.5)
        self.fabric.close()


@pytest.fixture(scope="module")
def one_link() -> Iterator[Bed]:
    bed = Bed(1)
    yield bed
    bed.close()


def model_merged(src: list[int], dst: list[int], page_bytes: int) -> int:
    """Work requests for a list of dense pages on one link."""
    limit = max(1, min(MERGE_PAGES, MERGE_BYTES // page_bytes))
    requests, length = 0, 0
    for i in range(len(src)):
        follows = i > 0 and src[i] == src[i - 1] + 1 and dst[i] == dst[i - 1] + 1
        if follows and length < limit:
            length += 1
        else:
            requests, length = requests + 1, 1
    return requests


@st.composite
def page_lists(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """A page size and two lists without doubles, with contiguous stretches in them."""
    page_bytes = draw(st.sampled_from([16, 512, 4096, 32768]))
    pages = min(LENGTH // page_bytes, 256)
    order = np.random.default_rng(draw(st.integers(0, 2**31))).permutation(pages // 8)
    stretches = [range(8 * int(i), 8 * int(i) + draw(st.integers(1, 8))) for i in order[: draw(st.integers(1, 12))]]
    src = [page for stretch in stretches for page in stretch]
    dst = draw(st.sampled_from([src, src[::-1], sorted(src)]))
    return page_bytes, src, list(dst)


@EXAMPLES
@given(lists=page_lists())
def test_merging(one_link: Bed, lists: tuple[int, list[int], list[int]]) -> None:
    page_bytes, src, dst = lists
    bed = one_link
    bed.target.array[:] = 0
    before = bed.posted()
    bed.near.write_pages(
        bed.source, Pages(src, page_bytes), bed.remote, Pages(dst, page_bytes), page_bytes, imm=1
    ).wait(9)
    assert bed.posted() - before == model_merged(src, dst, page_bytes)
    bed.far.counter(1).expect(len(src)).wait(9)  # one page is one arrival, merged or not
    assert bed.far.counter(1).value == 0
    expected = np.zeros(LENGTH, np.uint8)
    for s, d in zip(src, dst, strict=True):
        expected[d * page_bytes : (d + 1) * page_bytes] = bed.source.array[s * page_bytes : (s + 1) * page_bytes]
    assert np.array_equal(bed.target.array, expected)


@EXAMPLES
@given(runs=st.integers(2, 40), pages=st.integers(1, 5), dense=st.booleans())
def test_runs_are_fragments(one_link: Bed, runs: int, pages: int, dense: bool) -> None:
    """A page of k separate runs is k work requests; where they touch on both sides, one. More than 16 weigh nothing,
    and an immediate of their own follows."""
    bed, run = one_link, 64
    stride = run if dense else 3 * run
    before = bed.posted()
    layout = Pages(list(range(0, 2 * pages, 2)), 40 * 3 * run, runs=(runs, stride))
    bed.near.write_pages(bed.source, layout, bed.remote, layout, runs * run, imm=2).wait(9)
    bed.far.counter(2).expect(pages).wait(9)
    assert bed.far.counter(2).value == 0
    fragments = pages if dense else pages * runs
    extra = bed.posted() - before - fragments
    assert extra == 0 if dense or runs <= PARTS else extra >= 1


@pytest.mark.parametrize("links", [1, 2, 4])
@pytest.mark.parametrize("max_write_bytes", [1 << 40, 100_000])
def test_striping(links: int, max_write_bytes: int) -> None:
    bed = Bed(links, max_write_bytes)
    rng = np.random.default_rng(links)
    try:
        for length in [0, 1, 3, 16385, STRIPE, 2 * STRIPE, 100_000, 100_001, LENGTH, *rng.integers(1, LENGTH, 20)]:
            length = int(length)
            before = bed.posted()
            bed.near.write(bed.source[:length], bed.remote[:length], imm=3).wait(9)
            requests = bed.posted() - before
            least = max(1, ceil(length / max_write_bytes))
            if links == 1:
                assert requests == least or least > PARTS
            elif least <= PARTS:
                assert least <= requests <= max(least, min(PARTS, length // STRIPE), 1)
                assert requests >= min(links, length // STRIPE)  # every link has its share of a long write
            bed.far.counter(3).expect(1).wait(9)  # one write is one arrival, however it was cut
            assert bed.far.counter(3).value == 0
            assert np.array_equal(bed.target.array[:length], bed.source.array[:length])
    finally:
        bed.close()
