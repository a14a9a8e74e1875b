"""The protocol alone: every order of delivery, every moment of a death, and what the tuning does."""

from __future__ import annotations

import random

import numpy as np
import pytest
from moe_machines import World

from railwire.moe import MoeConfig, PhaseError
from railwire.moe.actions import Fence, Phase, Plan
from railwire.moe.geometry import Geometry, Header, HeaderError
from railwire.moe.membership import agree
from railwire.moe.protocol import Machine
from railwire.moe.tuning import SlotTuner


def small(pick: random.Random, ranks: int) -> MoeConfig:
    return MoeConfig(
        ranks=ranks, experts=pick.randint(1, 2 * ranks + 1), hidden=pick.choice([1, 4]), max_tokens=pick.randint(1, 6),
        top_k=pick.randint(1, 3), dtype="float32", slot_rows=pick.choice([0, 0, 1, 3]),
        overflow_rows=pick.choice([0, 1, 2]),
    )  # fmt: skip


def test_every_order_of_delivery(seed: int) -> None:
    """1,500 generations of random size, skew and order."""
    pick = random.Random(seed)
    for run in range(300):
        ranks = pick.randint(1, 5)
        world = World(small(pick, ranks), seed + run)
        world.play({n: [world.random_bins() for _ in range(5)] for n in range(ranks)})
        for number in range(ranks):
            machine = world.ranks[number].machine
            assert machine.phase is Phase.IDLE and machine.generation == 5 and not machine.awaiting, run
        assert not world.flying


def test_a_rank_dies_or_is_given_up_at_any_moment(seed: int) -> None:
    """Survivors end every generation, and agree on who is gone."""
    pick = random.Random(seed)
    faults = 0
    for run in range(150):
        ranks = pick.randint(3, 5)
        world = World(small(pick, ranks), seed + run)
        loads = {n: [world.random_bins() for _ in range(6)] for n in range(ranks)}
        world.play(loads, faults=pick.choice([0.003, 0.02, 0.1]), most=pick.randint(1, 2))
        alive = world.alive
        for number in alive:
            machine = world.ranks[number].machine
            assert machine.phase is Phase.IDLE and not machine.awaiting, (run, number, machine.phase)
            assert machine.generation == 6
        # One more, in peace: what each knows reaches all.
        world.play({n: [world.random_bins()] for n in range(ranks)}, faults=1e-9, most=0)
        masks = {world.ranks[number].machine.masked for number in world.alive}
        assert len(masks) <= 1, run
        if masks:
            gone = masks.pop()
            assert gone.isdisjoint(world.alive) and gone | set(world.alive) == set(range(ranks)), run
            faults += bool(gone)
    assert faults > 60


def test_calls_out_of_turn_change_nothing() -> None:
    geometry = Geometry(MoeConfig(ranks=2, experts=2, hidden=4, max_tokens=4, top_k=1))
    machine = Machine(geometry, 0)
    with pytest.raises(PhaseError, match="in turn"):
        machine.combine()
    machine.dispatch([1, 1], np.array([1]))
    before = set(machine.awaiting)
    for call in (lambda: machine.dispatch([1, 1], np.array([1])), machine.combine):
        with pytest.raises(PhaseError):
            call()
    assert machine.awaiting == before and machine.generation == 1
    assert machine.overflow(1) == [] and machine.grant(1, 1, 0, 1) == [] and machine.combined(1) == []


def test_a_grant_that_no_honest_rank_gives() -> None:
    config = MoeConfig(ranks=2, experts=2, hidden=4, max_tokens=8, top_k=1, slot_rows=2)
    for generation, offset, rows in [(2, 0, 1), (1, 0, 0), (1, 0, 7), (1, -1, 1), (1, 8, 1), (1, 1 << 62, 1)]:
        machine = Machine(Geometry(config), 0)
        machine.dispatch([0, 8], np.array([0]))
        machine.grant(1, generation, offset, rows)
        assert machine.masked == {1}


def test_headers_from_liars() -> None:
    g = Geometry(MoeConfig(ranks=3, experts=5, hidden=4, max_tokens=8, top_k=2))
    counts = np.array([[3, 1], [0, 2], [4, 0]])
    words = g.encode_headers(7 << 33, counts.sum(axis=1), np.array([0, 4, 6]), 3, frozenset({1}), counts)
    header = g.decode_header(words[2], 2)
    assert (header.generation, header.rows, header.segment, header.masked) == (7 << 33, 4, 6, {1})
    assert header.counts.tolist() == [4, 0]
    for word, value in [(0, 1), (3, 5), (4, 14), (5, 0), (5, 1 << 20), (8, 1 << 3), (9, 1 << 31), (10, 1)]:
        bad = words[2].copy()
        bad[word] = value
        with pytest.raises(HeaderError):
            g.decode_header(bad, 2)


def test_ranks_that_hear_the_same_agree() -> None:
    assert agree((), {0: frozenset(), 1: frozenset({2}), 3: frozenset({2})}) == {2}
    assert agree((), {0: frozenset({1}), 1: frozenset({0}), 2: frozenset()}) == {1}  # the lower one stays
    assert agree({0}, {0: frozenset({2}), 1: frozenset()}) == {0}  # who is out has no say


def test_an_accusation_in_a_header_counts_before_the_rows_do() -> None:
    g = Geometry(MoeConfig(ranks=3, experts=3, hidden=4, max_tokens=4, top_k=1))
    machine = Machine(g, 0)
    machine.dispatch([1, 1, 1], np.array([1]))

    def header(masked: frozenset[int]) -> Header:
        return Header(1, 1, 0, 2, masked, np.array([1]))

    assert machine.header(2, header(frozenset())) == []
    fence, plan, *take = machine.header(1, header(frozenset({2})))
    assert isinstance(fence, Fence) and fence.rank == 2 and machine.masked == {2} and machine.unfenced == {2}
    assert isinstance(plan, Plan) and plan.counts.tolist() == [[1], [1], [0]]
    assert [action.rank for action in take] == [0, 1] and machine.phase is Phase.EXPERTS
    accused = Machine(g, 2)
    accused.dispatch([1, 1, 1], np.array([1]))
    accused.header(0, header(frozenset()))
    assert accused.header(1, header(frozenset({2}))) == [] and accused.phase is Phase.OUT


def test_slots_follow_the_load() -> None:
    rng = np.random.default_rng(1)
    tuner = SlotTuner(36, 200)
    for _ in range(300):
        tuner.observe(rng.poisson(16, 63).astype(np.int64))
    assert 28 <= tuner.rows <= 40  # 16 + 4.5 * 4 = 34
    over = sum(int((rng.poisson(16, 63) > tuner.rows).sum()) for _ in range(300))
    assert over / (300 * 63) < 0.001
    for _ in range(40):
        tuner.observe(rng.poisson(100, 63).astype(np.int64))
    assert tuner.rows > 110
    for _ in range(300):
        tuner.observe(rng.poisson(2, 63).astype(np.int64))
    assert tuner.rows < 20


def test_memory_of_a_real_group() -> None:
    """EP64, T = 128, H = 7168, fp8: the peers register 1.4 to 1.9 GB."""
    g = Geometry(MoeConfig(ranks=64, experts=256, hidden=7168, max_tokens=128, top_k=8, fp8=True))
    assert g.row == 7168 + 224 and g.combine_row == 14336
    assert g.first_slot_rows == 36
    assert g.registered_bytes < 75e6
