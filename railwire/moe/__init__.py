"""Mixture-of-experts dispatch and combine between the ranks of an expert-parallel group.

config, geometry, rows    what is where
protocol, actions, lending, membership, tuning    pure machines: what happens next
kernels/                  packing, unpacking, reducing: torch and triton
meeting, wires            an engine's memory, connections and immediates
carrying, waiting, fencing, driving, group    the shell: :class:`ExpertGroup`
graph                     the same without a host in it, for CUDA graphs: :class:`~railwire.moe.graph.GraphGroup`
nodes                     one copy per (token, node): two groups, across nodes and within
reference                 the same in one process, plainly: what everything is compared with
"""

from railwire.moe.carrying import Dispatched
from railwire.moe.config import MoeConfig
from railwire.moe.errors import MaskedOutError, MoeError, PhaseError, RankLostError
from railwire.moe.geometry import Geometry
from railwire.moe.group import ExpertGroup
from railwire.moe.nodes import NodeGroup
from railwire.moe.rendezvous import Exchange, GroupExchange, StoreExchange

__all__ = [
    "Dispatched",
    "Exchange",
    "ExpertGroup",
    "Geometry",
    "GroupExchange",
    "MaskedOutError",
    "MoeConfig",
    "MoeError",
    "NodeGroup",
    "PhaseError",
    "RankLostError",
    "StoreExchange",
]
