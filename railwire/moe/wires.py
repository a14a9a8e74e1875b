"""The registered memory of a group and its way to the other ranks: who writes what where, and with which immediate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from railwire import EngineAddress, MemoryRegion, Peer, RemoteRegion, TransferEngine
from railwire.errors import ConfigurationError, ConnectTimeout, DescriptorError, FenceError, RailwireError
from railwire.moe.config import MoeConfig, check_equal, to_dict
from railwire.moe.geometry import (
    GRANT_BYTES,
    GRANT_MAGIC,
    MASKED_MAGIC,
    Geometry,
    decode_grant,
    encode_grant,
)
from railwire.moe.protocol import Wait
from railwire.moe.rendezvous import Exchange
from railwire.transfer import Expectation, Fence, Transfer

GENERATIONS = 4  # that have immediates of their own; two are in use at most
BEAT_BYTES = 16
_FOREVER = 1e6


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """What each rank tells all others at the start."""

    rank: int
    config: dict[str, Any]
    address: bytes
    dispatch: bytes
    combine: bytes
    first_imm: int
    generation: int


@dataclass(slots=True)
class _Remote:
    peer: Peer
    dispatch: RemoteRegion
    combine: RemoteRegion
    first_imm: int


class Wires:
    """Regions, connections, immediates and fences of one rank."""

    def __init__(self, engine: TransferEngine, geometry: Geometry, rank: int, allocate: Callable[[int], Any]) -> None:
        self.engine = engine
        self.geometry = geometry
        self.rank = rank
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
        self._remotes: dict[int, _Remote] = {}
        self._beat = 0
        self.dispatching: dict[int, list[Transfer]] = {}
        """Writes out of the dispatch send region that may be under way, by rank."""
        self.combining: dict[int, list[Transfer]] = {}
        """Writes out of the combine send region that may be under way, by rank."""

    # ---- connecting --------------------------------------------------------------------------------------------------
    def hello(self, generation: int) -> bytes:
        return msgspec.msgpack.encode(
            Hello(
                self.rank,
                to_dict(self.geometry.config),
                bytes(self.engine.address),
                bytes(self._recv.descriptor),
                bytes(self._combine_recv.descriptor),
                self._first_imm,
                generation,
            )
        )

    def meet(self, exchange: Exchange, generation: int, timeout: float) -> tuple[int, frozenset[int]]:
        """Tells all ranks about this one, connects to all that are there, and returns when all are connected.

        Returns:
            The highest generation of all, and the ranks that are not there.

        Raises:
            ConfigurationError: the ranks disagree, or one is not who it should be.
            ConnectError: one cannot be reached.
        """
        hellos = self._decode(exchange(self.hello(generation)))
        for rank, hello in hellos.items():
            if rank > self.rank:
                self._remotes[rank] = self._remote(hello, self.engine.connect(hello.address, timeout))
        exchange(b"connected")
        for rank, hello in hellos.items():
            if rank < self.rank:
                self._remotes[rank] = self._remote(hello, self._connected(hello, timeout))
        absent = frozenset(rank for rank in range(self.geometry.config.ranks) if rank not in hellos)
        for rank in absent:
            self._remotes.pop(rank, None)
        for number in range(len(Wait) * GENERATIONS * self.geometry.config.ranks):
            self.engine.counter(self._first_imm + number).reset()
        grants = self.geometry.config.ranks * GRANT_BYTES
        self.dispatch_recv[:grants] = 0
        self.dispatch_recv[self._beats_at :] = 0
        self._beat = 0
        self.dispatching.clear()
        self.combining.clear()
        exchange(b"ready")  # before this nobody writes
        return max(hello.generation for hello in hellos.values()), absent

    def _decode(self, data: Any) -> dict[int, Hello]:
        ranks = self.geometry.config.ranks
        if len(data) != ranks:
            raise ConfigurationError(f"the exchange joins {len(data)} ranks, the configuration says {ranks}")
        hellos = {}
        configs = {}
        for rank, item in enumerate(data):
            if not item:
                continue
            try:
                hello = msgspec.msgpack.decode(item, type=Hello)
                configs[rank] = MoeConfig(**hello.config)
            except (msgspec.MsgspecError, TypeError) as error:
                raise ConfigurationError(f"rank {rank} speaks another version of this protocol: {error}") from None
            if hello.rank != rank:
                raise ConfigurationError(f"rank {hello.rank} came as number {rank} of the exchange")
            hellos[rank] = hello
        if self.rank not in hellos:
            raise ConfigurationError(f"the exchange does not return what rank {self.rank} itself has said")
        check_equal(configs)
        return hellos

    def _remote(self, hello: Hello, peer: Peer) -> _Remote:
        dispatch = RemoteRegion.from_bytes(hello.dispatch).over(peer)
        combine = RemoteRegion.from_bytes(hello.combine).over(peer)
        if dispatch.nbytes != self._recv.nbytes or combine.nbytes != self._combine_recv.nbytes:
            raise DescriptorError(f"rank {hello.rank} offers {dispatch.nbytes} and {combine.nbytes} bytes")
        return _Remote(peer, dispatch, combine, hello.first_imm)

    def _connected(self, hello: Hello, timeout: float) -> Peer:
        """The peer that has connected to us, which may take a moment to show."""
        incarnation = EngineAddress.from_bytes(hello.address).incarnation
        end = time.monotonic() + timeout
        while True:
            for peer in self.engine.peers:
                if peer.incarnation == incarnation:
                    return peer
            if time.monotonic() > end:
                raise ConnectTimeout(f"rank {hello.rank} has not connected within {timeout:g} s")
            time.sleep(0.001)

    def peer_name(self, rank: int) -> str:
        remote = self._remotes.get(rank)
        return remote.peer.name if remote else f"rank {rank}"

    # ---- writing -----------------------------------------------------------------------------------------------------
    def send_rows(self, rank: int, start: int, at: int, nbytes: int, wait: Wait, generation: int) -> None:
        """Writes bytes of the dispatch send region to the dispatch region of a rank."""
        remote = self._remotes[rank]
        transfer = self.engine.write(
            self._send[start : start + nbytes],
            remote.dispatch[at : at + nbytes],
            self._imm(remote.first_imm, wait, generation, self.rank),
        )
        self.dispatching.setdefault(rank, []).append(transfer)

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

    def send_results(self, rank: int, first: int, segment: int, rows: int, generation: int) -> None:
        """Writes rows of the combine send region to the combine region of a rank."""
        row = self.geometry.combine_row
        remote = self._remotes[rank]
        transfer = self.engine.write(
            self._combine_send[first * row : (first + rows) * row],
            remote.combine[segment * row : (segment + rows) * row],
            self._imm(remote.first_imm, Wait.COMBINED, generation, self.rank),
        )
        self.combining.setdefault(rank, []).append(transfer)

    def beat(self, ranks: list[int]) -> None:
        """Tells these ranks that this one is alive and waits for somebody."""
        self._beat += 1
        start = self.geometry.dispatch_send_region
        self._put(start, np.array([self._beat, 0], np.uint64).view(np.uint8))
        at = self._beats_at + self.rank * BEAT_BYTES
        for rank in ranks:
            try:
                self.engine.write(
                    self._send[start : start + BEAT_BYTES], self._remotes[rank].dispatch[at : at + BEAT_BYTES]
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
                self.engine.write(self._send[start : start + GRANT_BYTES], remote.dispatch[at : at + GRANT_BYTES]).wait(
                    min(timeout, 0.02)
                )
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
