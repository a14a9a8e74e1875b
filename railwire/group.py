"""Peers that are addressed together."""

from __future__ import annotations

from collections.abc import Sequence

from railwire.memory import MemoryRegion, RegionSlice, RemoteRegion, ScatterTarget
from railwire.peer import Peer
from railwire.prepared import Prepared, Scattering


class PeerGroup:
    """Peers that are addressed together, for scatter() and barrier(). Made by ``engine.peer_group()``."""

    def __init__(self, engine: Scattering, peers: Sequence[Peer]) -> None:
        self._engine = engine
        self.peers = tuple(peers)
        self._natives = [peer._native for peer in self.peers]
        self._index = {peer.incarnation: i for i, peer in enumerate(self.peers)}

    def __len__(self) -> int:
        return len(self.peers)

    def prepare_scatter(
        self,
        src: MemoryRegion | RegionSlice,
        targets: Sequence[ScatterTarget | Peer],
        imm: int | None = None,
        *,
        depth: int = 1,
    ) -> Prepared:
        """A scatter that is posted again and again, each time with other offsets and lengths (MoE dispatch, for one).

        Args:
            src: the memory that all posts read from.
            targets: the memory that each may write to: ``dst`` of a :class:`ScatterTarget`. A peer of the group in
                its place gets immediates only, as from a barrier. One peer may have several targets.
            imm: the immediate that the table begins with; each target may get another one.
            depth: slots of the table, for whoever fills one while another is read.

        Raises:
            ValueError: a target of a peer outside the group.
            ClosedError, DescriptorError, IndexError: at the call.
        """
        return Prepared(self, src, targets, imm, depth)

    def _member(self, target: RemoteRegion | Peer) -> int:
        """Which of the peers that is, or to whom the memory belongs."""
        index = self._index.get(target.incarnation)
        own = target if isinstance(target, Peer) else target.peer
        if index is None or own not in (None, self.peers[index]):
            raise ValueError(f"{target!r} belongs to no peer of the group")
        return index
