"""One copy per (token, node): exact against a reference that sums node by node, the same bits twice, fewer bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moe_bed import Load, Ranks, expert, same

from railwire import ConfigurationError
from railwire.moe import ExpertGroup, MoeConfig, NodeGroup
from railwire.moe.kernels.quantise import dequantise, quantise
from railwire.testing import SimulatedFabric


def by_node(config: MoeConfig, load: Load, rank: int, node_experts: int) -> torch.Tensor:
    """The sum that nodes make of a rank's tokens."""
    dtype = getattr(torch, config.dtype)
    x = load.x[rank]
    if config.fp8:
        x = dequantise(*quantise(x)).to(dtype)
    ids, weights = load.ids[rank], load.weights[rank]
    total = torch.zeros(x.shape, dtype=torch.float32)
    for token in range(len(x)):
        named = [int(number) // node_experts for number in ids[token] if number >= 0]
        for node in dict.fromkeys(named):
            part = torch.zeros(config.hidden)
            for j in range(config.top_k):
                number = int(ids[token, j])
                if number >= 0 and number // node_experts == node:
                    part += expert(number, x[token]).to(torch.float32) * weights[token, j]
            total[token] += part.to(dtype).to(torch.float32)
    return total.to(dtype)


@pytest.mark.parametrize("fp8", [False, True])
def test_exact_by_node_and_fewer_bytes(fp8: bool, rng: np.random.Generator) -> None:
    config = MoeConfig(ranks=4, experts=8, hidden=256, max_tokens=12, top_k=4, fp8=fp8)
    fabric = SimulatedFabric(seed=5, reorder=True, max_delay_us=30)
    with fabric, Ranks(config, lambda rank: [fabric.nic(f"r{rank}")]) as ranks:
        groups = ranks.over_nodes(config, 2)
        for turn in range(25):
            load = Load(config, rng, "random" if turn < 5 else None)

            def once(rank: int, _: ExpertGroup, load: Load = load) -> torch.Tensor:
                got = groups[rank].dispatch(load.x[rank], load.ids[rank], load.weights[rank])
                dtype = getattr(torch, config.dtype)
                x = got.x if got.scales is None else dequantise(got.x, got.scales).to(dtype)
                y = torch.zeros(x.shape, dtype=dtype)
                for number, (base, rows) in enumerate(
                    zip(got.rows.bases.tolist(), got.expert_rows.tolist(), strict=True)
                ):
                    y[base : base + rows] = expert(rank * config.local_experts + number, x[base : base + rows])
                return groups[rank].combine(y)

            first, again = ranks.each(once), ranks.each(once)
            for rank in range(config.ranks):
                assert same(first[rank], by_node(config, load, rank, 4)), load.kind
                assert same(first[rank], again[rank])
        load = Load(config, rng, "random")
        before = [sum(group.across.stats["sent_to"]) for group in groups]
        ranks.each(lambda rank, _: once(rank, _, load))
        for rank, group in enumerate(groups):
            g = group.across.geometry
            node = rank // 2
            # The other node gets each token once that names any of its experts.
            owners = torch.where(load.ids[rank] >= 0, load.ids[rank] // 4, -1)
            rows = int((owners == 1 - node).any(1).sum())
            peer = (1 - node) * 2 + rank % 2
            theirs = torch.where(load.ids[peer] >= 0, load.ids[peer] // 4, -1)
            back = int((theirs == node).any(1).sum())
            sent = sum(group.across.stats["sent_to"]) - before[rank]
            assert sent == g.header + rows * g.row + back * g.combine_row
        ranks.pool.map(lambda group: group.close(), groups)


def test_numbers_that_do_not_divide() -> None:
    config = MoeConfig(ranks=4, experts=8, hidden=8, max_tokens=2, top_k=1)
    for other, node, text in [
        (config, 3, "whole number of nodes"),
        (MoeConfig(ranks=4, experts=6, hidden=8, max_tokens=2, top_k=1), 2, "divide evenly"),
        (MoeConfig(ranks=4, experts=8, hidden=8, max_tokens=2, top_k=1, layout="batched"), 2, "grouped"),
    ]:
        with pytest.raises(ConfigurationError, match=text):
            NodeGroup(None, other, 0, node, lambda data: [data])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="does not shrink"):
        NodeGroup(None, config, 0, 2, lambda data: [data], shrink=True)  # type: ignore[arg-type]
