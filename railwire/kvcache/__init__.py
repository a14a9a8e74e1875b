"""KV-cache transfer for disaggregated inference: layouts and plans; tickets on the decode side, pushes on the other.

Start with :class:`Receiver` and :class:`Sender`. What may be relied on: docs/kvcache.md.
"""

from railwire.kvcache.errors import (
    ChecksumMismatch,
    PushAborted,
    PushCancelled,
    PushError,
    TicketCancelled,
    TicketError,
    TicketFailed,
)
from railwire.kvcache.geometry.builders import mla_instance, mla_layout, paged_instance, paged_layout
from railwire.kvcache.geometry.checksum import destination_sums, source_sums
from railwire.kvcache.geometry.layout import Component, InstanceLayout, LayerStorage, LayoutError, RankLayout, Storage
from railwire.kvcache.geometry.plan import RankPlan, plan
from railwire.kvcache.graph import LayerWatcher
from railwire.kvcache.link import Link
from railwire.kvcache.protocol.descriptor import RankDescriptor
from railwire.kvcache.push import Push
from railwire.kvcache.receiver import Receiver
from railwire.kvcache.sender import Sender
from railwire.kvcache.slots import SlotsExhausted
from railwire.kvcache.ticket import Arrival, Ticket

__all__ = [
    "Arrival",
    "ChecksumMismatch",
    "Component",
    "InstanceLayout",
    "LayerStorage",
    "LayerWatcher",
    "LayoutError",
    "Link",
    "Push",
    "PushAborted",
    "PushCancelled",
    "PushError",
    "RankDescriptor",
    "RankLayout",
    "RankPlan",
    "Receiver",
    "Sender",
    "SlotsExhausted",
    "Storage",
    "Ticket",
    "TicketCancelled",
    "TicketError",
    "TicketFailed",
    "destination_sums",
    "mla_instance",
    "mla_layout",
    "paged_instance",
    "paged_layout",
    "plan",
    "source_sums",
]
