"""Dispatch and combine are exact: every layout and dtype, random routings, any order of delivery."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from moe_bed import Load, Ranks, ThreadExchange, check_round, expected_output, run_experts, same

from railwire import ConfigurationError, TransferEngine
from railwire.moe import ExpertGroup, MoeConfig, PhaseError
from railwire.testing import SimulatedFabric


def rounds(config: MoeConfig, ranks: Ranks, rng: np.random.Generator, number: int) -> None:
    loads = [Load(config, rng) for _ in range(number)]

    def work(rank: int, group: object) -> None:
        for load in loads:
            check_round(config, load, rank, group)  # type: ignore[arg-type]

    ranks.each(work)


@pytest.mark.parametrize("layout", ["grouped", "batched", "standard"])
@pytest.mark.parametrize(
    ("dtype", "fp8"), [("bfloat16", False), ("float32", False), ("float16", False), ("bfloat16", True)]
)
def test_bitwise_on_a_network_that_reorders(layout: str, dtype: str, fp8: bool, rng: np.random.Generator) -> None:
    with SimulatedFabric(seed=int(rng.integers(1 << 30)), reorder=True, max_delay_us=50) as fabric:
        config = MoeConfig(
            ranks=int(rng.choice([2, 3, 5])), experts=int(rng.integers(5, 12)), hidden=int(rng.choice([8, 24, 160])),
            max_tokens=12, top_k=int(rng.integers(1, 5)), dtype=dtype, fp8=fp8, layout=layout,
            expert_alignment=int(rng.choice([1, 4])), slot_rows=int(rng.choice([0, 2, 5])),
            overflow_rows=int(rng.choice([0, 3])),
        )  # fmt: skip
        print(config)
        with Ranks(config, lambda rank: [fabric.nic(f"r{rank}")]) as ranks:
            rounds(config, ranks, rng, 40)


def test_thousands_of_routings(rng: np.random.Generator) -> None:
    config = MoeConfig(ranks=3, experts=7, hidden=16, max_tokens=6, top_k=2, dtype="float32")
    fabric = SimulatedFabric(seed=int(rng.integers(1 << 30)), reorder=True, max_delay_us=20)
    with fabric, Ranks(config, lambda rank: [fabric.nic(f"r{rank}")]) as ranks:
        rounds(config, ranks, rng, 800)


def test_two_micro_batches_in_flight(rng: np.random.Generator) -> None:
    """Two groups on the same engines, one dispatching while the other computes."""
    with SimulatedFabric(seed=3, reorder=True, max_delay_us=100) as fabric:
        configs = [MoeConfig(ranks=3, experts=6, hidden=8, max_tokens=8, top_k=2, context=n) for n in range(2)]
        with Ranks(configs[0], lambda rank: [fabric.nic(f"r{rank}")]) as ranks:
            second = ranks.make(configs[1])
            loads = [[Load(config, rng) for _ in range(30)] for config in configs]

            def work(rank: int, group: ExpertGroup) -> None:
                groups = (group, second[rank])
                for a, b in zip(*loads, strict=True):
                    groups[0].dispatch_send(a.x[rank], a.ids[rank], a.weights[rank])
                    groups[1].dispatch_send(b.x[rank], b.ids[rank], b.weights[rank])
                    first = groups[0].dispatch_receive()
                    groups[0].combine_send(run_experts(configs[0], rank, first))
                    other = groups[1].dispatch_receive()
                    assert same(groups[0].combine_receive(), expected_output(configs[0], a, rank))
                    out = groups[1].combine(run_experts(configs[1], rank, other))
                    assert same(out, expected_output(configs[1], b, rank))

            ranks.each(work)
            ranks.pool.map(lambda group: group.close(), second)


def test_bytes_on_the_wire_are_the_formulas(rng: np.random.Generator) -> None:
    config = MoeConfig(ranks=3, experts=6, hidden=40, max_tokens=10, top_k=2, slot_rows=3, overflow_rows=4)
    with SimulatedFabric() as fabric, Ranks(config, lambda rank: [fabric.nic(f"r{rank}")]) as ranks:
        load = Load(config, rng, "random")
        before = [sum(n["bytes_written"] for n in engine.stats()["nics"]) for engine in ranks.engines]
        ranks.each(lambda rank, group: check_round(config, load, rank, group))
        g = ranks.groups[0].geometry
        sent = [np.bincount(ids[ids >= 0].numpy() // config.local_experts, minlength=3) for ids in load.ids]
        for rank, engine in enumerate(ranks.engines):
            dispatch = sum(sum(g.dispatch_wire_bytes(int(sent[rank][to]), 3)) for to in range(3) if to != rank)
            back = sum(g.combine_wire_bytes(int(sent[source][rank])) for source in range(3) if source != rank)
            assert ranks.groups[rank].stats["sent_bytes"] == dispatch + back
            grants = ranks.groups[rank].stats["second_rounds"] * 32
            posted = sum(n["bytes_written"] for n in engine.stats()["nics"]) - before[rank]
            assert posted == dispatch + back + grants


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(3, 8)}, TypeError, "bfloat16"),
        ({"x": torch.zeros(3, 9, dtype=torch.bfloat16)}, ValueError, r"\[tokens, 8\]"),
        ({"x": torch.zeros(5, 8, dtype=torch.bfloat16)}, ValueError, "at most 4 tokens"),
        ({"x": np.zeros((3, 8))}, TypeError, "torch tensor"),
        ({"x": torch.zeros(3, 8, dtype=torch.bfloat16, device="meta")}, ValueError, "meta"),
        ({"x": (torch.zeros(3, 8), torch.zeros(3, 1))}, TypeError, "fp8"),
        ({"ids": torch.zeros(3, 2)}, TypeError, "int32 or int64"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"\[3, 2\]"),
        ({"ids": torch.full((3, 2), 4)}, IndexError, "-1 to 3"),
        ({"ids": torch.full((3, 2), -2)}, IndexError, "-2"),
        ({"weights": torch.zeros(3, 2, dtype=torch.float64)}, TypeError, "float32"),
        ({"weights": torch.zeros(3, 1)}, ValueError, r"\[3, 2\]"),
    ],
)
def test_bad_input_is_refused_and_nothing_has_moved(
    bed: Ranks, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    good = {"x": torch.zeros(3, 8, dtype=torch.bfloat16), "ids": torch.zeros(3, 2, dtype=torch.int64), "weights": None}
    given = {**good, **change}
    generation = bed.groups[0].generation
    with pytest.raises(error, match=text):
        bed.groups[0].dispatch(given["x"], given["ids"], given["weights"])
    assert bed.groups[0].generation == generation
    load = Load(bed.config, np.random.default_rng(1), "random")
    bed.each(lambda rank, group: check_round(bed.config, load, rank, group))  # as if nothing had been


def test_bad_results_are_refused(bed: Ranks) -> None:
    load = Load(bed.config, np.random.default_rng(1), "random")

    def work(rank: int, group: ExpertGroup) -> None:
        with pytest.raises(PhaseError, match="in turn"):
            group.combine(torch.zeros(0, 8, dtype=torch.bfloat16))
        got = group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
        with pytest.raises(PhaseError, match="in turn"):
            group.dispatch(load.x[rank], load.ids[rank])
        for y in (torch.zeros(got.x.shape[0] + 1, 8, dtype=torch.bfloat16), torch.zeros(got.x.shape[0], 9).bfloat16()):
            with pytest.raises(ValueError, match="rows of 8"):
                group.combine(y)
        with pytest.raises(TypeError, match="bfloat16"):
            group.combine(torch.zeros(got.x.shape))
        assert same(group.combine(run_experts(bed.config, rank, got)), expected_output(bed.config, load, rank))

    bed.each(work)


@pytest.fixture(scope="module")
def bed() -> Iterator[Ranks]:
    """Two ranks that all tests of bad input share: none of it may do any harm."""
    config = MoeConfig(ranks=2, experts=4, hidden=8, max_tokens=4, top_k=2)
    with SimulatedFabric() as fabric, Ranks(config, lambda rank: [fabric.nic(f"r{rank}")]) as ranks:
        yield ranks


def test_ranks_that_disagree_are_refused_with_both_values() -> None:
    base = MoeConfig(ranks=3, experts=4, hidden=8, max_tokens=4, top_k=2)
    exchange = ThreadExchange(3)
    with SimulatedFabric() as fabric, ThreadPoolExecutor(3) as pool:

        def one(rank: int) -> str:
            with TransferEngine(nics=[fabric.nic(f"r{rank}")]) as engine:
                config = dataclasses.replace(base, hidden=16) if rank == 2 else base
                with pytest.raises(ConfigurationError) as caught:
                    ExpertGroup(engine, config, rank, exchange.of(rank))
                return str(caught.value)

        assert set(pool.map(one, range(3))) == {"ranks disagree: hidden is 8 on rank 0 and 16 on rank 2"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ranks": 0}, "ranks is a whole number"),
        ({"hidden": 1.5}, "hidden"),
        ({"dtype": "int8"}, "bfloat16, float16, float32"),
        ({"layout": "rows"}, "grouped, batched or standard"),
        ({"top_k": True}, "top_k"),
        ({"ranks": 2000}, "at most 1024"),
        ({"slot_rows": -1}, "slot_rows"),
        ({"max_tokens": 1 << 30, "top_k": 8}, "2\\*\\*31"),
    ],
)
def test_a_configuration_that_cannot_be(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        MoeConfig(**{"ranks": 2, "experts": 4, "hidden": 8, "max_tokens": 4, "top_k": 2, **change})
