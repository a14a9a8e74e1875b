"""Routing between prefill and decode instances: who is there, who gets what, and what happens when one dies. Pure
logic: how bytes get to an instance is the transport's business (``railwire.serve`` has one over HTTP)."""

from railwire.kvcache.router.membership import Member, Members, Membership, MembershipError, MembershipLost, keep
from railwire.kvcache.router.memory import InMemoryMembership
from railwire.kvcache.router.policy import LoadAndPrefix, Policy
from railwire.kvcache.router.router import Attempt, RouteEvent, Router
from railwire.kvcache.router.transport import (
    DecodeEvent,
    DecodeLeg,
    LegFailed,
    NoMembers,
    PrefillLeg,
    RequestRefused,
    RouteFailed,
    RouteRequest,
    Sampling,
    Transport,
)

__all__ = [
    "Attempt",
    "DecodeEvent",
    "DecodeLeg",
    "InMemoryMembership",
    "LegFailed",
    "LoadAndPrefix",
    "Member",
    "Members",
    "Membership",
    "MembershipError",
    "MembershipLost",
    "NoMembers",
    "Policy",
    "PrefillLeg",
    "RequestRefused",
    "RouteEvent",
    "RouteFailed",
    "RouteRequest",
    "Router",
    "Sampling",
    "Transport",
    "keep",
]
