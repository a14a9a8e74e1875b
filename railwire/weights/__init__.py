"""RL weight updates: every trainer rank writes straight into every inference rank.

Start with docs/weights.md. Geometry (what goes where; numpy only): ``placements``, ``tables``, ``matching``,
``cutting``, ``cover``, ``plan``. From torch's tensors to tables: ``memory``, ``source``, ``recording``, ``rules``.
Protocol: ``messages``, and the pure machines ``lead_machine`` and ``receiver_machine``. Shells: ``rendezvous``,
``lead``, ``trainer``, ``receiver`` (its memory: ``landing``); a trainer's work: ``writing``, ``staging``, ``quantize``.
Receivers that give each other what is published: ``peer_plan``, ``catching``, ``giving``, ``exchange``. What imports
torch is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from railwire.weights.errors import (
    PlanError,
    ProofError,
    RecordingError,
    RendezvousError,
    UpdateError,
    WeightsError,
)
from railwire.weights.plan import Plan, compute
from railwire.weights.rendezvous import MemoryStore, RayStore, Rendezvous, tcp_store
from railwire.weights.tables import Held, RankTable

if TYPE_CHECKING:
    from railwire.weights.receiver import Receiver
    from railwire.weights.recording import Destination, record
    from railwire.weights.rules import Rule, llama_rules, rule_loader
    from railwire.weights.source import Box, Source, describe, describe_boxes
    from railwire.weights.trainer import Report, Trainer

_WITH_TORCH = {
    "Receiver": "receiver",
    "Destination": "recording",
    "record": "recording",
    "Rule": "rules",
    "llama_rules": "rules",
    "rule_loader": "rules",
    "Box": "source",
    "Source": "source",
    "describe": "source",
    "describe_boxes": "source",
    "Report": "trainer",
    "Trainer": "trainer",
}


def __getattr__(name: str) -> Any:
    module = _WITH_TORCH.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


__all__ = [
    "Box",
    "Destination",
    "Held",
    "MemoryStore",
    "Plan",
    "PlanError",
    "ProofError",
    "RankTable",
    "RayStore",
    "Receiver",
    "RecordingError",
    "Rendezvous",
    "RendezvousError",
    "Report",
    "Rule",
    "Source",
    "Trainer",
    "UpdateError",
    "WeightsError",
    "compute",
    "describe",
    "describe_boxes",
    "llama_rules",
    "record",
    "rule_loader",
    "tcp_store",
]
