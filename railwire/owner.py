"""What the things that an engine makes need of it: regions, peers, counters, transfers, watched words.

They hold their engine as an :class:`Owner`, so that their modules stand below ``railwire.engine``.
"""

from __future__ import annotations

from typing import Protocol

from railwire import _native
from railwire.nics import NicInfo


class Owner(Protocol):
    """An engine, seen from below. ``TransferEngine`` is one."""

    name: str
    device: str
    liveness: float
    incarnation: bytes
    nics: tuple[NicInfo, ...]
    _native: _native.Engine

    @property
    def closed(self) -> bool: ...

    def _check_open(self) -> None:
        """Raises ClosedError once it is closed."""

    def _check_process(self) -> None:
        """Raises ClosedError in a child of the process whose engine it is."""

    def _check_ours(self, other: object) -> None:
        """Raises ValueError for a peer or a group of another engine."""

    def _peer_name(self, peer_id: int) -> str | None:
        """Of a peer that it knows."""
