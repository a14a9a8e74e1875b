"""Fewer bytes between nodes: one copy of a token for each node, fanned out inside it.

The ranks ``i`` of all nodes are a *rail*. A token goes once to each node that holds one of its experts, to the rank on
the sender's rail, with its top-k (layout ``standard``, nodes in place of ranks); that rank passes it on to the ranks
of its node (layout ``grouped``), over shared memory where the engine has it. Combine goes back: each node's experts
are summed inside the node, weighted, and one row per (token, node) crosses the network.

The sum of a node is rounded to the dtype before it travels, so results differ in the last place from
:class:`ExpertGroup`'s; they are the same bits in every run: float32 in the order of top-k inside a node, then float32
over the nodes in the order in which top-k names them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from railwire.engine import TransferEngine
from railwire.errors import ConfigurationError
from railwire.moe.carrying import Dispatched
from railwire.moe.config import MoeConfig
from railwire.moe.group import ExpertGroup
from railwire.moe.rendezvous import Exchange

Tensor = torch.Tensor


def _among(exchange: Exchange, members: Sequence[int]) -> Callable[[bytes], list[bytes]]:
    """The part of an exchange that concerns these ranks; all ranks call it together."""

    def part(data: bytes) -> list[bytes]:
        everything = exchange(data)
        return [everything[rank] for rank in members]

    return part


class NodeGroup:
    """As :class:`ExpertGroup`, with one copy per (token, node) on the network.

    Args:
        engine: of this rank.
        config: of the whole group, layout ``grouped``; ranks ``node * n`` to ``node * n + n - 1`` are one node.
        rank: of this process.
        node_ranks: ranks of a node; divides the ranks, and the experts divide evenly among the ranks.
        exchange: joins all ranks.
        local_engine: carries what stays on the node; None: ``engine``.
        options: as for :class:`ExpertGroup`; ``shrink`` is not supported: a missing rank ends the group.

    Raises:
        ConfigurationError: numbers that do not divide, or ranks that disagree.
    """

    def __init__(
        self,
        engine: TransferEngine,
        config: MoeConfig,
        rank: int,
        node_ranks: int,
        exchange: Exchange,
        *,
        local_engine: TransferEngine | None = None,
        **options: Any,
    ) -> None:
        if node_ranks < 1 or config.ranks % node_ranks:
            raise ConfigurationError(f"{config.ranks} ranks are no whole number of nodes of {node_ranks}")
        if config.experts % config.ranks:
            raise ConfigurationError(f"{config.experts} experts do not divide evenly among {config.ranks} ranks")
        if config.layout != "grouped":
            raise ConfigurationError(f"a group over nodes has the layout grouped, not {config.layout}")
        if options.get("shrink"):
            raise ConfigurationError("a group over nodes does not shrink")
        self.config = config
        self.rank = rank
        nodes = config.ranks // node_ranks
        node, rail = divmod(rank, node_ranks)
        across = dataclasses.replace(config, ranks=nodes, layout="standard", expert_alignment=1)
        within = dataclasses.replace(
            config, ranks=node_ranks, experts=config.experts // nodes, max_tokens=config.max_tokens * nodes
        )
        self.across = ExpertGroup(
            engine, across, node, _among(exchange, range(rail, config.ranks, node_ranks)), **options
        )
        """Between the nodes, on our rail."""
        members = range(node * node_ranks, (node + 1) * node_ranks)
        self.within = ExpertGroup(local_engine or engine, within, rail, _among(exchange, members), **options)
        """Inside our node."""

    def dispatch(
        self, x: Tensor | tuple[Tensor, Tensor], topk_ids: Tensor, topk_weights: Tensor | None = None
    ) -> Dispatched:
        """As :meth:`ExpertGroup.dispatch`. Rows of an expert are ordered by the rail on which they came, then by
        node, then by token. Without weights all are 1."""
        if topk_weights is None:
            topk_weights = torch.ones(topk_ids.shape, dtype=torch.float32, device=topk_ids.device)
        here = self.across.dispatch(x, topk_ids, topk_weights)
        assert here.topk_ids is not None
        tokens = here.x if here.scales is None else (here.x, here.scales)
        return self.within.dispatch(tokens, here.topk_ids, here.topk_weights)

    def combine(self, y: Tensor, out: Tensor | None = None) -> Tensor:
        """As :meth:`ExpertGroup.combine`, with the weights of the dispatch."""
        return self.across.combine(self.within.combine(y), None, out)

    def close(self) -> None:
        """Ends both groups."""
        self.across.close()
        self.within.close()

    def __enter__(self) -> NodeGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
