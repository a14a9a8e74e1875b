"""RL weight updates: every trainer rank writes straight into every inference rank.

Geometry (what goes where): ``placements``, ``tables``, ``matching``, ``cutting``, ``cover``, ``plan``; from torch's
tensors to tables: ``memory``, ``source``, ``recording``. Only the latter import torch.
"""

from railwire.weights.errors import PlanError, ProofError, RecordingError, UpdateError, VersionError, WeightsError
from railwire.weights.plan import Plan, compute
from railwire.weights.tables import Held, RankTable

__all__ = [
    "Held",
    "Plan",
    "PlanError",
    "ProofError",
    "RankTable",
    "RecordingError",
    "UpdateError",
    "VersionError",
    "WeightsError",
    "compute",
]
