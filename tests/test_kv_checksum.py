"""Checksums: the same bytes have the same sum wherever they lie; anything else has another."""

from __future__ import annotations

import statistics
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_machines import Memory, blank, expected

from railwire.kvcache.geometry.builders import mla_instance, paged_instance
from railwire.kvcache.geometry.checksum import destination_sums, held_shares, page_sums, source_sums
from railwire.kvcache.geometry.layout import InstanceLayout, LayoutError
from railwire.kvcache.geometry.plan import plan
from railwire.kvcache.geometry.share import Share

MODEL: dict[str, Any] = {"model": "m", "num_blocks": 8, "block_tokens": 4, "kv_heads": 4, "head_bytes": 16,
                         "stages": [range(3)]}  # fmt: skip


def both(source: InstanceLayout, destination: InstanceLayout, end: int, first: int = 0) -> None:
    """What the source ranks send adds up to what each destination rank holds."""
    tables = [[5, 0, 7, 2, 3, 1, 6, 4], [1, 6, 3, 4, 2, 0, 7, 5]]
    memories = [expected(rank, tables[0], first, end) for rank in source.ranks]
    for index, rank in enumerate(destination.ranks):
        plans = plan(source, rank, index)
        unit = next(made.unit_tokens for made in plans if made)
        total: Any = 0
        for made, layout, memory in zip(plans, source.ranks, memories, strict=True):
            if made is not None:
                total = total + source_sums(memory, layout, made, tables[0], first, end)
        have = destination_sums(expected(rank, tables[1], first, end), rank, unit, tables[1], first, end)
        assert have.dtype == np.uint64 and len(have) == -(-end // unit) - first // unit
        assert np.array_equal(total, have)


@given(
    p=st.sampled_from([1, 2, 4, 8]),
    d=st.sampled_from([1, 2, 4, 8]),
    heads=st.sampled_from([2, 4]),
    head_bytes=st.sampled_from([1, 8, 12, 16]),
    orders=st.tuples(st.sampled_from(["HND", "NHD"]), st.sampled_from(["HND", "NHD"])),
    kinds=st.tuples(st.sampled_from(["leading", "last"]), st.sampled_from(["separate", "block"])),
    blocks=st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4])),
    end=st.integers(4, 16),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_sums_of_what_was_sent_add_up(
    p: int, d: int, heads: int, head_bytes: int, orders: Any, kinds: Any, blocks: Any, end: int
) -> None:
    options = {"model": "m", "num_blocks": 8, "kv_heads": heads, "head_bytes": head_bytes, "scale_bytes": 4,
               "indexer_bytes": 9}  # fmt: skip
    both(
        paged_instance(
            stages=[range(1), range(1, 3)], tp_size=p, order=orders[0], kv=kinds[0], block_tokens=blocks[0], **options
        ),
        paged_instance(stages=[range(3)], tp_size=d, order=orders[1], kv=kinds[1], block_tokens=blocks[1], **options),
        end,
        first=0 if end % 3 else 4 * (end // 8),
    )


def test_mla_sums_add_up() -> None:
    options: dict[str, Any] = {"model": "m", "num_blocks": 8, "latent_bytes": 24, "indexer_bytes": 4}
    both(
        mla_instance(stages=[range(2)], tp_size=4, block_tokens=4, **options),
        mla_instance(stages=[range(1), range(1, 2)], tp_size=2, block_tokens=8, placement="cross_layer", **options),
        13,
    )


def setup(tokens: int = 16, **changes: Any) -> tuple[Any, Memory, list[int]]:
    (layout,) = paged_instance(**{**MODEL, "placement": "one", **changes}).ranks
    table = [3, 1, 6, 0]
    return layout, expected(layout, table, 0, tokens), table


def sums(layout: Any, memory: Memory, table: list[int], first: int = 0, end: int = 16, **options: Any) -> np.ndarray:
    return destination_sums(memory, layout, layout.block_tokens, table, first, end, **options)


@pytest.mark.parametrize("head_bytes", [1, 4, 16, 20])
def test_every_flipped_byte_is_noticed_and_located(head_bytes: int) -> None:
    layout, memory, table = setup(head_bytes=head_bytes, stages=[range(2)], kv_heads=2)
    right = sums(layout, memory, table)
    region = memory[0]
    used = np.flatnonzero(expected(layout, table, 0, 16)[0] != blank(layout)[0])
    for at in np.random.choice(used, 200).tolist():
        for bit in (0, 7):
            region[at] ^= 1 << bit
            wrong = np.flatnonzero(sums(layout, memory, table) != right)
            assert len(wrong) == 1
            region[at] ^= 1 << bit
    assert np.array_equal(sums(layout, memory, table), right)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_swapped_elements_are_noticed(data: st.DataObject) -> None:
    """Two (layer, component, head, token) that differ exchange their bytes, be it by a single bit."""
    layout, memory, table = setup(stages=[range(2)], kv_heads=2)
    for region in memory:
        region[:] = data.draw(st.sampled_from([0, 255]))

    def element() -> Any:
        layer = data.draw(st.sampled_from(layout.layers))
        component = data.draw(st.integers(0, 1))
        head, token = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 15))
        s = layer.storages[component]
        at = s.offset + table[token // 4] * s.page_stride + token % 4 * s.token_stride + head * s.head_stride
        return memory[s.region][at : at + 16]

    one, other = element(), element()
    one[data.draw(st.integers(0, 15))] ^= 1 << data.draw(st.integers(0, 7))
    before = sums(layout, memory, table)
    saved = one.copy()
    one[:] = other
    other[:] = saved
    changed = one.ctypes.data != other.ctypes.data
    assert np.array_equal(sums(layout, memory, table), before) != changed


def test_swapped_pages_and_stale_pages_are_noticed() -> None:
    layout, memory, table = setup()
    right = sums(layout, memory, table)
    assert (sums(layout, memory, [1, 3, 6, 0]) != right).tolist() == [True, True, False, False]
    assert (sums(layout, memory, [3, 1, 7, 0]) != right).tolist() == [False, False, True, False]
    # The same pages one block later in the sequence are other tokens.
    assert not (sums(layout, memory, [3, 3, 1, 6])[1:] == right[:3]).any()
    # Untouched memory is not the sum of nothing.
    assert (sums(layout, blank(layout), table) != 0).all()
    assert (sums(layout, [np.zeros_like(region) for region in memory], table) != 0).all()


def test_ranges_layers_and_tables() -> None:
    layout, memory, table = setup()
    right = sums(layout, memory, table)
    assert np.array_equal(sums(layout, memory, table, 4, 16), right[1:])
    assert np.array_equal(sums(layout, memory, table[1:], 4, 16, first_block=1), right[1:])
    assert np.array_equal(sums(layout, memory, table, 0, 12), right[:3])
    assert len(sums(layout, memory, table, 8, 8)) == 0
    by_layer = [sums(layout, memory, table, layers=[layer]) for layer in range(3)]
    assert np.array_equal(np.add.reduce(by_layer), right)
    # Units of half a block: two of them add up to the block.
    halves = destination_sums(memory, layout, 2, table, 0, 16)
    assert np.array_equal(halves.reshape(4, 2).sum(axis=1, dtype=np.uint64), right)
    # A last unit counts up to the last token.
    part = sums(layout, memory, table, 0, 14)
    s = layout.layers[0].storages[0]
    memory[0][s.offset + table[3] * s.page_stride + 2 * s.token_stride] ^= 1
    assert np.array_equal(sums(layout, memory, table, 0, 14), part)
    assert not np.array_equal(sums(layout, memory, table), right)


def test_regions_as_tensors_of_other_types() -> None:
    layout, memory, table = setup()
    assert np.array_equal(sums(layout, [memory[0].view(np.uint16)], table), sums(layout, memory, table))
    assert np.array_equal(sums(layout, [bytearray(memory[0])], table), sums(layout, memory, table))


def test_unaligned_storages() -> None:
    """A region that begins at any address."""
    layout, memory, table = setup()
    moved = np.zeros(memory[0].nbytes + 3, dtype=np.uint8)[3:]
    moved[:] = memory[0]
    assert np.array_equal(sums(layout, [moved], table), sums(layout, memory, table))


def test_bad_input() -> None:
    layout, memory, table = setup()
    with pytest.raises(ValueError, match="multiple of 4"):
        sums(layout, memory, table, 2, 8)
    with pytest.raises(IndexError, match="the table has"):
        sums(layout, memory, table, 0, 17)
    with pytest.raises(IndexError, match="8 blocks"):
        sums(layout, memory, [0, 8], 0, 8)
    with pytest.raises(LayoutError, match="region"):
        sums(layout, [memory[0][:-1]], table)
    with pytest.raises(LayoutError, match="0 regions"):
        sums(layout, [], table)
    with pytest.raises(LayoutError, match="does not hold"):
        page_sums(memory, layout, 4, {0: (Share(0, 3, 2),)}, table, 0, 16)
    other = msgspec.structs.replace(layout, components=layout.components[::-1])
    assert held_shares(other) == held_shares(layout)  # by name, whatever the order


@pytest.mark.parametrize(
    ("order", "head_bytes", "block_tokens"), [("HND", 128, 16), ("HND", 256, 64), ("NHD", 256, 16)]
)
def test_speed(order: Any, head_bytes: int, block_tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    """In processor time: how long somebody else had the core is not what is measured."""
    (layout,) = paged_instance(
        model="m", stages=[range(4)], num_blocks=8192 // block_tokens, block_tokens=block_tokens, kv_heads=8,
        head_bytes=head_bytes, order=order,
    ).ranks  # fmt: skip
    memory = [np.random.randint(0, 256, nbytes, dtype=np.uint8) for nbytes in layout.region_bytes]
    table = np.random.permutation(layout.num_blocks)
    taken = []
    for _ in range(5):
        began = time.thread_time()
        destination_sums(memory, layout, block_tokens, table, 0, 8192)
        taken.append(time.thread_time() - began)
    speed = sum(layout.region_bytes) / statistics.median(taken) / 1e9
    with capsys.disabled():
        print(f"\n{order}, heads of {head_bytes} bytes, blocks of {block_tokens} tokens: checksums at {speed:.1f} GB/s")
    assert speed > 0.3
