"""Layouts: what the builders make, and what is refused, from a caller or from the network."""

from __future__ import annotations

import itertools
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from railwire.kvcache.geometry.builders import head_range, mla_layout, paged_instance, paged_layout
from railwire.kvcache.geometry.disjoint import Box, OverlapError, check_disjoint, nested
from railwire.kvcache.geometry.layout import Component, InstanceLayout, LayerStorage, LayoutError, RankLayout, Storage

BASE: dict[str, Any] = {"model": "m", "layers": range(2), "num_blocks": 5, "block_tokens": 4, "head_bytes": 8}


def addresses(layout: RankLayout) -> np.ndarray:
    """Of every byte of every storage, region by region far apart."""
    found = []
    for layer in layout.layers:
        for component, s in zip(layout.components, layer.storages, strict=True):
            grid = (
                (s.region << 40)
                + s.offset
                + np.arange(layout.num_blocks)[:, None, None, None] * s.page_stride
                + np.arange(layout.block_tokens)[:, None, None] * s.token_stride
                + np.arange(s.heads)[:, None] * s.head_stride
                + np.arange(component.head_bytes)
            )
            found.append(grid.reshape(-1))
    return np.concatenate(found)


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("kv", ["separate", "leading", "block", "last"])
@pytest.mark.parametrize("placement", ["tensors", "one", "cross_layer"])
@pytest.mark.parametrize("extras", [{}, {"scale_bytes": 4, "indexer_bytes": 3}])
def test_builders_use_every_byte_once(order: Any, kv: Any, placement: Any, extras: dict[str, int]) -> None:
    options = {**BASE, **extras, "kv_heads": 6, "order": order, "kv": kv, "placement": placement}
    if placement == "cross_layer" and kv in ("separate", "leading"):
        with pytest.raises(LayoutError, match="cross_layer"):
            paged_layout(**options)
        return
    layout = paged_layout(**options, tp_rank=1, tp_size=2)
    used = addresses(layout)
    assert len(np.unique(used)) == len(used)
    for region, nbytes in enumerate(layout.region_bytes):
        inside = used[used >> 40 == region] & ((1 << 40) - 1)
        assert inside.min() >= 0 and inside.max() < nbytes
        if placement != "one":
            assert len(inside) == nbytes  # no gaps: tensors are dense
    assert all(layer.storages[0].first_head == 3 and layer.storages[0].heads == 3 for layer in layout.layers)


@pytest.mark.parametrize(
    ("order", "kv", "shape", "axes"),
    [  # where blocks, tokens and heads are in the tensor, and K and V
        ("HND", "leading", (2, 5, 3, 4), {"page": 1, "token": 3, "head": 2, "kv": 0}),
        ("NHD", "leading", (2, 5, 4, 3), {"page": 1, "token": 2, "head": 3, "kv": 0}),
        ("HND", "block", (5, 2, 3, 4), {"page": 0, "token": 3, "head": 2, "kv": 1}),
        ("NHD", "block", (5, 2, 4, 3), {"page": 0, "token": 2, "head": 3, "kv": 1}),
        ("HND", "last", (5, 3, 4, 2), {"page": 0, "token": 2, "head": 1, "kv": 3}),
        ("NHD", "last", (5, 4, 3, 2), {"page": 0, "token": 1, "head": 2, "kv": 3}),
    ],
)
def test_builders_agree_with_numpy_strides(order: Any, kv: Any, shape: tuple[int, ...], axes: dict[str, int]) -> None:
    tensor = np.zeros((*shape, 8), dtype=np.uint8)
    layout = paged_layout(**{**BASE, "layers": [0]}, kv_heads=3, order=order, kv=kv)
    k, v = layout.layers[0].storages
    assert layout.region_bytes == (tensor.nbytes,)
    for storage in (k, v):
        assert storage.page_stride == tensor.strides[axes["page"]]
        assert storage.token_stride == tensor.strides[axes["token"]]
        assert storage.head_stride == tensor.strides[axes["head"]]
    assert v.offset - k.offset == tensor.strides[axes["kv"]]


def test_vllm_cpu_layout() -> None:
    """[B, H, N, K|V] bf16 of SmolLM2 on vLLM-CPU: strides (49152, 16384, 128, 1) elements, as measured there."""
    layout = paged_layout(
        model="m", layers=range(30), num_blocks=364, block_tokens=128, kv_heads=3, head_bytes=128, kv="last",
        placement="one",
    )  # fmt: skip
    k, v = layout.layers[1].storages
    assert (k.page_stride, k.head_stride, k.token_stride) == (98304, 32768, 256)
    assert (k.offset, v.offset) == (35782656, 35782656 + 128)
    assert layout.region_bytes == (30 * 35782656,)


@pytest.mark.parametrize(
    ("heads", "size", "ranges"),
    [
        (8, 2, [(0, 4), (4, 4)]),
        (2, 2, [(0, 1), (1, 1)]),
        (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (1, 3, [(0, 1)] * 3),
    ],
)
def test_head_range(heads: int, size: int, ranges: list[tuple[int, int]]) -> None:
    assert [head_range(heads, rank, size) for rank in range(size)] == ranges


@pytest.mark.parametrize(("heads", "rank", "size"), [(3, 0, 2), (2, 0, 3), (4, 4, 4), (4, -1, 4), (4, 0, 0)])
def test_head_range_refuses(heads: int, rank: int, size: int) -> None:
    with pytest.raises(LayoutError):
        head_range(heads, rank, size)


def layout_with(**changes: Any) -> RankLayout:
    """One layer, one component of 2 heads x 8 bytes, 3 blocks of 4 tokens, NHD; with changes."""
    storage = {
        "region": 0, "offset": 0, "page_stride": 64, "token_stride": 16, "head_stride": 8, "first_head": 0, "heads": 2
    }  # fmt: skip
    rank = {"model": "m", "block_tokens": 4, "num_blocks": 3, "region_bytes": (192,)}
    component = {"name": "k", "heads": 2, "head_bytes": 8, "dtype": "u8"}
    for name, value in changes.items():
        for target in (storage, rank, component):
            if name in target:
                target[name] = value
    return RankLayout(components=(Component(**component),), layers=(LayerStorage(0, (Storage(**storage),)),), **rank)  # type: ignore[arg-type]


BAD = [
    ({"offset": -1}, "offset"),
    ({"offset": 1}, "ends at byte 193 of region 0, which has 192"),
    ({"region": 1}, "region"),
    ({"region": -1}, "region"),
    ({"page_stride": 0}, "page_stride"),
    ({"page_stride": 63}, "overlap"),
    ({"page_stride": -64}, "page_stride"),
    ({"token_stride": 15}, "overlap"),
    ({"token_stride": 0}, "overlap"),
    ({"head_stride": 7}, "overlap"),
    ({"head_stride": 1 << 60}, "head_stride"),
    ({"first_head": 1}, "heads"),
    ({"first_head": 2}, "first_head"),
    ({"heads": 3}, "heads"),
    ({"heads": 0, "head_bytes": 8}, "heads"),
    ({"head_bytes": 0}, "head_bytes"),
    ({"head_bytes": 1 << 40}, "head_bytes"),
    ({"block_tokens": 0}, "block_tokens"),
    ({"block_tokens": 1 << 40}, "block_tokens"),
    ({"num_blocks": 0}, "num_blocks"),
    ({"num_blocks": 1 << 62}, "num_blocks"),
    ({"num_blocks": 4}, "ends at byte 256"),
    ({"region_bytes": ()}, "regions"),
    ({"region_bytes": (0,)}, "region"),
    ({"region_bytes": (1 << 60,)}, "region"),
    ({"model": ""}, "model"),
    ({"model": "m" * 1000}, "model"),
    ({"name": ""}, "name"),
    ({"offset": 0.0}, "int"),
    ({"page_stride": np.int64(64)}, "int"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_layouts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        layout_with(**changes)


def test_a_rank_may_hold_nothing_of_a_component() -> None:
    layout = paged_layout(**BASE, kv_heads=2)
    nothing = msgspec.structs.replace(layout.layers[1].storages[1], heads=0)
    layers = (
        layout.layers[0],
        msgspec.structs.replace(layout.layers[1], storages=(layout.layers[1].storages[0], nothing)),
    )
    assert msgspec.structs.replace(layout, layers=layers).storages(1)[1].heads == 0


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (-1,), (1 << 40,)])
def test_bad_layer_lists(layers: tuple[int, ...]) -> None:
    good = layout_with()
    with pytest.raises(LayoutError, match="layer"):
        msgspec.structs.replace(
            good, layers=tuple(LayerStorage(layer, good.layers[0].storages) for layer in layers), region_bytes=(192,)
        )


def test_overlapping_storages_are_named() -> None:
    layout = paged_layout(**BASE, kv_heads=2, placement="one")
    k, v = layout.layers[1].storages
    clash = msgspec.structs.replace(v, offset=layout.layers[0].storages[0].offset + 3)
    layers = (layout.layers[0], LayerStorage(1, (k, clash)))
    with pytest.raises(LayoutError, match=r"component '[kv]' of layer [01] and component '[kv]' of layer [01] overlap"):
        msgspec.structs.replace(layout, layers=layers)


def test_ranks_of_an_instance_must_agree() -> None:
    one = paged_layout(**BASE, kv_heads=2)
    for other in (
        paged_layout(**{**BASE, "model": "n"}, kv_heads=2),
        paged_layout(**{**BASE, "block_tokens": 8}, kv_heads=2),
        paged_layout(**BASE, kv_heads=4),
    ):
        with pytest.raises(LayoutError, match="rank 1"):
            InstanceLayout((one, other))
    with pytest.raises(LayoutError, match="ranks"):
        InstanceLayout(())


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_disjoint_is_never_wrong(data: st.DataObject) -> None:
    """What passes has no byte twice: compared with writing all bytes down."""
    boxes = []
    taken: list[int] = []
    shared = [(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))) for _ in range(2)]
    for index in range(data.draw(st.integers(1, 4))):
        pairs = [
            data.draw(st.sampled_from(shared) | st.tuples(st.integers(1, 3), st.integers(1, 40))) for _ in range(2)
        ]
        run, offset = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 60))
        grid = [
            offset + sum(i * s for i, (_, s) in zip(where, pairs, strict=True)) + byte
            for where in itertools.product(*(range(count) for count, _ in pairs))
            for byte in range(run)
        ]
        shape = nested(pairs, run)
        if shape is None:
            continue
        assert len(set(grid)) == len(grid) and max(grid) + 1 - offset == shape[1]
        boxes.append(Box(offset, shape[1], shape[0], run, 0, index))
        taken += grid
    try:
        check_disjoint(boxes)
    except OverlapError:
        return
    assert len(set(taken)) == len(taken)


def test_layouts_survive_the_wire() -> None:
    instance = paged_instance(stages=[range(3), range(3, 5)], tp_size=2, model="m", num_blocks=7, block_tokens=16,
                              kv_heads=4, head_bytes=64, scale_bytes=4)  # fmt: skip
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(instance), type=InstanceLayout) == instance
    mla = mla_layout(model="m", layers=[4], num_blocks=7, block_tokens=64, latent_bytes=656, indexer_bytes=132)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(mla), type=RankLayout) == mla


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_garbage_from_the_network(data: st.DataObject) -> None:
    """A layout with numbers replaced is refused as such, or is valid; nothing else happens, and soon."""
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(layout_with()))
    numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(-2, 300) | st.none() | st.text(max_size=3)
    for _ in range(data.draw(st.integers(1, 3))):
        node = tree
        while True:
            index = data.draw(st.integers(0, len(node) - 1))
            if not isinstance(node[index], list) or not node[index] or data.draw(st.integers(0, 9)) == 0:
                break
            node = node[index]
        node[index] = data.draw(numbers)
    began = time.perf_counter()
    try:
        layout = msgspec.msgpack.decode(msgspec.msgpack.encode(tree), type=RankLayout)
    except (msgspec.ValidationError, LayoutError):
        pass
    else:
        used = sum(
            layout.num_blocks * layout.block_tokens * s.heads * c.head_bytes
            for layer in layout.layers
            for c, s in zip(layout.components, layer.storages, strict=True)
        )
        assert used <= sum(layout.region_bytes)
    assert time.perf_counter() - began < 1
