"""A prefill instance as a receiver knows it, once both sides have agreed on a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from railwire.kvcache.geometry.plan import RankPlan
    from railwire.peer import Peer


class Source:
    """One rank of a prefill instance, as a link sees it."""

    def __init__(self, rank: int, peer: Peer, rank_plan: RankPlan, destinations: int) -> None:
        self.rank = rank
        self.peer = peer
        self.plan = rank_plan
        self.destinations = destinations
        """Ranks of our instance that this source rank writes to."""


class Link:
    """A prefill instance that has agreed on a plan with us. Made by ``receiver.connect()``."""

    def __init__(self, instance: str, sources: Sequence[Source]) -> None:
        self.instance = instance
        self.sources = tuple(sources)
        self.unit_tokens = sources[0].plan.unit_tokens

    @property
    def connected(self) -> bool:
        """Whether all of its ranks are there."""
        return all(source.peer.state == "connected" for source in self.sources)

    def __repr__(self) -> str:
        return f"<Link {self.instance}, {len(self.sources)} ranks{'' if self.connected else ', lost'}>"
