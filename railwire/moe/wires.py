"""The registered memory of a group and its way to the other ranks: who writes what where, and with which immediate.

What goes to all ranks (slots, results) is a prepared scatter: its table says what each one gets, and one call into the
engine posts all of it, when the CUDA stream that fills the memory has come so far. What goes to one (grants, overflow
rows) is a write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from railwire.engine import TransferEngine
from railwire.errors import FenceError, RailwireError
from railwire.memory import MemoryRegion, ScatterTarget
from railwire.moe.actions import Wait
from railwire.moe.geometry import (
    GRANT_BYTES,
    GRANT_MAGIC,
    MASKED_MAGIC,
    Geometry,
    decode_grant,
    encode_grant,
)
from railwire.moe.meeting import Remote, meet
from railwire.moe.rendezvous import Exchange
from railwire.prepared import DESTINATION, IMMEDIATE, LENGTH, NO_IMMEDIATE, SOURCE, Prepared
from railwire.transfer import Expectation, Fence, Transfer

GENERATIONS = 4  # that have immediates of their own; two are in use at most
BEAT_BYTES = 16
_FOREVER = 1e6
_DISPATCH, _COMBINE = range(2)  # the regions that a rank offers


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank gets of a scatter: ``nbytes`` from ``start`` of our region, to ``at`` of its."""

    rank: int
    start: int
    at: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Sent:
    """A write that may be under way, and whom it goes to."""

    transfer: Transfer
    ranks: Sequence[int]


class Wires:
    """Regions, connections, immediates and fences of one rank.

    Args:
        allocate: makes the memory of a region.
        after: what a write waits for: the CUDA stream that fills its memory, or None.
    """

    def __init__(
        self,
        engine: TransferEngine,
        geometry: Geometry,
        rank: int,
        allocate: Callable[[int], Any],
        after: Callable[[], Any],
    ) -> None:
        self.engine = engine
        self.geometry = geometry
        self.rank = rank
        self._after = after
        ranks = geometry.config.ranks
        self._beats_at = geometry.dispatch_region
        sizes = (
            geometry.dispatch_send_region + BEAT_BYTES,
            geometry.dispatch_region + ranks * BEAT_BYTES,
            geometry.combine_send_region,
            geometry.combine_region,
        )
        self.buffers = [allocate(size) for size in sizes]
        self.dispatch_send, self.dispatch_recv, self.combine_send, self.combine_recv = self.buffers
        self._regions: list[MemoryRegion] = [engine.register(buffer) for buffer in self.buffers]
        self._send, self._recv, self._combine_send, self._combine_recv = self._regions
        self._first_imm = engine.new_imms(len(Wait) * GENERATIONS * ranks)
        self._remotes: dict[int, Remote] = {}
        self._scatters: tuple[Prepared, ...] = ()
        self._columns: dict[int, int] = {}
        self._beat = 0
        self.dispatching: list[Sent] = []
        """Writes out of the dispatch send region that may be under way."""
        self.combining: list[Sent] = []
        """Writes out of the combine send region that may be under way."""

    # ---- connecting --------------------------------------------------------------------------------------------------
    def meet(self, exchange: Exchange, generation: int, timeout: float) -> tuple[int, frozenset[int]]:
        """Tells all ranks about this one, connects to all that are there, and returns when all are connected.

        Returns:
            The highest generation of all, and the ranks that are not there.

        Raises:
            ConfigurationError: the ranks disagree, or one is not who it should be.
            ConnectError: one cannot be reached.
        """
        config = self.geometry.config
        self._remotes, generation = meet(
            self.engine, exchange, config, self.rank, [self._recv, self._combine_recv], self._first_imm, generation,
            timeout, self._begin,
        )  # fmt: skip
        ranks = sorted(self._remotes)
        self._columns = {rank: column for column, rank in enumerate(ranks)}
        group = self.engine.peer_group([self._remotes[rank].peer for rank in ranks])
        self._scatters = tuple(
            group.prepare_scatter(source, [ScatterTarget(0, self._remotes[rank].regions[kind]) for rank in ranks])
            for kind, source in ((_DISPATCH, self._send), (_COMBINE, self._combine_send))
        )
        return generation, frozenset(range(config.ranks)) - self._remotes.keys() - {self.rank}

    def _begin(self) -> None:
        """All are connected, and nobody writes yet."""
        for number in range(len(Wait) * GENERATIONS * self.geometry.config.ranks):
            self.engine.counter(self._first_imm + number).reset()
        grants = self.geometry.config.ranks * GRANT_BYTES
        self.dispatch_recv[:grants] = 0
        self.dispatch_recv[self._beats_at :] = 0
        self._beat = 0
        self.dispatching.clear()
        self.combining.clear()

    def peer_name(self, rank: int) -> str:
        remote = self._remotes.get(rank)
        return remote.peer.name if remote else f"rank {rank}"

    def failed(self, ranks: Iterable[int], error: RailwireError) -> list[int]:
        """Those of the ranks to which a write that ended so has failed."""
        name = getattr(error, "peer", None)
        return [
            rank
            for rank in ranks
            if self._remotes[rank].peer.state != "connected" or self._remotes[rank].peer.name == name
        ]

    # ---- writing -----------------------------------------------------------------------------------------------------
    def scatter_slots(self, pieces: Sequence[Piece], generation: int) -> None:
        """Writes to the dispatch regions of these ranks, all at once."""
        self._scatter(_DISPATCH, pieces, Wait.HEADER, generation, self.dispatching)

    def scatter_results(self, pieces: Sequence[Piece], generation: int) -> None:
        """Writes to the combine regions of these ranks, all at once."""
        self._scatter(_COMBINE, pieces, Wait.COMBINED, generation, self.combining)

    def _scatter(self, kind: int, pieces: Sequence[Piece], wait: Wait, generation: int, sent: list[Sent]) -> None:
        if not pieces:
            return
        prepared = self._scatters[kind]
        table = prepared.table[0]
        table[:, LENGTH] = 0
        table[:, IMMEDIATE] = NO_IMMEDIATE
        columns = [self._columns[piece.rank] for piece in pieces]
        rows = np.empty((len(pieces), 4), np.uint64)
        rows[:, SOURCE] = [piece.start for piece in pieces]
        rows[:, DESTINATION] = [piece.at for piece in pieces]
        rows[:, LENGTH] = [piece.nbytes for piece in pieces]
        rows[:, IMMEDIATE] = [
            self._imm(self._remotes[piece.rank].first_imm, wait, generation, self.rank) for piece in pieces
        ]
        table[columns] = rows
        sent.append(Sent(prepared.post(after=self._after()), [piece.rank for piece in pieces]))

    def send_rows(self, rank: int, start: int, at: int, nbytes: int, wait: Wait, generation: int) -> None:
        """Writes bytes of the dispatch send region to the dispatch region of one rank."""
        remote = self._remotes[rank]
        transfer = self.engine.write(
            self._send[start : start + nbytes],
            remote.regions[_DISPATCH][at : at + nbytes],
            self._imm(remote.first_imm, wait, generation, self.rank),
            after=self._after(),
        )
        self.dispatching.append(Sent(transfer, [rank]))

    def send_grant(self, rank: int, generation: int, offset: int, rows: int) -> None:
        """Lends overflow rows."""
        start = self.geometry.own_grant(rank)
        self._put(start, encode_grant(GRANT_MAGIC, generation, offset, rows))
        self.send_rows(rank, start, self.geometry.grant(self.rank), GRANT_BYTES, Wait.GRANT, generation)

    def read_grant(self, rank: int) -> tuple[int, int, int, int]:
        """The record that ``rank`` has written here."""
        at = self.geometry.grant(rank)
        return decode_grant(host_bytes(self.dispatch_recv[at : at + GRANT_BYTES]))

    def is_masked_by(self, rank: int) -> bool:
        """True if ``rank`` has said that it goes on without us."""
        return self.read_grant(rank)[0] == MASKED_MAGIC

    def beat(self, ranks: list[int]) -> None:
        """Tells these ranks that this one is alive and waits for somebody."""
        self._beat += 1
        start = self.geometry.dispatch_send_region
        self._put(start, np.array([self._beat, 0], np.uint64).view(np.uint8))
        at = self._beats_at + self.rank * BEAT_BYTES
        for rank in ranks:
            try:
                self.engine.write(
                    self._send[start : start + BEAT_BYTES],
                    self._remotes[rank].regions[_DISPATCH][at : at + BEAT_BYTES],
                    after=self._after(),
                )
            except RailwireError:
                pass  # it is lost: its expectation says so

    def beats(self, rank: int) -> int:
        """How often ``rank`` has said so."""
        at = self._beats_at + rank * BEAT_BYTES
        return int(host_bytes(self.dispatch_recv[at : at + 8]).view(np.uint64)[0])

    # ---- waiting -----------------------------------------------------------------------------------------------------
    def expect(self, wait: Wait, rank: int, generation: int) -> Expectation:
        imm = self._imm(self._first_imm, wait, generation, rank)
        return self.engine.counter(imm).expect(1, peers=[self._remotes[rank].peer], timeout=_FOREVER)

    def _imm(self, first: int, wait: Wait, generation: int, source: int) -> int:
        number = wait.value * GENERATIONS + generation % GENERATIONS
        return first + number * self.geometry.config.ranks + source

    # ---- fences ------------------------------------------------------------------------------------------------------
    def cut_off(self, rank: int, generation: int, timeout: float) -> Fence | None:
        """Tells a rank that it is out, and begins to close the connection. None: it is closed already."""
        remote = self._remotes[rank]
        start = self.geometry.own_grant(rank)
        if remote.peer.state == "connected":
            self._put(start, encode_grant(MASKED_MAGIC, generation, 0, 0))
            at = self.geometry.grant(self.rank)
            try:
                self.engine.write(
                    self._send[start : start + GRANT_BYTES],
                    remote.regions[_DISPATCH][at : at + GRANT_BYTES],
                    after=self._after(),
                ).wait(min(timeout, 0.02))
            except (RailwireError, TimeoutError):
                pass  # it does not hear us: that is why it goes
        if remote.peer.state == "closed":
            return None
        return remote.peer.close_async(timeout)

    def close(self) -> None:
        """Deregisters everything; returns when nobody can write any more."""
        first: FenceError | None = None
        for region in self._regions:
            try:
                region.close()
            except FenceError as error:
                first = first or error
        if first is not None:
            raise first

    def _put(self, start: int, data: Any) -> None:
        import torch

        self.dispatch_send[start : start + data.size] = torch.from_numpy(data)


def host_bytes(tensor: Any) -> Any:
    """A tensor's bytes as numpy, without a copy where they are in host memory."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor.cpu().numpy()
