"""Weight plans: any sharding on either side, byte by byte; misfits are named; plans agree and cannot be forged."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from railwire.weights.cover import prove
from railwire.weights.cutting import choose, intersect, pages
from railwire.weights.errors import PlanError, ProofError
from railwire.weights.matching import match
from railwire.weights.placements import REPLICATE, Placement, local_parts, shard
from railwire.weights.plan import Batch, Plan, compute
from railwire.weights.tables import FP8, ITEMSIZE, Held, RankTable, contiguous

Shapes = dict[str, tuple[tuple[int, ...], str]]


class Memory:
    """A rank whose local tensors lie in byte arrays."""

    def __init__(self, rank: str, tensors: Shapes, mesh: Sequence[int], at: Sequence[int],
                 placements: dict[str, Sequence[Placement]], whole: dict[str, np.ndarray] | None,
                 permuted: bool = False, mesh_id: int = 0) -> None:  # fmt: skip
        held, self.regions, names = [], [], {}
        for name, (shape, dtype) in tensors.items():
            names[name] = (shape, dtype)
            local, parts = local_parts(shape, mesh, at, placements[name])
            if not parts:
                continue
            size = ITEMSIZE[dtype]
            array = np.zeros((*local, size), dtype=np.uint8)
            strides = contiguous(local, size)
            if permuted and len(local) == 2:  # stored transposed
                strides = (size, size * local[0])
                array = np.zeros((local[1], local[0], size), dtype=np.uint8).transpose(1, 0, 2)
            for part in parts:
                if whole is not None:
                    box = tuple(slice(a, a + n) for a, n in zip(part.lo, part.size, strict=True))
                    there = tuple(slice(a, a + n) for a, n in zip(part.local, part.size, strict=True))
                    array[there] = whole[name][box]
                offset = sum(a * b for a, b in zip(part.local, strides, strict=True))
                held.append(Held(name, shape, dtype, part.lo, part.size, len(self.regions), offset, strides, mesh_id))
            base = array.transpose(1, 0, 2) if permuted and len(local) == 2 else array
            self.regions.append((base.reshape(-1), array, name, parts))
        table = RankTable(rank, tuple(held), tuple(len(r[0]) for r in self.regions), {}, names)
        self.table = RankTable.decode(table.encode())


def replay(plan: Plan, sources: Sequence[Memory], destinations: Sequence[Memory]) -> None:
    """What the engine does with the batches."""
    for number, source in enumerate(sources):
        for batch in plan.batches_of(number):
            src, dst = source.regions[batch.src_region][0], destinations[batch.dst_rank].regions[batch.dst_region][0]
            for page in range(batch.first, batch.first + batch.count):
                for run in range(batch.runs):
                    a = int(plan.src_offsets[page]) + run * batch.src_stride
                    b = int(plan.dst_offsets[page]) + run * batch.dst_stride
                    dst[b : b + batch.run_bytes] = src[a : a + batch.run_bytes]


def whole_of(tensors: Shapes, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.integers(1, 255, (*s, ITEMSIZE[d]), dtype=np.uint8) for n, (s, d) in tensors.items()}


def check(memory: Memory, whole: dict[str, np.ndarray]) -> None:
    for _, array, name, parts in memory.regions:
        for part in parts:
            box = tuple(slice(a, a + n) for a, n in zip(part.lo, part.size, strict=True))
            there = tuple(slice(a, a + n) for a, n in zip(part.local, part.size, strict=True))
            assert np.array_equal(array[there], whole[name][box]), name


def placements_for(rng: random.Random, shape: tuple[int, ...], dims: int) -> list[Placement]:
    return [
        rng.choice([REPLICATE, *(shard(d, rng.choice([1, 1, 2, 3])) for d in range(len(shape)))]) for _ in range(dims)
    ]


@pytest.mark.parametrize("case", range(60))
def test_any_sharding_to_any_other(case: int, request: pytest.FixtureRequest) -> None:
    rng = random.Random(request.config.option.seed + case)
    tensors: Shapes = {
        f"t{i}": (tuple(rng.randint(1, 12) for _ in range(rng.randint(0, 4))), rng.choice(["bfloat16", "float32"]))
        for i in range(rng.randint(1, 5))
    }
    whole = whole_of(tensors, case)
    sides = []
    for side in range(2):
        mesh = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
        placed = {name: placements_for(rng, shape, len(mesh)) for name, (shape, _) in tensors.items()}
        sides.append(
            [
                Memory(f"{side}-{at}", tensors, mesh, at, placed, whole if side == 0 else None, rng.random() < 0.3)
                for at in np.ndindex(*mesh)
            ]
        )
    plan = compute([m.table for m in sides[0]], [m.table for m in sides[1]])
    replay(plan, sides[0], sides[1])
    for memory in sides[1]:
        check(memory, whole)
    again = compute([m.table for m in sides[0]], [m.table for m in sides[1]])
    assert again.digest == plan.digest == Plan.load(plan.encode()).digest
    assert int(plan.nbytes().sum()) == sum(len(r[0]) for m in sides[1] for r in m.regions)
    assert int(plan.arrivals().sum()) == len(plan.src_offsets)
    for number in range(len(sides[0])):
        mine = plan.only(number)
        assert [b.nbytes for b in mine.batches_of(number)] == [b.nbytes for b in plan.batches_of(number)]


def test_replicas_share_the_load() -> None:
    tensors: Shapes = {f"l{i}": ((64, 32), "bfloat16") for i in range(48)}
    placed = {name: [REPLICATE, shard(0)] for name in tensors}
    sources = [Memory(f"s{at}", tensors, (4, 2), at, placed, None) for at in np.ndindex(4, 2)]
    placed = {name: [shard(1)] for name in tensors}
    destinations = [Memory(f"d{i}", tensors, (4,), (i,), placed, None) for i in range(4)]
    plan = compute([m.table for m in sources], [m.table for m in destinations])
    assert max(plan.imbalance()) <= 1.05
    pairs = plan.nbytes()
    assert pairs.max() <= 1.5 * pairs.mean()  # no pair of NICs carries much more than another


def test_a_lost_replica_is_replaced_and_a_lost_shard_is_named() -> None:
    tensors: Shapes = {"w": ((8, 4), "float32")}
    whole = whole_of(tensors, 0)
    placed = {"w": [REPLICATE, shard(0)]}
    sources = [Memory(f"s{at}", tensors, (2, 2), at, placed, whole) for at in np.ndindex(2, 2)]
    destination = Memory("d", tensors, (1,), (0,), {"w": [REPLICATE]}, None)
    alive = sources[1:]
    replay(compute([m.table for m in alive], [destination.table]), alive, [destination])
    check(destination, whole)
    with pytest.raises(PlanError, match="w: the trainers that take part hold only a part"):
        compute([sources[0].table, sources[2].table], [destination.table])


def hold(name: str, shape: tuple[int, ...], dtype: str, lo: tuple[int, ...], size: tuple[int, ...], region: int = 0,
         offset: int = 0) -> Held:  # fmt: skip
    return Held(name, shape, dtype, lo, size, region, offset, contiguous(size, ITEMSIZE[dtype]))


def one(rank: str, *held: Held, tied: dict[str, str] | None = None) -> RankTable:
    sizes = [0] * (1 + max((h.region for h in held), default=0))
    for h in held:
        sizes[h.region] = max(sizes[h.region], h.offset + int(np.prod(h.size)) * ITEMSIZE[h.dtype])
    return RankTable(rank, held, tuple(sizes), tied or {}, {h.name: (h.shape, h.dtype) for h in held})


def test_what_does_not_fit_is_named_parameter_by_parameter() -> None:
    trainer = one("t", hold("a", (4, 4), "bfloat16", (0, 0), (4, 4)), hold("b", (4,), "bfloat16", (0,), (4,), 1),
                  hold("i", (4,), "int32", (0,), (4,), 2), hold("x", (4,), "bfloat16", (0,), (4,), 3))  # fmt: skip
    receiver = one("r", hold("a", (4, 5), "bfloat16", (0, 0), (4, 5)), hold("c", (4,), "bfloat16", (0,), (4,), 1),
                   hold("i", (4,), "float32", (0,), (4,), 2))  # fmt: skip
    with pytest.raises(PlanError) as caught:
        compute([trainer], [receiver])
    text = "\n".join(caught.value.problems)
    assert "a: shape (4, 5) on receiver r, (4, 4) on the trainers" in text
    assert "c: receiver r wants it, no trainer has it" in text
    assert "i: float32 on receiver r cannot be made of the trainers' int32" in text
    assert "b: the trainers have it, no receiver wants it" in text and "x: the trainers" in text
    with pytest.raises(PlanError, match="the same name"):
        compute([trainer, trainer], [receiver])
    other = one("u", hold("a", (4, 4), "float32", (0, 0), (4, 4)))
    with pytest.raises(PlanError, match="a: float32"):
        compute([trainer, other], [receiver], allow_extra=True)


def test_tied_parameters() -> None:
    embed = hold("embed", (8, 4), "bfloat16", (0, 0), (8, 4))
    trainer = one("t", embed, tied={"head": "embed"})
    both = one("r", embed, hold("head", (8, 4), "bfloat16", (0, 0), (8, 4)))  # tied at the receiver too
    assert int(compute([trainer], [both]).nbytes().sum()) == 64
    apart = one("r", embed, hold("head", (8, 4), "bfloat16", (0, 0), (8, 4), 1))
    assert int(compute([trainer], [apart]).nbytes().sum()) == 128
    untied = one("t", embed, hold("head", (8, 4), "bfloat16", (0, 0), (8, 4), 1))
    with pytest.raises(PlanError, match="fills the same memory with embed, which is not tied"):
        compute([untied], [both])


def quantised(rank: str, shape: tuple[int, int], lo: tuple[int, int], size: tuple[int, int]) -> RankTable:
    blocks = tuple(-(-n // 128) for n in shape)
    scale = hold("w_scale_inv", blocks, "float32", (lo[0] // 128, lo[1] // 128), tuple(-(-n // 128) for n in size), 1)  # type: ignore[arg-type]
    return one(rank, hold("w", shape, FP8, lo, size), scale)


def test_fp8_is_quantised_where_whole_blocks_are() -> None:
    shape = (512, 256)
    quarters = [one(f"t{i}", hold("w", shape, "bfloat16", (i * 128, 0), (128, 256))) for i in range(4)]
    plan = compute(quarters, [quantised("r", shape, (0, 0), shape)])
    assert {unit.kind for unit in plan.units} == {"fp8"}
    fifths = [
        one(f"t{i}", hold("w", shape, "bfloat16", (i * 103, 0), (min(103, 512 - i * 103), 256))) for i in range(5)
    ]
    plan = compute(fifths, [quantised("r", shape, (0, 0), shape)])
    assert [unit.kind for unit in plan.units] == ["fp8-gather"] * 5
    assert sum(unit.size[0] for unit in plan.units) == 512
    assert all(unit.lo[0] % 128 == 0 for unit in plan.units)
    with pytest.raises(PlanError, match=r"w: receiver r's part begins or ends at 200 and so cuts a block"):
        compute(quarters, [quantised("r", shape, (0, 0), (200, 256)), quantised("q", shape, (200, 0), (312, 256))])
    with pytest.raises(PlanError, match="w: float8_e4m3fn on receiver r without a w_scale_inv"):
        compute(quarters, [one("r", hold("w", shape, FP8, (0, 0), shape))])
    bad = one("r", hold("w", shape, FP8, (0, 0), shape), hold("w_scale_inv", (4, 3), "float32", (0, 0), (4, 3), 1))
    with pytest.raises(PlanError, match="w_scale_inv: float32"):
        compute(quarters, [bad])


def test_the_proof_sees_every_single_fault() -> None:
    tensors: Shapes = {"a": ((12, 10), "bfloat16"), "b": ((9,), "float32")}
    placed = {"a": [shard(0), shard(1)], "b": [shard(0), shard(0)]}
    sources = [Memory(f"s{at}", tensors, (3, 2), at, placed, None).table for at in np.ndindex(3, 2)]
    placed = {"a": [shard(1)], "b": [shard(0)]}
    destinations = [Memory(f"d{i}", tensors, (2,), (i,), placed, None).table for i in range(2)]
    matched = match(sources, destinations)
    group, pieces = intersect(matched.sources, matched.destinations)
    right = pages(matched.sources, matched.destinations,
                  choose(matched.sources, group, pieces, matched.destinations, len(sources)))  # fmt: skip
    prove(matched.sources, matched.destinations, right)
    faults = 0
    for name in right._fields:
        for row in range(len(right.src)):
            for delta in (-2, 1, 2, 4):
                column = getattr(right, name).copy()
                column[row] += delta
                if name in ("src", "dst") and not 0 <= column[row] < len(
                    matched.sources if name == "src" else matched.destinations
                ):
                    continue
                if name in ("src_stride", "dst_stride") and right.runs[row] == 1:
                    continue
                if name == "runs" and column[row] < 1:
                    continue
                with pytest.raises(ProofError):
                    prove(matched.sources, matched.destinations, right._replace(**{name: column}))
                faults += 1
    assert faults > 100
    for row in range(len(right.src)):  # one page less, one page twice
        for index in (np.delete(np.arange(len(right.src)), row), np.append(np.arange(len(right.src)), row)):
            with pytest.raises(ProofError):
                prove(matched.sources, matched.destinations, type(right)(*(column[index] for column in right)))


def test_tables_and_plans_from_elsewhere_are_checked() -> None:
    table = one("t", hold("a", (4, 4), "bfloat16", (0, 0), (4, 4)))
    for wrong in (
        hold("a", (4, 4), "bfloat16", (1, 0), (4, 4)),
        Held("a", (4, 4), "bfloat16", (0, 0), (4, 4), 0, 0, (-8, 2)),
        Held("a", (4, 4), "bfloat16", (0, 0), (4, 4), 0, 2, (8, 2)),
        Held("a", (4, 4), "bfloat16", (0, 0), (4, 4), 7, 0, (8, 2)),
        Held("a", (4, 4), "complex9", (0, 0), (4, 4), 0, 0, (8, 2)),
        Held("a", (4, 4), "bfloat16", (0,), (4, 4), 0, 0, (8, 2)),
        Held("a", (1,) * 5, "bfloat16", (0,) * 5, (1,) * 5, 0, 0, (2,) * 5),
    ):
        with pytest.raises(PlanError, match="a: "):
            RankTable.decode(RankTable("t", (wrong,), table.regions).encode())
    for garbage in (b"", b"\x00" * 40, table.encode()[:-3], b"\xc1"):
        with pytest.raises(PlanError):
            RankTable.decode(garbage)
    data = compute([table], [table]).encode()
    for garbage in (b"", b"PK\x03\x04", data[:6], data[:-40], data[:-1], b"x" * 100):
        with pytest.raises(PlanError):
            Plan.load(garbage)
    plan = compute([table], [table])
    forged = Plan(plan.sources, plan.destinations, plan.variants, plan.units, plan.batches, plan.src_offsets + 2,
                  plan.dst_offsets)  # fmt: skip
    object.__setattr__(forged, "digest", plan.digest)
    with pytest.raises(PlanError, match="digest"):
        Plan.load(forged.encode())


def test_plans_are_loaded_by_several_threads_at_once() -> None:
    """With numpy's own format, CPython 3.11's parser raised SystemError where threads changed in the middle of it."""
    held = Held("w", (8, 6), "int16", (0, 0), (8, 6), 0, 0, (12, 2))
    table = RankTable("t", (held,), (96,), {}, {"w": ((8, 6), "int16")})
    data, errors = compute([table], [table]).encode(), []

    def load() -> None:
        try:
            for _ in range(30):
                Plan.load(data)
        except BaseException as error:
            errors.append(error)

    def change_threads(*_: object) -> None:
        time.sleep(0)

    thresholds = gc.get_threshold()
    gc.callbacks.append(change_threads)
    gc.set_threshold(20)
    try:
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(change_threads)
    assert not errors


def test_batches_have_the_order_of_their_columns() -> None:
    assert Batch.__struct_fields__ == (
        "src_rank", "dst_rank", "unit", "src_region", "dst_region", "run_bytes", "runs", "src_stride", "dst_stride",
        "first", "count",
    )  # fmt: skip
