"""The group for CUDA graphs, run in Triton's interpreter by processes that share nothing but the wire: kernels, words
and native actions only. That a captured graph replays is shown on a GPU, by scripts/moe-gpu.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beds import patient
from moe_bed import Load, expected_output, run_experts, same
from processes import Children, State

from railwire import TransferEngine
from railwire.moe import MoeConfig, RankLostError, StoreExchange, reference
from railwire.moe.rows import OutputRows

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

CONFIG = MoeConfig(ranks=2, experts=5, hidden=12, max_tokens=3, top_k=2, dtype="float32")
KINDS = ["random", "empty", "holes", "random"]


def begin(state: State, rank: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    state.rank = rank
    state.engine = TransferEngine(nics=["shm"])


def change_to_tcp(state: State) -> None:
    state.engine.close()
    state.engine = TransferEngine(nics=["tcp://127.0.0.1"])


def meet(state: State, store: str, options: dict[str, Any], timeout: float) -> int:
    from railwire.moe.graph import GraphGroup

    config = dataclasses.replace(CONFIG, **options)
    exchange = StoreExchange(torch.distributed.FileStore(store, -1), state.rank, config.ranks, timeout=60)
    state.group = GraphGroup(state.engine, config, state.rank, exchange, device="cpu", timeout=timeout)
    return int(state.group.registered_bytes)


def layer(state: State, load: Load) -> tuple[Any, torch.Tensor]:
    group, config, rank = state.group, state.group.config, state.rank
    got = group.dispatch(load.x[rank], load.ids[rank])
    seen = State(
        x=got.x, scales=got.scales, expert_rows=got.expert_rows, rows=OutputRows(config, got.counts.numpy().astype(int))
    )
    return got, group.combine(run_experts(config, rank, seen), load.weights[rank])


def layers(state: State, seed: int, number: int) -> list[str]:
    """So many layers, one after the other; returns what differs from the reference."""
    group, config, rank = state.group, state.group.config, state.rank
    rng = np.random.default_rng(seed)
    wrong = []
    for turn in range(number):
        load = Load(config, rng, KINDS[turn % len(KINDS)])
        got, out = layer(state, load)
        group.check()
        want = reference.dispatch(config, rank, load.x, load.ids, load.weights)
        flat = got.x.reshape(-1, config.hidden)[: want.x.shape[0]]
        if got.expert_rows.tolist() != list(want.expert_rows):
            wrong.append(f"{turn} {load.kind}: {got.expert_rows.tolist()} rows, not {want.expert_rows}")
        elif not same(flat[want.valid], want.x[want.valid]):
            wrong.append(f"{turn} {load.kind}: dispatched rows")
        elif not same(out, expected_output(config, load, rank)):
            wrong.append(f"{turn} {load.kind}: results")
    if group.generation != number:
        wrong.append(f"generation {group.generation}, not {number}")
    return wrong


def failure(state: State, seed: int, kind: str) -> tuple[str, str, int]:
    """A layer that must fail: (error, text, rank that is named)."""
    from railwire.moe.errors import MoeError

    load = Load(state.group.config, np.random.default_rng(seed), kind)
    layer(state, load)
    try:
        state.group.check()
    except (RankLostError, ValueError) as error:
        rank = error.rank if isinstance(error, RankLostError) else -1
        with pytest.raises(MoeError, match="make a new one"):
            layer(state, load)
        return type(error).__name__, str(error), rank
    return "", "", -1


def lie(state: State, seed: int) -> None:
    """Sends headers that begin with something else."""
    import railwire.moe.graph as graph

    load = Load(state.group.config, np.random.default_rng(seed), "random")
    graph.MAGIC += 1
    state.group.dispatch_send(load.x[state.rank], load.ids[state.rank])
    graph.MAGIC -= 1


def leave(state: State) -> None:
    state.group.close()


def end(state: State) -> None:
    state.engine.close()


def test_layers_and_failures(children: Children, seed: int, tmp_path: Path) -> None:
    """In one test, as each process takes seconds to import torch and triton."""
    ranks = [children.spawn(f"rank{rank}") for rank in range(3)]
    number = iter(range(100))

    def each(function: Any, *args: Any) -> list[Any]:
        for rank in ranks:
            rank.begin(function, *args)
        return [rank.answer(patient(60)) for rank in ranks]

    def groups(timeout: float, **options: Any) -> None:
        each(meet, str(tmp_path / str(next(number))), options, timeout)

    for i, rank in enumerate(ranks):
        rank.begin(begin, i)
    for rank in ranks:
        rank.answer(patient(60))
    groups(patient(20.0), ranks=3)  # the one in the middle has others before and behind it
    assert each(layers, seed, len(KINDS)) == [[], [], []]
    each(leave)
    ranks.pop().call(end)
    shapes: list[dict[str, Any]] = [
        {"fp8": True, "dtype": "bfloat16", "hidden": 130, "expert_alignment": 4},
        {"layout": "batched", "dtype": "float16", "experts": 4},
    ]
    for options in shapes:
        groups(patient(20.0), **options)
        assert each(layers, seed, len(KINDS)) == [[], []], options
        each(leave)
    # Too much for a slot: the sender says so, or names the other one, which has said so before.
    groups(0.1, slot_rows=1)
    (kind, text, _), (other, _, _) = each(failure, seed, "full")
    assert {kind, other} <= {"ValueError", "RankLostError"} and "ValueError" in (kind, other), (kind, text, other)
    each(leave)
    # A liar.
    groups(0.1)
    ranks[1].begin(lie, seed)
    assert ranks[0].call(failure, seed, "random")[::2] == ("RankLostError", 1)
    ranks[1].answer(30)
    each(leave)
    each(change_to_tcp)
    groups(patient(20.0))
    assert each(layers, seed, len(KINDS)) == [[], []]
    each(leave)
    # One that is late, and one that dies: long before the time-out.
    groups(patient(0.05))
    kind, text, named = ranks[0].call(failure, seed, "random")
    assert (kind, named) == ("RankLostError", 1) and "did not send in time" in text
    each(leave)
    groups(1000.0)
    ranks[0].begin(failure, seed, "random")
    time.sleep(0.2)
    ranks[1].kill()
    kind, text, named = ranks[0].answer(patient(60))
    assert (kind, named) == ("RankLostError", 1)
    ranks[0].call(leave)
    ranks[0].call(end)
