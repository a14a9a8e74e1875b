"""A rank that dies, is late or lies: named in milliseconds, masked, fenced; the others go on, agree, take it back."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beds import patient
from moe_bed import Load, Ranks, ThreadExchange, expected_output, run_experts, same
from processes import Children, State

from railwire import TransferEngine
from railwire.moe import ExpertGroup, MaskedOutError, MoeConfig, RankLostError, StoreExchange
from railwire.testing import SimulatedFabric

CONFIG = MoeConfig(ranks=4, experts=8, hidden=16, max_tokens=8, top_k=3, dtype="float32", slot_rows=3, overflow_rows=4)
GONE = frozenset({2})


def round_without(config: MoeConfig, load: Load, rank: int, group: ExpertGroup, gone: frozenset[int]) -> None:
    """One generation in which ``gone`` are masked from the start."""
    got = group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
    assert got.masked == gone and not got.counts[sorted(gone)].any()
    assert same(group.combine(run_experts(config, rank, got)), expected_output(config, load, rank, gone))


@contextlib.contextmanager
def simulated(**options: Any) -> Iterator[tuple[SimulatedFabric, Ranks]]:
    fabric = SimulatedFabric(seed=1, reorder=True, max_delay_us=50)
    with fabric, Ranks(CONFIG, lambda rank: [fabric.nic(f"r{rank}")], **options) as ranks:
        yield fabric, ranks


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("dispatch_send", "random"),
        ("dispatch_receive", "random"),
        ("dispatch_receive", "one"),  # in the overflow round: all rows are for one rank, slots and overflow are small
        ("dispatch_receive", "hot"),
        ("combine_send", "random"),
        ("combine_receive", "random"),
    ],
)
def test_a_late_rank_is_masked_and_comes_back(step: str, kind: str, rng: np.random.Generator) -> None:
    """It stops calling before each step in turn. The others are rid of it after the time-out, also in memory."""
    timeout = patient(0.15)
    with simulated(timeout=timeout, shrink=True) as (_, ranks):
        loads = [Load(CONFIG, rng, kind if i == 1 else "random") for i in range(6)]

        def work(rank: int, group: ExpertGroup) -> float:
            round_without(CONFIG, loads[0], rank, group, frozenset())
            load = loads[1]
            if rank == 2:
                if step != "dispatch_send":
                    group.dispatch_send(load.x[2], load.ids[2], load.weights[2])
                if step in ("combine_send", "combine_receive"):
                    got = group.dispatch_receive()
                if step == "combine_receive":
                    group.combine_send(run_experts(CONFIG, 2, got))
                return 0.0
            began = time.monotonic()
            got = group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
            out = group.combine(run_experts(CONFIG, rank, got))
            took = time.monotonic() - began
            full = expected_output(CONFIG, load, rank)
            without = expected_output(CONFIG, load, rank, GONE)
            assert same(out, full) or same(out, without)
            if step == "combine_receive":
                assert same(out, full)
            for load in loads[2:4]:
                got = group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
                out = group.combine(run_experts(CONFIG, rank, got))
            assert group.masked == GONE and 2 in group.reasons
            assert same(out, expected_output(CONFIG, loads[3], rank, GONE))
            return took

        took = ranks.each(work)
        assert max(took) < timeout * 3 + patient(2)  # one wait, and a fence
        late = ranks.groups[2]

        def goes_on() -> None:
            if step == "dispatch_receive":
                late.combine(run_experts(CONFIG, 2, late.dispatch_receive()))
            elif step == "combine_send":
                late.combine(run_experts(CONFIG, 2, late.last))
            elif step == "combine_receive":
                late.combine_receive()
            for load in loads[2:]:
                late.dispatch(load.x[2], load.ids[2], load.weights[2])
                late.combine(run_experts(CONFIG, 2, late.last))

        with pytest.raises(MaskedOutError, match="rank 2"):
            goes_on()
        exchange = ThreadExchange(4)

        def again(rank: int, group: ExpertGroup) -> int:
            group.reform(exchange.of(rank))
            for load in loads[4:]:
                round_without(CONFIG, load, rank, group, frozenset())
            return group.generation

        assert len(set(ranks.each(again))) == 1


def test_two_ranks_one_after_the_other_while_slots_change(rng: np.random.Generator) -> None:
    """Slots follow the load. A rank stops in a dispatch, a second one in a combine; three agree, and take both back."""
    config = MoeConfig(ranks=5, experts=10, hidden=16, max_tokens=24, top_k=3, dtype="float32", overflow_rows=8)
    timeout = patient(0.15)
    fabric = SimulatedFabric(seed=2, reorder=True, max_delay_us=50)
    with fabric, Ranks(config, lambda rank: [fabric.nic(f"r{rank}")], timeout=timeout, shrink=True) as ranks:
        kinds = ["few", "few", "one", "hot", "random", "few", "one", "random", "random"]
        loads = [Load(config, rng, kind) for kind in kinds]
        stops = {4: (2, "dispatch"), 3: (5, "combine")}  # rank: (generation, from 0; in which half)
        final = frozenset(stops)

        def work(rank: int, group: ExpertGroup) -> tuple[frozenset[int], float, set[int]]:
            slowest, sizes = 0.0, set()
            for turn, load in enumerate(loads[:8]):
                began = time.monotonic()
                if rank in stops and turn == stops[rank][0]:
                    group.dispatch_send(load.x[rank], load.ids[rank], load.weights[rank])
                    if stops[rank][1] == "combine":
                        group.dispatch_receive()
                    return group.masked, 0.0, sizes
                got = group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
                out = group.combine(run_experts(config, rank, got))
                slowest = max(slowest, time.monotonic() - began)
                sizes.add(group._machine.slot_rows)
                masks = [frozenset(), frozenset({4}), final]
                assert any(same(out, expected_output(config, load, rank, gone)) for gone in masks), (turn, load.kind)
            assert same(out, expected_output(config, load, rank, final))
            return group.masked, slowest, sizes

        done = ranks.each(work)
        assert [masked for masked, _, _ in done[:3]] == [final] * 3
        assert max(slowest for _, slowest, _ in done) < timeout * 3 + patient(2)
        assert all(len(sizes) > 1 for _, _, sizes in done[:3])
        for rank, (turn, half) in stops.items():

            def goes_on(group: ExpertGroup, load: Load, half: str) -> None:
                got = group.dispatch_receive() if half == "dispatch" else group.last
                group.combine(run_experts(config, group.rank, got))
                group.dispatch(load.x[group.rank], load.ids[group.rank], load.weights[group.rank])

            with pytest.raises(MaskedOutError, match=f"rank {rank}"):
                goes_on(ranks.groups[rank], loads[turn], half)
        exchange = ThreadExchange(5)

        def again(rank: int, group: ExpertGroup) -> frozenset[int]:
            group.reform(exchange.of(rank))
            round_without(config, loads[8], rank, group, frozenset())
            return group.masked

        assert ranks.each(again) == [frozenset()] * 5


def test_without_shrink_the_rank_is_named(rng: np.random.Generator) -> None:
    load = Load(CONFIG, rng, "random")
    with simulated(timeout=patient(0.1)) as (_, ranks):

        def work(rank: int, group: ExpertGroup) -> None:
            if rank == 1:
                return
            with pytest.raises(RankLostError, match=r"rank 1 \(rank1\) is missing in generation 1: .* ms") as caught:
                group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
            assert caught.value.rank == 1
            with pytest.raises(MaskedOutError):
                group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])

        ranks.each(work)


def test_who_waits_is_not_blamed(rng: np.random.Generator) -> None:
    """Rank 0 hears rank 2, rank 1 does not: what rank 1 sends is late by the whole time-out, and yet it stays."""
    load = Load(CONFIG, rng, "random")
    with simulated(timeout=patient(0.3), shrink=True) as (fabric, ranks):
        fabric.partition("r2", "r1")

        def work(rank: int, group: ExpertGroup) -> frozenset[int]:
            try:
                for _ in range(3):
                    got = group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
                    group.combine(run_experts(CONFIG, rank, got))
            except MaskedOutError:
                return frozenset({-1})
            return group.masked

        masks = ranks.each(work)
        # 1 and 2 accuse each other, and the lower one stays.
        assert [masks[0], masks[1], masks[3]] == [GONE] * 3 and masks[2] == {-1}


def test_a_liar_is_masked(rng: np.random.Generator) -> None:
    load = Load(CONFIG, rng, "random")
    with simulated(timeout=5.0, shrink=True) as (_, ranks):
        honest = ranks.groups[3].geometry.encode_headers

        def lie(*args: Any) -> Any:
            words = honest(*args)
            words[:, 3] += 1
            return words

        object.__setattr__(ranks.groups[3].geometry, "encode_headers", lie)

        def once(rank: int, group: ExpertGroup) -> None:
            got = group.dispatch(load.x[rank], load.ids[rank], load.weights[rank])
            group.combine(run_experts(CONFIG, rank, got))

        def work(rank: int, group: ExpertGroup) -> str:
            if rank == 3:
                with pytest.raises(MaskedOutError):
                    once(rank, group)
                return ""
            once(rank, group)
            return group.reasons[3]

        reasons = ranks.each(work)[:3]
        assert all("what it sent is wrong" in reason or "goes on without" in reason for reason in reasons)


def join(state: State, rank: int, store: str, present: list[int]) -> None:
    state.engine = TransferEngine(nics=["tcp://127.0.0.1"])
    exchange = StoreExchange(torch.distributed.FileStore(store, -1), rank, 3, timeout=60)
    config = MoeConfig(ranks=3, experts=6, hidden=16, max_tokens=8, top_k=2, dtype="float32")
    state.group = ExpertGroup(state.engine, config, rank, exchange, timeout=patient(10), shrink=True)


def reform(state: State, rank: int, store: str) -> None:
    state.group.reform(StoreExchange(torch.distributed.FileStore(store, -1), rank, 3, timeout=60))


def play(state: State, seed: int, number: int, gone: list[int]) -> tuple[float, list[int]]:
    """So many rounds; returns how long the first took, and the mask."""
    group = state.group
    rng = np.random.default_rng(seed)
    took = 0.0
    for turn in range(number):
        load = Load(group.config, rng, "random")
        began = time.monotonic()
        got = group.dispatch(load.x[group.rank], load.ids[group.rank], load.weights[group.rank])
        out = group.combine(run_experts(group.config, group.rank, got))
        took = took or time.monotonic() - began
        if turn:  # in the first a rank may die in the middle
            assert same(out, expected_output(group.config, load, group.rank, frozenset(gone)))
    return took, sorted(group.masked)


def hurry(state: State, timeout: float) -> None:
    """A shorter time-out from now on."""
    state.group.timeout = timeout


def is_out(state: State, seed: int) -> bool:
    try:
        play(state, seed, 1, [])
    except MaskedOutError:
        return True
    return False


def leave(state: State) -> None:
    state.group.close()
    state.engine.close()


def test_a_killed_process_is_replaced(children: Children, seed: int, tmp_path: Path) -> None:
    """Its death is known long before the time-out of 10 s; a new process takes its place."""
    ranks = [children.spawn(f"rank{rank}") for rank in range(3)]
    spare = children.spawn("spare")

    def each(which: list[int], function: Callable[..., Any], args: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        for rank in which:
            ranks[rank].begin(function, *args(rank))
        return [ranks[rank].answer(60) for rank in which]

    each([0, 1, 2], join, lambda rank: (rank, str(tmp_path / "a"), [0, 1, 2]))
    each([0, 1, 2], play, lambda rank: (seed, 5, []))
    for rank in (0, 2):
        ranks[rank].begin(play, seed + 1, 5, [1])
    ranks[1].kill()
    took = []
    for rank in (0, 2):
        seconds, masked = ranks[rank].answer(60)
        assert masked == [1]
        took.append(seconds)
    assert max(took) < patient(5)
    ranks[1] = spare
    for rank in (0, 2):
        ranks[rank].begin(reform, rank, str(tmp_path / "b"))
    spare.begin(join, 1, str(tmp_path / "b"), [0, 1, 2])
    for rank in (0, 2, 1):
        ranks[rank].answer(60)
    assert [masked for _, masked in each([0, 1, 2], play, lambda rank: (seed + 2, 5, []))] == [[], [], []]
    # One that is stopped looks alive to its connection: it is late.
    each([0, 1, 2], hurry, lambda rank: (patient(0.3),))
    ranks[1].stop()
    took = []
    for seconds, masked in each([0, 2], play, lambda rank: (seed + 3, 3, [1])):
        assert masked == [1]
        took.append(seconds)
    assert max(took) < patient(2)
    ranks[1].signal(signal.SIGCONT)
    assert ranks[1].call(is_out, seed + 3)
    for rank in (0, 2, 1):
        ranks[rank].begin(reform, rank, str(tmp_path / "c"))
    for rank in (0, 2, 1):
        ranks[rank].answer(60)
    assert [masked for _, masked in each([0, 1, 2], play, lambda rank: (seed + 4, 3, []))] == [[], [], []]
    each([0, 1, 2], leave, lambda rank: ())
