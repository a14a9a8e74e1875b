"""Plans: executed literally against a model of the bytes, and proofs that notice every kind of damage."""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from kv_machines import blank, execute, expected, senders, small_rank

from railwire import Pages, TransferEngine
from railwire.kvcache.geometry.builders import mla_instance, paged_instance
from railwire.kvcache.geometry.layout import InstanceLayout, LayerStorage, LayoutError, RankLayout, Storage
from railwire.kvcache.geometry.pages import Addressing, Step
from railwire.kvcache.geometry.plan import RankPlan, plan, prove
from railwire.testing import SimulatedFabric

# `make test-slow` draws more.
DRAWN = int(os.environ.get("RAILWIRE_PLAN_EXAMPLES", 150))
LLAMA70B: dict[str, Any] = {
    "model": "llama", "num_blocks": 2000, "block_tokens": 16, "kv_heads": 8, "head_bytes": 256, "stages": [range(80)]
}  # fmt: skip


def steps_of(made: RankPlan | None, layer: int = 0) -> tuple[Step, ...]:
    assert made is not None
    return made.steps[layer]


# ---- every shape against every other ---------------------------------------------------------------------------------
def split(layers: int, data: st.DataObject) -> list[range]:
    cuts = sorted({0, layers, *data.draw(st.sets(st.integers(0, layers), max_size=2))})
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    common = {"model": "m", "indexer_bytes": draw(st.sampled_from([0, 0, 5]))}
    if draw(st.integers(0, 3)) == 0:
        return {"mla": True, **common, "latent_bytes": draw(st.sampled_from([1, 12]))}
    return {
        "mla": False, **common,
        "kv_heads": draw(st.sampled_from([1, 2, 3, 4, 6])), "head_bytes": draw(st.integers(1, 9)),
        "scale_bytes": draw(st.sampled_from([0, 0, 4])),
    }  # fmt: skip


@st.composite
def instances(draw: st.DrawFn, model: dict[str, Any], layers: int) -> InstanceLayout:
    data = draw(st.data())
    options = {key: value for key, value in model.items() if key != "mla"}
    options |= {
        "stages": split(layers, data),
        "num_blocks": draw(st.integers(10, 14)),
        "block_tokens": draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12])),
        "placement": draw(st.sampled_from(["tensors", "one", "cross_layer"])),
    }
    if model["mla"]:
        return mla_instance(tp_size=draw(st.integers(1, 4)), **options)
    heads = model["kv_heads"]
    sizes = [n for n in (1, 2, 3, 4, 6, 8) if heads % n == 0 or n % heads == 0]
    kinds = ["block", "last"] + (["separate", "leading"] if options["placement"] != "cross_layer" else [])
    return paged_instance(
        tp_size=draw(st.sampled_from(sizes)), kv=draw(st.sampled_from(kinds)),
        order=draw(st.sampled_from(["HND", "NHD"])), **options,
    )  # fmt: skip


@st.composite
def spaced(draw: st.DrawFn, instance: InstanceLayout) -> InstanceLayout:
    """The same with room between tokens, heads and blocks (views of larger storages), and components turned round."""
    factor, shift, turn = draw(st.integers(1, 3)), draw(st.integers(0, 7)), draw(st.sampled_from([1, -1]))
    padding = draw(st.integers(0, 5))  # of each block: units then do not divide blocks

    def storage(s: Storage, pad: int) -> Storage:
        return Storage(s.region, s.offset * factor + shift, s.page_stride * factor + pad, s.token_stride * factor,
                       s.head_stride * factor, s.first_head, s.heads)  # fmt: skip

    def rank(r: RankLayout, pad: int) -> RankLayout:
        return RankLayout(
            r.model, r.block_tokens, r.num_blocks, r.components[::turn],
            tuple(LayerStorage(x.layer, tuple(storage(s, pad) for s in x.storages[::turn])) for x in r.layers),
            tuple(nbytes * factor + shift + pad * r.num_blocks for nbytes in r.region_bytes),
        )  # fmt: skip

    try:
        return InstanceLayout(tuple(rank(r, padding) for r in instance.ranks))
    except LayoutError:  # several tensors in a region: blocks of one would run into the next
        return InstanceLayout(tuple(rank(r, 0) for r in instance.ranks))


@st.composite
def irregular(draw: st.DrawFn, instance: InstanceLayout) -> InstanceLayout:
    """Every layer and component of every rank narrowed to some of its heads, or none."""

    def storage(s: Storage) -> Storage:
        skip = draw(st.integers(0, 2))
        heads = s.heads - skip - draw(st.sampled_from([0, 0, 1, 2, s.heads - skip]))
        return msgspec.structs.replace(
            s, offset=s.offset + skip * s.head_stride if heads else 0, first_head=s.first_head + skip, heads=heads
        )

    def rank(r: RankLayout) -> RankLayout:
        layers = tuple(LayerStorage(x.layer, tuple(storage(s) for s in x.storages)) for x in r.layers)
        return msgspec.structs.replace(r, layers=layers)

    return InstanceLayout(tuple(rank(r) for r in instance.ranks))


@given(data=st.data())
@settings(max_examples=DRAWN, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_every_byte_arrives_once(data: st.DataObject) -> None:
    model = data.draw(models())
    layers = data.draw(st.integers(1, 3))
    source = data.draw(instances(model, layers))
    destination = data.draw(instances(model, layers))
    if data.draw(st.booleans()):
        source = data.draw(spaced(source))
    if data.draw(st.booleans()):
        destination = data.draw(spaced(destination))
    p, d = source.ranks[0].block_tokens, destination.ranks[0].block_tokens
    unit = int(np.gcd(p, d))
    first = unit * data.draw(st.integers(0, 6))
    end = first + data.draw(st.integers(0, 20))
    whole = -(-end // unit) * unit  # a last unit comes as it is
    longest = min(p * source.ranks[0].num_blocks, d * destination.ranks[0].num_blocks)
    assume(whole <= longest)
    for index, rank in enumerate(destination.ranks):
        plans = plan(source, rank, index)
        moves_all(source, rank, plans, first, end, data)


def moves_all(
    source: InstanceLayout,
    destination: RankLayout,
    plans: tuple[RankPlan | None, ...],
    first: int,
    end: int,
    data: st.DataObject,
) -> None:
    """Executes a plan; compares every byte of the destination and of the sources, and the counts."""
    prove(source, destination, plans)
    unit = int(np.gcd(source.ranks[0].block_tokens, destination.block_tokens))
    whole = -(-end // unit) * unit
    # Different tables on both sides; all ranks of an instance share one.
    src_table = data.draw(st.permutations(range(min(r.num_blocks for r in source.ranks))))
    dst_table = data.draw(st.permutations(range(destination.num_blocks)))
    memories = [expected(layout, src_table, first, whole) for layout in source.ranks]
    before = [[region.copy() for region in memory] for memory in memories]
    memory = blank(destination)
    for made, sent in zip(plans, memories, strict=True):
        if made is not None:
            assert made.unit_tokens == unit
            arrivals, nbytes = execute(made, sent, memory, src_table, dst_table, first, end)
            assert (arrivals, nbytes) == (made.arrivals(first, end), made.nbytes(first, end))
    for got, want in zip(memory, expected(destination, dst_table, first, whole), strict=True):
        assert np.array_equal(got, want)
    total = sum(
        s.heads * c.head_bytes
        for x in destination.layers
        for c, s in zip(destination.components, x.storages, strict=True)
    )
    assert sum(made.nbytes(first, end) for made in plans if made) == total * (whole - first if end > first else 0)
    for memory, was in zip(memories, before, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(memory, was, strict=True))


@given(data=st.data())
@settings(max_examples=DRAWN, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_irregular_heads_arrive_once_or_are_refused(data: st.DataObject) -> None:
    """Ranks that hold any heads, differently per layer and component: what is there arrives, what is not is named."""
    options = {"model": "m", "kv_heads": 5, "head_bytes": 3, "num_blocks": 6, "stages": [range(2)], "scale_bytes": 2}
    # Not kv="last": there K and V of different heads would interleave in no regular way, which layouts refuse.
    orders, kinds = st.sampled_from(["HND", "NHD"]), st.sampled_from(["separate", "leading", "block"])
    sides = []
    for count in (data.draw(st.integers(1, 8)), 1):
        whole = paged_instance(
            **options, order=data.draw(orders), kv=data.draw(kinds), block_tokens=data.draw(st.sampled_from([2, 4]))
        )
        sides.append(data.draw(irregular(InstanceLayout(whole.ranks * count))))
    source, (destination,) = sides[0], sides[1].ranks
    missing = False
    for layer in destination.shapes:
        for wanted, *offers in zip(
            destination.storages(layer), *(r.storages(layer) for r in source.ranks), strict=True
        ):
            heads = set(range(wanted.first_head, wanted.first_head + wanted.heads))
            missing |= bool(heads.difference(*(range(o.first_head, o.first_head + o.heads) for o in offers)))
    try:
        plans = plan(source, destination, data.draw(st.integers(0, 3)))
    except LayoutError as error:
        assert missing and "held by no source rank" in str(error)
        event("refused")
        return
    assert not missing
    moves_all(source, destination, plans, 0, data.draw(st.integers(0, 9)), data)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ({"tp_size": 4, "order": "HND", "kv": "last"}, {"tp_size": 2, "order": "HND", "kv": "last"}),
        ({"tp_size": 4, "order": "NHD", "kv": "leading"}, {"tp_size": 2, "order": "NHD", "kv": "block"}),
        ({"tp_size": 1, "order": "HND", "block_tokens": 6}, {"tp_size": 8, "order": "NHD", "placement": "one"}),
        ({"tp_size": 8, "kv": "block", "placement": "cross_layer"}, {"tp_size": 1, "order": "HND"}),
    ],
)
def test_the_engine_carries_a_plan_out(source: dict[str, Any], destination: dict[str, Any]) -> None:
    """``Pages`` made of the steps mean to the engine what they mean to the model, and arrivals count as predicted."""
    options = {"model": "m", "stages": [range(1), range(1, 3)], "num_blocks": 16, "block_tokens": 4, "kv_heads": 4,
               "head_bytes": 24, "scale_bytes": 4}  # fmt: skip
    instance = paged_instance(**{**options, **source})
    first, end = 12, 30
    src_table, dst_table = list(range(15, 0, -1)), [5, 2, 3, 4, 0, 9, 8, 7, 6, 11]
    for index, layout in enumerate(paged_instance(**{**options, **destination}).ranks):
        plans = plan(instance, layout, index)
        whole = -(-end // next(p.unit_tokens for p in plans if p)) * next(p.unit_tokens for p in plans if p)
        memory = blank(layout)
        with ExitStack() as stack:
            fabric = stack.enter_context(SimulatedFabric(reorder=True))
            decoder = stack.enter_context(TransferEngine(nics=[fabric.nic("d")]))
            regions = [decoder.register(region) for region in memory]
            expectation = decoder.counter(9).expect(sum(p.arrivals(first, end) for p in plans if p), timeout=20)
            for rank, made in enumerate(plans):
                if made is None:
                    continue
                prefiller = stack.enter_context(TransferEngine(nics=[fabric.nic(f"p{rank}")]))
                prefiller.connect(decoder.address)
                held = expected(instance.ranks[rank], src_table, first, whole)
                sent = [prefiller.register(region) for region in held]
                for step in itertools.chain(*made.steps.values()):
                    prefiller.write_pages(
                        sent[step.src_region],
                        pages(step.src, made.src_indices(step, src_table, first, end)),
                        regions[step.dst_region].descriptor,
                        pages(step.dst, made.dst_indices(step, dst_table, first, end)),
                        step.unit_bytes,
                        imm=9,
                    )
            expectation.wait(20)
        for got, want in zip(memory, expected(layout, dst_table, first, whole), strict=True):
            assert np.array_equal(got, want)


def pages(side: Addressing, indices: np.ndarray) -> Pages:
    return Pages(indices, side.unit_stride, side.offset, side.runs)


# ---- the shape of the steps ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize(("kv", "steps"), [("separate", 2), ("leading", 2), ("block", 1), ("last", 1)])
def test_equal_layouts_move_whole_pages(order: Any, kv: Any, steps: int) -> None:
    instance = paged_instance(**LLAMA70B, tp_size=4, order=order, kv=kv)
    plans = plan(instance, instance.ranks[2], 2)
    assert senders(plans) == [2]
    made = plans[2]
    assert made is not None and all(len(made.steps[layer]) == steps for layer in range(80))
    page = 2 * 2 * 16 * 256
    for step in steps_of(made):
        assert step.src.runs == step.dst.runs == (1, 0)
        assert step.src.block_step == step.dst.block_step == 1
        assert step.unit_bytes == page // steps == step.src.unit_stride  # neighbouring pages can share a work request
    assert made.nbytes(0, 17) == 2 * 80 * page


@pytest.mark.parametrize(("p", "d"), [(8, 4), (4, 8), (2, 8)])
def test_other_tensor_parallelism_hnd_is_contiguous(p: int, d: int) -> None:
    for kv, steps in (("separate", 2), ("block", 2), ("last", 1)):
        source = paged_instance(**LLAMA70B, tp_size=p, kv=kv)
        destination = paged_instance(**LLAMA70B, tp_size=d, kv=kv)
        for index, rank in enumerate(destination.ranks):
            plans = plan(source, rank, index)
            assert len(senders(plans)) == max(1, p // d)
            for sender in senders(plans):
                assert len(steps_of(plans[sender])) == steps
                assert all(step.src.runs == step.dst.runs == (1, 0) for step in steps_of(plans[sender]))


def test_other_tensor_parallelism_nhd_is_a_run_per_token() -> None:
    source = paged_instance(**LLAMA70B, tp_size=8, order="NHD", kv="last")
    destination = paged_instance(**LLAMA70B, tp_size=4, order="NHD", kv="last")
    plans = plan(source, destination.ranks[1], 1)
    assert senders(plans) == [2, 3]
    (step,) = steps_of(plans[3])
    assert step.src.runs == (1, 0) and step.dst.runs == (16, 2 * 512)
    assert step.dst.offset == 512 and step.unit_bytes == 16 * 512


def test_other_order_expands_the_smaller_dimension() -> None:
    options = {**LLAMA70B, "stages": [range(1)]}
    source = paged_instance(**options, tp_size=4, order="HND", kv="last")
    destination = paged_instance(**options, tp_size=4, order="NHD", kv="last")
    steps = steps_of(plan(source, destination.ranks[0], 0)[0])
    assert len(steps) == 2  # heads of a rank
    assert {step.src.runs for step in steps} == {(1, 0)} and {step.dst.runs for step in steps} == {(16, 1024)}


def test_different_block_sizes() -> None:
    source = paged_instance(**{**LLAMA70B, "block_tokens": 16}, tp_size=2, kv="block")
    destination = paged_instance(**{**LLAMA70B, "block_tokens": 24}, tp_size=2, kv="block")
    made = plan(source, destination.ranks[0], 0)[0]
    assert made is not None and made.unit_tokens == 8
    for step in steps_of(made):
        # 4 heads: each has the 8 tokens of a unit in a row.
        assert step.src.runs == (4, 16 * 256) and step.dst.runs == (4, 24 * 256) and step.unit_bytes == 4 * 8 * 256
    assert made.arrivals(8, 41) == 5 * 80 * 2
    step = steps_of(made)[0]
    table = [5, 7, 0]
    offsets = made.src_indices(step, table, 8, 41) * step.src.unit_stride
    page, unit = 2 * 4 * 16 * 256, 8 * 256
    assert offsets.tolist() == [5 * page + unit, 7 * page, 7 * page + unit, 0, unit]
    offsets = made.dst_indices(step, [9, 3], 8, 41) * step.dst.unit_stride
    page = 2 * 4 * 24 * 256
    assert offsets.tolist() == [9 * page + unit, 9 * page + 2 * unit, 3 * page, 3 * page + unit, 3 * page + 2 * unit]


def test_cross_layer_storage() -> None:
    options = {**LLAMA70B, "num_blocks": 100}
    source = paged_instance(**options, tp_size=8, kv="block", placement="cross_layer")
    destination = paged_instance(**options, tp_size=8, kv="block", placement="tensors")
    made = plan(source, destination.ranks[3], 3)[3]
    (step,) = steps_of(made, 2)
    page = 2 * 16 * 256
    assert step.src.unit_stride == 80 * page and step.src.offset == 2 * page and step.src_region == 0
    assert step.dst.unit_stride == page and step.dst.offset == 0 and step.dst_region == 2 and step.unit_bytes == page


# ---- replicas --------------------------------------------------------------------------------------------------------
MLA: dict[str, Any] = {
    "model": "v3", "num_blocks": 50, "block_tokens": 64, "latent_bytes": 1152, "indexer_bytes": 132,
    "stages": [range(3)],
}  # fmt: skip


@pytest.mark.parametrize(("p", "d"), [(8, 8), (8, 4), (2, 8), (1, 4), (4, 1)])
def test_mla_reaches_every_rank_once_and_spreads(p: int, d: int) -> None:
    source, destination = mla_instance(**MLA, tp_size=p), mla_instance(**MLA, tp_size=d)
    used = [senders(plan(source, rank, index)) for index, rank in enumerate(destination.ranks)]
    assert all(len(ranks) == 1 for ranks in used)  # latent and indexer from the same rank
    load = np.bincount([ranks[0] for ranks in used], minlength=p)
    assert load.max() <= -(-d // p)


def test_replicated_gqa_heads_spread() -> None:
    options = {**LLAMA70B, "kv_heads": 2, "stages": [range(2)]}
    source, destination = paged_instance(**options, tp_size=8), paged_instance(**options, tp_size=4)
    used = [senders(plan(source, rank, index)) for index, rank in enumerate(destination.ranks)]
    assert [len(ranks) for ranks in used] == [1] * 4
    assert len({ranks[0] for ranks in used}) == 4
    one = plan(source, paged_instance(**options, tp_size=1).ranks[0], 0)
    assert len(senders(one)) == 2  # one source per unique head, never two of the same
    assert sum(made.nbytes(0, 16) for made in one if made) == 2 * 2 * 2 * 16 * 256


def test_indexer_comes_from_a_rank_that_sends_anyway() -> None:
    options = {**LLAMA70B, "stages": [range(2)], "indexer_bytes": 132}
    source, destination = paged_instance(**options, tp_size=8), paged_instance(**options, tp_size=2)
    assert [senders(plan(source, r, i)) for i, r in enumerate(destination.ranks)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_pipeline_stages() -> None:
    options = {key: value for key, value in LLAMA70B.items() if key != "stages"}
    source = paged_instance(**options, stages=[range(30), range(30, 80)], tp_size=2)
    destination = paged_instance(**options, stages=[range(50), range(50, 80)], tp_size=2)
    sent = {i: plan(source, rank, i) for i, rank in enumerate(destination.ranks)}
    assert {i: senders(plans) for i, plans in sent.items()} == {0: [0, 2], 1: [1, 3], 2: [2], 3: [3]}
    plans = sent[0]
    assert plans[0] is not None and list(plans[0].steps) == list(range(30))
    assert plans[2] is not None and list(plans[2].steps) == list(range(30, 50))


# ---- digests, ranges, indices ----------------------------------------------------------------------------------------
def test_both_sides_compute_the_same_digest() -> None:
    source, destination = paged_instance(**LLAMA70B, tp_size=4), paged_instance(**LLAMA70B, tp_size=8)
    far = msgspec.msgpack.decode(msgspec.msgpack.encode(source), type=InstanceLayout)
    for index, layout in enumerate(destination.ranks):
        one = plan(source, layout, index)
        other = plan(far, msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=RankLayout), index)
        assert [p and p.digest for p in one] == [p and p.digest for p in other]
        assert all(len(p.digest) == 16 for p in one if p)


def test_digests_differ_where_plans_do() -> None:
    digests = set()
    for changes in ({}, {"model": "n"}, {"num_blocks": 5}, {"kv": "last"}, {"layers": range(2)},
                    {"head_bytes": 16}, {"block_tokens": 8}, {"dtype": "float16"}):  # fmt: skip
        layout = small_rank(**changes)
        (made,) = plan(InstanceLayout((layout,)), layout, 0)
        assert made is not None
        digests.add(made.digest)
    assert len(digests) == 8


def test_token_ranges() -> None:
    (made,) = plan(InstanceLayout((small_rank(),)), small_rank(), 0)
    assert made is not None
    step = steps_of(made)
    assert made.units(0, 0) == made.units(4, 4) == 0 and made.units(0, 1) == 1 and made.units(4, 9) == 2
    assert made.arrivals(4, 9) == 2 * 3 * 2
    for first, end in ((1, 8), (4, 0), (-4, 8)):
        with pytest.raises(ValueError, match="multiple of 4"):
            made.units(first, end)
        with pytest.raises(ValueError, match="multiple of 4"):
            made.src_indices(step[0], [0, 1], first, end)
    assert made.dst_indices(step[0], [], 4, 4).tolist() == []
    assert made.dst_indices(step[0], np.array([3, 1, 0], dtype=np.uint32), 4, 12).tolist() == [1, 0]
    assert made.dst_indices(step[0], np.array([1, 0]), 4, 12, first_block=1).tolist() == [1, 0]
    for table, message in (([0], "the table has 0..0"), ([0, 4], "there are 4 blocks"), ([0, -1], "4 blocks")):
        with pytest.raises(IndexError, match=message):
            made.dst_indices(step[0], table, 0, 8)
    with pytest.raises(IndexError, match="the table has"):
        made.dst_indices(step[0], [0, 1], 0, 8, first_block=1)
    with pytest.raises(TypeError, match="integers"):
        made.dst_indices(step[0], [0.0, 1.0], 0, 8)


def test_indices_do_not_alias_the_table() -> None:
    (made,) = plan(InstanceLayout((small_rank(),)), small_rank(), 0)
    assert made is not None
    table = np.array([2, 3])
    made.src_indices(steps_of(made)[0], table, 0, 8)[:] = 0
    assert table.tolist() == [2, 3]
