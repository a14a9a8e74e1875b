"""Dispatch and combine between processes, on every kind of NIC: tcp and shm here, and what --nic says, such as verbs in
the machine of scripts/test-rxe.sh."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beds import patient
from moe_bed import Load, check_round
from processes import Children, State

from railwire import TransferEngine
from railwire.moe import ExpertGroup, MoeConfig, StoreExchange


def join(state: State, config: MoeConfig, rank: int, nic: str, store: str) -> None:
    """In a child: becomes a rank."""
    state.engine = TransferEngine(nics=[nic])
    exchange = StoreExchange(torch.distributed.FileStore(store, config.ranks), rank, config.ranks, timeout=patient(60))
    state.group = ExpertGroup(state.engine, config, rank, exchange)


def play(state: State, seed: int, number: int) -> int:
    """In a child: so many rounds. Returns how many second rounds it has granted."""
    group = state.group
    rng = np.random.default_rng(seed)
    for _ in range(number):
        check_round(group.config, Load(group.config, rng), group.rank, group)
    return group.stats["second_rounds"]


def leave(state: State) -> None:
    state.group.close()
    state.engine.close()


def test_bitwise_between_processes(nic: str, children: Children, seed: int, tmp_path: Path) -> None:
    base = MoeConfig(ranks=3, experts=10, hidden=64, max_tokens=16, top_k=3, slot_rows=4, overflow_rows=8)
    ranks = [children.spawn(f"rank{rank}") for rank in range(base.ranks)]

    def each(function: Any, *args: Any) -> list[Any]:
        for number, child in enumerate(ranks):
            child.begin(function, *(arg(number) if callable(arg) else arg for arg in args))
        return [child.answer(patient(60)) for child in ranks]

    for layout in ("grouped", "standard"):
        each(join, dataclasses.replace(base, layout=layout), lambda rank: rank, nic, str(tmp_path / layout))
        assert sum(each(play, seed, 30)) > 0
        each(leave)
