"""Waiting for peers that connect to us: only one of two sides connects, so no two connections cross."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from railwire.weights.errors import RendezvousError

if TYPE_CHECKING:
    from railwire.engine import TransferEngine
    from railwire.peer import Peer


def await_peers(engine: TransferEngine, incarnations: Iterable[str], timeout: float) -> dict[str, Peer]:
    """The peers of these incarnations (hex), once they have connected.

    Raises:
        RendezvousError: some have not within ``timeout`` seconds.
    """
    wanted = set(incarnations)
    deadline = time.monotonic() + timeout
    while True:
        found = {peer.incarnation.hex(): peer for peer in engine.peers}
        missing = wanted - found.keys()
        if not missing:
            return {key: found[key] for key in wanted}
        if time.monotonic() > deadline:
            raise RendezvousError(
                f"{len(missing)} of {len(wanted)} have not connected within {timeout:g} s, engine "
                f"{min(missing)[:8]} among them"
            )
        time.sleep(0.01)
