"""What an engine says about its NICs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NicInfo:
    """One NIC of an engine."""

    name: str
    """As it can be given to ``nics=`` again."""
    kind: str
    """``tcp``, ``shm``, ``efa``, ``verbs``, ``sim``, ...; NICs of one kind can talk to each other."""
    provider: str
    """The implementation behind it, with its version."""
    library: str
    """Path of its library; empty if none."""
    same_host_only: bool
    completion_proves_landing: bool
    """False: a flush on the link proves it, once per burst."""
    closing_fences: bool
    """Closing our half of a link keeps the peer from writing."""
    max_write_bytes: int
    link_depth: int
    """Work requests a link may have outstanding."""
    max_message_bytes: int
    link_gbps: float
    """Nominal speed in Gbit/s; 0 if unknown."""
