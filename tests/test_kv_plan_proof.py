"""Plans that cannot be, are refused with the reason; and the proof of a plan notices every kind of damage."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec
import pytest
from kv_machines import senders, small_rank

from railwire.kvcache.geometry.builders import mla_layout, paged_instance, paged_layout
from railwire.kvcache.geometry.cover import ProofError
from railwire.kvcache.geometry.layout import Component, InstanceLayout, LayerStorage, LayoutError, RankLayout, Storage
from railwire.kvcache.geometry.pages import Step
from railwire.kvcache.geometry.plan import plan, prove


# ---- what cannot be mapped -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "n"}, "other model: the source has 'n', the destination 'm'"),
        ({"dtype": "float8_e4m3fn"}, "component 'k' differs in dtype: 'float8_e4m3fn' at the source, 'bfloat16'"),
        ({"kv_heads": 8}, "component 'k' differs in heads: 8 at the source, 4 at the destination"),
        ({"head_bytes": 16}, "component 'k' differs in head_bytes"),
        ({"scale_bytes": 4}, "component 'k_scale' of the source is missing at the destination"),
        ({"layers": range(2)}, "layer 2 is held by no source rank"),
        ({"tp_size": 2, "tp_rank": 1}, r"heads 0\.\.1 of component 'k' of layer 0 are held by no source rank"),
    ],
)
def test_what_cannot_be_mapped_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        plan(InstanceLayout((small_rank(**changes),)), small_rank(), 0)


def test_component_missing_at_the_source() -> None:
    with pytest.raises(LayoutError, match="component 'k_scale' of the destination is missing at the source"):
        plan(InstanceLayout((small_rank(),)), small_rank(scale_bytes=4), 0)
    with pytest.raises(LayoutError, match="component 'k' of the source is missing at the destination"):
        plan(
            InstanceLayout((small_rank(),)),
            mla_layout(model="m", layers=range(3), num_blocks=4, block_tokens=4, latent_bytes=8),
            0,
        )


@pytest.mark.parametrize("index", [-1, "0", None, True])
def test_bad_destination_index(index: Any) -> None:
    with pytest.raises(LayoutError, match="index"):
        plan(InstanceLayout((small_rank(),)), small_rank(), index)


def test_indices_that_no_page_list_can_hold() -> None:
    """Blocks that are not aligned to their units: the common stride is so small that indices do not fit in 32 bits."""
    big = 1 << 27
    layout = RankLayout(
        "m", 4, 1000, (Component("k", 1, 8, "u8"),), (LayerStorage(0, (Storage(0, 0, big + 1, 8, 8, 0, 1),)),),
        (1000 * (big + 1),),
    )  # fmt: skip
    small = mla_layout(model="m", layers=[0], num_blocks=9, block_tokens=2, latent_bytes=8, dtype="u8")
    small = msgspec.structs.replace(small, components=layout.components)
    with pytest.raises(LayoutError, match=r"2\*\*32"):
        plan(InstanceLayout((layout,)), small, 0)
    same = mla_layout(model="m", layers=[0], num_blocks=9, block_tokens=4, latent_bytes=8, dtype="u8")
    same = msgspec.structs.replace(same, components=layout.components)
    assert plan(InstanceLayout((layout,)), same, 0)[0] is not None  # whole blocks do


def test_absurd_layouts_are_refused_soon() -> None:
    """Valid numbers that would take hours or terabytes to plan."""
    huge = mla_layout(model="m", layers=range(1), num_blocks=1, block_tokens=1 << 16, latent_bytes=1)
    many = msgspec.structs.replace(huge.components[0], heads=1 << 14)
    storage = Storage(0, 0, 1 << 31, 1 << 14, 1, 0, 1 << 14)
    huge = RankLayout("m", 1 << 16, 1, (many,), (LayerStorage(0, (storage,)),), (1 << 40,))
    began = time.perf_counter()
    with pytest.raises(LayoutError, match="too many"):
        plan(InstanceLayout((huge,)), huge, 0)
    # Every layer another geometry, each of them large.
    layers = tuple(LayerStorage(i, (Storage(i, 0, (1 << 31) + 64 * i, 64, 1, 0, 16),)) for i in range(1024))
    odd = RankLayout("m", 1 << 16, 1, (many,), layers, (1 << 40,) * 1024)
    with pytest.raises(LayoutError, match="too large or too irregular"):
        plan(InstanceLayout((odd,)), odd, 0)
    # Orders that do not match: a step per token or head.
    hnd = paged_layout(model="m", layers=range(1024), num_blocks=1, block_tokens=128, kv_heads=128, head_bytes=1)
    nhd = paged_layout(
        model="m", layers=range(1024), num_blocks=1, block_tokens=128, kv_heads=128, head_bytes=1, order="NHD"
    )
    try:
        plan(InstanceLayout((hnd,)), nhd, 0)
    except LayoutError as error:
        assert "too irregular" in str(error)
    assert time.perf_counter() - began < 20


# ---- the proof notices -----------------------------------------------------------------------------------------------
CASES = [
    ({"order": "NHD", "kv": "last"}, {"order": "NHD", "kv": "last"}),
    ({"order": "HND", "kv": "separate"}, {"order": "NHD", "kv": "block"}),
    ({"order": "HND", "kv": "leading"}, {"order": "HND", "kv": "leading", "block_tokens": 6}),
]


@pytest.mark.parametrize(("one", "other"), CASES)
def test_the_proof_notices_every_mutation(one: dict[str, Any], other: dict[str, Any]) -> None:
    options: dict[str, Any] = {"model": "m", "num_blocks": 5, "block_tokens": 4, "kv_heads": 4, "head_bytes": 8,
                               "stages": [range(2)]}  # fmt: skip
    source = paged_instance(**{**options, **one}, tp_size=4)
    destination = paged_instance(**{**options, **other}, tp_size=2).ranks[1]
    plans = plan(source, destination, 1)
    prove(source, destination, plans)
    seen = 0

    def refused(position: int, layer: int, steps: tuple[Step, ...]) -> None:
        nonlocal seen
        made = plans[position]
        assert made is not None
        damaged = dataclasses.replace(made, steps={**made.steps, layer: steps})
        with pytest.raises(ProofError):
            prove(source, destination, (*plans[:position], damaged, *plans[position + 1 :]))
        seen += 1

    for position in senders(plans):
        made = plans[position]
        assert made is not None
        for layer, steps in made.steps.items():
            for index, step in enumerate(steps):
                before, after = steps[:index], steps[index + 1 :]
                refused(position, layer, before + after)
                refused(position, layer, (*steps, step))
                for mutant in mutants(step):
                    refused(position, layer, (*before, mutant, *after))
    assert seen > 50


def mutants(step: Step) -> list[Step]:
    made = []
    for side in ("src", "dst"):
        address = getattr(step, side)
        count, stride = address.runs
        changes: list[dict[str, Any]] = [{"offset": address.offset + by} for by in (1, 8, -1, 32)]
        changes += [{"runs": (count, stride + 8)}] if count > 1 else [{"runs": (2, step.unit_bytes)}]
        changes += [{"runs": (count + 1, stride)}, {"runs": (0, 0)}]
        changes += [{"unit_stride": address.unit_stride + 8}, {"block_step": address.block_step + 1}]
        changes += [{"sub_step": address.sub_step + 1}] if address.sub_step else []
        made += [msgspec.structs.replace(step, **{side: msgspec.structs.replace(address, **c)}) for c in changes]
    made += [msgspec.structs.replace(step, unit_bytes=step.unit_bytes + by) for by in (-8, 8, -step.unit_bytes)]
    made += [msgspec.structs.replace(step, layer=step.layer + 1)]
    return made


def test_the_proof_notices_exchanged_sources() -> None:
    """Every destination byte is written once, but K from V, or from the other head."""
    source = paged_instance(
        model="m", num_blocks=5, block_tokens=4, kv_heads=4, head_bytes=8, stages=[range(2)], tp_size=4
    )
    destination = paged_instance(
        model="m", num_blocks=5, block_tokens=4, kv_heads=4, head_bytes=8, stages=[range(2)], tp_size=2
    ).ranks[0]
    plans = plan(source, destination, 0)
    first, second = plans[0], plans[1]
    assert first is not None and second is not None
    k, v = first.steps[0]
    swapped = (
        msgspec.structs.replace(k, src=v.src, src_region=v.src_region),
        msgspec.structs.replace(v, src=k.src, src_region=k.src_region),
    )
    with pytest.raises(ProofError, match="wrong place"):
        prove(source, destination, (dataclasses.replace(first, steps={**first.steps, 0: swapped}), second))
    exchanged = (dataclasses.replace(first, source_rank=1), dataclasses.replace(second, source_rank=0))
    with pytest.raises(ProofError, match="wrong place"):
        prove(source, destination, exchanged)
    with pytest.raises(ProofError, match="no step"):
        prove(source, destination, (None, None))
    with pytest.raises(ProofError, match="does not hold"):
        prove(source, destination, (dataclasses.replace(first, steps={7: first.steps[0]}), second))
